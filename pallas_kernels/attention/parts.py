"""The parts that decode cuts the keys of a request into: a list of them, and the sum of what becomes of each."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.simt import lanes, launch
from pallas_kernels.simt.hardware import LANES
from pallas_kernels.simt.lane_math import unsigned_div


class Plan(NamedTuple):
    """The parts of all requests, in the order of the requests.

    Attributes:
      request: i32 [tasks], the request of each part.
      part: i32 [tasks], the index of the part in its request.
      ends: i32 [B], the number of parts of the requests 0..b together. The last one counts the parts that exist; the
        others of `request` and `part` are ignored.
    """

    request: jax.Array
    part: jax.Array
    ends: jax.Array


def plan(lengths: jax.Array, max_length: int, part: int | jax.Array, most: int | None = None) -> Plan:
    """Lists the parts of requests with `lengths` keys, i32 [B], at most `max_length` each.

    part: the keys of a part; or i32 [B], those of each request. Then a request has at most `most` parts.
    """
    if most is None:
        assert isinstance(part, int)
        most = -(-max_length // part)
    parts = (jnp.clip(lengths, 0, max_length) + (part - 1)) // part
    ends = jnp.cumsum(parts).astype(jnp.int32)
    task = jnp.arange(lengths.shape[0] * most, dtype=jnp.int32)
    request = jnp.sum((ends[None, :] <= task[:, None]).astype(jnp.int32), axis=1, dtype=jnp.int32)
    request = jnp.minimum(request, lengths.shape[0] - 1)
    return Plan(request, task - (ends - parts)[request], ends)


_UNROLL = 4  # parts whose loads are in flight together


def merge(out: jax.Array, weight: jax.Array, parts: Plan) -> jax.Array:
    """Adds up the parts of every request, in order: bf16 [B, heads, V]; zeros for a request without keys.

    A lane takes 8 values of one head.

    Args:
      out: f32 [tasks, heads, V], see `decode.attend`.
      weight: f32 [tasks, heads].
      parts: see `plan`.
    """
    _, heads, value_dim = out.shape
    batch, per_row = parts.ends.shape[0], value_dim // 8
    blocks = -(-heads * per_row // LANES)  # thread blocks of a request

    def body(out_gmem, weight_gmem, ends_gmem, result_gmem):
        request = lax.div(lanes.block_index(), jnp.int32(blocks))
        item = lax.rem(lanes.block_index(), jnp.int32(blocks)) * LANES + lanes.lane_index()
        head = unsigned_div(item, per_row)
        valid = head < heads
        end = ends_gmem[request]
        begin = jnp.where(request > 0, ends_gmem[jnp.maximum(request - 1, 0)], 0)
        steps = lax.div(end - begin + (_UNROLL - 1), jnp.int32(_UNROLL))

        def weights_of(i):
            """The parts i * _UNROLL + 0, 1, ...: the lane's row of each, whether it exists, its logarithm."""
            for u in range(_UNROLL):
                part = begin + i * _UNROLL + u
                exists = valid & (lanes.splat(part, jnp.int32) < end)
                (bits,) = lanes.gather(weight_gmem, part * heads + head, where=exists)
                yield part * heads + head, exists, lax.bitcast_convert_type(bits, jnp.float32)

        def largest_of(i, largest):
            for _, exists, found in weights_of(i):
                # The largest finite logarithm. A NaN needs none: its power of two is NaN too.
                largest = jnp.where(exists & (found > largest), found, largest)
            return largest

        largest = lax.fori_loop(0, steps, largest_of, lanes.splat(-jnp.inf, jnp.float32))

        def add(i, carry):
            sums, total = carry
            for row, exists, found in weights_of(i):
                words = lanes.gather(out_gmem, row * per_row + (item - head * per_row), 8, where=exists)
                factor = jnp.where(exists, jnp.exp2(found - largest), 0.0)
                sums = tuple(
                    s + factor * lax.bitcast_convert_type(w, jnp.float32) for s, w in zip(sums, words, strict=True)
                )
                total = total + factor
            return sums, total

        zero = lanes.splat(0, jnp.float32)
        sums, total = lax.fori_loop(0, steps, add, ((zero,) * 8, zero))
        scale = jnp.where(lanes.splat(end, jnp.int32) > begin, 1 / total, 0.0)
        rounded = [
            lax.bitcast_convert_type((s * scale).astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32) for s in sums
        ]
        words = [low | (high << 16) for low, high in zip(rounded[::2], rounded[1::2], strict=True)]
        lanes.scatter(result_gmem, request * (heads * per_row) + item, words, where=valid)

    return launch.kernel(
        body, jax.ShapeDtypeStruct((batch, heads, value_dim), jnp.bfloat16), grid=batch * blocks, approx_math=True
    )(out, weight, parts.ends)
