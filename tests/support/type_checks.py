"""The runtime type checker of the tests: beartype, but options of strings are left to the functions themselves.

Users run without a type checker, and what a function says to an unknown option is tested; a checker that refuses the
option first would hide it.
"""

from typing import Literal

from beartype import BeartypeConf, FrozenDict, beartype

_OPTIONS = [
    Literal["xla", "mosaic_gpu"],
    Literal["exact", "modelopt", "compressed_tensors"],
    Literal["linear", "m_major", "swizzled"],
    Literal["nvfp4", "nvfp4_as_bf16", "bf16"],
    Literal["per_peer", "per_slot"],
    Literal["nvfp4", "fp8", "bf16"],
    Literal["masked", "contiguous"],
    Literal["nvfp4", "bf16"],
]

check = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({option: str for option in _OPTIONS})))
