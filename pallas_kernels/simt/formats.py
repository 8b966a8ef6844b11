"""Numbers of the formats: NVFP4, block-wise FP8, and the layouts of their scales."""

from collections.abc import Sequence

import numpy as np

BLOCK_SIZE = 16  # values along K that share an NVFP4 block scale
FP8_BLOCK = 128  # values along K that share an FP8 scale; a weight's scale covers as many rows too
E2M1_MAX = 6.0
E4M3_MAX = 448.0
# An NVFP4 global scale is the amax divided by one of these, so that the largest block scale is 448. With four-over-six
# a block may be stored at 6/4 of its usual scale: there the largest usual one is 256, which becomes 384.
FOUR_OVER_SIX_SCALE = 256.0
GLOBAL_SCALE_RANGE = (2.0**-100, 2.0**100)  # beyond it intermediate products leave the normal f32 range
AMAX_DIVISOR = E2M1_MAX * E4M3_MAX  # 2688
AMAX_DIVISOR_FOUR_OVER_SIX = E2M1_MAX * FOUR_OVER_SIX_SCALE  # 1536
F32_MAX = np.float32(np.finfo(np.float32).max)
F32_TINY = np.float32(np.finfo(np.float32).tiny)  # 2^-126, the smallest normal magnitude

# Layouts of block scales [.., M, S]: as they are, [.., S, M], and the tiles that Blackwell's tensor cores read.
SCALE_LAYOUTS = ("linear", "m_major", "swizzled")
SWIZZLE_ROWS, SWIZZLE_COLUMNS = 128, 4  # scales of one tile; it is stored as [32, 4, 4]: row % 32, row // 32, column


def swizzled_shape(lead: Sequence[int], m: int, columns: int) -> tuple[int, ...]:
    """Shape of scales [*lead, m, columns] in the swizzled layout, whole tiles of 128 x 4."""
    tiles = (-(-m // SWIZZLE_ROWS), -(-columns // SWIZZLE_COLUMNS))
    return (*lead, *tiles, SWIZZLE_ROWS // 4, 4, SWIZZLE_COLUMNS)
