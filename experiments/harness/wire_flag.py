"""The flag --wire_format: how tokens cross the network to other devices.

The flag wins over the environment variable FD_DISPATCH_USE_FP4 (1: NVFP4, 0: bf16), and the variable wins over the
script's or its config's default. The variable has the name that it has in the serving system whose deployments this
library is compared with.
"""

import os
import warnings
from typing import cast

from absl import flags

from experiments.harness.flag_values import switch
from fp4jax.expert_parallel import WIRE_FORMATS, WireFormat

_USE_FP4, _STALE = "FD_DISPATCH_USE_FP4", "FD_USE_NVFP4_COMM_QUANT"

WIRE_FORMAT = flags.DEFINE_enum(
    "wire_format", None, WIRE_FORMATS, f"How tokens cross the network; default: {_USE_FP4}, else nvfp4."
)


def wire_format(config_value: WireFormat) -> WireFormat:
    """The wire format from the flag, else from the environment, else `config_value`.

    Raises:
      app.UsageError: the environment variable is not a boolean.
    """
    if _STALE in os.environ:
        warnings.warn(f"{_STALE} is not read any more; set {_USE_FP4}", stacklevel=2)
    if WIRE_FORMAT.value is not None:
        return cast(WireFormat, WIRE_FORMAT.value)
    use_fp4 = switch(_USE_FP4, None)
    return config_value if use_fp4 is None else "nvfp4" if use_fp4 else "bf16"
