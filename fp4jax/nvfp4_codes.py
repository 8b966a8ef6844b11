"""The codes of NVFP4: packing, decoding, and how each dialect rounds a block of 16 values.

A dialect takes blocks f32 [..., Kb, 16] and gives codes u8, e4m3 block scales, and the scales before clipping and
rounding.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from fp4jax.rounding import div_rn, flush_subnormals, round_to_e2m1, round_to_e4m3
from pallas_kernels.simt.formats import BLOCK_SIZE, F32_MAX


def decode_blocks(
    qdata: UInt8[Array, "... half_k"], block_scale: Float[Array, "... blocks"], dtype: Any = jnp.bfloat16
) -> Float[Array, "..."]:
    """Returns code x block_scale [..., K], without the global scale.

    The products are exact in bf16, f16 and f32: they have at most 6 significant bits.
    """
    codes = unpack(qdata)
    # Twice the magnitude of a code, computed without branches: 0 1 2 3 4 6 8 12 for m = 0..7.
    m = (codes & 7).astype(jnp.int32)
    doubled = m + jnp.maximum(m - 4, 0) + 2 * jnp.maximum(m - 6, 0)
    magnitude = lax.bitcast_convert_type(doubled.astype(jnp.float32) * 0.5, jnp.uint32)
    value = lax.bitcast_convert_type(magnitude | ((codes >> 3).astype(jnp.uint32) << 31), jnp.float32)
    blocks = value.reshape(*block_scale.shape, BLOCK_SIZE) * block_scale.astype(jnp.float32)[..., None]
    return blocks.reshape(codes.shape).astype(dtype)


def unpack(qdata: UInt8[Array, "... half_k"]) -> UInt8[Array, "..."]:
    """Splits packed bytes [..., K/2] into one code (0..15) per byte, [..., K], the low nibble first."""
    return jnp.stack([qdata & 0xF, qdata >> 4], axis=-1).reshape(*qdata.shape[:-1], 2 * qdata.shape[-1])


def pack_codes(codes: UInt8[Array, "... k"]) -> UInt8[Array, "..."]:
    """Inverse of `unpack`."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def encode_exact(blocks: Any, block_amax: Any, scale: Any, four_over_six: bool) -> tuple[Any, Any, Any]:
    """The dialect "exact"; scale: the global scale, to decode. Four-over-six keeps the better of two block scales."""
    gs = div_rn(np.float32(1), scale)
    inverse = div_rn(np.float32(1), gs)

    def candidate(reciprocal):
        raw = block_amax * (gs * np.float32(reciprocal))
        block_scale = round_to_e4m3(raw)
        multiplier = jnp.minimum(div_rn(np.float32(1), block_scale.astype(jnp.float32) * inverse), F32_MAX)
        multiplier = jnp.where(block_amax == 0, np.float32(0), multiplier)
        return round_to_e2m1(blocks * multiplier[..., None]), block_scale, raw

    six = candidate(1 / 6)
    if not four_over_six:
        return six
    four = candidate(1 / 4)
    four_wins = _squared_error(blocks, *four[:2], scale) < _squared_error(blocks, *six[:2], scale)
    codes = jnp.where(four_wins[..., None], four[0], six[0])
    return codes, jnp.where(four_wins, four[1], six[1]), jnp.where(four_wins, four[2], six[2])


def encode_modelopt(blocks: Any, block_amax: Any, scale: Any) -> tuple[Any, Any, Any]:
    """The dialect "modelopt"; scale: the global scale, to decode."""
    raw = div_rn(block_amax, jnp.broadcast_to(np.float32(6) * scale, block_amax.shape))
    block_scale = round_to_e4m3(jnp.maximum(raw, 2.0**-9))
    block_scale = jnp.where(block_amax == 0, jnp.ones_like(block_scale), block_scale)
    divisor = block_scale.astype(jnp.float32) * scale
    return _sign_of_input(round_to_e2m1(div_rn(blocks, divisor[..., None])), blocks), block_scale, raw


def encode_compressed_tensors(blocks: Any, block_amax: Any, gs: Any) -> tuple[Any, Any, Any]:
    """The dialect "compressed_tensors"; gs: the global scale, to encode."""
    raw = gs * div_rn(block_amax, np.float32(6))
    block_scale = round_to_e4m3(raw)
    block_scale = jnp.where(block_scale == 0, jnp.full_like(block_scale, 0.125), block_scale)
    divisor = div_rn(block_scale.astype(jnp.float32), jnp.broadcast_to(gs, block_scale.shape))
    return _sign_of_input(round_to_e2m1(div_rn(blocks, divisor[..., None])), blocks), block_scale, raw


def _sign_of_input(codes, blocks):
    """Sets the sign where x < 0, as both tools do: -0 gets code 0, a negative value that rounds to zero gets code 8."""
    return jnp.where(blocks < 0, codes, codes & 7)


def _squared_error(blocks, codes, block_scale, scale):
    """Returns the f32 sum of (x - decoded value)^2 of a block, adding halves: 16 to 8, 4, 2 and 1 values."""
    value = decode_blocks(pack_codes(codes.reshape(*codes.shape[:-2], -1)), block_scale, jnp.float32) * scale
    # The barriers keep XLA from contracting product and sum into one FMA, which would change the last bit. CPUs flush
    # subnormal errors and squares to zero and GPUs do not, so both are flushed here.
    error = flush_subnormals(blocks - lax.optimization_barrier(value).reshape(blocks.shape))
    total = flush_subnormals(lax.optimization_barrier(error * error))
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0]
