"""Stacked NVFP4 weights in the layout that the grouped GEMM's kernel reads; they are packed once, at load time."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp4jax.nvfp4 import BLOCK_SIZE, NVFP4Tensor
from fp4jax.nvfp4_codes import pack_codes, unpack
from fp4jax.operands import check_type, check_unsharded, summary
from pallas_kernels.gemm import weight_layout


@functools.partial(jax.tree_util.register_dataclass, data_fields=["words", "global_scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class PackedWeights:
    """Stacked NVFP4 weights [E, N, K] in the layout of the kernel, a pytree of two arrays.

    Both leaves have the leading axis E, so that weights can be sharded over `ep` and sliced per expert.

    Attributes:
      words: u32 [E, N/64, K/64, 9, 64], the codes and block scales of tiles of 64 x 64 values
        (`pallas_kernels.gemm.weight_layout`).
      global_scale: f32 [E, 1, 1] or [E, N, 1], decode direction (multiply), as in `NVFP4Tensor`.
    """

    words: Any
    global_scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [..., N, K] of the values."""
        *lead, n_tiles, k_tiles, _, _ = self.words.shape
        return (*lead, n_tiles * weight_layout.TILE, k_tiles * weight_layout.TILE)

    @property
    def ndim(self) -> int:
        """Number of axes of `shape`."""
        return len(self.shape)

    def __repr__(self) -> str:
        return summary(self, "nvfp4 packed", "global_scale")

    def validate(self) -> "PackedWeights":
        """Returns the weights themselves if their leaves fit together.

        Raises:
          TypeError, ValueError: a dtype or shape does not fit; the message names the leaf.
        """
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
    """Moves weights into the layout of the kernel, which takes 4.5 bits per value like NVFP4Tensor.

    Every value is kept exactly. `unpack_weights` also gives the same bytes back, except for two kinds of blocks. In a
    block with scale 0, all codes become +0. A block with a negative scale gets the positive scale and negated codes.

    Args:
      w: weights [E, N, K] with global scale [E, 1, 1] or [E, N, 1]; N and K are multiples of 64.

    Raises:
      ValueError, TypeError: shapes or dtypes do not fit.
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
    """Inverse of `pack_weights`. It takes any leading axes, so also the slice of one expert, which has none."""
    check_type("unpack_weights: packed", packed, PackedWeights, "`pack_weights` makes one of an NVFP4Tensor")
    check_unsharded("unpack_weights", packed)
    codes, scale_bytes = _unpack(packed.words)
    block_scale = lax.bitcast_convert_type(scale_bytes, jnp.float8_e4m3fn)
    return NVFP4Tensor(pack_codes(codes), block_scale, packed.global_scale)


# Both run under jit, so that unpacked codes (a byte each) and unfinished words are not all in memory at once.
_pack = jax.jit(lambda qdata, scale_bytes: weight_layout.pack(unpack(qdata), scale_bytes))
_unpack = jax.jit(weight_layout.unpack)


def is_nvfp4(w: Any) -> bool:
    """Whether w is in NVFP4, packed or not, rather than a plain array."""
    return isinstance(w, NVFP4Tensor | PackedWeights)


def arrange_experts(w13: Any, w2: Any, size: int, *, packed: bool) -> tuple[Any, Any]:
    """Packs the weights of both GEMMs for the kernel, or unpacks them; plain arrays stay as they are.

    To pack, I is first padded to a multiple of 64 (`pad_experts`). Weights whose other sizes do not fit the layout stay
    unpacked.

    Args:
      w13: the weights of GEMM 1, [E, 2I, H].
      w2: the weights of GEMM 2, [E, H, I].
      size: I without pads. Unpacking trims the weights to it.
      packed: whether to pack or to unpack.

    Returns:
      The pair (w13, w2).
    """
    if packed and isinstance(w13, NVFP4Tensor) and isinstance(w2, NVFP4Tensor):
        w13, w2 = pad_experts(w13, w2)
    w13, w2 = packed_if(w13, packed), packed_if(w2, packed)
    if not packed and isinstance(w13, NVFP4Tensor) and isinstance(w2, NVFP4Tensor):
        w13, w2 = trim_experts(w13, w2, size)
    return w13, w2


def packed_if(w: Any, wanted: bool) -> Any:
    """Packs w if `wanted` and its shape fits the layout; unpacks it if not wanted. Plain arrays stay as they are."""
    if wanted and isinstance(w, NVFP4Tensor) and weight_layout.check_shape(w.shape) is None:
        return pack_weights(w)
    if not wanted and isinstance(w, PackedWeights):
        return unpack_weights(w)
    return w


def packed_size(intermediate_size: int) -> int:
    """Returns I after `pad_experts`: I rounded up to a multiple of 64."""
    return -(-intermediate_size // weight_layout.TILE) * weight_layout.TILE


def pad_experts(w13: NVFP4Tensor, w2: NVFP4Tensor) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    """Pads I of w13 [E, 2I, H] and w2 [E, H, I] to a multiple of 64; the rows of gate and of up are padded separately.

    The pads have codes and block scales 0, and global scale 1 where there is one per row. So gate and up are 0 there,
    silu(gate) * up is 0, and the pads add nothing in the second GEMM.
    """
    size = w2.shape[-1]
    more = packed_size(size) - size
    return _pad(w13, w2, more) if more else (w13, w2)


def trim_experts(w13: NVFP4Tensor, w2: NVFP4Tensor, size: int) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    """Inverse of `pad_experts`: cuts I back to `size`."""
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
