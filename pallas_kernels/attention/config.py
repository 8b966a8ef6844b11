"""What the attention kernels accept, and their configurations."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.attention import decode as decode_kernel, prefill as prefill_kernel
from pallas_kernels.simt.hardware import SMEM_BYTES, WGMMA_ROWS

ALIGNMENT = 64  # places of a page are a multiple of it, or a request has one page
PART = 256  # keys of a part of decode, whatever the shapes are
DTYPES = (jnp.bfloat16, jnp.float8_e4m3fn)  # of keys and values
MOST_PARTS = 16  # of a request in decode of latents: their sums take memory, and time to write and to add up
_SIZES = (64, 128, 192, 256)
_LATENT_SIZES = 512, 64  # of a latent and of a rotated key
_RESERVED = 4096  # bytes of shared memory for barriers


def prefill(dim: int) -> prefill_kernel.TuningConfig:
    """The configuration for queries and keys of size `dim`: smaller tiles of keys where shared memory is short."""
    return prefill_kernel.TuningConfig() if dim <= 128 else prefill_kernel.TuningConfig(tile=64)


def decode(dim: int, value_dim: int, dtype: Any) -> decode_kernel.TuningConfig:
    """The configuration for keys and values of these sizes: as many stages as shared memory holds, up to 4."""
    usual = decode_kernel.TuningConfig()
    values = usual.tile * (dim + value_dim)  # of a stage
    free = SMEM_BYTES - _RESERVED - 2 * WGMMA_ROWS * dim * 2
    if dtype == jnp.bfloat16:
        return decode_kernel.TuningConfig(num_stages=min(usual.num_stages, free // (2 * values)))
    for wide in (2, 1):
        stages = (free - wide * 2 * values) // values
        if stages >= 2:
            return decode_kernel.TuningConfig(num_stages=min(usual.num_stages, stages), wide_stages=wide)
    raise AssertionError(f"no room for keys of {dim} and values of {value_dim}")


def check_config(q: Any, keys: Any, values: Any, table: Any) -> str | None:
    """None if the kernels accept these (arrays or ShapeDtypeStructs), else what does not fit.

    The shapes are those of `prefill.attend`; q of one query per request is for decode.
    """
    _, length, heads, dim = q.shape
    _, kv_heads, page, value_dim = values.shape
    if q.dtype != jnp.bfloat16 or keys.dtype != values.dtype or keys.dtype not in DTYPES:
        return f"needs bf16 queries, keys and values (or both in e4m3), got {q.dtype}, {keys.dtype} and {values.dtype}"
    if dim not in _SIZES or value_dim not in _SIZES or value_dim > dim:
        return f"the sizes of keys and values must be among {_SIZES}, got {dim} and {value_dim}"
    if page % ALIGNMENT and table.shape[1] > 1:
        return f"pages must have a multiple of {ALIGNMENT} places, got {page}"
    if length == 1 and heads // kv_heads > WGMMA_ROWS:
        return f"at most {WGMMA_ROWS} query heads may share a key head in decode, got {heads // kv_heads}"
    return None


def check_latents(q_latent: Any, q_rotated: Any, latents: Any, rotated: Any) -> str | None:
    """None if the kernel of `latent_decode` accepts these (arrays or ShapeDtypeStructs), else what does not fit.

    The queries are [B, S, heads, ..], the latents and rotated keys are those of `latent_decode.attend`.
    """
    operands = q_latent, q_rotated, latents, rotated
    if any(a.dtype != jnp.bfloat16 for a in operands):
        return f"needs bf16 queries, latents and rotated keys, got {[a.dtype.name for a in operands]}"
    if (latents.shape[3], rotated.shape[3]) != _LATENT_SIZES:
        return f"latents and rotated keys must have sizes {_LATENT_SIZES}, got {latents.shape[3], rotated.shape[3]}"
    if q_latent.shape[1] != 1:
        return f"needs one query per request, got {q_latent.shape[1]}"
    if latents.shape[2] % ALIGNMENT:
        return f"pages must have a multiple of {ALIGNMENT} places, got {latents.shape[2]}"
    return None
