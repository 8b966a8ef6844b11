"""Reads folders that stack all experts of a layer in one tensor, plain or NVFP4: gate_up_proj and down_proj.

The tensors are named in one of two ways. ModelOpt may treat the stack as a parameter: `experts.gate_up_proj` and
`experts.gate_up_proj_weight_scale`, for example. Both tools may treat it as a module: `experts.gate_up_proj.weight` or
`.weight_packed`, and `experts.gate_up_proj.weight_scale`.

The weight of each expert is stored as [N, K], or as [K, N] if the original model computes x @ W. Codes and block scales
have the same order. The shapes of the tensors tell which order it is: at least one of gate_up_proj and down_proj is not
square.

A global scale is a single number for the stack, or one per expert, or one per expert for each of gate and up.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fp4jax.checkpoint.storage import stored
from fp4jax.checkpoint.storage.reader import Reader
from fp4jax.checkpoint.storage.scales import check_block_scales, decode_scales, decoded
from fp4jax.nvfp4 import BLOCK_SIZE

# Suffix of the weight's name -> the layout, and the suffixes of block scales, global scale and input scale.
_FORMS = {
    "": ("modelopt", "_weight_scale", "_weight_scale_2", "_input_scale"),
    ".weight": ("modelopt", ".weight_scale", ".weight_scale_2", ".input_scale"),
    ".weight_packed": ("compressed_tensors", ".weight_scale", ".weight_global_scale", ".input_global_scale"),
}


class Names(NamedTuple):
    """The names of the tensors of one stacked weight.

    base: the common start of the names, "model.layers.0.mlp.experts.down_proj" for example. stored: how the weight is
    stored, as `stored.stored_as` says it. The other fields are the full names of the tensors.
    """

    base: str
    stored: str
    weight: str
    block_scale: str
    global_scale: str
    input_scale: str


def names_of(reader: Reader, base: str) -> Names | None:
    """Returns the tensor names of the stacked weight `base`, or None if the folder has no such weight.

    base: for example "model.layers.0.mlp.experts.down_proj".
    """
    for end, (kind, *scales) in _FORMS.items():
        if base + end in reader:
            plain = kind == "modelopt" and reader.dtype(base + end) in stored.FLOATS
            return Names(base, "bf16" if plain else kind, base + end, *(base + scale for scale in scales))
    return None


def is_transposed(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a layer's stacked weights are stored as [E, K, N] rather than [E, N, K].

    shapes: {base name: [E, N, K]}, the shapes in the model of both stacked weights of the layer.
    """
    for base, (experts, n, k) in shapes.items():
        names = names_of(reader, base)
        if names is None:
            continue
        k = k if names.stored == "bf16" else k // 2
        if n != k and reader.shape(names.weight) in ((experts, n, k), (experts, k, n)):
            return reader.shape(names.weight) == (experts, k, n)
    return False


def source(
    reader: Reader, names: Names, shape: tuple[int, ...], dtype: Any, *, halves: int, transposed: bool
) -> stored.Source:
    """Returns the source of a parameter whose experts the folder stacks in one tensor.

    Args:
      reader: the folder.
      names: the names of the parameter's tensors.
      shape: [E, N, K], the shape of the parameter.
      dtype: the NumPy dtype of plain weights in the model.
      halves: how many projections an expert's rows hold: 2 for w13 (gate and up), 1 for w2.
      transposed: whether the folder stores [E, K, N].

    Every leaf has one part, whose `load` takes a range of experts.

    Raises:
      ValueError: the weights are NVFP4 and K is no multiple of 16.
    """
    experts, n, k = shape
    if names.stored != "bf16":
        stored.check_nvfp4_width(f"{reader.folder}: {names.weight}", k)

    def tensor(name, columns, dtypes):
        return stored.Tensor(name, (experts, columns, n) if transposed else (experts, n, columns), dtypes)

    def leaf(columns, kind, load, check=None):
        return stored.Leaf((experts, n, columns), kind, [stored.Part(load, None, 0, experts, check)])

    def read(name, rows):
        values = reader.read(name, rows)
        return values.swapaxes(1, 2) if transposed else values

    if names.stored == "bf16":
        load = lambda rows=slice(None): read(names.weight, rows).astype(dtype, copy=False)  # noqa: E731
        return stored.Source("bf16", [tensor(names.weight, k, stored.FLOATS)], {"": leaf(k, dtype, load)}, [names.base])

    def block_scale(rows=slice(None)):
        check_block_scales(reader, names.block_scale, reader.read(names.block_scale, rows))
        return read(names.block_scale, rows)

    found = reader.shape(names.global_scale) if names.global_scale in reader else ()
    own = halves > 1 and found[:2] == (experts, halves)  # gate and up have different global scales
    scale_rows = n if own else 1

    def global_scale(rows=slice(None)):
        values = decode_scales(reader, names.stored, names.global_scale)
        return np.repeat(_per_expert(values, experts)[rows], n // halves if own else 1, axis=1)[..., None]

    tensors = [
        tensor(names.weight, k // 2, ("U8",)),
        tensor(names.block_scale, k // BLOCK_SIZE, ("F8_E4M3",)),
        stored.Tensor(names.global_scale, _scale_shape(found, experts, halves), ("F32",)),
    ]
    leaves = {
        "qdata": leaf(k // 2, np.uint8, lambda rows=slice(None): read(names.weight, rows)),
        "block_scale": leaf(k // BLOCK_SIZE, ml_dtypes.float8_e4m3fn, block_scale, block_scale),
        "global_scale": stored.Leaf(
            (experts, scale_rows, 1), np.float32, [stored.Part(global_scale, None, 0, experts, global_scale)]
        ),
    }
    return stored.Source(names.stored, tensors, leaves, [names.base])


def input_scales(reader: Reader, names: Names, experts: int, halves: int) -> np.ndarray:
    """Reads the activation scales of a stacked weight, in the decode direction (to multiply with), f32.

    The values are not checked.

    Args:
      reader: the folder.
      names: the names of the weight's tensors.
      experts: E.
      halves: how many projections an expert's rows hold: 2 for w13, 1 for w2.

    Returns:
      [E, 1], or [E, halves] if the folder has a scale per projection.

    Raises:
      ValueError: the tensor has another type than F32, or a shape that cannot be read as one scale, one per expert, or
        one per expert and projection.
    """
    found = reader.shape(names.input_scale)
    reader.check(names.input_scale, _scale_shape(found, experts, halves), ("F32",))
    return _per_expert(decoded(reader, names.stored, names.input_scale), experts)


def _scale_shape(found: tuple[int, ...], experts: int, halves: int) -> tuple[int, ...]:
    """Returns the shape that a tensor of scales must have.

    This is its own shape `found` if the tensor can be read as one scale, one per expert, or one per expert and
    projection. Else it is the usual shape, [E] or [E, halves], which a later check compares with `found`.
    """
    usual = (experts, halves) if halves > 1 else (experts,)
    accepted = {(), (1,), (experts,), (experts, 1), (experts, 1, 1), usual, (*usual, 1)}
    return found if found in accepted else usual


def _per_expert(values: np.ndarray, experts: int) -> np.ndarray:
    """Reshapes scales of any accepted shape to [E, 1] or [E, halves]."""
    if values.size == 1:
        return np.broadcast_to(values.reshape(1, 1), (experts, 1))
    return values.reshape(experts, -1)
