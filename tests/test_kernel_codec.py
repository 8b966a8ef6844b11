"""The arithmetic of the GPU kernels as plain functions, against the numpy oracles; no kernel runs here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from pallas_kernels import lanes, nvfp4_codec
from pallas_kernels.quantize import swizzled_offset
from pallas_kernels.schedule import unit_ends
from pallas_kernels.swiglu_quantize import silu

F32 = np.float32


@pytest.fixture(autouse=True)
def plain_jnp():
    with lanes.interpreting():
        yield


def _around(values, steps=3):
    """f32 neighbours of every value, `steps` to each side, without negatives."""
    bits = np.asarray(values, F32).view(np.int32)[:, None] + np.arange(-steps, steps + 1)
    around = bits.astype(np.int32).view(F32).ravel()
    return around[np.isfinite(around) & (around >= 0)]


def test_round_to_e2m1_next_to_every_midpoint_and_elsewhere(rng):
    x = np.concatenate(
        [
            _around(np.arange(0, 65) / 8),
            rng.uniform(0, 8, 100_000).astype(F32),
            (2.0 ** rng.uniform(-140, 127, 100_000)).astype(F32),
            [np.inf, oracles.F32_MAX],
        ]
    )
    x = np.where(x < oracles.F32_TINY, 0, x)  # lanes.abs_mul_flush leaves none
    codes = np.asarray(nvfp4_codec.round_to_e2m1(jnp.asarray(x)))
    np.testing.assert_array_equal(codes - 2.0**23, oracles.round_e2m1(x))
    np.testing.assert_array_equal(
        np.asarray(nvfp4_codec.code_value(jnp.asarray(codes))), oracles.E2M1[oracles.round_e2m1(x)]
    )


def test_round_to_e4m3_next_to_every_midpoint_and_elsewhere(rng):
    midpoints = (oracles.E4M3[1:] + oracles.E4M3[:-1]) / 2
    x = np.concatenate(
        [_around(midpoints), _around(oracles.E4M3), _around([464, 480]), (2.0 ** rng.uniform(-30, 12, 100_000))]
    ).astype(F32)
    byte, value = nvfp4_codec.round_to_e4m3(jnp.asarray(x))
    np.testing.assert_array_equal(np.asarray(byte), oracles.round_e4m3(x))
    np.testing.assert_array_equal(np.asarray(value), oracles.decode_e4m3(np.asarray(byte)))
    byte, value = nvfp4_codec.round_to_e4m3(jnp.full(1, np.nan, F32))
    assert byte[0] == 0x7F and np.isnan(value[0])


def test_e4m3_value_of_every_byte():
    byte = np.arange(256, dtype=np.uint32)
    np.testing.assert_array_equal(
        np.asarray(nvfp4_codec.e4m3_value(jnp.asarray(byte))), oracles.decode_e4m3(byte).astype(F32)
    )


def test_decode_block_of_every_code_and_scale():
    codes = np.tile(np.arange(16, dtype=np.uint8), (256, 1))
    qdata, scale = oracles.pack(codes), np.arange(256, dtype=np.uint8)
    words = qdata.view(np.uint32)
    values = nvfp4_codec.decode_block([jnp.asarray(w) for w in words.T], jnp.asarray(scale, jnp.uint32))
    expected = oracles.dequantize(qdata, scale[:, None])
    np.testing.assert_array_equal(np.stack(values, -1), expected)
    finite = scale & 127 != 127
    packed = np.stack(nvfp4_codec.pack_exact_bf16(values), -1).view(np.uint16)  # exact: no bit may be lost
    np.testing.assert_array_equal((packed.astype(np.uint32) << 16).view(F32)[finite], expected[finite].astype(F32))


@pytest.mark.parametrize("four_over_six", [False, True])
@pytest.mark.parametrize("g", [1.0, 0.0123, 2.0**-100, 2.0**100, 77777.0])
def test_encode_block(four_over_six, g, rng):
    bf16 = oracles.all_bf16()
    bf16 = np.where(np.isfinite(bf16), bf16, 0)
    blocks = np.concatenate(
        [
            rng.permutation(bf16).reshape(-1, 16),
            rng.standard_normal((4096, 16)) * g * 2.0 ** rng.uniform(-12, 14, (4096, 1)),
            rng.integers(-48, 49, (512, 16)) / 8 * g,
            np.zeros((1, 16)),
        ]
    ).astype(F32)
    values = [jnp.asarray(v) for v in blocks.T]
    scales = nvfp4_codec.encode_scales(F32(g))
    encode = jax.jit(lambda v: nvfp4_codec.encode_block(v, nvfp4_codec.block_amax(v), scales, four_over_six))
    encoded = encode(values)
    oracle = oracles.quantize_four_over_six if four_over_six else oracles.quantize_exact
    qdata, scale_bytes = oracle(blocks, F32(g))
    np.testing.assert_array_equal(np.asarray(encoded.scale_byte), scale_bytes[:, 0])
    np.testing.assert_array_equal(np.stack(encoded.words, -1).view(np.uint8), qdata)


def test_silu_within_4_ulp():
    bf16 = oracles.all_bf16()
    bf16 = bf16[np.isfinite(bf16)]
    x = np.concatenate([np.linspace(-110, 110, 400_001), np.linspace(-1, 1, 50_001), bf16]).astype(F32)
    expected = oracles.silu(x)
    got = np.asarray(silu(jnp.asarray(x)), np.float64)
    normal = np.abs(expected) >= oracles.F32_TINY
    ulp = np.spacing(np.abs(expected[normal]).astype(F32)).astype(np.float64)
    assert (np.abs(got - expected)[normal] / ulp).max() < 4
    assert np.abs(got[~normal]).max() <= oracles.F32_TINY
    assert silu(jnp.full(1, np.inf, F32))[0] == np.inf and np.isnan(silu(jnp.full(1, np.nan, F32))[0])


@pytest.mark.parametrize("experts, m, blocks", [(1, 5, 3), (3, 200, 6), (2, 128, 48)])
def test_swizzled_offset(experts, m, blocks):
    scales = np.arange(1, experts * m * blocks + 1) % 255 + 1  # no zero, which marks pads
    scales = scales.astype(np.uint8).reshape(experts, m, blocks)
    row, column = np.divmod(np.arange(scales.size, dtype=np.int32), blocks)
    out = np.zeros_like(oracles.swizzle(scales))
    out[np.asarray(swizzled_offset(jnp.asarray(row), jnp.asarray(column), m, blocks))] = scales.ravel()
    np.testing.assert_array_equal(out, oracles.swizzle(scales))


def test_unit_ends_count_whole_units_of_clipped_rows():
    ends = unit_ends(jnp.array([0, 3, 9, -1, 1], jnp.int32), 8, per_row=5, per_unit=16)
    np.testing.assert_array_equal(ends, np.cumsum([0, 1, 3, 0, 1]))
