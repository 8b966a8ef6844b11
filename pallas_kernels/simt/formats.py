"""Constants of the number formats: NVFP4, block-wise FP8, and the layouts of their scales.

Every other module, those of fp4jax too, takes these numbers from here. The exception is fp4jax.quant_config, which must
not import kernels; a test compares its numbers with these.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

BLOCK_SIZE = 16  # values along K that share an NVFP4 block scale
FP8_BLOCK = 128  # values along K that share an FP8 scale; a scale of a weight also covers 128 rows
E2M1_MAX = 6.0  # largest magnitude of an NVFP4 code
E4M3_MAX = 448.0  # largest finite e4m3 value
# An NVFP4 global scale is amax / AMAX_DIVISOR, so that the block which holds the amax has the block scale 448.
# Four-over-six may store a block at 6/4 of its usual scale. It divides by AMAX_DIVISOR_FOUR_OVER_SIX instead: then the
# largest usual block scale is 256, and the largest stored one 384.
FOUR_OVER_SIX_SCALE = 256.0
AMAX_DIVISOR = E2M1_MAX * E4M3_MAX  # = 2688
AMAX_DIVISOR_FOUR_OVER_SIX = E2M1_MAX * FOUR_OVER_SIX_SCALE  # = 1536
GLOBAL_SCALE_RANGE = (2.0**-100, 2.0**100)  # outside it intermediate products leave the normal range of f32
F32_MAX = np.float32(np.finfo(np.float32).max)
F32_TINY = np.float32(np.finfo(np.float32).tiny)  # 2^-126, the smallest normal magnitude

# Layouts of block scales: linear [.., M, S]; m_major [.., S, M]; swizzled, the tiles of 128 x 4 scales that Blackwell's
# tensor cores read.
ScaleLayout = Literal["linear", "m_major", "swizzled"]
SCALE_LAYOUTS: tuple[str, ...] = get_args(ScaleLayout)
SWIZZLE_ROWS, SWIZZLE_COLUMNS = 128, 4  # of one tile, stored as [32, 4, 4]: row % 32, row // 32, column


def swizzled_shape(lead: Sequence[int], m: int, columns: int) -> tuple[int, ...]:
    """Shape in the swizzled layout of scales [*lead, m, columns], padded to whole tiles of 128 x 4."""
    tiles = (-(-m // SWIZZLE_ROWS), -(-columns // SWIZZLE_COLUMNS))
    return (*lead, *tiles, SWIZZLE_ROWS // 4, 4, SWIZZLE_COLUMNS)
