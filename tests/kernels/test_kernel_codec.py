"""The arithmetic of the GPU kernels as plain functions, against the numpy oracles; no kernel runs here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import oracles
from fp4jax import nvfp4
from fp4jax.quant_config import schemas
from fp4jax.swiglu import swiglu_quantize
from pallas_kernels.rows import nvfp4_codec
from pallas_kernels.rows.swiglu_quantize import swiglu
from pallas_kernels.simt import formats, lanes

pytestmark = pytest.mark.usefixtures("quick_compile")

F32 = np.float32


@pytest.fixture(autouse=True)
def plain_jnp():
    with lanes.interpreting(), jax.default_device(jax.devices("cpu")[0]):
        yield


def test_quant_config_which_imports_no_kernels_has_the_same_blocks():
    assert schemas.BLOCK_SIZE == formats.BLOCK_SIZE == 16
    assert schemas.FP8_BLOCK == (formats.FP8_BLOCK, formats.FP8_BLOCK) == (128, 128)


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


def test_decode_word_of_every_code_and_scale():
    codes = np.tile(np.arange(16, dtype=np.uint8), (256, 1))
    qdata, scale = oracles.pack(codes), np.arange(256, dtype=np.uint8)
    value = nvfp4_codec.e4m3_value(jnp.asarray(scale, jnp.uint32))
    values = [v for w in qdata.view(np.uint32).T for v in nvfp4_codec.decode_word(jnp.asarray(w), value)]
    expected = oracles.dequantize(qdata, scale[:, None])
    np.testing.assert_array_equal(np.stack(values, -1), expected)
    packed = np.stack(nvfp4_codec.pack_exact_bf16(values), -1).view(np.uint16)  # exact: no bit may be lost
    np.testing.assert_array_equal((packed.astype(np.uint32) << 16).view(F32), expected.astype(F32))  # NaN of NaN scales


@functools.partial(jax.jit, static_argnames="four_over_six")
def _encode_block(values, g, *, four_over_six):
    scales = nvfp4_codec.encode_scales(g)
    return nvfp4_codec.encode_block(values, nvfp4_codec.block_amax(values), scales, four_over_six)


@pytest.mark.parametrize("four_over_six", [False, True])
@pytest.mark.parametrize(
    "g", [0.0123, 2.0**-100, *(pytest.param(g, marks=pytest.mark.slow) for g in (1.0, 2.0**100, 77777.0))]
)
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
    encoded = _encode_block(values, F32(g), four_over_six=four_over_six)
    oracle = oracles.quantize_four_over_six if four_over_six else oracles.quantize_exact
    qdata, scale_bytes = oracle(blocks, F32(g))
    np.testing.assert_array_equal(np.asarray(encoded.scale_byte), scale_bytes[:, 0])
    np.testing.assert_array_equal(np.stack(encoded.words, -1).view(np.uint8), qdata)


def test_silu_of_every_bf16_within_4_ulp():
    bf16 = oracles.all_bf16()
    x = bf16[np.isfinite(bf16)]
    expected = oracles.silu(x)
    bits = (x.view(np.uint32) >> 16).reshape(-1, 16)
    words = jnp.asarray(bits[:, 0::2] | bits[:, 1::2] << 16)
    ones = [jnp.full(len(words), 0x3F803F80, jnp.uint32)] * 8
    got = np.stack(swiglu(list(words.T), ones)[0], -1).ravel().astype(np.float64)
    normal = np.abs(expected) >= oracles.F32_TINY
    ulp = np.spacing(np.abs(expected[normal]).astype(F32)).astype(np.float64)
    assert (np.abs(got - expected)[normal] / ulp).max() < 4
    assert np.abs(got[~normal]).max() <= oracles.F32_TINY


@pytest.mark.parametrize("gate", [-87.5, -88.0, -88.5, -100.0])
def test_one_far_gate_in_any_place_of_a_block(gate):
    """1 / (1 + e^88) is no normal number: the block is done again, wherever of the 16 the gate stands."""
    gates = np.ones((16, 16), F32)
    np.fill_diagonal(gates, gate)
    bits = gates.view(np.uint32) >> 16
    words, twos = jnp.asarray(bits[:, 0::2] | bits[:, 1::2] << 16), [jnp.full(16, 0x40004000, jnp.uint32)] * 8
    values, amax = swiglu(list(words.T), twos)
    found, expected = np.stack(values, -1).astype(np.float64), 2 * oracles.silu(gates)
    normal = np.abs(expected) >= oracles.F32_TINY
    np.testing.assert_allclose(found[normal], expected[normal], rtol=2.0**-21)  # 4 ulp
    assert normal.all() or gate < -91
    np.testing.assert_array_equal(amax, found.max(axis=1))


def test_silu_of_inf_and_nan():
    words = [jnp.asarray([0x00007F80, 0x00007FC0, 0x00000000, 0xFF800000], jnp.uint32)] * 8  # inf, NaN, 0, -inf
    ones = [jnp.full(4, 0x3F803F80, jnp.uint32)] * 8
    low, high = (np.asarray(v) for v in swiglu(words, ones)[0][:2])
    assert low[0] == np.inf and np.isnan(low[1]) and low[2] == 0
    assert np.isnan(high[3])


@pytest.mark.slow
def test_swiglu_of_gates_and_ups_that_are_not_finite(rng):
    """One of 16 gates or ups, in every place; with finite partners, zeros and each other."""
    bad = np.array([np.nan, -np.nan, np.inf, -np.inf], F32)
    pairs = [(b, u) for b in bad for u in (1.5, -2, 0, *bad)] + [(g, b) for b in bad for g in (1.5, -2, -90, 0)]
    gates, ups = (np.tile(rng.standard_normal((len(pairs), 1, 16)), (1, 16, 1)) for _ in range(2))
    for i, pair in enumerate(pairs):
        gates[i, range(16), range(16)], ups[i, range(16), range(16)] = pair
    gates, ups = (jnp.asarray(a.reshape(-1, 16), jnp.bfloat16) for a in (gates, ups))
    words = [list(lax.bitcast_convert_type(a.reshape(-1, 8, 2), jnp.uint32).T) for a in (gates, ups)]
    values, amax = swiglu(*words)
    gate_up = jnp.concatenate([gates, ups], axis=1)
    expected = swiglu_quantize(gate_up, None, global_scale=None, out="bf16", implementation="xla")
    expected = np.asarray(expected, F32)
    got = np.asarray(jnp.stack(values, -1).astype(jnp.bfloat16), F32)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    np.testing.assert_array_equal(got[np.isinf(expected)], expected[np.isinf(expected)])
    assert (~np.isfinite(got)).any(1).all() and np.isnan(amax).all()


@pytest.mark.parametrize(
    "bad", [np.nan, *(pytest.param(bad, marks=pytest.mark.slow) for bad in (-np.nan, np.inf, -np.inf))]
)
@pytest.mark.parametrize("four_over_six", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_block_with_nan_or_inf_has_the_bits_of_the_xla_quantizer(bad, four_over_six, rng):
    x = rng.standard_normal((64, 16)).astype(F32)
    x[np.arange(64), rng.integers(0, 16, 64)] = bad
    expected = nvfp4.quantize(jnp.asarray(x), global_scale=0.01, four_over_six=four_over_six, implementation="xla")
    values = [jnp.asarray(v) for v in x.T]
    encoded = _encode_block(values, F32(0.01), four_over_six=four_over_six)
    np.testing.assert_array_equal(encoded.scale_byte, np.asarray(expected.block_scale)[:, 0].view(np.uint8))
    np.testing.assert_array_equal(np.stack(encoded.words, -1).view(np.uint8), np.asarray(expected.qdata))
    assert (np.asarray(encoded.scale_byte) == 0x7F).all() and not np.stack(encoded.words).any()
    decoded = np.stack(nvfp4_codec.decoded_bf16(encoded, values), -1).view(np.uint16)
    assert np.isnan((decoded.astype(np.uint32) << 16).view(F32)).all()
