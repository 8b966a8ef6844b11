"""Experts of a layer that a folder keeps in one tensor: `experts.gate_up_proj` and `experts.down_proj`, plain or NVFP4.

Names: the scales of a parameter (`gate_up_proj`, `gate_up_proj_weight_scale`, ..: ModelOpt), or those of a module
(`gate_up_proj.weight`, `gate_up_proj.weight_packed`, ..: both tools). Each expert is [N, K], or [K, N] where the
original model multiplies x @ W, codes and block scales alike; the shapes tell. Two matrices of a layer cannot both be
square, so they tell for certain. A global scale is one for all, one per expert, or one per expert for gate and up each.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fp4jax.checkpoint.storage import stored
from fp4jax.checkpoint.storage.reader import Reader
from fp4jax.nvfp4 import BLOCK_SIZE

# End of the name of the codes -> how it is stored, and the ends of block scales, global scale, input scale.
_FORMS = {
    "": ("modelopt", "_weight_scale", "_weight_scale_2", "_input_scale"),
    ".weight": ("modelopt", ".weight_scale", ".weight_scale_2", ".input_scale"),
    ".weight_packed": ("compressed_tensors", ".weight_scale", ".weight_global_scale", ".input_global_scale"),
}


class Names(NamedTuple):
    """Of the tensors of one stacked parameter; base: what they have in common; `stored` as in `stored.stored_as`."""

    base: str
    stored: str
    weight: str
    block_scale: str
    global_scale: str
    input_scale: str


def names_of(reader: Reader, base: str) -> Names | None:
    """None where the folder has no weight of that base name, e.g. "model.layers.0.mlp.experts.down_proj"."""
    for end, (kind, *scales) in _FORMS.items():
        if base + end in reader:
            plain = kind == "modelopt" and reader.dtype(base + end) in stored.FLOATS
            return Names(base, "bf16" if plain else kind, base + end, *(base + scale for scale in scales))
    return None


def is_transposed(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether experts are [K, N]; shapes: {base name: [E, N, K]} of all parameters of a layer."""
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
    """Of one parameter [E, N, K] that consists of `halves` projections; every array by ranges of experts."""
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
        stored.check_block_scales(reader, names.block_scale, reader.read(names.block_scale, rows))
        return read(names.block_scale, rows)

    found = reader.shape(names.global_scale) if names.global_scale in reader else ()
    own = halves > 1 and found[:2] == (experts, halves)  # a scale for gate, another for up
    scale_rows = n if own else 1

    def global_scale(rows=slice(None)):
        values = stored.decode_scales(reader, names.stored, names.global_scale)
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
    """Activation scales [E, 1], or [E, halves] where projections have own ones: decode direction, f32, not checked."""
    found = reader.shape(names.input_scale)
    reader.check(names.input_scale, _scale_shape(found, experts, halves), ("F32",))
    return _per_expert(stored.decoded(reader, names.stored, names.input_scale), experts)


def _scale_shape(found: tuple[int, ...], experts: int, halves: int) -> tuple[int, ...]:
    """The shape that a scale must have: what it has, if that can be read as one, else one number per expert (half)."""
    usual = (experts, halves) if halves > 1 else (experts,)
    accepted = {(), (1,), (experts,), (experts, 1), (experts, 1, 1), usual, (*usual, 1)}
    return found if found in accepted else usual


def _per_expert(values: np.ndarray, experts: int) -> np.ndarray:
    """A scale of any accepted shape as [E, 1] or [E, halves]."""
    if values.size == 1:
        return np.broadcast_to(values.reshape(1, 1), (experts, 1))
    return values.reshape(experts, -1)
