"""What happens between projections and attention, in one pass: norms of queries and keys, RoPE, the write into pages.

The product of the projections is [tokens, (heads + 2 kv_heads) * D]: queries, keys and values of a token behind each
other. A group of D / 8 lanes takes a few queries of a token, or a few keys with their values; a lane holds 8 values of
each. The lanes of a group sum squares for the norm, and exchange values for RoPE. Queries are written as attention
reads them, keys and values into the pages, in place; pages of e4m3 get them divided by a scale. Device memory bounds
the time.
"""

import dataclasses
import math
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
_HEADS = 4  # that a lane takes one after the other, at most: they share angles and the weights of the norm
_BLOCKS_PER_SM = 8
_FP8 = jnp.float8_e4m3fn
_NAN = np.uint32(0x7FC07FC0)  # two bf16
_NAN_CODES = np.uint32(0x7F7F7F7F)  # four e4m3


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
    if qkv.dtype != jnp.bfloat16 or keys.dtype != values.dtype or keys.dtype not in (jnp.bfloat16, _FP8):
        return f"needs bf16 projections and pages in bf16 or e4m3, got {qkv.dtype}, {keys.dtype} and {values.dtype}"
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
    scales: jax.Array | None = None,
    *,
    rotation: Rotation,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the queries bf16 [B, S, heads, D], and the pages with the new keys and values.

    Args:
      qkv: bf16 [B, S, (heads + 2 kv_heads) * D].
      keys: bf16 or e4m3 [P, kv_heads, page, D]; XLA copies pages that something else still needs.
      values: of the same type, [P, kv_heads, page, D].
      table: i32 [B, n], the pages of each request.
      starts: i32 [B], the position of the first token of each request.
      counts: i32 [B], the tokens that are valid; keys and values of the others are not written.
      angles: of all B * S tokens.
      norms: f32 [2, D], the weights of the norms of queries and of keys; None: no norms.
      scales: f32 [2], the scales of keys and of values in e4m3; None for bf16.
      rotation: see `Rotation`.
    """
    batch, length, _ = qkv.shape
    _, kv_heads, page, dim = keys.shape
    heads, entries = rotation.heads, table.shape[1]
    group = dim // _PER_LANE  # lanes of a query, or of a key and value
    row = (heads + 2 * kv_heads) * group
    tokens = batch * length
    blocks = max(1, min(-(-tokens * heads * group // lanes.LANES), _BLOCKS_PER_SM * H100_SMS))
    operands = [qkv, table, starts, counts, *angles]
    operands += [a for a in (norms, None if scales is None else 1 / scales) if a is not None]

    def body(*refs):
        inputs, (k_ref, v_ref, q_ref) = refs[: len(operands)], refs[len(operands) :]
        qkv_ref, table_ref, starts_ref, counts_ref, cos_ref, sin_ref, *norm_ref = inputs
        inverse_ref = None if scales is None else norm_ref.pop()

        def for_each(number, which, write):
            """Calls write(token, head, piece, words, valid) with the rotated words of all `number` queries or keys."""
            run = math.gcd(number, _HEADS)
            per_token = number // run * group

            def rotate(item):
                token = unsigned_div(item, per_token)
                inner = item - token * per_token
                head = unsigned_div(inner, group)
                piece, head = inner - head * group, head * run
                valid = token < tokens
                at = token * row + (which * heads + head) * group + piece
                many = [lanes.gather(qkv_ref, at + i * group, 4, where=valid) for i in range(run)]
                angle = _angle(token, piece, valid, cos_ref, sin_ref)
                weights = None
                if norm_ref:
                    weights = _floats(lanes.gather(norm_ref[0], which * group + piece, _PER_LANE, where=valid))
                turned = [_packed(_turned(_normed(unpack_bf16(words), weights), angle)) for words in many]
                write(token, head, piece, turned, valid)

            PersistentLanes(blocks, 1).for_each(tokens * per_token, rotate)

        def write_queries(token, head, piece, turned, valid):
            to = token * (heads * group) + head * group + piece
            for i, words in enumerate(turned):
                lanes.scatter(q_ref, to + i * group, words, where=valid)

        def write_keys_and_values(token, head, piece, turned, valid):
            request = unsigned_div(token, length)
            place = token - request * length
            (start,) = lanes.gather(starts_ref, request, where=valid)
            (count,) = lanes.gather(counts_ref, request, where=valid)
            position = start.astype(jnp.int32) + place
            entry = unsigned_div(position, page)
            valid &= (place < count.astype(jnp.int32)) & (entry < entries)
            (at,) = lanes.gather(table_ref, request * entries + entry, where=valid)
            source = token * row + (heads + kv_heads + head) * group + piece
            values = [lanes.gather(qkv_ref, source + i * group, 4, where=valid) for i in range(len(turned))]
            to = (at.astype(jnp.int32) * kv_heads + head) * page + position - entry * page
            for i, (words, v_words) in enumerate(zip(turned, values, strict=True)):
                bad_value = _spoiled(v_words, group)
                bad, nan = bad_value, _NAN
                if inverse_ref is not None:
                    bad, nan = bad | _spoiled(words, group), _NAN_CODES
                    words, v_words = (_encoded(w, inverse_ref, k) for k, w in enumerate((words, v_words)))
                here = (to + i * page) * group + piece
                lanes.scatter(k_ref, here, [jnp.where(bad, nan, w) for w in words], where=valid)
                lanes.scatter(v_ref, here, [jnp.where(bad_value, np.uint32(0), w) for w in v_words], where=valid)

        for_each(kv_heads, 1, write_keys_and_values)
        for_each(heads, 0, write_queries)

    def _normed(x, weights):
        if weights is None:
            return x
        squares = sum((v * v for v in x[1:]), x[0] * x[0])
        mean = lanes.sum_of_neighbours(squares, group) * np.float32(1 / dim)
        factor = _rsqrt(mean + np.float32(rotation.epsilon))
        return [v * factor * w for v, w in zip(x, weights, strict=True)]

    def _angle(token, piece, valid, cos_ref, sin_ref):
        """The cosines and sines of the lane's pairs; a sine has the sign with which it multiplies."""
        count = _PER_LANE // 2 if rotation.interleaved else _PER_LANE
        pair = piece if rotation.interleaved else jnp.where(piece < group // 2, piece, piece - group // 2)
        at = token * (dim // 2 // count) + pair
        cos, sin = (_floats(lanes.gather(ref, at, count, where=valid)) for ref in (cos_ref, sin_ref))
        if not rotation.interleaved:
            sin = [jnp.where(piece < group // 2, -s, s) for s in sin]
        return cos, sin

    def _turned(x, angle):
        cos, sin = angle
        if rotation.interleaved:
            found = []
            for i in range(_PER_LANE // 2):
                first, second = x[2 * i], x[2 * i + 1]
                found += [first * cos[i] - second * sin[i], second * cos[i] + first * sin[i]]
            return found
        others = [lanes.partner(v, group // 2) for v in x]
        return [v * c + o * s for v, o, c, s in zip(x, others, cos, sin, strict=True)]

    k_pages, v_pages = jax.new_ref(keys), jax.new_ref(values)
    q = launch.kernel(body, jax.ShapeDtypeStruct((batch, length, heads, dim), jnp.bfloat16), grid=blocks)(
        *operands, k_pages, v_pages
    )
    return q, jax.freeze(k_pages), jax.freeze(v_pages)


def _floats(words):
    return [lax.bitcast_convert_type(word, jnp.float32) for word in words]


def _packed(values):
    return [lane_math.pack_bf16(low, high) for low, high in zip(values[::2], values[1::2], strict=True)]


def _encoded(words, inverse_ref, which):
    """bf16 values times inverse_ref[which], as e4m3."""
    (inverse,) = lanes.gather(inverse_ref, which)
    scaled = [v * lax.bitcast_convert_type(inverse, jnp.float32) for v in unpack_bf16(words)]
    return [lane_math.pack_e4m3(scaled[i : i + 4]) for i in range(0, len(scaled), 4)]


def _rsqrt(x):
    return lanes.instruction("rsqrt.approx.f32 $0, $1;", lax.rsqrt, x)


def _spoiled(words, group):
    """Whether a bf16 of the words, or of those of the other lanes of the group, is NaN or infinite."""
    exponent = np.uint32(0x7F80)
    found = words[0] != words[0]
    for word in words:
        found |= ((word & exponent) == exponent) | ((word >> 16 & exponent) == exponent)
    return lanes.largest_of_neighbours(found.astype(jnp.int32), min(group, WARP)) > 0
