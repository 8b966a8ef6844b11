"""Stacked NVFP4 weights in the layout that the grouped GEMM's kernel reads: packed once, when a model is loaded."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp4jax.nvfp4 import NVFP4Tensor, pack_codes, unpack
from pallas_kernels import weight_layout


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

    def validate(self) -> "PackedWeights":
        """Returns self; raises TypeError or ValueError naming the leaf whose dtype or shape does not fit."""
        for name, dtype in (("words", jnp.uint32), ("global_scale", jnp.float32)):
            if getattr(self, name).dtype != dtype:
                raise TypeError(f"PackedWeights.{name} must be {jnp.dtype(dtype)}, got {getattr(self, name).dtype}")
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
    w.validate()
    if problem := weight_layout.check_shape(w.shape):
        raise ValueError(f"pack_weights: {problem}")
    if w.global_scale.ndim != 3 or w.global_scale.shape[0] != w.shape[0]:
        raise ValueError(f"pack_weights: global_scale must be [E, 1, 1] or [E, N, 1], got {w.global_scale.shape}")
    scale_bytes = lax.bitcast_convert_type(w.block_scale, jnp.uint8)
    return PackedWeights(_pack(w.qdata, scale_bytes), w.global_scale)


def unpack_weights(packed: PackedWeights) -> NVFP4Tensor:
    """The inverse of `pack_weights`, for any leading axes (one expert's slice has none)."""
    codes, scale_bytes = _unpack(packed.words)
    block_scale = lax.bitcast_convert_type(scale_bytes, jnp.float8_e4m3fn)
    return NVFP4Tensor(pack_codes(codes), block_scale, packed.global_scale)


# Under jit, so that codes in a byte each, and words in the making, are not all in memory at once.
_pack = jax.jit(lambda qdata, scale_bytes: weight_layout.pack(unpack(qdata), scale_bytes))
_unpack = jax.jit(weight_layout.unpack)


def packed_if(w: Any, wanted: bool) -> Any:
    """w packed if `wanted` and its shape has the layout, unpacked if not wanted; what is not NVFP4 stays as it is."""
    if wanted and isinstance(w, NVFP4Tensor) and weight_layout.check_shape(w.shape) is None:
        return pack_weights(w)
    if not wanted and isinstance(w, PackedWeights):
        return unpack_weights(w)
    return w
