"""How a module's weights are stored in a folder, and which tensors fill which rows of which array of a parameter.

A parameter is one array (plain weights), or an NVFP4Tensor or BlockFP8Weights of several. Each array has a list of
parts: rows of an expert (or of the whole) that come from one tensor, or from a weight and its scales where experts in
FP8 are decoded. Scales are in the decode direction from here on: compressed-tensors keeps reciprocals.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fp4jax.block_fp8 import BLOCK, scale_shape
from fp4jax.checkpoint.layouts import NAMES
from fp4jax.checkpoint.reader import Reader
from fp4jax.nvfp4 import BLOCK_SIZE, GLOBAL_SCALE_RANGE

FLOATS = ("BF16", "F16", "F32")


class Tensor(NamedTuple):
    """What a tensor of the folder must be like; shape None: one number, [] or [1]."""

    name: str
    shape: tuple[int, ...] | None
    dtypes: tuple[str, ...]


class Part(NamedTuple):
    """Rows `start` to `start + rows` of an array, of expert `expert` where it has experts: `load()` gives them.

    expert None: the whole array; what is plain gives some of its leading rows for a slice.
    """

    load: Callable[..., np.ndarray]
    expert: int | None
    start: int
    rows: int


class Leaf(NamedTuple):
    """One array of a parameter and where it comes from."""

    shape: tuple[int, ...]
    dtype: Any
    parts: list[Part]


class Module(NamedTuple):
    """A linear layer in the folder, [rows, K], and its place in a parameter."""

    name: str
    expert: int | None = None
    start: int = 0
    rows: int = 0


class Source(NamedTuple):
    """Of one parameter: how it is stored, the tensors that must be there, the arrays by field ("" if it is plain)."""

    stored: str
    tensors: list[Tensor]
    leaves: dict[str, Leaf]


def stored_as(reader: Reader, module: str) -> str:
    """By the tensors of a linear layer: "bf16" (any plain floats), "modelopt", "compressed_tensors", "block_wise_fp8".

    A layer without tensors counts as plain.
    """
    weight = f"{module}.weight"
    if f"{module}.weight_packed" in reader:
        return "compressed_tensors"
    return {"U8": "modelopt", "F8_E4M3": "block_wise_fp8"}.get(reader.dtype(weight) if weight in reader else "", "bf16")


def plain_source(reader: Reader, tensors: list[tuple[Module, Tensor]], shape: tuple[int, ...], dtype: Any) -> Source:
    """An array that plain tensors fill, each some rows of it."""

    def load(tensor):
        return lambda rows=slice(None): reader.read(tensor.name, rows).astype(dtype, copy=False)

    parts = [Part(load(tensor), module.expert, module.start, module.rows) for module, tensor in tensors]
    return Source("bf16", [tensor for _, tensor in tensors], {"": Leaf(shape, dtype, parts)})


def weight_source(
    reader: Reader, stored: str, modules: list[Module], shape: tuple[int, ...], dtype: Any, *, decode: bool
) -> Source:
    """The weight [.., N, K] of one linear layer, or of the same layers of all experts.

    decode: FP8 weights become plain ones of `dtype` (experts, which have no FP8 kernels).
    """
    k = shape[-1]
    if stored == "bf16":
        plain = [(m, Tensor(f"{m.name}.weight", (m.rows, k), FLOATS)) for m in modules]
        return plain_source(reader, plain, shape, dtype)
    if stored == "block_wise_fp8":
        return _fp8_source(reader, modules, shape, dtype, decode)
    codes, block_scale, global_scale, _ = NAMES[stored]
    tensors: list[Tensor] = []
    for m in modules:
        tensors += [
            Tensor(f"{m.name}.{codes}", (m.rows, k // 2), ("U8",)),
            Tensor(f"{m.name}.{block_scale}", (m.rows, k // BLOCK_SIZE), ("F8_E4M3",)),
            Tensor(f"{m.name}.{global_scale}", None, ("F32",)),
        ]
    # One global scale per expert suffices where an expert is one tensor; gate and up may have different ones.
    per_row = any(m.start for m in modules)
    lead, n = shape[:-2], shape[-2]
    scale_rows = n if per_row else 1

    def parts(suffix, convert, rows=None):
        def load(m):
            return lambda: convert(reader, f"{m.name}.{suffix}")

        return [
            Part(load(m), m.expert, m.start if rows is None else 0, m.rows if rows is None else rows) for m in modules
        ]

    def scalar(reader, name):
        return decode_scales(reader, stored, name).reshape(1, 1)

    leaves = {
        "qdata": Leaf((*lead, n, k // 2), np.uint8, parts(codes, Reader.read)),
        "block_scale": Leaf((*lead, n, k // BLOCK_SIZE), ml_dtypes.float8_e4m3fn, parts(block_scale, _block_scale)),
        "global_scale": Leaf((*lead, scale_rows, 1) if lead else (), np.float32,
                             parts(global_scale, scalar, None if per_row else 1)),
    }  # fmt: skip
    return Source(stored, tensors, leaves)


def input_scales(reader: Reader, stored: str, modules: Iterable[str]) -> dict[str, float]:
    """{"<module>.input_scale": decode scale} of those modules that have one; not checked."""
    if stored not in NAMES:
        return {}
    suffix = NAMES[stored][3]
    found = {}
    for module in modules:
        name = f"{module}.{suffix}"
        if name in reader:
            reader.check(name, reader.shape(name) if reader.shape(name) in ((), (1,)) else (), ("F32",))
            value = np.float32(reader.read(name).reshape(()))
            with np.errstate(divide="ignore"):
                found[f"{module}.input_scale"] = float(value if stored == "modelopt" else np.float32(1) / value)
    return found


def input_scale_name(stored: str, module: str) -> str:
    """What the folder calls it."""
    return f"{module}.{NAMES[stored][3]}"


def _fp8_source(reader, modules, shape, dtype, decode):
    k = shape[-1]
    tensors = []
    for m in modules:
        tensors += [
            Tensor(f"{m.name}.weight", (m.rows, k), ("F8_E4M3",)),
            _fp8_scale(reader, m.name, (m.rows, k)),
        ]
    if not decode:
        (m,) = modules
        codes = Part(lambda: reader.read(f"{m.name}.weight"), None, 0, m.rows)
        scales = Part(lambda: _block_scales(reader, m.name, shape), None, 0, scale_shape(shape)[0])
        leaves = {
            "qdata": Leaf(shape, ml_dtypes.float8_e4m3fn, [codes]),
            "block_scale": Leaf(scale_shape(shape), np.float32, [scales]),
        }
        return Source("block_wise_fp8", tensors, leaves)

    def load(m):
        def decoded():
            scale = _block_scales(reader, m.name, (m.rows, k))
            wide = np.repeat(np.repeat(scale, BLOCK, 0)[: m.rows], BLOCK, 1)[:, :k]
            return (reader.read(f"{m.name}.weight").astype(np.float32) * wide).astype(dtype)

        return decoded

    parts = [Part(load(m), m.expert, m.start, m.rows) for m in modules]
    return Source("block_wise_fp8", tensors, {"": Leaf(shape, dtype, parts)})


def _fp8_scale(reader: Reader, module: str, shape: tuple[int, ...]) -> Tensor:
    """Scales per block, as DeepSeek stores them, or one `weight_scale` per tensor, as ModelOpt does."""
    name = f"{module}.weight_scale"
    if name in reader and f"{name}_inv" not in reader:
        return Tensor(name, None, ("F32", "BF16"))
    return Tensor(f"{name}_inv", scale_shape(shape), ("F32", "BF16"))


def _block_scales(reader: Reader, module: str, shape: tuple[int, ...]) -> np.ndarray:
    """f32 [ceil(N / 128), ceil(K / 128)]; one scale per tensor is that of every block."""
    tensor = _fp8_scale(reader, module, shape)
    scales = positive_scales(reader, tensor.name)
    return np.full(scale_shape(shape), scales.reshape(())) if tensor.shape is None else scales


# --- numbers that must be usable ---


def positive_scales(reader: Reader, name: str) -> np.ndarray:
    """A tensor of scales in f32.

    Raises:
      ValueError: naming file and tensor, for one that is NaN, infinite, zero or negative.
    """
    values = reader.read(name).astype(np.float32)
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        _refuse(reader, name, values[bad].flat[0], "scales must be positive and finite")
    return values


def _refuse(reader, name, value, rule):
    raise ValueError(f"{reader.file_of(name)}: tensor {name} has {value}; {rule}")


def decode_scales(reader: Reader, stored: str, name: str) -> np.ndarray:
    """The global scales of a tensor, f32, decode direction.

    Raises:
      ValueError: naming file and tensor, for one that is not positive or beyond what NVFP4 can be computed with.
    """
    values = positive_scales(reader, name)
    low, high = GLOBAL_SCALE_RANGE  # the same for reciprocals
    bad = (values < low) | (values > high)
    if bad.any():
        _refuse(reader, name, values[bad].flat[0], "a global scale must lie in [2^-100, 2^100]")
    return values if stored == "modelopt" else np.float32(1) / values


def _block_scale(reader, name):
    values = reader.read(name)
    check_block_scales(reader, name, values)
    return values


def check_block_scales(reader: Reader, name: str, values: np.ndarray) -> None:
    """ValueError where values that were read from a tensor have a NaN."""
    if ((values.view(np.uint8) & 0x7F) == 0x7F).any():
        _refuse(reader, name, "nan", "block scales must be finite")
