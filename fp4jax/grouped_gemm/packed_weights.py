"""Stacked NVFP4 weights in the layout that the grouped GEMM's kernel reads: packed once, when a model is loaded."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp4jax.nvfp4 import BLOCK_SIZE, NVFP4Tensor, pack_codes, unpack
from fp4jax.operands import check_type, check_unsharded, summary
from pallas_kernels.gemm import weight_layout


@functools.partial(jax.tree_util.register_dataclass, data_fields=["words", "global_scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class PackedWeights:
    """Weights [E, N, K]: `words` u32 [E, N/64, K/64, 9, 64], codes and block scales of 64 x 64 tiles.

    global_scale: f32 [E, 1, 1] or [E, N, 1], decode direction, as in NVFP4Tensor. A pytree whose leaves both have the
    leading axis E, so that it can be sharded over `ep` and sliced per expert.
    """

    words: Any
    global_scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., N, K]."""
        *lead, n_tiles, k_tiles, _, _ = self.words.shape
        return (*lead, n_tiles * weight_layout.TILE, k_tiles * weight_layout.TILE)

    @property
    def ndim(self) -> int:
        """Logical rank."""
        return len(self.shape)

    def __repr__(self) -> str:
        return summary(self, "nvfp4 packed", "global_scale")

    def validate(self) -> "PackedWeights":
        """Returns self; raises TypeError or ValueError naming the leaf whose dtype or shape does not fit."""
        for name, dtype in (("words", jnp.uint32), ("global_scale", jnp.float32)):
            found = getattr(getattr(self, name), "dtype", None)
            if found != dtype:
                raise TypeError(f"PackedWeights.{name} must be {jnp.dtype(dtype)}, got {found}")
        if self.words.ndim != 5 or self.words.shape[3:] != (weight_layout.WORDS, weight_layout.TILE):
            raise ValueError(f"PackedWeights.words must be [E, N/64, K/64, 9, 64], got {self.words.shape}")
        experts, n, _ = self.shape
        if self.global_scale.shape not in ((experts, 1, 1), (experts, n, 1)):
            raise ValueError(
                f"PackedWeights.global_scale must be {(experts, 1, 1)} or {(experts, n, 1)}, "
                f"got {self.global_scale.shape}"
            )
        return self


def pack_weights(w: NVFP4Tensor) -> PackedWeights:
    """w [E, N, K] -> the kernel's layout; 4.5 bits per value as before. N and K are multiples of 64.

    Every value is kept exactly. `unpack_weights` gives the same bytes back, but for two kinds of blocks, which decode
    to the same values: codes under a zero scale become +0, and a negative scale becomes positive with negated codes.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    check_type("pack_weights: w", w, NVFP4Tensor, "`quantize(w, global_scale='per_expert')` makes one of an array")
    w.validate()
    check_unsharded("pack_weights", w)
    if problem := weight_layout.check_shape(w.shape):
        raise ValueError(f"pack_weights: {problem}")
    if w.global_scale.ndim != 3 or w.global_scale.shape[0] != w.shape[0]:
        raise ValueError(f"pack_weights: global_scale must be [E, 1, 1] or [E, N, 1], got {w.global_scale.shape}")
    scale_bytes = lax.bitcast_convert_type(w.block_scale, jnp.uint8)
    return PackedWeights(_pack(w.qdata, scale_bytes), w.global_scale)


def unpack_weights(packed: PackedWeights) -> NVFP4Tensor:
    """The inverse of `pack_weights`, for any leading axes (one expert's slice has none)."""
    check_type("unpack_weights: packed", packed, PackedWeights, "`pack_weights` makes one of an NVFP4Tensor")
    check_unsharded("unpack_weights", packed)
    codes, scale_bytes = _unpack(packed.words)
    block_scale = lax.bitcast_convert_type(scale_bytes, jnp.float8_e4m3fn)
    return NVFP4Tensor(pack_codes(codes), block_scale, packed.global_scale)


# Under jit, so that codes in a byte each, and words in the making, are not all in memory at once.
_pack = jax.jit(lambda qdata, scale_bytes: weight_layout.pack(unpack(qdata), scale_bytes))
_unpack = jax.jit(weight_layout.unpack)


def is_nvfp4(w: Any) -> bool:
    """Whether weights are in NVFP4, packed or not, and no plain array."""
    return isinstance(w, NVFP4Tensor | PackedWeights)


def arrange_experts(w13: Any, w2: Any, size: int, *, packed: bool) -> tuple[Any, Any]:
    """The weights of both GEMMs, I = size, as the kernel reads them, or as they were; what is not NVFP4 stays as it is.

    An I that the layout does not have is padded: see `pad_experts`. Other shapes that it does not have are not packed.
    """
    if packed and isinstance(w13, NVFP4Tensor) and isinstance(w2, NVFP4Tensor):
        w13, w2 = pad_experts(w13, w2)
    w13, w2 = packed_if(w13, packed), packed_if(w2, packed)
    if not packed and isinstance(w13, NVFP4Tensor) and isinstance(w2, NVFP4Tensor):
        w13, w2 = trim_experts(w13, w2, size)
    return w13, w2


def packed_if(w: Any, wanted: bool) -> Any:
    """w packed if `wanted` and its shape has the layout, unpacked if not wanted; what is not NVFP4 stays as it is."""
    if wanted and isinstance(w, NVFP4Tensor) and weight_layout.check_shape(w.shape) is None:
        return pack_weights(w)
    if not wanted and isinstance(w, PackedWeights):
        return unpack_weights(w)
    return w


def packed_size(intermediate_size: int) -> int:
    """The rows of gate, and of up, that `pad_experts` leaves."""
    return -(-intermediate_size // weight_layout.TILE) * weight_layout.TILE


def pad_experts(w13: NVFP4Tensor, w2: NVFP4Tensor) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    """w13 [E, 2I, H] and w2 [E, H, I] with I raised to a multiple of 64, gate and up rows each on their own.

    Codes and block scales of the pads are 0, their global scales 1: gate and up are 0 there, so that silu(gate) * up
    is, and adds nothing in the second GEMM.
    """
    size = w2.shape[-1]
    more = packed_size(size) - size
    return _pad(w13, w2, more) if more else (w13, w2)


def trim_experts(w13: NVFP4Tensor, w2: NVFP4Tensor, size: int) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    """The inverse of `pad_experts` for I = size."""
    return (w13, w2) if w2.shape[-1] == size else _trim(w13, w2, size)


@functools.partial(jax.jit, static_argnums=2)
def _pad(w13, w2, more):
    def rows(leaf, value=0):
        if leaf.shape[1] == 1:  # one global scale per expert
            return leaf
        halves = leaf.reshape(leaf.shape[0], 2, -1, leaf.shape[-1])
        padded = jnp.pad(halves, ((0, 0), (0, 0), (0, more), (0, 0)), constant_values=value)
        return padded.reshape(leaf.shape[0], -1, leaf.shape[-1])

    def columns(leaf, per_value):
        return jnp.pad(leaf, ((0, 0), (0, 0), (0, more // per_value)))

    return (
        NVFP4Tensor(rows(w13.qdata), rows(w13.block_scale), rows(w13.global_scale, 1)),
        NVFP4Tensor(columns(w2.qdata, 2), columns(w2.block_scale, BLOCK_SIZE), w2.global_scale),
    )


@functools.partial(jax.jit, static_argnums=2)
def _trim(w13, w2, size):
    def rows(leaf):
        if leaf.shape[1] == 1:
            return leaf
        halves = leaf.reshape(leaf.shape[0], 2, -1, leaf.shape[-1])
        return halves[:, :, :size].reshape(leaf.shape[0], 2 * size, -1)

    return (
        jax.tree.map(rows, w13),
        NVFP4Tensor(w2.qdata[..., : size // 2], w2.block_scale[..., : size // BLOCK_SIZE], w2.global_scale),
    )
