"""Block-scale layouts: every byte against the contract's offset formula, and exact inverses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from fp4jax import scale_layout

SHAPES = [(1, 1, 1), (2, 8, 4), (1, 128, 4), (3, 130, 6), (2, 200, 3), (1, 257, 9)]


def _scales(rng, shape, dtype=np.uint8):
    """Random bytes, none of them zero, so that pads can be told from scales."""
    return rng.integers(1, 256, shape).astype(np.uint8).view(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_swizzle_follows_the_offset_formula(shape, rng):
    scales = _scales(rng, shape)
    swizzled = np.asarray(scale_layout.swizzle(jnp.asarray(scales)))
    experts, m, s = shape
    assert swizzled.shape == (experts, -(-m // 128), -(-s // 4), 32, 4, 4)
    np.testing.assert_array_equal(swizzled.ravel(), oracles.swizzle(scales))
    assert (swizzled == 0).sum() == swizzled.size - scales.size  # all pads are zero, nothing else is


@pytest.mark.parametrize("shape", SHAPES)
def test_unswizzle_is_the_inverse_whatever_the_pads_hold(shape, rng):
    scales = _scales(rng, shape)
    swizzled = np.array(scale_layout.swizzle(jnp.asarray(scales)))
    swizzled[swizzled == 0] = 0x7F
    for physical in (swizzled, swizzled.ravel()):
        np.testing.assert_array_equal(scale_layout.unswizzle(jnp.asarray(physical), shape), scales)


def test_consumer_view(rng):
    # The contract's logical view: transposed by (3, 4, 1, 5, 2, 0), element [m%32, m%128//32, m//128, s%4, s//4, e].
    scales = _scales(rng, (2, 200, 6))
    view = np.asarray(scale_layout.swizzle(jnp.asarray(scales))).transpose(3, 4, 1, 5, 2, 0)
    for e, m, s in [(0, 0, 0), (1, 199, 5), (0, 33, 4), (1, 127, 3), (1, 128, 2)]:
        assert view[m % 32, m % 128 // 32, m // 128, s % 4, s // 4, e] == scales[e, m, s]


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_leading_axes_and_e4m3_nan_bytes_survive(lead, rng):
    # Scales are payload: 0x7F and 0xFF (NaN) and 0x80 (-0) must come through as bytes, eager and under jit.
    shape = (*lead, 40, 5)
    scales = _scales(rng, shape)
    scales[..., 0, :3] = (0x7F, 0xFF, 0x80)
    e4m3 = jnp.asarray(scales.view(jnp.float8_e4m3fn))
    for wrap in (lambda f: f, jax.jit):
        swizzled = wrap(scale_layout.swizzle)(e4m3)
        back = wrap(lambda s: scale_layout.unswizzle(s, shape))(swizzled)
        assert swizzled.dtype == back.dtype == jnp.float8_e4m3fn
        np.testing.assert_array_equal(np.asarray(back).view(np.uint8), scales)


@pytest.mark.parametrize("shape", SHAPES)
def test_m_major(shape, rng):
    scales = _scales(rng, shape)
    m_major = scale_layout.to_m_major(jnp.asarray(scales))
    np.testing.assert_array_equal(m_major, np.stack([s.T for s in scales]))


def test_refusals():
    with pytest.raises(ValueError, match=r"512.*\(511,\)"):
        scale_layout.unswizzle(jnp.zeros(511, jnp.uint8), (1, 8, 4))
    with pytest.raises(Exception, match=r"\(4,\)|u8\[4\]"):  # by jaxtyping in tests, by the library without it
        scale_layout.swizzle(jnp.zeros(4, jnp.uint8))
