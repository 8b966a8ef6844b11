"""dispatch / combine against plain Python loops, and the layer across devices against one device, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P

import oracles
from fp4jax.expert_parallel import agree_global_scale, all_to_all, combine, dispatch, from_fp8, wire_bytes
from fp4jax.moe import MoEConfig, MoEWeights, dense_moe, moe_layer
from fp4jax.nvfp4 import NVFP4Tensor, dequantize, quantize
from fp4jax.permute import permute_to_masked
from oracles import ALL_NVFP4, W4A4

pytestmark = pytest.mark.usefixtures("quick_compile")

EP = P("ep")


def sharded(mesh, fn, in_specs=EP, out_specs=EP):
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def as_bytes(array):
    return np.ascontiguousarray(np.asarray(array)).view(np.uint8)


def same_bits(a, b):
    return all(
        np.array_equal(as_bytes(p), as_bytes(q)) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- dispatch and combine against loops ---


@pytest.mark.parametrize("form", ["per_peer", "per_slot"])
@pytest.mark.parametrize(("devices", "pair_capacity"), [(4, None), (4, 3), (2, None)])
def test_dispatch_and_combine_against_loops(make_mesh, rng, form, devices, pair_capacity):
    tokens, k, num_experts, hidden = 7, 3, 8, 32
    ids = rng.integers(-2, num_experts + 2, (devices, tokens, k)).astype(np.int32)
    ids[:, 2] = -1  # an interior token that goes nowhere
    ids[0, :, :] = num_experts - 1  # one sender sends everything, each token k times, to one expert
    weights = rng.standard_normal((devices, tokens, k)).astype(np.float32)
    x = jnp.asarray(rng.standard_normal((devices * tokens, hidden)), jnp.bfloat16)
    capacity = pair_capacity or (tokens if form == "per_peer" else tokens * k)
    rows = rng.standard_normal((devices, devices * capacity, hidden)).astype(np.float32)
    y = jnp.asarray(rows.reshape(-1, hidden))  # f32: bf16 would hide in which order they are added

    def body(x, ids, weights, y):
        d = dispatch(
            x, ids, weights, num_experts=num_experts, form=form, wire_format="bf16", pair_capacity=pair_capacity
        )
        d = d._replace(dropped=d.dropped[None])
        home = weights if form == "per_slot" else None
        back = [combine(rows, d, topk_weights=home) for rows in (y, y.astype(jnp.bfloat16))]
        return d, [*back, combine(y.astype(jnp.bfloat16), d, x, topk_weights=home)]

    flat_ids, flat_weights = (jnp.asarray(a.reshape(devices * tokens, k)) for a in (ids, weights))
    d, (out, narrow, added) = sharded(make_mesh(devices), body)(x, flat_ids, flat_weights, y)

    received, send_map, dropped = oracles.reference_dispatch(ids, devices, num_experts, form, capacity)
    assert np.array_equal(np.asarray(d.dropped), dropped)
    assert np.array_equal(np.asarray(d.send_map).reshape(send_map.shape), send_map)
    got_x = np.asarray(d.x, np.float32).reshape(devices, devices * capacity, hidden)
    got_ids = np.asarray(d.local_ids).reshape(devices, devices * capacity, -1)
    got_weights = np.asarray(d.local_weights).reshape(devices, devices * capacity, -1)
    local = num_experts // devices
    x_np = np.asarray(x, np.float32).reshape(devices, tokens, hidden)
    for receiver in range(devices):
        for row in range(devices * capacity):
            if row not in received[receiver]:
                assert (got_ids[receiver, row] == -1).all()
                continue
            sender, t, slots = received[receiver][row]
            assert np.array_equal(got_x[receiver, row], x_np[sender, t])
            if form == "per_slot":
                assert got_ids[receiver, row] == ids[sender, t, slots[0]] - receiver * local
                assert got_weights[receiver, row] == 1
                continue
            for j in range(k):
                expected = ids[sender, t, j] - receiver * local if j in slots else -1
                assert got_ids[receiver, row, j] == expected
                assert j not in slots or got_weights[receiver, row, j] == weights[sender, t, j]

    # The way back: products rounded to f32, added in slot or rank order; then a residual, and bf16 rows are rounded
    # once, after that.
    y_np = rows.reshape(devices, devices, capacity, hidden)  # [expert side, sender, C, H]
    narrow_np = oracles.round_bf16(y_np)
    out, narrow, added = (np.asarray(a, np.float32).reshape(devices, tokens, hidden) for a in (out, narrow, added))
    ways = (
        (out, y_np, None, np.float32), (narrow, narrow_np, None, oracles.round_bf16),
        (added, narrow_np, x_np, oracles.round_bf16),
    )  # fmt: skip
    for sender in range(devices):
        for t in range(tokens):
            for found, returned, residual, finish in ways:
                total = np.zeros(hidden, np.float32)
                for s, row in enumerate(send_map[sender, t]):
                    if row >= 0:
                        weight = weights[sender, t, s] if form == "per_slot" else np.float32(1)
                        total = total + returned[row // capacity, sender, row % capacity] * weight
                if residual is not None:
                    total = total + residual[sender, t]
                assert np.array_equal(found[sender, t], finish(total))


@pytest.mark.parametrize("form", ["per_peer", "per_slot"])
def test_ids_of_64_bits_do_not_wrap_into_experts(make_mesh, form):
    """They are dropped and counted, and nothing of theirs arrives."""
    bad = [2**32, 2**32 + 3, -(2**32) + 1, 2**63 - 1]

    def body(x, ids):
        d = dispatch(x, ids, jnp.ones(ids.shape, jnp.float32), num_experts=4, form=form, wire_format="bf16")
        return d.local_ids, d.send_map, d.dropped[None]

    with jax.enable_x64():
        ids = jnp.array([[2, bad[0]], [bad[1], bad[2]], [bad[3], -1], [0, 3]], jnp.int64)
        local_ids, send_map, dropped = sharded(make_mesh(2), body)(jnp.ones((4, 32), jnp.bfloat16), ids)
    assert np.asarray(dropped).tolist() == [3, 1]
    here = np.asarray(local_ids)
    assert sorted(here[here >= 0].tolist()) == [0, 0, 1]  # expert 0 of device 0, experts 2 and 3 of device 1
    expected = {"per_peer": [[-1, 2], [-1, -1], [-1, -1], [0, 2]], "per_slot": [[4, -1], [-1, -1], [-1, -1], [0, 4]]}
    assert np.asarray(send_map).tolist() == expected[form]


@pytest.mark.parametrize("form", ["per_peer", "per_slot"])
@pytest.mark.parametrize("scale", [None, "per_token", 0.01])
def test_no_tokens_at_all(make_mesh, form, scale):
    def body(x, ids):
        d = dispatch(x, ids, jnp.ones(ids.shape, jnp.float32), num_experts=4, form=form, global_scale=scale)
        return d.send_map, d.local_ids, d.dropped[None]

    x, ids = jnp.zeros((0, 32), jnp.bfloat16), jnp.zeros((0, 2), jnp.int32)
    send_map, local_ids, dropped = sharded(make_mesh(2), body)(x, ids)
    assert send_map.shape == (0, 2)
    assert (np.asarray(local_ids) == -1).all()
    assert np.asarray(dropped).tolist() == [0, 0]


@pytest.mark.parametrize(
    "scale_mode", ["per_token", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("agreed", "static"))]
)
def test_nvfp4_payload_is_what_the_sender_quantized(make_mesh, rng, scale_mode):
    devices, tokens, hidden = 2, 8, 64
    x = jnp.asarray(rng.standard_normal((devices * tokens, hidden)) * ([[1]] * tokens + [[30]] * tokens), jnp.bfloat16)
    ids = jnp.tile(jnp.array([[0, 3]], jnp.int32), (devices * tokens, 1))  # both devices get every token
    given = {"agreed": None, "per_token": "per_token", "static": 0.013}[scale_mode]

    def body(x, ids):
        scale = jnp.float32(given) if scale_mode == "static" else given
        d = dispatch(x, ids, jnp.ones(ids.shape, jnp.float32), num_experts=4, global_scale=scale)
        return d.x if d.x.global_scale.ndim else NVFP4Tensor(d.x.qdata, d.x.block_scale, d.x.global_scale.reshape(1, 1))

    got = sharded(make_mesh(devices), body)(x, ids)
    whole = quantize(x, global_scale=given)
    for device in range(devices):
        part = slice(device * devices * tokens, (device + 1) * devices * tokens)
        assert np.array_equal(as_bytes(got.qdata[part]), as_bytes(whole.qdata))
        assert np.array_equal(as_bytes(got.block_scale[part]), as_bytes(whole.block_scale))
    if scale_mode == "per_token":
        assert np.array_equal(np.asarray(got.global_scale), np.tile(np.asarray(whole.global_scale), (devices, 1)))
    else:  # one scale on all devices: the maximum over all of them
        assert (np.asarray(got.global_scale) == np.asarray(whole.global_scale)).all()


def test_fp8_wire_against_numpy(make_mesh, rng):
    hidden = 200  # the last group of 128 is not full
    x = jnp.asarray(rng.standard_normal((16, hidden)) * rng.lognormal(size=(16, 1)), jnp.bfloat16).at[3].set(0)

    def body(x):
        ids = jnp.zeros((x.shape[0], 1), jnp.int32)
        d = dispatch(x, ids, jnp.ones(ids.shape, jnp.float32), num_experts=2, wire_format="fp8")
        return (*d.x, from_fp8(*d.x))

    values, scales, decoded = sharded(make_mesh(2), body)(x)
    x64 = np.asarray(x, np.float64)
    for group, columns in enumerate((slice(0, 128), slice(128, 200))):
        amax = np.abs(x64[:, columns]).max(axis=1)
        expected = np.where(amax == 0, 1, amax / 448).astype(np.float32)
        assert np.array_equal(np.asarray(scales[:16, group]), expected)
        # e4m3 has 3 mantissa bits: half a unit is 2^-4 of the value, or 2^-10 of the scale where subnormal.
        error = np.abs(np.asarray(decoded[:16, columns], np.float64) - x64[:, columns])
        bound = np.maximum(np.abs(x64[:, columns]) * 2.0**-4, expected[:, None] * 2.0**-10) * (1 + 2.0**-7)
        assert (error <= bound).all()
    assert np.asarray(values[:16], np.float32).max() <= 448
    # Device 1 hosts no routed expert: it received pads only.
    assert np.isnan(np.asarray(scales[16:])).all()


def test_fp8_of_nearly_zero_groups_is_finite(make_mesh):
    x = np.zeros((2, 256), np.float32)
    x[0, 0], x[1, 128], x[1, 3] = 1e-37, 448 * 2.0**-126, -1e-38

    def body(x):
        ids = jnp.zeros((x.shape[0], 1), jnp.int32)
        return from_fp8(*dispatch(x, ids, jnp.ones(ids.shape, jnp.float32), num_experts=1, wire_format="fp8").x)

    decoded = np.asarray(sharded(make_mesh(1), body)(jnp.asarray(x)), np.float64)
    np.testing.assert_allclose(decoded, x, rtol=2.0**-4, atol=448 * 2.0**-126)


# --- the whole layer across devices ---

E, H, INTERMEDIATE, K, T = 16, 128, 64, 4, 64


@pytest.fixture(scope="module")
def layer():
    rng = np.random.default_rng(7)
    x = jnp.asarray(rng.standard_normal((T, H)), jnp.bfloat16)
    ids = np.argsort(rng.random((T, E)), axis=1)[:, :K].astype(np.int32)
    ids[5, 1:3] = -1
    ids[17] = -1
    weights = rng.random((T, K)).astype(np.float32)
    w13 = jnp.asarray(rng.standard_normal((E, 2 * INTERMEDIATE, H)) / H**0.5, jnp.float32)
    w2 = jnp.asarray(rng.standard_normal((E, H, INTERMEDIATE)) / INTERMEDIATE**0.5, jnp.float32)
    packed = MoEWeights(
        quantize(w13, global_scale="per_expert"),
        quantize(w2, global_scale="per_expert"),
        jnp.float32(4.5 / 2688),
        jnp.asarray(rng.uniform(6, 10, (E, 1, 1)) / 2688, jnp.float32),  # no activation is clipped
    )
    return x, jnp.asarray(ids), jnp.asarray(weights), packed, (w13, w2)


def weight_specs(weights):
    return jax.tree.map(lambda leaf: EP if leaf.ndim else P(), weights)


@functools.cache
def _program(mesh, config, specs, structure):
    """The compiled layer, the same for all tests that run it on a mesh with a config."""
    specs = (EP, EP, EP, jax.tree.unflatten(structure, specs))
    return sharded(mesh, lambda *a: moe_layer(*a, config), specs, (EP, P()))


def run_layer(mesh, layer, **options):
    x, ids, weights, packed = layer[:4]
    config = MoEConfig(num_experts=E, axis_name="ep", **{**ALL_NVFP4, **options})
    specs, structure = jax.tree.flatten(weight_specs(packed))
    y, stats = _program(mesh, config, tuple(specs), structure)(x, ids, weights, packed)
    return np.asarray(y), int(stats.dropped)


@functools.cache
def _one_device(layout):
    return jax.jit(lambda *a: moe_layer(*a[:4], MoEConfig(num_experts=E, layout=layout, **W4A4), None, *a[4:]))


@pytest.mark.parametrize("devices", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 8)), 4])
def test_per_slot_is_identical_for_every_number_of_devices(make_mesh, layer, devices):
    alone, stats = _one_device("masked")(*layer[:4])
    y, dropped = run_layer(make_mesh(devices), layer, form="per_slot")
    assert same_bits(y, alone)
    assert dropped == 0 == int(stats.dropped)


@pytest.mark.slow
def test_per_slot_adds_a_residual_as_one_device_does(make_mesh, layer):
    """The sum over the slots and the residual is rounded once, wherever it is computed."""
    x, ids, weights, packed = layer[:4]
    residual = x[::-1]
    alone, _ = _one_device("masked")(*layer[:4], residual)
    config = MoEConfig(num_experts=E, axis_name="ep", **{**ALL_NVFP4, "form": "per_slot"})
    run = lambda *a: moe_layer(*a[:4], config, residual=a[4])[0]  # noqa: E731
    y = sharded(make_mesh(2), run, (EP, EP, EP, weight_specs(packed), EP), EP)(x, ids, weights, packed, residual)
    assert same_bits(y, alone) and not same_bits(y, residual + _one_device("masked")(*layer[:4])[0])


@pytest.mark.slow
def test_per_slot_with_one_token_per_device(make_mesh, layer):
    few = tuple(a[:8] for a in layer[:3]) + layer[3:]
    alone, _ = _one_device("masked")(*few[:4])
    for devices, capacity in ((8, 8), (8, None), (2, 8)):
        y, dropped = run_layer(make_mesh(devices), few, form="per_slot", capacity=capacity)
        assert same_bits(y, alone)
        assert dropped == 0


@pytest.mark.slow
def test_per_slot_contiguous_equals_masked(make_mesh, layer):
    alone, _ = _one_device("contiguous")(*layer[:4])
    y, _ = run_layer(make_mesh(4), layer, form="per_slot", layout="contiguous")
    assert same_bits(y, alone)
    assert same_bits(alone, _one_device("masked")(*layer[:4])[0])


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_per_peer_differs_from_one_device_by_rounding_only(make_mesh, layer, devices):
    """Partial sums are rounded to bf16 once per peer: the error stays near 2^-9 of the norm, and runs repeat."""
    alone = np.asarray(_one_device("masked")(*layer[:4])[0], np.float64)
    y, dropped = run_layer(make_mesh(devices), layer, form="per_peer")
    again, _ = run_layer(make_mesh(devices), layer, form="per_peer", layout="contiguous")
    assert np.linalg.norm(y.astype(np.float64) - alone) < 4e-3 * np.linalg.norm(alone)
    assert same_bits(y, again)
    assert dropped == 0


@pytest.mark.slow
@pytest.mark.parametrize("form", ["per_peer", "per_slot"])
def test_wire_format_does_not_change_the_result(make_mesh, layer, form):
    """nvfp4 dispatch = bf16 dispatch + quantization at the receiver; input scales differ by expert and rank."""
    x, ids, weights, packed, _ = layer
    scales = jnp.asarray(np.random.default_rng(3).uniform(1, 6, (E, 1, 1)) / 2688, jnp.float32)
    differing = (x, ids, weights, packed._replace(input_scale_1=scales))
    agreed = (x, ids, weights, packed._replace(input_scale_1=jnp.max(scales)))
    results = [
        run_layer(make_mesh(4), differing, form=form, wire_format="nvfp4")[0],
        run_layer(make_mesh(4), differing, form=form, wire_format="bf16")[0],
        run_layer(make_mesh(4), agreed, form=form, wire_format="nvfp4")[0],
    ]
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@pytest.mark.slow
def test_wire_format_does_not_change_the_result_with_per_token_scales(make_mesh, layer):
    x, ids, weights, packed, _ = layer
    dynamic = (x * jnp.logspace(-2, 2, T).astype(x.dtype)[:, None], ids, weights, packed._replace(input_scale_1=None))
    results = [run_layer(make_mesh(2), dynamic, wire_format=wire)[0] for wire in ("nvfp4", "bf16")]
    assert same_bits(*results)


def test_agreed_scale_is_the_maximum_over_all_devices(make_mesh):
    scales = jnp.arange(1.0, 9.0, dtype=jnp.float32).reshape(8, 1, 1)
    agreed = sharded(make_mesh(4), lambda s: agree_global_scale(s, "ep").reshape(1))(scales)
    assert (np.asarray(agreed) == 8).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "threshold"),
    [
        # NVFP4 rounding is 9.5% of a normal operand, e4m3 2.6%, and errors add in squares. Those of x and w13 reach
        # gate and up: 2.3 times the square after silu(gate) * up. Bounds are 1.05 times that model.
        (dict(activation_format_1="bf16", activation_format_2="bf16", wire_format="bf16"), 0.18),  # W4A16
        (dict(activation_format_1="bf16", activation_format_2="bf16", wire_format="fp8"), 0.19),
        (dict(activation_format_1="bf16", activation_format_2="bf16", wire_format="nvfp4"), 0.236),
        (dict(wire_format="nvfp4"), 0.256),  # W4A4
        (dict(wire_format="fp8"), 0.259),
    ],
)
def test_accuracy_against_the_unquantized_layer(make_mesh, layer, options, threshold):
    x, ids, weights, packed, (w13, w2) = layer
    exact = np.asarray(dense_moe(x.astype(jnp.float32), ids, weights, w13, w2), np.float64)
    y, _ = run_layer(make_mesh(2), layer, **options)
    error = np.linalg.norm(y.astype(np.float64) - exact) / np.linalg.norm(exact)
    assert 0.5 * threshold < error < threshold
    if options["wire_format"] != "fp8":
        # The formats' own error, without the library: float64 on operands quantized by the numpy oracle.
        dense = []
        for w in (np.asarray(w13), np.asarray(w2)):
            g = oracles.computed_scale(w, axis=(1, 2))
            dense.append(oracles.dequantize(*oracles.quantize_exact(w, g), g))
        expected = oracles.moe(
            np.asarray(x, np.float32), np.asarray(ids), np.asarray(weights), *dense,
            x_scale=np.asarray(packed.input_scale_1), act_scale=np.asarray(packed.input_scale_2).ravel(),
            quantized=(options["wire_format"] == "nvfp4", "activation_format_2" not in options),
        )  # fmt: skip
        own_error = np.linalg.norm(expected - exact) / np.linalg.norm(exact)
        assert abs(error - own_error) < 0.01 * own_error


@pytest.mark.slow
def test_unquantized_weights_on_two_devices(make_mesh, layer):
    x, ids, weights, _, (w13, w2) = layer
    plain = MoEWeights(w13.astype(jnp.bfloat16), w2.astype(jnp.bfloat16))
    exact = np.asarray(
        dense_moe(x.astype(jnp.float32), ids, weights, *(w.astype(jnp.float32) for w in plain[:2])), np.float64
    )
    bf16 = dict(activation_format_1="bf16", activation_format_2="bf16")
    y, _ = run_layer(make_mesh(2), (x, ids, weights, plain), wire_format="bf16", **bf16)
    assert np.linalg.norm(y.astype(np.float64) - exact) < 8e-3 * np.linalg.norm(exact)  # three roundings to bf16
    y, _ = run_layer(make_mesh(2), (x, ids, weights, plain), wire_format="fp8", **bf16)
    assert np.linalg.norm(y.astype(np.float64) - exact) < 0.05 * np.linalg.norm(exact)


# --- capacities, pads, odd sizes ---


@pytest.mark.slow
def test_capacities_larger_than_needed_change_nothing(make_mesh, layer):
    """Pads carry 0xFF bytes (NaN scales, NaN weights, ids of -1): more of them must not change a bit."""
    for form in ("per_peer", "per_slot"):
        usual, _ = run_layer(make_mesh(4), layer, form=form)
        wide, dropped = run_layer(make_mesh(4), layer, form=form, pair_capacity=80, capacity=345)
        assert same_bits(usual, wide)
        assert dropped == 0


@pytest.mark.slow
def test_overflow_is_counted_and_drops_the_last_tokens(make_mesh, layer):
    x, _, weights, packed, _ = layer
    ids = jnp.full((T, 1), 5, jnp.int32)  # all tokens of all devices to one expert of one rank
    hot = (x, ids, weights[:, :1], packed)
    full, none = run_layer(make_mesh(4), hot)
    assert none == 0
    y, dropped = run_layer(make_mesh(4), hot, pair_capacity=3)
    assert dropped == T - 4 * 3
    kept = np.arange(T) % (T // 4) < 3
    assert same_bits(y[kept], full[kept])
    assert (y[~kept] == 0).all()
    y, dropped = run_layer(make_mesh(4), hot, capacity=10)
    assert dropped == T - 10  # rank order: the receiver keeps its first 10 rows, all from rank 0
    assert same_bits(y[:10], full[:10])
    assert (y[10:] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["per_peer", "per_slot"])
def test_bad_ids_are_counted_once(make_mesh, layer, form):
    x, ids, weights, packed, _ = layer
    clean = ids.at[3, 2].set(-1).at[40, 0].set(-1)
    bad = ids.at[3, 2].set(E).at[40, 0].set(-7)
    expected, _ = run_layer(make_mesh(2), (x, clean, weights, packed), form=form)
    y, dropped = run_layer(make_mesh(2), (x, bad, weights, packed), form=form)
    assert dropped == 2
    assert same_bits(y, expected)


def test_no_tokens(make_mesh, layer):
    packed = layer[3]
    empty = (jnp.zeros((0, H), jnp.bfloat16), jnp.zeros((0, K), jnp.int32), jnp.zeros((0, K), jnp.float32), packed)
    for form in ("per_peer", "per_slot"):
        y, dropped = run_layer(make_mesh(2), empty, form=form)
        assert y.shape == (0, H)
        assert dropped == 0


def test_checked_ops_report_the_device_under_shard_map(make_mesh):
    def body(x, ids):
        q = quantize(x, global_scale="per_token", checked=True)
        return permute_to_masked(q.qdata, q.block_scale, ids, num_experts=2, capacity=4, checked=True).masked_m

    run = jax.jit(checkify.checkify(jax.shard_map(body, mesh=make_mesh(4), in_specs=EP, out_specs=EP)))
    x, ids = jnp.ones((16, 32), jnp.float32), jnp.zeros((16, 1), jnp.int32)
    assert run(x, ids)[0].get() is None
    assert "index 2: quantize: 1 input elements are NaN or Inf" in run(x.at[9, 3].set(jnp.nan), ids)[0].get()
    assert "index 0: permute_to_masked: 1 routes have a bad id" in run(x, ids.at[3].set(7))[0].get()


# --- bytes on the wire ---


@pytest.mark.parametrize("form", ["per_peer", "per_slot"])
@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_wire_bytes_of_the_compiled_layer(make_mesh, layer, form, devices):
    x, ids, weights, packed, _ = layer
    config = MoEConfig(num_experts=E, axis_name="ep", form=form, **ALL_NVFP4)
    f = sharded(make_mesh(devices), lambda *a: moe_layer(*a, config), (EP, EP, EP, weight_specs(packed)), (EP, P()))
    found = wire_bytes(f.lower(x, ids, weights, packed).compile())
    tokens = T // devices
    routing = 8 * K if form == "per_peer" else 4  # i32 id and f32 weight per slot; one id
    rows = devices * tokens * (1 if form == "per_peer" else K)
    there, back = rows * (H // 2 + H // 16 + routing), rows * 2 * H
    assert [a.dtype for a in found.all_to_alls] == ["u8", "u16"]
    assert [a.bytes for a in found.all_to_alls] == [there, back]
    assert found.total == there + back
    assert found.crossing == (there + back) * (devices - 1) // devices
    assert found.scalar_bytes == 4  # one count; the scale is a scalar, so it is the same on all devices already


@pytest.mark.parametrize(("wire_format", "bytes_per_row"), [("bf16", 2 * H), ("fp8", H + 4 * (H // 128))])
def test_wire_bytes_of_other_formats(make_mesh, layer, wire_format, bytes_per_row):
    x, ids, weights = layer[:3]

    def body(x, ids, weights):
        return dispatch(x, ids, weights, num_experts=E, wire_format=wire_format).local_weights

    found = wire_bytes(sharded(make_mesh(2), body).lower(x, ids, weights).compile())
    assert [(a.dtype, a.bytes) for a in found.all_to_alls] == [("u8", T * (bytes_per_row + 8 * K))]
    assert found.scalar_bytes == 0


@pytest.mark.parametrize("form", ["per_peer", "per_slot"])
@pytest.mark.parametrize("wire_format", ["nvfp4", *(pytest.param(w, marks=pytest.mark.slow) for w in ("fp8", "bf16"))])
def test_large_payloads_cross_in_two_all_to_alls(make_mesh, layer, monkeypatch, form, wire_format):
    """Not one bit changes, and no byte is added."""
    x, ids, weights = layer[:3]

    def run(large):
        monkeypatch.setattr(all_to_all, "_APART_BYTES", 0 if large else 2**24)

        def body(x, ids, weights):
            d = dispatch(x, ids, weights, num_experts=E, form=form, wire_format=wire_format)
            return [a for a in jax.tree.leaves(d) if a.ndim]

        f = sharded(make_mesh(2), body, (EP, EP, EP), EP).lower(x, ids, weights).compile()
        return wire_bytes(f), jax.tree.map(np.asarray, f(x, ids, weights))

    (one, together), (two, apart) = run(False), run(True)
    assert (len(one.all_to_alls), len(two.all_to_alls)) == (1, 2)
    assert one.total == two.total
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8)), together, apart)


def test_wire_bytes_is_zero_on_one_device(make_mesh, layer):
    x, ids, weights, packed, _ = layer
    config = MoEConfig(num_experts=E, axis_name="ep", **ALL_NVFP4)
    f = sharded(make_mesh(1), lambda *a: moe_layer(*a, config), (EP, EP, EP, weight_specs(packed)), (EP, P()))
    found = wire_bytes(f.lower(x, ids, weights, packed).compile())
    assert (found.total, found.crossing, found.scalar_bytes) == (0, 0, 0)


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_experts=7), "num_experts=7 must be a positive multiple of the 2 devices"),
        (dict(num_experts=8, form="per_token"), "form='per_token' is unknown"),
        (dict(num_experts=8, wire_format="int8"), "wire_format='int8' is unknown"),
        (dict(num_experts=8, pair_capacity=0), "pair_capacity must be at least 1, got 0"),
        (dict(num_experts=8, wire_format="bf16", global_scale=1.0), "global_scale is only for a plain x"),
    ],
)
def test_dispatch_refuses(make_mesh, options, message):
    def body(x, ids):
        return dispatch(x, ids, jnp.ones(ids.shape, jnp.float32), **options).local_ids

    with pytest.raises(ValueError, match=message):
        sharded(make_mesh(2), body)(jnp.ones((4, 32), jnp.bfloat16), jnp.zeros((4, 1), jnp.int32))


def test_dispatch_names_an_implementation_that_does_not_exist(make_mesh):
    def body(x, ids):
        return dispatch(x, ids, jnp.ones(ids.shape, jnp.float32), num_experts=8, implementation="mosaic_gpu").local_ids

    with pytest.raises(NotImplementedError, match="mosaic_gpu"):
        sharded(make_mesh(2), body)(jnp.ones((4, 32), jnp.bfloat16), jnp.zeros((4, 1), jnp.int32))


def test_combine_refuses_the_wrong_form(make_mesh):
    def per_slot_without_weights(x, ids):
        d = dispatch(x, ids, jnp.ones(ids.shape, jnp.float32), num_experts=8, form="per_slot")
        return combine(dequantize(d.x), d)

    def per_peer_with_weights(x, ids):
        d = dispatch(x, ids, jnp.ones(ids.shape, jnp.float32), num_experts=8)
        return combine(dequantize(d.x), d, topk_weights=jnp.ones(ids.shape, jnp.float32))

    args = jnp.ones((4, 32), jnp.bfloat16), jnp.zeros((4, 3), jnp.int32)
    with pytest.raises(ValueError, match="per-slot form needs topk_weights"):
        sharded(make_mesh(2), per_slot_without_weights)(*args)
    with pytest.raises(ValueError, match="belong to the per-slot form"):
        sharded(make_mesh(2), per_peer_with_weights)(*args)
