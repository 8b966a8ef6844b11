"""One step of an online softmax on Hopper's tensor cores, which prefill and decode share.

A warpgroup holds 64 queries. For every tile of keys it computes the scores s = q k^T, and updates three running values
per query: the largest score so far, the sum of exp(score - largest), and the sum of exp(score - largest) * value.
Scores are in units of log2(e), so that the exponentials are powers of two (arXiv:2205.14135, algorithm 1).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.simt.hardware import SWIZZLE_BYTES, WGMMA_ROWS

LOG2_E = math.log2(math.e)
ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value per query: the four threads that share a row hold it
_WGMMA = plgpu.Layout.WGMMA


class Running(NamedTuple):
    """The running values of 64 queries.

    Attributes:
      total: f32 [64, V], the weighted sum of values.
      largest: f32 [64], the largest score so far, in units of log2(e).
      weight: f32 [64], the sum of weights.
    """

    total: jax.Array
    largest: jax.Array
    weight: jax.Array


TRANSFORMS = (plgpu.TilingTransform((8, SWIZZLE_BYTES // 2)), plgpu.SwizzleTransform(SWIZZLE_BYTES))


def tiles(*shape: int) -> Any:
    """Shared memory for bf16 matrices that wgmma reads: rows of 64 values, in the 128-byte swizzle."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=TRANSFORMS)


def start(value_size: int) -> Running:
    """The running values before the first key."""
    rows = lambda value: plgpu.layout_cast(jnp.full((WGMMA_ROWS,), value, jnp.float32), ROWS)  # noqa: E731
    total = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, value_size), jnp.float32), _WGMMA)
    return Running(total, rows(-jnp.inf), rows(0))


def scores(q_smem: Any, k_smem: Any, issued: Callable[[], None] = lambda: None) -> jax.Array:
    """q k^T, f32 [64, keys], of 64 queries and a tile of keys in shared memory.

    `issued` is called when the product is on its way, and not yet waited for.
    """

    def product(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, q_smem, k_smem.transpose((1, 0)))
        issued()
        return accumulator[...]

    return pl.run_scoped(product, plgpu.ACC((WGMMA_ROWS, k_smem.shape[0]), jnp.float32))


def add(
    running: Running, s: jax.Array, v_smem: Any, scale: Any, before_values: Callable[[], None] = lambda: None
) -> Running:
    """Adds a tile of keys to the running values.

    Args:
      running: the values before this tile.
      s: the scores f32 [64, keys] without their scale; -inf where a query does not see a key. Every query has seen a
        key in this tile or in an earlier one.
      v_smem: the values [keys, V] in shared memory. Those of keys that no query sees must be finite.
      scale: the factor of the scores, a number or f32 ().
      before_values: called before the values are read.
    """
    by_row = lambda row, shape: lax.broadcast_in_dim(row, shape, (0,))  # noqa: E731
    factor = scale * LOG2_E
    largest = jnp.maximum(running.largest, s.max(axis=1) * factor)
    shrink = jnp.exp2(running.largest - largest)
    weights = jnp.exp2(s * factor - by_row(largest, s.shape))
    total = running.total * by_row(shrink, running.total.shape)
    weight = running.weight * shrink + weights.sum(axis=1)
    rounded = weights.astype(jnp.bfloat16)
    before_values()

    def product(accumulator: Any) -> None:
        plgpu.wgmma(accumulator, rounded, v_smem)
        plgpu.wgmma_wait(0)

    total: Any = pl.run_state(product)(plgpu.ACC.init(total))
    return Running(total, largest, weight)


def clear_rows(v_smem: Any, first: Any) -> None:
    """Sets the rows of a tile of values from `first` on to zero. The wgmma of this warpgroup may read them afterwards.

    Several warpgroups may do it to the same tile at once: they write the same bytes.
    """
    values = plgpu.load(v_smem, layout=_WGMMA, optimized=False)
    row = plgpu.broadcasted_iota(jnp.int32, v_smem.shape, 0, layout=_WGMMA)
    v_smem[...] = jnp.where(row < first, values, jnp.bfloat16(0))
    plgpu.commit_smem()
