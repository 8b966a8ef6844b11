"""Layouts of block scales: linear [..., M, S], M-major [..., S, M], and the 128x4 swizzle of Blackwell's tensor cores.

S is the number of scales along K: K/16 for NVFP4, K/128 for block FP8. The functions only move elements, of any dtype.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from pallas_kernels.simt.formats import (
    SCALE_LAYOUTS as SCALE_LAYOUTS,
    SWIZZLE_COLUMNS,
    SWIZZLE_ROWS,
    ScaleLayout as ScaleLayout,
    swizzled_shape,
)


def to_m_major(block_scale: Shaped[Array, "... m s"]) -> Shaped[Array, "... s m"]:
    """Transposes linear scales [..., M, S] to [..., S, M], the layout that masked FP8 GEMMs read."""
    return jnp.swapaxes(block_scale, -1, -2)


def swizzle(block_scale: Shaped[Array, "... m s"]) -> Shaped[Array, "... mt st 32 4 4"]:
    """Moves linear scales into the 128x4 layout that Blackwell's block-scaled MMA (tcgen05) reads.

    Scale (m, s) moves to [m // 128, s // 4, m % 32, (m % 128) // 32, s % 4] (PTX ISA, scale factor layout). M is padded
    to a multiple of 128 and S to a multiple of 4; the pads are zero. For scales [E, M, S], consumers that want the
    logical view [32, 4, M/128, 4, S/4, E] transpose the result by (3, 4, 1, 5, 2, 0).

    Args:
      block_scale: linear scales [..., M, S] of any dtype.

    Returns:
      The scales [..., ceil(M/128), ceil(S/4), 32, 4, 4] in the same dtype.

    Raises:
      ValueError: block_scale has fewer than two axes.
    """
    if block_scale.ndim < 2:
        raise ValueError(f"swizzle: block_scale must be [..., M, S], got shape {block_scale.shape}")
    *lead, m, s = block_scale.shape
    m_tiles, s_tiles = -(-m // SWIZZLE_ROWS), -(-s // SWIZZLE_COLUMNS)
    pads = [(0, 0)] * len(lead) + [(0, m_tiles * SWIZZLE_ROWS - m), (0, s_tiles * SWIZZLE_COLUMNS - s)]
    tiles = jnp.pad(block_scale, pads).reshape(*lead, m_tiles, 4, SWIZZLE_ROWS // 4, s_tiles, SWIZZLE_COLUMNS)
    n = len(lead)
    return tiles.transpose(*range(n), n, n + 3, n + 2, n + 1, n + 4)


def unswizzle(swizzled: Shaped[Array, "..."], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
    """Inverse of `swizzle`.

    Args:
      swizzled: scales in the 128x4 layout, in any shape that has the same number of elements as `swizzle` returns.
      shape: the linear shape [..., M, S].

    Returns:
      The linear scales of shape `shape`.

    Raises:
      ValueError: the number of elements does not belong to `shape`.
    """
    *lead, m, s = shape
    m_tiles, s_tiles = -(-m // SWIZZLE_ROWS), -(-s // SWIZZLE_COLUMNS)
    physical = swizzled_shape(lead, m, s)
    if swizzled.size != math.prod(physical):
        raise ValueError(f"unswizzle: shape {tuple(shape)} needs {math.prod(physical)} elements, got {swizzled.shape}")
    n = len(lead)
    tiles = swizzled.reshape(physical).transpose(*range(n), n, n + 3, n + 2, n + 1, n + 4)
    return tiles.reshape(*lead, m_tiles * SWIZZLE_ROWS, s_tiles * SWIZZLE_COLUMNS)[..., :m, :s]
