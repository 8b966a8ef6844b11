"""Maps the tensors of a folder to the arrays of a model's parameters: plain weights, NVFP4 and block-wise FP8.

A parameter is one array (plain weights), or several arrays in an NVFP4Tensor or BlockFP8Weights. A `Source` describes
one parameter, and a `Leaf` one of its arrays. A leaf is filled by parts: a `Part` loads the rows of one expert, or of
the whole array, from one tensor. Only where experts in FP8 are decoded does a part read two tensors, the weight and its
scales. Parts return scales in the decode direction (to multiply with), also where compressed-tensors stores
reciprocals.
"""

import collections
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fp4jax.block_fp8 import BLOCK, scale_shape
from fp4jax.checkpoint.storage.layouts import NAMES
from fp4jax.checkpoint.storage.reader import Reader
from fp4jax.checkpoint.storage.scales import block_scales, decode_scales, positive_scales
from fp4jax.nvfp4 import BLOCK_SIZE

FLOATS = ("BF16", "F16", "F32")


class Tensor(NamedTuple):
    """The name of a tensor in the folder, and the shape and types (as safetensors names them) that it must have.

    shape None stands for a single number, of shape [] or [1].
    """

    name: str
    shape: tuple[int, ...] | None
    dtypes: tuple[str, ...]


class Part(NamedTuple):
    """The part of an array that comes from one tensor.

    load: a function that returns the part's values. For plain weights and for stacked experts it also takes a slice,
      and then returns only these entries of the leading axis.
    expert: the part belongs to this index of the leading axis; None: the part is the whole array.
    start, rows: the part covers rows `start` to `start + rows` of that expert. Both have no effect for expert None.
    check: a function that reads only the scales that `load` reads, and raises ValueError if one of them cannot be
      used, as `load` does; None: `load` reads no scales.
    """

    load: Callable[..., np.ndarray]
    expert: int | None
    start: int
    rows: int
    check: Callable[[], Any] | None = None


class Leaf(NamedTuple):
    """One array of a parameter: its shape and NumPy dtype in the model, and the parts that fill it."""

    shape: tuple[int, ...]
    dtype: Any
    parts: list[Part]


class Module(NamedTuple):
    """A linear layer of the folder, whose weight is [rows, K], and the place of its rows in a parameter.

    name: the layer's name in the folder. expert: the index of its expert, None if the parameter has no experts.
    start: the first of its rows in the parameter (of that expert). rows: their number.
    """

    name: str
    expert: int | None = None
    start: int = 0
    rows: int = 0


class Source(NamedTuple):
    """The tensors and linear layers of the folder that make up one parameter of the model.

    stored: how the weights are stored, as `stored_as` says it; where modules differ, the way of most of them.
    tensors: the tensors that the folder must have for this parameter.
    leaves: the arrays of the parameter by field name, or {"": array} for plain weights.
    modules: the names in the folder of the linear layers whose weights the parameter holds; empty for a norm, say.
    """

    stored: str
    tensors: list[Tensor]
    leaves: dict[str, Leaf]
    modules: list[str]

    def problems(self) -> Iterator[str]:
        """Yields the messages of the errors that loading would raise about unusable scales, without reading weights."""
        for leaf in self.leaves.values():
            for part in leaf.parts:
                try:
                    if part.check is not None:
                        part.check()
                except ValueError as error:
                    yield str(error)


def stored_as(reader: Reader, module: str) -> str | None:
    """Returns how the folder stores a linear layer, judged by the names and types of its tensors.

    Returns:
      "bf16" (any plain floats), "modelopt" or "compressed_tensors" (both NVFP4), "block_wise_fp8", or None if the
      folder has no weight for the layer.
    """
    weight = f"{module}.weight"
    if f"{module}.weight_packed" in reader:
        return "compressed_tensors"
    if weight not in reader:
        return None
    return {"U8": "modelopt", "F8_E4M3": "block_wise_fp8"}.get(reader.dtype(weight), "bf16")


def plain_source(reader: Reader, tensors: list[tuple[Module, Tensor]], shape: tuple[int, ...], dtype: Any) -> Source:
    """Returns the source of a parameter that is no linear layer, such as a norm or an embedding.

    Args:
      reader: the folder.
      tensors: the tensors that fill the parameter, and the place of the rows of each.
      shape: the shape of the parameter.
      dtype: the NumPy dtype of the parameter; tensors of other float types are cast to it.
    """
    parts = [_plain_part(reader, module, tensor.name, dtype) for module, tensor in tensors]
    return Source("bf16", [tensor for _, tensor in tensors], {"": Leaf(shape, dtype, parts)}, [])


def weight_source(reader: Reader, modules: list[Module], shape: tuple[int, ...], dtype: Any, *, decode: bool) -> Source:
    """Returns the source of the weight [N, K] of one linear layer, or [E, N, K] of the same layers of all experts.

    Args:
      reader: the folder.
      modules: the linear layers in the folder that the parameter holds, and the place of each.
      shape: the shape of the parameter.
      dtype: the NumPy dtype of plain weights in the model.
      decode: whether FP8 weights become plain weights of `dtype`. Experts need this, since they have no FP8 kernels.

    The modules may be stored in different ways if one kind of parameter can hold all of them: all are NVFP4, in either
    layout, or none is. A module without a weight in the folder is assumed to be stored like most of the others, so that
    the loader can name the tensors that are missing.

    Raises:
      ValueError: some modules are NVFP4 and some are not, or an NVFP4 weight has a K that is no multiple of 16.
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
    # w13 holds gate and up, which may have different global scales: it gets one scale per row. A parameter with one
    # projection per expert gets one scale per expert.
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
        read_blocks = _later(block_scales, reader, names[1])
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


# Like functools.partial: returns a function that calls `function` with `arguments`, then with its own arguments.
def _later(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    return lambda *more: function(*arguments, *more)


def _one_scale(reader: Reader, layout: str, name: str) -> np.ndarray:
    return decode_scales(reader, layout, name).reshape(1, 1)


def check_nvfp4_width(what: str, k: int) -> None:
    """Raises ValueError if K is no multiple of 16, the size of an NVFP4 block; `what` names the weight."""
    if k % BLOCK_SIZE:
        raise ValueError(f"{what}: K = {k} is no multiple of {BLOCK_SIZE}, as NVFP4 needs")


# --- block-wise FP8 ---


def _fp8_source(reader: Reader, module: Module, shape: tuple[int, ...]) -> Source:
    """Returns the source of a linear layer that stays FP8 in the model."""
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
    """Returns the part of an expert's weight that is stored in FP8 and decoded to `dtype` when it is loaded."""
    scales = _later(_block_scales, reader, module.name, module.rows, k)

    def load():
        wide = np.repeat(np.repeat(scales(), BLOCK, 0)[: module.rows], BLOCK, 1)[:, :k]
        return (reader.read(f"{module.name}.weight").astype(np.float32) * wide).astype(dtype)

    return Part(load, module.expert, module.start, module.rows, scales)


def _fp8_scale(reader: Reader, module: str, n: int, k: int) -> Tensor:
    """Returns the tensor of an FP8 weight's scales.

    It is `weight_scale_inv` with one scale per 128 x 128 block, as DeepSeek stores it, or `weight_scale` with one scale
    for the whole weight, as ModelOpt stores it.
    """
    name = f"{module}.weight_scale"
    if name in reader and f"{name}_inv" not in reader:
        return Tensor(name, None, ("F32", "BF16"))
    return Tensor(f"{name}_inv", scale_shape((n, k)), ("F32", "BF16"))


def _block_scales(reader: Reader, module: str, n: int, k: int) -> np.ndarray:
    """Returns an FP8 weight's scales, f32 [ceil(N / 128), ceil(K / 128)]; a scale per tensor is repeated per block."""
    tensor = _fp8_scale(reader, module, n, k)
    scales = positive_scales(reader, tensor.name)
    return np.full(scale_shape((n, k)), scales.reshape(())) if tensor.shape is None else scales


# --- scales, and the checks that they can be used ---
