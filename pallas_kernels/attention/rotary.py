"""What happens between projections and attention, in one pass: norms of queries and keys, RoPE, the write into pages.

The product of the projections is [tokens, (heads + 2 kv_heads) * D]: queries, keys and values of a token behind each
other. A group of D / 8 lanes takes one query, or one key with its value; a lane holds 8 values of each. The lanes of a
group sum squares for the norm, and exchange values for RoPE. Queries are written as attention reads them, keys and
values into the pages, in place. Device memory bounds the time.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.rows.nvfp4_codec import unpack_bf16
from pallas_kernels.simt import lane_math, lanes, launch
from pallas_kernels.simt.hardware import H100_SMS, WARP
from pallas_kernels.simt.lane_math import unsigned_div
from pallas_kernels.simt.schedule import PersistentLanes

_PER_LANE = 8  # values of a query, key or value that a lane takes: 16 bytes of bf16
_BLOCKS_PER_SM = 8
_NAN = np.uint32(0x7FC07FC0)  # two bf16


class Angles(NamedTuple):
    """RoPE of every token: f32 [tokens, D / 2], the cosine and sine of the angle of each pair."""

    cos: jax.Array
    sin: jax.Array


@dataclasses.dataclass(frozen=True)
class Rotation:
    """How queries and keys are made.

    Attributes:
      heads: query heads.
      interleaved: whether RoPE pairs x[2i] with x[2i + 1], and not x[i] with x[i + D / 2].
      epsilon: of the norms; None: there are none.
    """

    heads: int
    interleaved: bool = False
    epsilon: float | None = None


def check_config(qkv: Any, keys: Any, values: Any) -> str | None:
    """None if `rotate_and_write` accepts these (arrays or ShapeDtypeStructs), else what does not fit."""
    if any(a.dtype != jnp.bfloat16 for a in (qkv, keys, values)):
        return f"needs bf16 projections and pages, got {qkv.dtype}, {keys.dtype} and {values.dtype}"
    dim = keys.shape[3]
    if dim not in (64, 128, 256) or values.shape[3] != dim:
        return f"the sizes of keys and values must be the same, 64, 128 or 256, got {dim} and {values.shape[3]}"
    if max(qkv.size, keys.size) // _PER_LANE >= lanes.MAX_INDEX:
        return f"projections {qkv.shape} or pages {keys.shape} exceed the kernel's 32-bit indices"
    return None


def rotate_and_write(
    qkv: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    table: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    angles: Angles,
    norms: jax.Array | None,
    *,
    rotation: Rotation,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the queries bf16 [B, S, heads, D], and the pages with the new keys and values.

    Args:
      qkv: bf16 [B, S, (heads + 2 kv_heads) * D].
      keys: bf16 [P, kv_heads, page, D]; XLA copies pages that something else still needs.
      values: bf16 [P, kv_heads, page, D].
      table: i32 [B, n], the pages of each request.
      starts: i32 [B], the position of the first token of each request.
      counts: i32 [B], the tokens that are valid; keys and values of the others are not written.
      angles: of all B * S tokens.
      norms: f32 [2, D], the weights of the norms of queries and of keys; None: no norms.
      rotation: see `Rotation`.
    """
    batch, length, _ = qkv.shape
    _, kv_heads, page, dim = keys.shape
    heads, entries = rotation.heads, table.shape[1]
    group = dim // _PER_LANE  # lanes of a query, or of a key and value
    per_token = (heads + kv_heads) * group
    row = (heads + 2 * kv_heads) * group
    items = batch * length * per_token
    blocks = max(1, min(-(-items // lanes.LANES), _BLOCKS_PER_SM * H100_SMS))
    operands = [qkv, table, starts, counts, *angles] + ([] if norms is None else [norms])

    def body(*refs):
        inputs, (k_ref, v_ref, q_ref) = refs[: len(operands)], refs[len(operands) :]
        qkv_ref, table_ref, starts_ref, counts_ref, cos_ref, sin_ref, *norm_ref = inputs

        def rotate(item):
            token = unsigned_div(item, per_token)
            inner = item - token * per_token
            head = unsigned_div(inner, group)
            piece = inner - head * group
            valid = token < batch * length
            is_key = head >= heads
            words = lanes.gather(qkv_ref, token * row + inner, 4, where=valid)
            x = unpack_bf16(words)
            if norm_ref:
                squares = sum((v * v for v in x[1:]), x[0] * x[0])
                mean = lanes.sum_of_neighbours(squares, group) * np.float32(1 / dim)
                factor = _rsqrt(mean + np.float32(rotation.epsilon))
                at = jnp.where(is_key, 1, 0) * group + piece
                weights = lanes.gather(norm_ref[0], at, _PER_LANE, where=valid)
                x = [v * factor * lax.bitcast_convert_type(w, jnp.float32) for v, w in zip(x, weights, strict=True)]
            words = _packed(_turned(x, token, piece, valid, cos_ref, sin_ref))
            lanes.scatter(q_ref, token * (heads * group) + inner, words, where=valid & ~is_key)

            request = unsigned_div(token, length)
            place = token - request * length
            (start,) = lanes.gather(starts_ref, request, where=valid & is_key)
            (count,) = lanes.gather(counts_ref, request, where=valid & is_key)
            position = start.astype(jnp.int32) + place
            entry = unsigned_div(position, page)
            writes = valid & is_key & (place < count.astype(jnp.int32)) & (entry < entries)
            (at,) = lanes.gather(table_ref, request * entries + entry, where=writes)
            v_words = lanes.gather(qkv_ref, token * row + inner + kv_heads * group, 4, where=writes)
            bad = _spoiled(v_words, group)
            to = ((at.astype(jnp.int32) * kv_heads + head - heads) * page + position - entry * page) * group + piece
            lanes.scatter(k_ref, to, [jnp.where(bad, _NAN, w) for w in words], where=writes)
            lanes.scatter(v_ref, to, [jnp.where(bad, np.uint32(0), w) for w in v_words], where=writes)

        PersistentLanes(blocks, 1).for_each(items, rotate)

    def _turned(x, token, piece, valid, cos_ref, sin_ref):
        half = group // 2
        count = _PER_LANE // 2 if rotation.interleaved else _PER_LANE
        pair = piece if rotation.interleaved else jnp.where(piece < half, piece, piece - half)
        at = token * (dim // 2 // count) + pair
        cos, sin = (
            [lax.bitcast_convert_type(w, jnp.float32) for w in lanes.gather(ref, at, count, where=valid)]
            for ref in (cos_ref, sin_ref)
        )
        if rotation.interleaved:
            found = []
            for i in range(count):
                first, second = x[2 * i], x[2 * i + 1]
                found += [first * cos[i] - second * sin[i], second * cos[i] + first * sin[i]]
            return found
        others = [lanes.partner(v, half) for v in x]
        sign = jnp.where(piece < half, np.float32(-1), np.float32(1))
        return [v * c + sign * o * s for v, o, c, s in zip(x, others, cos, sin, strict=True)]

    k_pages, v_pages = jax.new_ref(keys), jax.new_ref(values)
    q = launch.kernel(body, jax.ShapeDtypeStruct((batch, length, heads, dim), jnp.bfloat16), grid=blocks)(
        *operands, k_pages, v_pages
    )
    return q, jax.freeze(k_pages), jax.freeze(v_pages)


def _packed(values):
    return [lane_math.pack_bf16(low, high) for low, high in zip(values[::2], values[1::2], strict=True)]


def _rsqrt(x):
    return lanes.instruction("rsqrt.approx.f32 $0, $1;", lax.rsqrt, x)


def _spoiled(words, group):
    """Whether a bf16 of the words, or of those of the other lanes of the group, is NaN or infinite."""
    exponent = np.uint32(0x7F80)
    found = words[0] != words[0]
    for word in words:
        found |= ((word & exponent) == exponent) | ((word >> 16 & exponent) == exponent)
    return lanes.largest_of_neighbours(found.astype(jnp.int32), min(group, WARP)) > 0
