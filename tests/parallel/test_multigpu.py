"""Expert parallelism on the GPUs of one host: kernels that store to and read from the peers, against XLA and loops.

    python -m pytest -m multigpu tests/parallel/test_multigpu.py     or     python tests/parallel/test_multigpu.py

A kernel that hangs ends this process after some minutes (a watchdog prints where), not the machine.
"""

import faulthandler
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # a plain script finds the packages by itself
    sys.path[:0] = [str(Path(__file__).parents[2])]
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # no NVLink multicast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P
from poisoned_tokens import check_outputs, poison

import oracles
from fp4jax.block_fp8 import to_fp8
from fp4jax.expert_parallel import all_to_all, combine, dispatch, from_fp8
from fp4jax.grouped_gemm import pack_weights
from fp4jax.moe import MoEConfig, MoEWeights, moe_layer
from fp4jax.nvfp4 import quantize

EP = P("ep")
_WATCHDOG_S = 240
DEVICES = [pytest.param(n, marks=pytest.mark.multigpu(n)) for n in (2, 4, 8)]
KERNEL, XLA = "mosaic_gpu", "xla"
ROUTINGS = ("random", "skewed", "idle", "bad")

pytestmark = pytest.mark.multigpu


@pytest.fixture(autouse=True)
def watchdog():
    faulthandler.dump_traceback_later(_WATCHDOG_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def sharded(mesh, fn, in_specs=EP, out_specs=EP):
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def make_ids(rng, routing, devices, tokens, k, experts):
    """i32 [devices, T, k]. skewed: all to rank 1. idle: rank 0 sends nothing. bad: ids that are no experts."""
    ids = np.argsort(rng.random((devices, tokens, experts)), axis=-1)[..., :k].astype(np.int32)
    local = experts // devices
    if routing == "skewed":
        ids = ids % local + local
    if routing == "idle":
        ids[0] = -1
    if routing == "bad":
        ids[rng.random(ids.shape) < 0.2] = -1
        ids[rng.random(ids.shape) < 0.1] = experts + 3
        ids[rng.random(ids.shape) < 0.1] = -7
    return ids


def bits(array):
    array = np.asarray(array)
    return np.ascontiguousarray(array).view(np.uint8).reshape(array.shape[0], -1)


def check_same(got, expected):
    """Every row that a route filled, its ids and weights, the map and the drops: bit for bit."""
    here = (np.asarray(expected.local_ids) >= 0).any(axis=1)
    for a, b in ((got.local_ids, expected.local_ids), (got.send_map, expected.send_map)):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    np.testing.assert_array_equal(np.asarray(got.dropped), np.asarray(expected.dropped))
    assert here.any()
    a, b = ([x for x in jax.tree.leaves((d.x, d.local_weights)) if x.ndim] for d in (got, expected))
    for p, q in zip(a, b, strict=True):
        if p.shape[0] == here.size:
            np.testing.assert_array_equal(bits(p)[here], bits(q)[here])


def run_both(mesh, x, ids, weights, dtype=jnp.bfloat16, **options):
    """dispatch and combine with the kernels and with XLA, in one program each; results of all devices on the host."""

    def body(x, ids, weights, key, implementation):
        d = dispatch(x, ids, weights, implementation=implementation, **options)
        rows, hidden = d.local_ids.shape[0], x.shape[-1]
        y = jax.random.normal(jax.random.fold_in(key[0], lax.axis_index("ep")), (rows, hidden), dtype)
        y = jnp.where(jnp.any(d.local_ids >= 0, axis=1, keepdims=True), y, jnp.nan)  # nobody may use what is a pad
        home = weights if options["form"] == "per_slot" else None
        residuals = None, x[:, ::-1].astype(dtype)
        out = [combine(y, d, r, topk_weights=home, implementation=implementation) for r in residuals]
        return jax.tree.map(lambda a: a if a.ndim else a[None], d), out

    key = jax.random.split(jax.random.key(7), 1)
    results = []
    for implementation in (KERNEL, XLA):
        fn = lambda x, i, w, key, implementation=implementation: body(x, i, w, key, implementation)  # noqa: E731
        results.append(jax.device_get(sharded(mesh, fn, (EP, EP, EP, P()))(x, ids, weights, key)))
    return results


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("form", ["per_peer", "per_slot"])
@pytest.mark.parametrize(
    ("wire", "scale", "hidden", "tokens", "k", "routing", "pair_capacity"),
    [
        ("nvfp4", "given", 7168, 37, 8, "random", None),
        ("nvfp4", "per_token", 256, 1, 1, "random", None),
        ("nvfp4", "per_token", 2560, 1001, 6, "random", None),
        ("nvfp4", "agreed", 512, 3001, 3, "bad", None),  # counted by a kernel of its own
        ("nvfp4", "f32", 512, 1500, 4, "bad", 1200),
        ("nvfp4", "per_token", 512, 2100, 4, "skewed", 700),  # overflow
        ("nvfp4", "agreed", 512, 263, 4, "idle", None),
        ("fp8", None, 2048, 130, 8, "random", None),
        ("fp8", None, 512, 259, 2, "bad", 50),
        ("fp8", None, 112, 77, 15, "random", None),  # one scale per row
        ("bf16", None, 7168, 65, 8, "random", None),
        ("bf16", None, 64, 515, 5, "skewed", 301),
    ],
)
def test_kernels_have_the_bits_of_xla(
    make_mesh, rng, devices, form, wire, scale, hidden, tokens, k, routing, pair_capacity
):
    experts = 16
    x = jnp.asarray(rng.standard_normal((devices * tokens, hidden)) * rng.lognormal(size=(devices * tokens, 1)))
    ids = make_ids(rng, routing, devices, tokens, k, experts)
    weights = rng.random((devices, tokens, k)).astype(np.float32)
    given = jnp.float32(0.013) if scale in ("given", "f32") else "per_token" if scale == "per_token" else None
    x = x.astype(jnp.float32 if scale == "f32" else jnp.bfloat16)
    got, expected = run_both(
        make_mesh(devices), x, ids.reshape(-1, k), weights.reshape(-1, k), num_experts=experts,
        form=form, wire_format=wire, pair_capacity=pair_capacity, global_scale=given,
    )  # fmt: skip
    check_same(got[0], expected[0])
    for found, wanted in zip(got[1], expected[1], strict=True):  # without and with a residual
        np.testing.assert_array_equal(bits(found), bits(wanted))
    capacity = pair_capacity or (tokens if form == "per_peer" else tokens * k)
    _, send_map, dropped = oracles.reference_dispatch(ids, devices, experts, form, capacity)
    np.testing.assert_array_equal(got[0].send_map.reshape(send_map.shape), send_map)
    np.testing.assert_array_equal(got[0].dropped, dropped)
    assert (dropped > 0).any() == (routing == "bad" or pair_capacity is not None)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("global_scale", ["one", "per_token"])
def test_tokens_that_are_quantized_already(make_mesh, rng, devices, global_scale):
    tokens, hidden, k, experts = 101, 1024, 4, 8
    x = jnp.asarray(rng.standard_normal((devices * tokens, hidden)), jnp.bfloat16)
    t = quantize(x, global_scale="per_token" if global_scale == "per_token" else jnp.float32(0.01))
    ids = jnp.asarray(make_ids(rng, "random", devices, tokens, k, experts).reshape(-1, k))
    weights = jnp.asarray(rng.random(ids.shape), jnp.float32)
    specs = jax.tree.map(lambda leaf: EP if leaf.ndim else P(), t)
    results = []
    for implementation in (KERNEL, XLA):

        def body(t, ids, weights, implementation=implementation):
            d = dispatch(t, ids, weights, num_experts=experts, implementation=implementation)
            return jax.tree.map(lambda a: a if a.ndim else a[None], d)

        results.append(jax.device_get(sharded(make_mesh(devices), body, (specs, EP, EP))(t, ids, weights)))
    check_same(*results)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("form", ["per_peer", "per_slot"])
@pytest.mark.parametrize(
    ("wire", "hidden", "tokens", "k", "routing"),
    [
        ("nvfp4", 7168, 37, 8, "random"),
        ("nvfp4", 512, 3001, 3, "bad"),
        ("nvfp4", 7168, 2500, 2, "bad"),  # large: two all_to_alls
        ("fp8", 2048, 130, 8, "bad"),
        ("fp8", 7168, 1300, 3, "bad"),
        ("bf16", 64, 515, 5, "skewed"),
        ("bf16", 7168, 700, 4, "random"),
    ],
)
def test_a_kernel_packs_for_an_all_to_all(make_mesh, rng, devices, form, wire, hidden, tokens, k, routing):
    """What several hosts do: a second mesh axis keeps the kernels from storing to peers."""
    capacity, value_bytes = tokens * (k if form == "per_slot" else 1), {"nvfp4": 1 / 2, "fp8": 1, "bf16": 2}[wire]
    large = devices * capacity * hidden * value_bytes >= all_to_all._APART_BYTES
    experts = 16
    x = jnp.asarray(rng.standard_normal((devices * tokens, hidden)), jnp.bfloat16)
    ids = make_ids(rng, routing, devices, tokens, k, experts).reshape(-1, k)
    weights = rng.random(ids.shape).astype(np.float32)
    options = dict(num_experts=experts, form=form, wire_format=wire)
    if wire == "nvfp4":
        options["global_scale"] = "per_token"
    mesh = jax.make_mesh((1, devices), ("host", "ep"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:devices])
    results = []
    for implementation in (None, XLA):

        def body(x, ids, weights, implementation=implementation):
            d = dispatch(x, ids, weights, implementation=implementation, **options)
            return jax.tree.map(lambda a: a if a.ndim else a[None], d)

        fn = sharded(mesh, body)
        text = fn.lower(x, ids, weights).as_text()
        assert text.count("stablehlo.all_to_all") == 1 + large
        assert ("mosaic_gpu" in text) == (implementation is None)
        results.append(jax.device_get(fn(x, ids, weights)))
    check_same(*results)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("form", ["per_peer", "per_slot"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_way_back(make_mesh, rng, devices, form, dtype):
    tokens, hidden, k, experts = 333, 1030, 4, 8  # rows that are no multiple of 16 bytes
    x = jnp.asarray(rng.standard_normal((devices * tokens, 256)), jnp.float32)
    ids = jnp.asarray(make_ids(rng, "bad", devices, tokens, k, experts).reshape(-1, k))
    weights = jnp.asarray(rng.random(ids.shape), jnp.float32)

    def body(x, ids, weights, implementation):
        d = dispatch(x, ids, weights, num_experts=experts, form=form, implementation=XLA)
        y = jax.random.normal(
            jax.random.fold_in(jax.random.key(1), lax.axis_index("ep")), (d.local_ids.shape[0], hidden)
        )
        home = weights if form == "per_slot" else None
        return combine(y.astype(dtype), d, topk_weights=home, implementation=implementation)

    mesh = make_mesh(devices)
    got, expected = (
        np.asarray(sharded(mesh, lambda *a, i=i: body(*a, i))(x, ids, weights)) for i in (KERNEL, XLA)
    )  # fmt: skip
    np.testing.assert_array_equal(bits(got), bits(expected))
    assert np.abs(got.astype(np.float64)).sum() > 0


def test_none_takes_the_kernels_and_xla_does_not(make_mesh):
    def text(implementation):
        def body(x, ids, weights):
            d = dispatch(x, ids, weights, num_experts=8, implementation=implementation)
            return combine(x[: d.local_ids.shape[0] // 2].repeat(2, 0), d, implementation=implementation)

        x, ids = jnp.ones((64, 256), jnp.bfloat16), jnp.zeros((64, 2), jnp.int32)
        return sharded(make_mesh(2), body).lower(x, ids, jnp.ones((64, 2))).as_text()

    assert "all_to_all" not in text(None)
    assert text(None).count("@mosaic_gpu_v2") >= 2
    assert "all_to_all" in text(XLA)
    assert "mosaic_gpu" not in text(XLA)


def mismatches(devices, form, tokens, steps, altered):
    """i32 [4] per device: bytes and values that kernels and XLA disagree about, over `steps` random routings."""
    experts, k, hidden = 64, 8, 1024

    def body(seed):
        def step(i, wrong):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed[0]), i), lax.axis_index("ep"))
            k1, k2, k3, k4, k5 = jax.random.split(key, 5)
            ids = lax.top_k(jax.random.uniform(k1, (tokens, experts)), k)[1].astype(jnp.int32)
            ids = jnp.where(jax.random.uniform(k4, (tokens, 1)) < jax.random.uniform(k5, ()), -1, ids)
            x = jax.random.normal(k2, (tokens, hidden), jnp.bfloat16)
            weights = jax.random.uniform(k3, ids.shape)
            options = dict(num_experts=experts, form=form, global_scale=jnp.float32(0.01))
            a = dispatch(x, ids, weights, implementation=KERNEL, **options)
            other = (x * 1.1, jnp.flip(ids, 0), weights * 2) if altered else (x, ids, weights)
            b = dispatch(*other, implementation=XLA, **options)
            here = jnp.any(b.local_ids >= 0, axis=1, keepdims=True)
            scales = [lax.bitcast_convert_type(d.x.block_scale, jnp.uint8) for d in (a, b)]
            rows = [a.x.qdata != b.x.qdata, scales[0] != scales[1]]
            y = jnp.where(here, b.x.qdata.astype(jnp.bfloat16), jnp.nan)
            home = weights if form == "per_slot" else None
            back = [combine(y, d, topk_weights=home, implementation=m) for d, m in ((a, KERNEL), (b, XLA))]
            found = [jnp.sum(r & here) for r in rows]
            found.append(jnp.sum(a.local_ids != b.local_ids) + jnp.sum((a.local_weights != b.local_weights) & here))
            found.append(jnp.sum(back[0] != back[1]) + jnp.sum(a.send_map != b.send_map))
            return wrong + jnp.stack(found).astype(jnp.int32)

        start = lax.pcast(jnp.zeros(4, jnp.int32), "ep", to="varying")
        return lax.fori_loop(0, steps, step, start)[None]

    return body


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize(("form", "tokens"), [("per_peer", 257), ("per_slot", 64), ("per_peer", 5)])
def test_200_random_routings(make_mesh, devices, form, tokens):
    run = lambda altered, steps: np.asarray(  # noqa: E731
        sharded(make_mesh(devices), mismatches(devices, form, tokens, steps, altered))(
            jnp.arange(devices, dtype=jnp.uint32)
        )
    )
    assert (run(False, 200) == 0).all()
    found = run(True, 20)  # of few tokens all can be idle in a step
    assert (found > 0).all()  # what is different is seen


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("wire", ["nvfp4", "fp8", "bf16"])
def test_the_layer_has_the_bits_of_one_device(make_mesh, rng, devices, wire):
    experts, hidden, intermediate, k, tokens = 16, 512, 256, 4, 64 * devices + devices
    x = jnp.asarray(rng.standard_normal((tokens, hidden)), jnp.bfloat16)
    ids = jnp.asarray(make_ids(rng, "random", 1, tokens, k, experts)[0])
    weights = jnp.asarray(rng.random((tokens, k)), jnp.float32)
    w13 = jnp.asarray(rng.standard_normal((experts, 2 * intermediate, hidden)) / hidden**0.5)
    w2 = jnp.asarray(rng.standard_normal((experts, hidden, intermediate)) / intermediate**0.5)
    packed = MoEWeights(*(pack_weights(quantize(w, global_scale="per_expert")) for w in (w13, w2)))
    specs = jax.tree.map(lambda leaf: EP if leaf.ndim else P(), packed)

    def run(implementation, form):
        config = MoEConfig(
            num_experts=experts, axis_name="ep", form=form, wire_format=wire, implementation=implementation,
            **oracles.W4A4,
        )  # fmt: skip
        fn = sharded(make_mesh(devices), lambda *a: moe_layer(*a, config), (EP, EP, EP, specs), (EP, P()))
        y, stats = fn(x, ids, weights, packed)
        assert int(stats.dropped) == 0
        return np.asarray(y)

    # fp8 is rounded to NVFP4 after it has crossed: as if x had been e4m3.
    arrived = from_fp8(*to_fp8(x)) if wire == "fp8" else x
    on_one = MoEConfig(num_experts=experts, **oracles.W4A4)
    alone, _ = jax.jit(lambda *a: moe_layer(*a, on_one))(arrived, ids, weights, packed)
    np.testing.assert_array_equal(bits(run(None, "per_slot")), bits(alone))
    alone = np.asarray(alone, np.float64)
    for form in ("per_peer", "per_slot"):
        got, reference = run(None, form), run(XLA, form)
        assert np.linalg.norm(got.astype(np.float64) - alone) < 5e-3 * np.linalg.norm(alone)
        difference = np.linalg.norm(got.astype(np.float64) - reference.astype(np.float64))
        assert difference < 1e-2 * np.linalg.norm(alone)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("implementation", [None, XLA])
@pytest.mark.parametrize(("wire", "form"), [("nvfp4", "per_peer"), ("fp8", "per_slot"), ("bf16", "per_peer")])
def test_a_token_with_nan_or_inf_spoils_no_other(make_mesh, rng, devices, implementation, wire, form):
    experts, hidden, k, tokens = 8, 256, 2, 40 * devices
    poisoned, zeroed, rows = poison(rng.standard_normal((tokens, hidden)), step=2 * devices)  # on every device
    ids = jnp.asarray(make_ids(rng, "random", 1, tokens, k, experts)[0])
    w13, w2 = (
        jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((experts, 256, hidden), (experts, hidden, 128))
    )
    packed = MoEWeights(*(pack_weights(quantize(w, global_scale="per_expert")) for w in (w13, w2)))
    specs = jax.tree.map(lambda _: EP, packed)
    config = MoEConfig(
        num_experts=experts, axis_name="ep", form=form, wire_format=wire, implementation=implementation,
        activation_format_1="bf16" if wire == "bf16" else "nvfp4",
    )  # fmt: skip
    fn = sharded(make_mesh(devices), lambda *a: moe_layer(*a, config)[0], (EP, EP, EP, specs))
    outputs = (fn(jnp.asarray(x, jnp.bfloat16), ids, jnp.ones((tokens, k)), packed) for x in (poisoned, zeroed))
    check_outputs(*outputs, rows)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("implementation", [KERNEL, XLA])
def test_the_agreed_scale_and_the_bits_of_spoiled_tokens(make_mesh, rng, devices, implementation):
    """The scale is that of all devices' finite values; a NaN or Inf arrives as the scale byte NaN and codes of zero."""
    tokens, hidden = 20 * devices, 256
    x, _, _ = poison(oracles.round_bf16(rng.standard_normal((tokens, hidden)).astype(np.float32)), step=devices)
    ids = jnp.tile(jnp.arange(devices, dtype=jnp.int32), (tokens, 1))  # every token to every device

    def body(x, ids):
        d = dispatch(x, ids, jnp.ones(ids.shape), num_experts=devices, implementation=implementation)
        return d.x.qdata, d.x.block_scale, d.x.global_scale[None]

    received = jax.device_get(sharded(make_mesh(devices), body)(jnp.asarray(x, jnp.bfloat16), ids))
    g = oracles.computed_scale(x)
    np.testing.assert_array_equal(received[2], np.full(devices, g))
    for got, expected in zip(received, oracles.quantize_exact(x, g), strict=False):
        np.testing.assert_array_equal(
            bits(got).reshape(devices, tokens, -1), np.broadcast_to(expected, (devices, *expected.shape))
        )


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-m", "multigpu", *sys.argv[1:]]))
