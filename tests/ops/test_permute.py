"""permute and depermute: exact against plain Python loops; hypothesis properties; poison; bits of the weighted sum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jax.experimental import checkify

import oracles
from fp4jax import NVFP4Tensor, permute

E, H = 5, 64  # local experts; hidden size (u8 rows are H/2 wide, scales H/16 = 4)
MASKED = ("num_experts", "capacity", "scale_layout", "decode", "checked")
CONTIGUOUS = ("num_experts", "num_rows", "scale_layout", "decode", "checked")
_masked = jax.jit(permute.permute_to_masked, static_argnames=MASKED)
_contiguous = jax.jit(permute.permute_to_contiguous, static_argnames=CONTIGUOUS)
_depermute = jax.jit(permute.depermute_combine)


def _tokens(rng, tokens):
    """u8 rows [T, 32], scale bytes [T, 4] without zeros, row scales f32 [T, 1]."""
    return (
        rng.integers(0, 256, (tokens, H // 2)).astype(np.uint8),
        rng.integers(1, 256, (tokens, H // 16)).astype(np.uint8),
        rng.uniform(0.1, 2, (tokens, 1)).astype(np.float32),
    )


def _e4m3(bytes_):
    return jnp.asarray(bytes_.view(jnp.float8_e4m3fn))


def _bytes(scales):
    return np.asarray(scales).view(np.uint8)


def _linear(scales, layout, rows):
    """Scales of any layout -> linear bytes [E, M, S], by the numpy oracle and never by the library's inverse."""
    scales = _bytes(scales)
    if layout == "linear":
        return scales
    if layout == "m_major":
        return np.swapaxes(scales, -1, -2)
    e, mt, st_ = scales.shape[:3]
    unscrambled = scales.transpose(0, 1, 4, 3, 2, 5).reshape(e, mt * 128, st_ * 4)
    return unscrambled[:, :rows, : H // 16]


def _check_masked(p, x, scales, row_scale, ids, capacity, layout="linear"):
    row_map, counts, dropped, source = oracles.permute_masked(ids, E, capacity)
    np.testing.assert_array_equal(p.masked_m, counts)
    np.testing.assert_array_equal(p.row_map, row_map)
    assert int(p.dropped) == dropped
    assert p.masked_m.dtype == p.row_map.dtype == p.dropped.dtype == jnp.int32
    x_e, row_scale_e = np.asarray(p.x), np.asarray(p.row_scale)
    assert x_e.shape == (E, capacity, x.shape[1]) and row_scale_e.shape == (E, capacity, 1)
    linear = _linear(p.scales, layout, capacity)
    for (e, row), t in source.items():
        np.testing.assert_array_equal(x_e[e, row], x[t])
        np.testing.assert_array_equal(linear[e, row], scales[t])
        assert row_scale_e[e, row, 0] == row_scale[t, 0]
    if layout == "swizzled":
        # Hardware reads these pads: the whole physical array equals the formula's, zeros included.
        expected = np.zeros((E, capacity, H // 16), np.uint8)
        for (e, row), t in source.items():
            expected[e, row] = scales[t]
        np.testing.assert_array_equal(_bytes(p.scales).ravel(), oracles.swizzle(expected))


def _ids(rng, tokens, k, capacity):
    """Distinct experts per token, about a third -1; expert 0 gets no row, expert 1 exactly one, others more."""
    ids = np.argsort(rng.random((tokens, max(k, E))), axis=1)[:, :k]
    ids = np.where((ids >= E) | (rng.random((tokens, k)) < 0.3), -1, ids)
    ids[ids == 0] = -1  # expert 0 stays empty
    ids[ids == 1] = -1
    if tokens > 2:
        ids[tokens // 2] = -1  # an interior token that is not here at all
        ids[tokens // 3, 0] = 1  # expert 1: exactly one row
    return ids.astype(np.int32)


@pytest.mark.parametrize(
    "k, capacity, layout",
    [(k, m, "swizzled") for k in (1, 4, 6, 8) for m in (8, 128, 200)]
    + [(k, m, layout) for k, m in ((4, 8), (6, 200)) for layout in ("linear", "m_major")],
)
def test_masked_against_loops(k, capacity, layout, rng):
    ids = _ids(rng, 96, k, capacity)
    x, scales, row_scale = _tokens(rng, 96)
    p = _masked(
        x, _e4m3(scales), ids, row_scale=row_scale, num_experts=E, capacity=capacity, scale_layout=layout
    )  # fmt: skip
    _check_masked(p, x, scales, row_scale, ids, capacity, layout)


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [256, 2048])
@pytest.mark.parametrize("layout", ["linear", "swizzled"])
def test_masked_large_capacities(capacity, layout, rng):
    # Counts of 0, 1, exactly M, M + 3 (three dropped), and a few: one long column of ids, k = 1.
    ids = np.concatenate([np.full(n, e) for e, n in enumerate([0, 1, capacity, capacity + 3, 7])])
    ids = rng.permutation(ids)[:, None].astype(np.int32)
    x, scales, row_scale = _tokens(rng, len(ids))
    p = _masked(x, _e4m3(scales), ids, row_scale=row_scale, num_experts=E, capacity=capacity, scale_layout=layout)
    assert np.asarray(p.masked_m).tolist() == [0, 1, capacity, capacity, 7] and int(p.dropped) == 3
    _check_masked(p, x, scales, row_scale, ids, capacity, layout)


CASES = {
    "none here": np.full((16, 4), -1),
    "one hot expert": np.full((16, 1), 2) * np.ones((1, 4), int),  # duplicates within every token: two rows and more
    "duplicates": np.tile([3, 3, -1, 3], (16, 1)),
    "interior tokens not here": np.where((np.arange(16) % 3 == 1)[:, None], -1, np.tile([0, 4, 2, 1], (16, 1))),
    "first token not here": np.where((np.arange(16) == 0)[:, None], -1, np.tile([0, 4, 2, 1], (16, 1))),
    "bad ids": np.tile([E, -2, 0, 2**31 - 1], (16, 1)),
    "more bad ids": np.tile([-(2**31), 4, E + 7, -1], (16, 1)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_masked_cases(name, dtype, rng):
    ids = CASES[name].astype(dtype)
    x, scales, row_scale = _tokens(rng, 16)
    run = functools.partial(_masked, num_experts=E, capacity=8, scale_layout="swizzled")
    with jax.enable_x64(dtype == np.int64):
        p = run(x, _e4m3(scales), jnp.asarray(ids), row_scale=row_scale)
    _check_masked(p, x, scales, row_scale, ids, 8, "swizzled")


def test_int64_ids_beyond_32_bits_are_dropped_not_wrapped():
    with jax.enable_x64(True):
        ids = jnp.asarray([[2**32, 1], [2**32 - 1, -(2**32) + 1]], jnp.int64)  # modulo 2^32: 0, -1 and 1
        p = permute.permute_to_masked(jnp.zeros((2, 8), jnp.uint8), None, ids, num_experts=E, capacity=4)
    assert np.asarray(p.row_map).tolist() == [[-1, 4], [-1, -1]] and int(p.dropped) == 3


@pytest.mark.parametrize(
    "how, layout", [("eager", "swizzled"), ("jit", "linear"), ("jit", "m_major"), ("jit", "swizzled")]
)
def test_no_tokens(layout, how):
    x, scales, row_scale = jnp.zeros((0, 32), jnp.uint8), np.zeros((0, 4), np.uint8), jnp.zeros((0, 1), jnp.float32)
    masked, contiguous = (
        (_masked, _contiguous) if how == "jit" else (permute.permute_to_masked, permute.permute_to_contiguous)
    )
    ids = jnp.zeros((0, 4), jnp.int32)
    p = masked(x, _e4m3(scales), ids, row_scale=row_scale, num_experts=E, capacity=8, scale_layout=layout)
    assert p.x.shape == (E, 8, 32) and p.row_map.shape == (0, 4)
    assert not np.asarray(p.masked_m).any() and int(p.dropped) == 0
    if layout == "swizzled":
        assert not _bytes(p.scales).any()
    p = contiguous(x, _e4m3(scales), ids, row_scale=row_scale, num_experts=E, scale_layout="linear")
    assert p.x.shape == (0, 32) and not np.asarray(p.group_sizes).any() and int(p.dropped) == 0
    out = permute.depermute_combine(jnp.zeros((E, 8, 16), jnp.float32), ids, jnp.zeros((0, 4), jnp.float32))
    assert out.shape == (0, 16)


def test_bf16_rows_without_scales(rng):
    x = rng.integers(0, 65536, (16, 32)).astype(np.uint16).view(jnp.bfloat16)  # any bits, NaN payloads too
    ids = CASES["interior tokens not here"].astype(np.int32)
    p = _masked(x, None, ids, num_experts=E, capacity=8)
    row_map, _, _, source = oracles.permute_masked(ids, E, 8)
    np.testing.assert_array_equal(p.row_map, row_map)
    assert p.scales is None and p.row_scale is None
    for (e, row), t in source.items():
        np.testing.assert_array_equal(np.asarray(p.x)[e, row].view(np.uint16), x[t].view(np.uint16))


@pytest.mark.parametrize("own_scales", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_nvfp4_rows_stay_whole(own_scales, rng):
    """An NVFP4Tensor gives the bytes that its parts give, and its scale: that of each row, or the one of all rows."""
    x, scales, row_scale = _tokens(rng, 9)
    scales &= 0x7E  # no NaN
    ids = jnp.asarray(rng.integers(-1, E, (9, 2)), jnp.int32)
    global_scale = jnp.asarray(row_scale) if own_scales else jnp.float32(0.25)
    whole = NVFP4Tensor(jnp.asarray(x), _e4m3(scales), global_scale)
    for permute_rows, options in ((_masked, dict(num_experts=E, capacity=4)), (_contiguous, dict(num_experts=E))):
        parts = permute_rows(whole.qdata, whole.block_scale, ids, row_scale=jnp.asarray(row_scale), **options)
        found = permute_rows(whole, None, ids, **options)
        assert found.scales is None and found.row_scale is None
        np.testing.assert_array_equal(found.x.qdata, parts.x)
        np.testing.assert_array_equal(_bytes(found.x.block_scale), _bytes(parts.scales))
        np.testing.assert_array_equal(found.row_map, parts.row_map)
        expected = parts.row_scale if own_scales else np.float32(0.25)
        np.testing.assert_array_equal(found.x.global_scale, expected)
        decoded = permute_rows(whole, None, ids, decode=True, **options)
        assert decoded.scales is None
        np.testing.assert_array_equal(decoded.row_scale, expected)
        filled = np.unique(np.asarray(found.row_map)[np.asarray(found.row_map) >= 0])
        rows = np.asarray(decoded.x, np.float64).reshape(-1, H)[filled]
        codes, blocks = np.asarray(parts.x).reshape(-1, H // 2), _bytes(parts.scales).reshape(-1, H // 16)
        np.testing.assert_array_equal(rows, oracles.dequantize(codes[filled], blocks[filled], np.float32(1)))


def test_decode_gives_code_times_block_scale(rng):
    x, scales, row_scale = _tokens(rng, 16)
    scales = np.where(scales & 0x7F == 0x7F, 0x38, scales).astype(np.uint8)  # finite: NaN has no value to compare
    ids = CASES["interior tokens not here"].astype(np.int32)
    options = dict(row_scale=row_scale, num_experts=E)
    values = oracles.dequantize(x, scales)
    p = _masked(x, _e4m3(scales), ids, capacity=8, decode=True, **options)
    assert p.x.dtype == jnp.bfloat16 and p.scales is None
    for (e, row), t in oracles.permute_masked(ids, E, 8)[3].items():
        np.testing.assert_array_equal(np.asarray(p.x, np.float64)[e, row], values[t])
        assert np.asarray(p.row_scale)[e, row] == row_scale[t]
    p = _contiguous(x, _e4m3(scales), ids, decode=True, **options)
    source = oracles.permute_contiguous(ids, E, ids.size)[3]
    np.testing.assert_array_equal(np.asarray(p.x, np.float64)[: len(source)], values[source])


# --- properties ---

ROUTES = st.lists(st.integers(-3, E + 2), min_size=12 * 3, max_size=12 * 3)


@given(ids=ROUTES)
def test_masked_properties(ids):
    ids = np.array(ids, np.int32).reshape(12, 3)
    x = np.arange(12 * 8, dtype=np.uint8).reshape(12, 8)  # a row's first byte names its token
    p = _masked(x, None, ids, num_experts=E, capacity=4)
    row_map, masked_m, x_e = np.asarray(p.row_map), np.asarray(p.masked_m), np.asarray(p.x)
    routed = (ids >= 0) & (ids < E)
    kept = row_map >= 0
    # Counts: every route is kept, not here, or dropped.
    assert kept.sum() == masked_m.sum() and (ids != -1).sum() == kept.sum() + int(p.dropped)
    np.testing.assert_array_equal(masked_m, np.minimum(np.bincount(ids[routed], minlength=E), 4))
    # Map round trip: a kept route points into its expert's valid rows, at its own token's data; no row is used twice.
    assert (row_map[kept] // 4 == ids[kept]).all() and (row_map[kept] % 4 < masked_m[ids[kept]]).all()
    assert len(set(row_map[kept])) == kept.sum()
    tokens = np.nonzero(kept)[0]
    np.testing.assert_array_equal(x_e.reshape(E * 4, 8)[row_map[kept]], x[tokens])
    # Stable order: rows count up along (token, slot), and a route is dropped only by a full expert.
    for e in range(E):
        assert row_map[(ids == e) & kept].tolist() == list(range(e * 4, e * 4 + masked_m[e]))
        assert (ids[kept] == e).sum() == 4 or not ((ids == e) & ~kept).any()


@given(ids=ROUTES, num_rows=st.sampled_from([0, 7, 20, 36]))
def test_contiguous_against_loops(ids, num_rows):
    ids = np.array(ids, np.int32).reshape(12, 3)
    x = np.arange(12 * 8, dtype=np.uint8).reshape(12, 8)
    row_scale = np.arange(12, dtype=np.float32)[:, None]
    p = _contiguous(x, _e4m3(x[:, :4]), ids, row_scale=row_scale, num_experts=E, num_rows=num_rows)
    row_map, sizes, dropped, source = oracles.permute_contiguous(ids, E, num_rows)
    np.testing.assert_array_equal(p.row_map, row_map)
    np.testing.assert_array_equal(p.group_sizes, sizes)
    assert int(p.dropped) == dropped and p.x.shape == (num_rows, 8)
    n = len(source)
    np.testing.assert_array_equal(np.asarray(p.x)[:n], x[source])
    np.testing.assert_array_equal(_bytes(p.scales)[:n], x[source, :4])
    np.testing.assert_array_equal(np.asarray(p.row_scale)[:n], row_scale[source])


def test_contiguous_scale_layouts(rng):
    ids = _ids(rng, 96, 4, 0)
    x, scales, row_scale = _tokens(rng, 96)
    _, _, _, source = oracles.permute_contiguous(ids, E, ids.size)
    linear = np.zeros((ids.size, 4), np.uint8)
    linear[: len(source)] = scales[source]
    options = dict(row_scale=row_scale, num_experts=E)
    p = _contiguous(x, _e4m3(scales), ids, scale_layout="m_major", **options)
    np.testing.assert_array_equal(_bytes(p.scales).T[: len(source)], scales[source])
    p = _contiguous(x, _e4m3(scales), ids, scale_layout="swizzled", **options)
    np.testing.assert_array_equal(_bytes(p.scales).ravel(), oracles.swizzle(linear[None]))


# --- poison ---


def test_tokens_that_are_not_here_are_inert(rng):
    ids = CASES["interior tokens not here"].astype(np.int32)
    x, scales, row_scale = _tokens(rng, 16)
    away = (ids == -1).all(1)
    clean = _masked(x, _e4m3(scales), ids, row_scale=row_scale, num_experts=E, capacity=16, scale_layout="swizzled")
    scales[away], row_scale[away], x[away] = 0x7F, np.nan, 0xFF
    poisoned = _masked(x, _e4m3(scales), ids, row_scale=row_scale, num_experts=E, capacity=16, scale_layout="swizzled")
    valid = np.arange(16) < np.asarray(clean.masked_m)[:, None]
    np.testing.assert_array_equal(_bytes(poisoned.scales), _bytes(clean.scales))
    np.testing.assert_array_equal(poisoned.row_map, clean.row_map)
    np.testing.assert_array_equal(np.asarray(poisoned.x)[valid], np.asarray(clean.x)[valid])
    np.testing.assert_array_equal(np.asarray(poisoned.row_scale)[valid], np.asarray(clean.row_scale)[valid])


# --- depermute ---


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("how", ["eager", "jit"])
@pytest.mark.parametrize(("k", "residual"), [(1, False), (4, False), (8, False), (8, True)])
def test_depermute_bits(dtype, how, k, residual, rng):
    # NaN in every row that no route uses and in the weight of every -1 slot; a token without slots is its residual.
    y = rng.standard_normal((E, 16, H)).astype(np.float32).astype(dtype)
    weights = rng.uniform(-1, 1, (24, k)).astype(np.float32)
    row_map = np.stack([rng.permutation(E * 16)[:k] for _ in range(24)]).astype(np.int32)
    row_map[rng.random((24, k)) < 0.3] = -1
    row_map[7] = -1
    unused = np.setdiff1d(np.arange(E * 16), row_map)
    y.reshape(E * 16, H)[unused] = np.nan
    weights[row_map == -1] = np.nan
    added = rng.standard_normal((24, H)).astype(np.float32).astype(dtype) if residual else None
    run = _depermute if how == "jit" else permute.depermute_combine
    operands = [None if a is None else jnp.asarray(a) for a in (row_map, weights, added)]
    out = np.asarray(run(jnp.asarray(y), *operands))
    expected = oracles.depermute(y, row_map, weights, added)
    expected = expected if dtype == jnp.float32 else oracles.round_bf16(expected)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out[7], added[7] if residual else np.zeros(H, dtype))
    np.testing.assert_array_equal(out.astype(np.float32), expected)
    rows = np.asarray(run(jnp.asarray(y.reshape(E * 16, H)), *operands))
    np.testing.assert_array_equal(rows.view(np.uint8), out.view(np.uint8))  # [rows, H] is the same as [E, M, H]


def test_the_sum_with_a_residual_is_rounded_once(rng):
    """Values whose sums are exact in f32: the result is the float64 sum in bf16, which two roundings would miss."""
    y = oracles.round_bf16(rng.integers(-255, 256, (E * 16, H)).astype(np.float32))
    residual = oracles.round_bf16(rng.integers(-255, 256, (24, H)).astype(np.float32) / 64)
    weights = (rng.integers(1, 9, (24, 4)) / 8).astype(np.float32)
    row_map = np.stack([rng.permutation(E * 16)[:4] for _ in range(24)]).astype(np.int32)
    row_map[rng.random((24, 4)) < 0.3] = -1
    exact = np.where((row_map >= 0)[..., None], y.astype(np.float64)[row_map] * weights[..., None], 0).sum(1)
    y[np.setdiff1d(np.arange(E * 16), row_map)] = np.nan
    bf16 = [jnp.asarray(a, jnp.bfloat16) for a in (y, residual)]
    out = np.asarray(_depermute(bf16[0], jnp.asarray(row_map), jnp.asarray(weights), bf16[1]), np.float32)
    np.testing.assert_array_equal(out, oracles.round_bf16((exact + residual).astype(np.float32)))
    assert (out != oracles.round_bf16(oracles.round_bf16(exact.astype(np.float32)) + residual)).any()


def test_derivatives_of_a_residual(rng):
    """Those of the sum: its cotangent goes to the residual unchanged, and to the rows with their weights."""
    y, residual, tangent = (rng.standard_normal(s).astype(np.float32) for s in ((6, H), (3, H), (3, H)))
    row_map, weights = np.array([[0, 2], [-1, 5], [-1, -1]]), np.array([[1, 2], [4, 0.5], [8, 8]], np.float32)
    call = lambda y, r: permute.depermute_combine(y, jnp.asarray(row_map), jnp.asarray(weights), r)  # noqa: E731
    _, pull = jax.vjp(call, jnp.asarray(y), jnp.asarray(residual))
    to_rows, to_residual = pull(jnp.asarray(tangent))
    expected = np.zeros_like(y)
    expected[0], expected[2], expected[5] = tangent[0], 2 * tangent[0], 0.5 * tangent[1]
    np.testing.assert_array_equal(to_rows, expected)
    np.testing.assert_array_equal(to_residual, tangent)


@pytest.mark.parametrize("residual", [np.zeros((3, 8), np.float32), np.zeros((4, 8), np.float16)])
def test_a_residual_that_does_not_fit_is_refused(residual):
    # Exception: jaxtyping may refuse first in tests; the value is in its message as well.
    operands = jnp.zeros((2, 8), jnp.float32), jnp.zeros((4, 2), jnp.int32), jnp.zeros((4, 2), jnp.float32)
    with pytest.raises(Exception, match=r"\(3, 8\)|residual must be float32 \(4, 8\), got float16|f32\[3,8\]"):
        permute.depermute_combine(*operands, jnp.asarray(residual))


def test_permute_then_depermute_sums_the_weights(rng):
    # Powers of two add exactly: out = x * sum of the weights of the kept slots.
    ids = _ids(rng, 96, 4, 8)
    x = rng.standard_normal((96, H)).astype(np.float32)
    weights = np.broadcast_to(np.float32([1, 0.5, 0.25, 0.125]), (96, 4))
    for p, shape in (
        (_masked(x, None, ids, num_experts=E, capacity=8), (E, 8, H)),
        (_contiguous(x, None, ids, num_experts=E), (96 * 4, H)),
    ):
        total = np.where(np.asarray(p.row_map) >= 0, weights, 0).sum(1, keepdims=True)
        expected = oracles.depermute(np.asarray(p.x).reshape(shape), np.asarray(p.row_map), weights)
        np.testing.assert_array_equal(np.asarray(_depermute(p.x, p.row_map, weights)), expected)
        np.testing.assert_allclose(expected, x * total, rtol=3e-7, atol=1e-7)  # four f32 roundings


# --- refusals ---


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"topk_ids": np.zeros((3, 2), np.int32)}, Exception, "3"),
        ({"topk_ids": np.zeros((4, 0), np.int32)}, ValueError, r"\(4, 0\)"),
        ({"topk_ids": np.zeros((4, 2), np.float32)}, Exception, "f(loat)?32"),
        ({"scales": np.zeros((5, 4), np.uint8)}, Exception, "5"),
        ({"row_scale": np.zeros((5, 1), np.float32)}, Exception, "5"),
        ({"num_experts": 0}, ValueError, "0"),
        ({"capacity": 0}, ValueError, "0"),
        ({"scale_layout": "interleaved"}, ValueError, "interleaved"),
        ({"scale_layout": "swizzled", "scales": np.zeros((4, 4), np.float32)}, (TypeError, ValueError), "float32"),
        ({"decode": True, "scales": np.zeros((4, 3), np.uint8)}, ValueError, r"\(4, 3\)"),
        ({"decode": True, "x": np.zeros((4, 32), np.float32)}, (TypeError, ValueError), "float32"),
        ({"decode": True, "x": np.zeros((4, 9), np.uint8), "scales": np.zeros((4, 1), np.uint8)}, ValueError, "(4, 9)"),
        ({"topk_ids": np.zeros((4, 2), np.int8)}, TypeError, "int8"),
        ({"implementation": "triton"}, ValueError, "triton"),
    ],
)
def test_refusals(change, error, message):
    # Exception: jaxtyping may refuse first in tests; the value is in its message as well.
    arrays = dict(x=np.zeros((4, 32), np.uint8), scales=np.zeros((4, 4), np.uint8), topk_ids=np.zeros((4, 2), np.int32))
    arguments = {**arrays, "num_experts": E, "capacity": 8, **change}
    arguments = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    with pytest.raises(error, match=message):
        permute.permute_to_masked(**arguments)
    if "capacity" not in change:
        del arguments["capacity"]
        with pytest.raises(error, match=message):
            permute.permute_to_contiguous(**arguments)


@pytest.mark.parametrize("ids, dropped", [([[0, E], [1, 2]], 1), ([[0, -2], [1, -5]], 2), ([[0, 0], [0, 0]], 2)])
def test_checked_raises(ids, dropped):
    x, ids = jnp.zeros((2, 8), jnp.uint8), jnp.asarray(ids, jnp.int32)
    with pytest.raises(checkify.JaxRuntimeError, match=str(dropped)):
        permute.permute_to_masked(x, None, ids, num_experts=E, capacity=2, checked=True)
    error, p = checkify.checkify(functools.partial(_masked, num_experts=E, capacity=2, checked=True))(x, None, ids)
    assert str(dropped) in error.get() and int(p.dropped) == dropped
    error, _ = checkify.checkify(functools.partial(_masked, num_experts=E, capacity=2, checked=True))(
        x, None, jnp.array([[0, -1], [0, 1]], jnp.int32)
    )
    assert error.get() is None
