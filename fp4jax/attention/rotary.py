"""Rotary position embeddings (RoPE), and the way from the projections of an attention layer into its cache."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fp4jax.attention.pages import KeyValuePages, positions_from
from fp4jax.implementations import Call, Implementation, run_implementation
from fp4jax.norms import rms_norm
from pallas_kernels.attention import rotary as kernel


def rope_frequency(theta: float, dim: int) -> Float[Array, "half"]:
    """The angle per position of every RoPE pair: theta^(-2i / dim) for the pairs i = 0 .. dim / 2 - 1."""
    half = dim // 2
    return theta ** -(jnp.arange(half, dtype=jnp.float32) / half)


def rope(
    x: Float[Array, "B S heads D"],
    positions: Int[Array, "..."],
    frequency: Float[Array, "half"],
    *,
    interleaved: bool = False,
) -> Float[Array, "B S heads D"]:
    """Rotate pairs of values by the angle position * frequency, computed in float32 (RoPE, arXiv:2104.09864).

    Args:
      x: queries or keys.
      positions: the position of every token: [S] or [1, S] for all sequences, or [B, S].
      frequency: the angle per position of each of the D / 2 pairs.
      interleaved: False pairs x[i] with x[i + D/2]; True pairs x[2i] with x[2i + 1].
    """
    cos, sin = (part[:, :, None] for part in _angles(positions.reshape(-1, x.shape[1]), frequency))
    wide = x.astype(jnp.float32)
    first, second = (wide[..., ::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, axis=-1)
    rotated = first * cos - second * sin, second * cos + first * sin
    out = jnp.stack(rotated, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(rotated, axis=-1)
    return out.astype(x.dtype)


def _angles(positions, frequency):
    """The cosine and sine of every pair's angle, f32 [B, S, D / 2], at positions [B, S]."""
    angle = positions[..., None].astype(jnp.float32) * frequency.astype(jnp.float32)[None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate_and_write(
    qkv: Float[Array, "B S N"],
    pages: KeyValuePages,
    starts: Int[Array, "..."],
    frequency: Float[Array, "half"],
    *,
    heads: int,
    norms: Float[Array, "2 D"] | None = None,
    epsilon: float | None = None,
    interleaved: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B S heads D"], KeyValuePages]:
    """Normalizes and rotates queries and keys, and writes keys and values into the pages.

    Args:
      qkv: the projections of every token, queries, keys and values behind each other: N = (heads + 2 kv_heads) * D.
      pages: the cache of the layer; its arrays have kv_heads heads and one size D. Written as `KeyValuePages.write`
        does.
      starts: i32 [B], or () for all requests: the position of the first of the S tokens.
      frequency: see `rope_frequency`.
      heads: the number of query heads.
      norms: the weights of an RMSNorm on every query, and of one on every key, applied before RoPE; None: no norms.
      epsilon: of the norms.
      interleaved: which values RoPE pairs, see `rope`.
      implementation: "xla", "mosaic_gpu", or None for the best one (`implementations.run_implementation`). The kernel
        has no derivatives.

    Returns:
      The queries in the dtype of qkv, and the pages.

    Raises:
      NotImplementedError: implementation "mosaic_gpu" was named and cannot serve the call.
    """
    starts = jnp.broadcast_to(jnp.asarray(starts, jnp.int32), qkv.shape[:1])
    options = dict(rotation=kernel.Rotation(heads, interleaved, epsilon if norms is not None else None))
    problem = kernel.check_config(qkv, pages.keys, pages.values)
    if any(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves((qkv, pages))):
        problem = "JAX has no references that vary over a mesh axis; shard_map needs check_vma=False"
    return run_implementation(
        "rotate_and_write", implementation, (qkv, pages, starts, frequency, norms), problem=problem,
        xla=Call.of(_xla, **options), mosaic_gpu=Call.of(_mosaic_gpu, **options), differentiable=False,
    )  # fmt: skip


def rotated(
    qkv: Float[Array, "B S N"],
    starts: Int[Array, "..."],
    frequency: Float[Array, "half"],
    *,
    heads: int,
    kv_heads: int,
    norms: Float[Array, "2 D"] | None = None,
    epsilon: float | None = None,
    interleaved: bool = False,
) -> tuple[Float[Array, "B S heads D"], Float[Array, "B S kv_heads D"], Float[Array, "B S kv_heads D"]]:
    """Returns the queries and keys of `rotate_and_write`, and the values, in plain JAX and without a cache."""
    dim = qkv.shape[-1] // (heads + 2 * kv_heads)
    q, k, v = jnp.split(qkv.reshape(*qkv.shape[:2], -1, dim), [heads, heads + kv_heads], axis=2)
    if norms is not None and epsilon is not None:
        q, k = (rms_norm(x, w, epsilon).astype(qkv.dtype) for x, w in zip((q, k), norms, strict=True))
    positions = positions_from(starts, qkv.shape[1])
    q, k = (rope(x, positions, frequency, interleaved=interleaved) for x in (q, k))
    return q, k, v


def _xla(qkv, pages, starts, frequency, norms, *, rotation):
    q, k, v = rotated(
        qkv, starts, frequency, heads=rotation.heads, kv_heads=pages.keys.shape[1], norms=norms,
        epsilon=rotation.epsilon, interleaved=rotation.interleaved,
    )  # fmt: skip
    return q, pages.write(k, v, starts)


def _mosaic_gpu(qkv, pages, starts, frequency, norms, *, rotation):
    batch, length, _ = qkv.shape
    counts = jnp.full(batch, length, jnp.int32) if pages.counts is None else pages.counts.astype(jnp.int32)
    angles = (part.reshape(batch * length, -1) for part in _angles(positions_from(starts, length), frequency))
    norms = None if norms is None else norms.astype(jnp.float32)
    q, keys, values = kernel.rotate_and_write(
        qkv, pages.keys, pages.values, pages.table.astype(jnp.int32), starts, counts, kernel.Angles(*angles), norms,
        pages.scales, rotation=rotation,
    )  # fmt: skip
    return q, pages._replace(keys=keys, values=values)
