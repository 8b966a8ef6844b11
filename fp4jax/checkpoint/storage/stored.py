"""How a module's weights are stored in a folder, and which tensors fill which rows of which array of a parameter.

A parameter is one array (plain weights), or an NVFP4Tensor or BlockFP8Weights of several. Each array has a list of
parts: rows of an expert (or of the whole) that come from one tensor, or from a weight and its scales where experts in
FP8 are decoded. Scales are in the decode direction from here on: compressed-tensors keeps reciprocals.
"""

import collections
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fp4jax.block_fp8 import BLOCK, scale_shape
from fp4jax.checkpoint.storage.kept_scales import original, reciprocal
from fp4jax.checkpoint.storage.layouts import NAMES
from fp4jax.checkpoint.storage.reader import Reader
from fp4jax.nvfp4 import BLOCK_SIZE, GLOBAL_SCALE_RANGE

FLOATS = ("BF16", "F16", "F32")


class Tensor(NamedTuple):
    """What a tensor of the folder must be like; shape None: one number, [] or [1]."""

    name: str
    shape: tuple[int, ...] | None
    dtypes: tuple[str, ...]


class Part(NamedTuple):
    """Rows `start` to `start + rows` of an array, of expert `expert` where it has experts: `load()` gives them.

    expert None: the whole array; what is plain gives some of its leading rows for a slice. check: reads the scales that
    `load` reads, and raises ValueError as `load` does where one of them cannot be used; None: there is none.
    """

    load: Callable[..., np.ndarray]
    expert: int | None
    start: int
    rows: int
    check: Callable[[], Any] | None = None


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
    """Where one parameter comes from.

    stored: how most of it is stored. tensors: those that must be there. leaves: its arrays by field ("" if it is
    plain). modules: names in the folder of the linear layers that it is the weight of; none for a norm, say.
    """

    stored: str
    tensors: list[Tensor]
    leaves: dict[str, Leaf]
    modules: list[str]

    def problems(self) -> Iterator[str]:
        """What loading would raise about scales that cannot be used, without reading weights."""
        for leaf in self.leaves.values():
            for part in leaf.parts:
                try:
                    if part.check is not None:
                        part.check()
                except ValueError as error:
                    yield str(error)


def stored_as(reader: Reader, module: str) -> str | None:
    """By the tensors of a linear layer: "bf16" (any plain floats), "modelopt", "compressed_tensors", "block_wise_fp8".

    None: it has no weight.
    """
    weight = f"{module}.weight"
    if f"{module}.weight_packed" in reader:
        return "compressed_tensors"
    if weight not in reader:
        return None
    return {"U8": "modelopt", "F8_E4M3": "block_wise_fp8"}.get(reader.dtype(weight), "bf16")


def plain_source(reader: Reader, tensors: list[tuple[Module, Tensor]], shape: tuple[int, ...], dtype: Any) -> Source:
    """An array that plain tensors fill, each some rows of it."""
    parts = [_plain_part(reader, module, tensor.name, dtype) for module, tensor in tensors]
    return Source("bf16", [tensor for _, tensor in tensors], {"": Leaf(shape, dtype, parts)}, [])


def weight_source(reader: Reader, modules: list[Module], shape: tuple[int, ...], dtype: Any, *, decode: bool) -> Source:
    """The weight [.., N, K] of one linear layer, or of the same layers of all experts.

    decode: FP8 weights become plain ones of `dtype` (experts, which have no FP8 kernels). Modules may be stored in
    different ways as long as one array holds them: all in NVFP4, by whichever tool, or none. A module that has no
    weight is taken to be stored like most others, so that its tensors are missed by name.

    Raises:
      ValueError: some modules are NVFP4 and some are not; NVFP4 with K no multiple of 16.
    """
    found = [stored_as(reader, module.name) for module in modules]
    usual = collections.Counter(kind for kind in found if kind is not None).most_common(1)
    usual = usual[0][0] if usual else "bf16"
    kinds = [kind or usual for kind in found]
    if len({kind in NAMES for kind in kinds}) > 1:
        _refuse_mixture(reader, modules, kinds)
    if usual in NAMES:
        return _nvfp4_source(reader, modules, kinds, shape)
    if usual == "block_wise_fp8" and not decode:
        return _fp8_source(reader, modules[0], shape)
    k = shape[-1]
    tensors: list[Tensor] = []
    parts = []
    for module, kind in zip(modules, kinds, strict=True):
        weight = f"{module.name}.weight"
        if kind == "block_wise_fp8":
            tensors += [Tensor(weight, (module.rows, k), ("F8_E4M3",)), _fp8_scale(reader, module.name, module.rows, k)]
            parts.append(_decoded_part(reader, module, k, dtype))
        else:
            tensors.append(Tensor(weight, (module.rows, k), FLOATS))
            parts.append(_plain_part(reader, module, weight, dtype))
    return Source(usual, tensors, {"": Leaf(shape, dtype, parts)}, [module.name for module in modules])


def _refuse_mixture(reader: Reader, modules: list[Module], kinds: list[str]) -> None:
    names = {}
    for module, kind in zip(modules, kinds, strict=True):
        weight = f"{module.name}.{NAMES[kind].codes if kind in NAMES else 'weight'}"
        if weight in reader:
            names.setdefault(kind in NAMES, f"{weight} is {reader.dtype(weight)} ({kind})")
    raise ValueError(
        f"{reader.folder}: tensor {names[True]}, tensor {names[False]}; both are multiplied in one product, and so "
        "must both be NVFP4 or both not"
    )


def _plain_part(reader: Reader, module: Module, name: str, dtype: Any) -> Part:
    load = lambda rows=slice(None): reader.read(name, rows).astype(dtype, copy=False)  # noqa: E731
    return Part(load, module.expert, module.start, module.rows)


# --- NVFP4 ---


def _nvfp4_source(reader: Reader, modules: list[Module], kinds: list[str], shape: tuple[int, ...]) -> Source:
    *lead, n, k = shape
    check_nvfp4_width(f"{reader.folder}: {modules[0].name}", k)
    # One global scale per expert suffices where an expert is one tensor; gate and up may have different ones.
    per_row = any(module.start for module in modules)
    tensors: list[Tensor] = []
    codes, blocks, scales = [], [], []
    for module, kind in zip(modules, kinds, strict=True):
        names = [f"{module.name}.{end}" for end in NAMES[kind][:3]]
        tensors += [
            Tensor(names[0], (module.rows, k // 2), ("U8",)),
            Tensor(names[1], (module.rows, k // BLOCK_SIZE), ("F8_E4M3",)),
            Tensor(names[2], None, ("F32",)),
        ]
        place = module.expert, module.start, module.rows
        codes.append(Part(_later(reader.read, names[0]), *place))
        read_blocks = _later(_block_scale, reader, names[1])
        blocks.append(Part(read_blocks, *place, read_blocks))
        read_scale = _later(_one_scale, reader, kind, names[2])
        place = place if per_row else (module.expert, 0, 1)
        scales.append(Part(read_scale, *place, read_scale))
    leaves = {
        "qdata": Leaf((*lead, n, k // 2), np.uint8, codes),
        "block_scale": Leaf((*lead, n, k // BLOCK_SIZE), ml_dtypes.float8_e4m3fn, blocks),
        "global_scale": Leaf((*lead, n if per_row else 1, 1) if lead else (), np.float32, scales),
    }
    usual = collections.Counter(kinds).most_common(1)[0][0]
    return Source(usual, tensors, leaves, [module.name for module in modules])


def _later(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    return lambda *more: function(*arguments, *more)


def _one_scale(reader: Reader, layout: str, name: str) -> np.ndarray:
    return decode_scales(reader, layout, name).reshape(1, 1)


def check_nvfp4_width(what: str, k: int) -> None:
    """ValueError where rows of K values are no whole number of NVFP4 blocks; what: whose rows they are."""
    if k % BLOCK_SIZE:
        raise ValueError(f"{what}: K = {k} is no multiple of {BLOCK_SIZE}, as NVFP4 needs")


# --- block-wise FP8 ---


def _fp8_source(reader: Reader, module: Module, shape: tuple[int, ...]) -> Source:
    """A linear layer that stays FP8."""
    weight = f"{module.name}.weight"
    read_scales = _later(_block_scales, reader, module.name, *shape)
    codes = Part(_later(reader.read, weight), None, 0, module.rows)
    leaves = {
        "qdata": Leaf(shape, ml_dtypes.float8_e4m3fn, [codes]),
        "block_scale": Leaf(
            scale_shape(shape), np.float32, [Part(read_scales, None, 0, scale_shape(shape)[0], read_scales)]
        ),
    }
    tensors = [Tensor(weight, shape, ("F8_E4M3",)), _fp8_scale(reader, module.name, *shape)]
    return Source("block_wise_fp8", tensors, leaves, [module.name])


def _decoded_part(reader: Reader, module: Module, k: int, dtype: Any) -> Part:
    """Rows of an expert in FP8, decoded."""
    scales = _later(_block_scales, reader, module.name, module.rows, k)

    def load():
        wide = np.repeat(np.repeat(scales(), BLOCK, 0)[: module.rows], BLOCK, 1)[:, :k]
        return (reader.read(f"{module.name}.weight").astype(np.float32) * wide).astype(dtype)

    return Part(load, module.expert, module.start, module.rows, scales)


def _fp8_scale(reader: Reader, module: str, n: int, k: int) -> Tensor:
    """Scales per block, as DeepSeek stores them, or one `weight_scale` per tensor, as ModelOpt does."""
    name = f"{module}.weight_scale"
    if name in reader and f"{name}_inv" not in reader:
        return Tensor(name, None, ("F32", "BF16"))
    return Tensor(f"{name}_inv", scale_shape((n, k)), ("F32", "BF16"))


def _block_scales(reader: Reader, module: str, n: int, k: int) -> np.ndarray:
    """f32 [ceil(N / 128), ceil(K / 128)]; one scale per tensor is that of every block."""
    tensor = _fp8_scale(reader, module, n, k)
    scales = positive_scales(reader, tensor.name)
    return np.full(scale_shape((n, k)), scales.reshape(())) if tensor.shape is None else scales


# --- numbers that must be usable ---


def positive_scales(reader: Reader, name: str) -> np.ndarray:
    """A tensor of scales in f32.

    Raises:
      ValueError: naming file and tensor, for one that is NaN, infinite, zero or negative.
    """
    values = reader.read(name).astype(np.float32)
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        refuse(reader, name, values[bad].flat[0], "scales must be positive and finite")
    return values


def refuse(reader: Reader, name: str, value: Any, rule: str) -> None:
    """Raises ValueError for a value that a tensor of the file has."""
    raise ValueError(f"{reader.file_of(name)}: tensor {name} has {value}; {rule}")


def decoded(reader: Reader, layout: str, name: str) -> np.ndarray:
    """A global scale, or scales, of a folder in `layout`, in the decode direction (multiply), f32; not checked."""
    values = reader.read(name).astype(np.float32)
    if layout == "modelopt":
        return values
    kept = original(reader.kept_scales.get(name), values)
    return reciprocal(values) if kept is None else kept


def decode_scales(reader: Reader, stored: str, name: str) -> np.ndarray:
    """The global scales of a tensor, f32, decode direction.

    Raises:
      ValueError: naming file and tensor, for one that is not positive or beyond what NVFP4 can be computed with.
    """
    values = positive_scales(reader, name)
    low, high = GLOBAL_SCALE_RANGE  # the same for reciprocals
    bad = (values < low) | (values > high)
    if bad.any():
        refuse(reader, name, values[bad].flat[0], "a global scale must lie in [2^-100, 2^100]")
    return decoded(reader, stored, name)


def _block_scale(reader, name):
    values = reader.read(name)
    check_block_scales(reader, name, values)
    return values


def check_block_scales(reader: Reader, name: str, values: np.ndarray) -> None:
    """ValueError where values that were read from a tensor have a NaN."""
    if ((values.view(np.uint8) & 0x7F) == 0x7F).any():
        refuse(reader, name, "nan", "block scales must be finite")
