"""Every dialect byte for byte on blocks worked out by hand; the arithmetic stands next to each case.

e4m3 bytes used below: 0x01 = 2^-9, 0x20 = 0.125, 0x30 = 0.5, 0x38 = 1, 0x3A = 1.25, 0x3C = 1.5, 0x40 = 2, 0x7E = 448.
Codes: 0 .5 1 1.5 2 3 4 6 -> 0..7, plus 8 when negative; the even element in the low nibble.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp4jax import nvfp4

_JIT = jax.jit(nvfp4.quantize, static_argnames=("dialect", "four_over_six"))
# Eagerly, each operation is compiled for itself: slow, and less for the compiler to rewrite than under jit.
JIT_AND_SLOWLY_EAGER = ["jit", pytest.param("eager", marks=pytest.mark.slow)]
_QUANTIZE = {"eager": nvfp4.quantize, "jit": _JIT}


def _run(block, scale, dialect, how="eager", **options):
    """One block [16] (shorter ones are filled with zeros) -> (scale byte, codes as a list of 16)."""
    x = np.zeros((1, 16), np.float32)
    x[0, : len(block)] = block
    t = _QUANTIZE[how](jnp.asarray(x), global_scale=jnp.float32(scale), dialect=dialect, **options)
    nibbles = [n for byte in np.asarray(t.qdata)[0].tolist() for n in (byte & 15, byte >> 4)]
    return int(np.asarray(t.block_scale).view(np.uint8)[0, 0]), nibbles


def _fill(codes):
    return codes + [0] * (16 - len(codes))


# amax 6, global scale 1: every dialect computes the block scale 6 / 6 = 1, so each value is its own e2m1 input.
TIES = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -6]
TIE_CODES = [7, 0, 2, 2, 4, 4, 6, 6, 8, 10, 10, 12, 12, 14, 14, 15]


@pytest.mark.parametrize("how", ["jit", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dialect", nvfp4.DIALECTS)
def test_ties_go_to_the_even_code(dialect, how):
    assert _run(TIES, 1.0, dialect, how) == (0x38, TIE_CODES)


@pytest.mark.parametrize("how", JIT_AND_SLOWLY_EAGER)
@pytest.mark.parametrize("dialect", nvfp4.DIALECTS)
def test_all_codes(dialect, how):
    # amax 12 at global scale 2: scale 12 / (6 * 2) = 1, so value = code * 1 * 2.
    block = [0, 1, 2, 3, 4, 6, 8, 12, -1, -2, -3, -4, -6, -8, -12, 0]
    codes = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 0]
    assert _run(block, 2.0, dialect, how) == (0x38, codes)


@pytest.mark.parametrize("how", JIT_AND_SLOWLY_EAGER)
@pytest.mark.parametrize(
    "dialect, scale_byte",
    [("exact", 0x00), ("modelopt", 0x38), ("compressed_tensors", 0x20)],  # 0, 1.0, 0.125
)
def test_zero_block(dialect, scale_byte, how):
    assert _run([0.0], 1.0, dialect, how) == (scale_byte, [0] * 16)


@pytest.mark.parametrize("how", JIT_AND_SLOWLY_EAGER)
@pytest.mark.parametrize(
    "dialect, minus_zero",
    [("exact", 8), ("modelopt", 0), ("compressed_tensors", 0)],
)
def test_sign_of_zero(dialect, minus_zero, how):
    # -0: exact keeps the sign bit; both tools take the sign from x < 0. A negative that rounds to zero (-0.1) is
    # code 8 everywhere.
    assert _run([6, -0.0, -0.1, 0.1], 1.0, dialect, how) == (0x38, _fill([7, minus_zero, 8, 0]))


@pytest.mark.parametrize("how", JIT_AND_SLOWLY_EAGER)
@pytest.mark.parametrize(
    "dialect, scale_byte, codes",
    [
        # x = 2^-13, amax / 6 = 2^-15.6, below 2^-10 (half the smallest scale): rounds to 0.
        ("exact", 0x00, [7, 15]),  # scale 0, multiplier FLT_MAX: saturated codes that decode as zero
        ("modelopt", 0x01, [0, 8]),  # clamped to 2^-9: 2^-13 / 2^-9 = 1/16 -> code 0
        ("compressed_tensors", 0x20, [0, 8]),  # 0 becomes 0.125: 2^-13 / 0.125 = 2^-10 -> code 0
    ],
)
def test_underflowing_block(dialect, scale_byte, codes, how):
    assert _run([2.0**-13, -(2.0**-13)], 1.0, dialect, how) == (scale_byte, _fill(codes))


@pytest.mark.parametrize("how", JIT_AND_SLOWLY_EAGER)
@pytest.mark.parametrize("dialect", nvfp4.DIALECTS)
def test_smallest_scale(dialect, how):
    # amax = 2^-7: amax / 6 = 0.67 * 2^-9, the nearest scale is 2^-9. 2^-7 / 2^-9 = 4 -> code 6; 1.5 * 2^-9 / 2^-9 = 1.5
    # -> code 3.
    assert _run([2.0**-7, 1.5 * 2.0**-9], 1.0, dialect, how) == (0x01, _fill([6, 3]))


@pytest.mark.parametrize("how", JIT_AND_SLOWLY_EAGER)
@pytest.mark.parametrize("dialect", nvfp4.DIALECTS)
def test_saturating_block(dialect, how):
    # amax 4480: 4480 / 6 = 746.7 is clipped to 448. 4480 / 448 = 10 -> 6; 896 / 448 = 2; -1344 / 448 = -3;
    # 112 / 448 = 0.25 -> 0.
    assert _run([4480, 896, -1344, 112], 1.0, dialect, how) == (0x7E, _fill([7, 4, 13, 0]))


@pytest.mark.parametrize("how", JIT_AND_SLOWLY_EAGER)
@pytest.mark.parametrize("dialect", nvfp4.DIALECTS)
def test_scale_rounds_to_even(dialect, how):
    # amax 6.375: scale 1.0625 is midway between 1 (even mantissa) and 1.125: 1. 6.375 / 1 -> 6.
    assert _run([6.375, 3], 1.0, dialect, how) == (0x38, _fill([7, 5]))
    # amax 7.125: 1.1875 is midway between 1.125 (odd) and 1.25: 1.25. 7.125 / 1.25 = 5.7 -> 6; 3.125 / 1.25 = 2.5, tie
    # -> 2; 4.375 / 1.25 = 3.5, a tie -> 4. exact: f32(1/1.25) = 0.800000012, but the products round to 2.5 and 3.5.
    assert _run([7.125, 3.125, 4.375], 1.0, dialect, how) == (0x3A, _fill([7, 4, 6]))


@pytest.mark.parametrize("how", JIT_AND_SLOWLY_EAGER)
@pytest.mark.parametrize(
    "block, scale, scale_byte, code_of",
    [
        # Block scale 5.625 / 6 = 0.9375 (0x37); 2.34375 / 0.9375 = 2.5 exactly, a tie: 2 (code 4). exact multiplies by
        # f32(1 / 0.9375) = 1.06666672 (above 16/15): 2.50000013, which in f32 is 2.50000024: 3 (code 5).
        ([5.625, 2.34375], 1.0, 0x37, {"exact": 5, "modelopt": 4, "compressed_tensors": 4}),
        # Global scale 7, block scale 21 / (6 * 7) = 0.5 (0x30). modelopt: 8.75 / (0.5 * 7) = 2.5, a tie: code 4.
        # compressed_tensors: gs = f32(1/7) = 0.142857149, 0.5 / gs = 3.49999976, 8.75 / that = 2.50000024: code 5.
        # exact: 1/gs = 6.99999952, times 0.5 = 3.49999976, 1/that = 0.2857143, times 8.75 = 2.5: code 4.
        ([21, 8.75], 7.0, 0x30, {"exact": 4, "modelopt": 4, "compressed_tensors": 5}),
    ],
)
def test_reciprocals_decide_ties(block, scale, scale_byte, code_of, how):
    for dialect in nvfp4.DIALECTS:
        assert _run(block, scale, dialect, how) == (scale_byte, _fill([7, code_of[dialect]])), dialect


@pytest.mark.parametrize("how", JIT_AND_SLOWLY_EAGER)
def test_computed_global_scales(how):
    # amax 2688 * 2: s2 = 2 in decode direction, for all dialects; block amax 5376: 5376 / (6 * 2) = 448.
    x = np.zeros((1, 32), np.float32)
    x[0, 0], x[0, 16], x[0, 17] = 5376, 12, -6
    for dialect in nvfp4.DIALECTS:
        t = _QUANTIZE[how](jnp.asarray(x), dialect=dialect)
        assert float(t.global_scale) == 2.0
        assert np.asarray(t.block_scale).view(np.uint8)[0].tolist() == [0x7E, 0x38]  # 448; 12 / 12 = 1
        assert np.asarray(t.qdata)[0, [0, 8]].tolist() == [0x07, 0xD7]  # 6; 12 / 2 = 6 and -6 / 2 = -3 (code 13)


@pytest.mark.parametrize("how", JIT_AND_SLOWLY_EAGER)
@pytest.mark.parametrize("dialect, zero_scale", [("exact", 0), ("modelopt", 0x38), ("compressed_tensors", 0x20)])
def test_all_zero_tensor(dialect, zero_scale, how):
    # amax 0: the global scale is 1 (compressed-tensors does the same; ModelOpt divides 0 by 0 there).
    t = _QUANTIZE[how](jnp.zeros((2, 32), jnp.float32), dialect=dialect)
    assert float(t.global_scale) == 1.0
    assert (np.asarray(t.block_scale).view(np.uint8) == zero_scale).all() and not np.asarray(t.qdata).any()


@pytest.mark.parametrize("how", JIT_AND_SLOWLY_EAGER)
@pytest.mark.parametrize(
    "block, scale_byte, codes",
    [
        # amax 6. Scale 6/6 = 1 stores 6 and 4.5 -> 4 (error 0.5^2 = 0.25). Scale 6/4 = 1.5 stores 6 = 4 * 1.5 and
        # 4.5 = 3 * 1.5 exactly: error 0, four wins.
        ([6, 4.5], 0x3C, [6, 5]),
        # amax 6 with 4: scale 1 is exact, scale 1.5 gives 4/1.5 = 2.67 -> 3 * 1.5 = 4.5 (error 0.25): six wins.
        ([6, 4], 0x38, [7, 6]),
        # amax 12 alone: 12 = 6 * 2 = 4 * 3, both exact: a tie, six wins.
        ([12], 0x40, [7]),
        # amax 2688: scale 448 stores it as 6 * 448; 2688 / 4 = 672 is clipped to 448, so 6 * 448 as well: a tie.
        ([2688], 0x7E, [7]),
    ],
)
def test_four_over_six(block, scale_byte, codes, how):
    assert _run(block, 1.0, "exact", how, four_over_six=True) == (scale_byte, _fill(codes))


def test_four_over_six_computed_scale():
    # amax 1536 * 2 / 1536 = 2: the largest block has scale 3072 / (6 * 2) = 256, or 384 with four, below 448.
    x = np.zeros((1, 16), np.float32)
    x[0, :2] = 3072, 2304  # 2304 = 3 * 384 * 2 is exact with four; with six 2304 / 512 = 4.5 -> 4
    t = nvfp4.quantize(jnp.asarray(x), four_over_six=True)
    assert float(t.global_scale) == 2.0
    assert np.asarray(t.block_scale).view(np.uint8)[0, 0] == 0x7C  # 384 = 1.5 * 2^8: exponent 15, mantissa 4
    assert np.asarray(t.qdata)[0, 0] == 0x56
