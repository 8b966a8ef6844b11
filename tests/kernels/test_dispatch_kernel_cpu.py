"""The kernels of expert parallelism without GPUs: where rows go, lowering for CUDA, refusals."""

import dataclasses
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec as P, use_abstract_mesh
from poisoned_tokens import poison

import oracles
from cuda_lowering import H100, struct
from fp4jax.block_fp8 import to_fp8
from fp4jax.expert_parallel import combine, dispatch
from fp4jax.grouped_gemm import PackedWeights
from fp4jax.implementations import peers_problem
from fp4jax.moe import MoEConfig, MoEWeights, moe_layer
from oracles import W4A4
from pallas_kernels.exchange.dispatch import check_config
from pallas_kernels.exchange.makers import row_maker
from pallas_kernels.exchange.plan import Routes, RowPlan, TuningConfig, counts_of_blocks
from pallas_kernels.simt import lanes, launch

pytestmark = pytest.mark.usefixtures("on_the_cpu")

# --- where rows go ---


def plan_by_kernel(ids, routes, config, interpret, counted):
    """-> (map [T, columns], what every block holds of it, rows of all tokens per device)."""
    plan = RowPlan(routes, config)
    operands = [jnp.asarray(ids)]
    if counted:
        operands.append(counts_of_blocks(operands[0], plan, interpret=interpret))

    def body(*refs):
        ids_ref, *counts_ref = refs[: len(operands)]
        map_ref, table_ref, totals_ref, rows = refs[len(operands) :]
        totals = plan.fill(ids_ref, counts_ref[0] if counted else None, rows, map_ref)
        lane = lanes.lane_index()
        (word,) = lanes.gather(rows, lane)
        lanes.scatter(table_ref, lanes.block_index() * lanes.LANES + lane, [word])
        for d, total in enumerate(totals):
            at = lanes.block_index() * routes.devices + d
            lanes.scatter(totals_ref, at, [lanes.splat(total, jnp.uint32)], where=lane == 0)

    out = (
        struct((routes.tokens, routes.columns), jnp.int32),
        struct((config.blocks, lanes.LANES), jnp.int32),  # the first rows, which are all
        struct((config.blocks, routes.devices), jnp.int32),
    )
    scratch = [plan.scratch()]
    got = launch.kernel(body, out, grid=config.blocks, scratch_types=scratch, interpret=interpret)(*operands)
    return [np.asarray(a) for a in got], plan


@pytest.mark.parametrize("form", ["per_peer", "per_slot"])
@pytest.mark.parametrize(
    ("tokens", "k", "devices", "blocks", "capacity", "counted"),
    [(37, 2, 3, 2, 9, False), (19, 3, 2, 2, None, True)],
)
def test_rows_are_those_of_plain_loops(rng, run_kernels, form, tokens, k, devices, blocks, capacity, counted):
    experts = 2 * devices
    ids = rng.integers(-1, experts + 1, (tokens, k)).astype(np.int32)
    capacity = capacity or (tokens if form == "per_peer" else tokens * k)
    routes = Routes(tokens, k, devices, 2, capacity, form)
    (got, table, totals), plan = plan_by_kernel(ids, routes, TuningConfig(blocks), run_kernels, counted)
    _, expected, _ = oracles.reference_dispatch(ids[None].repeat(devices, 0), devices, experts, form, capacity)
    np.testing.assert_array_equal(got, expected[0])
    for block in range(blocks):
        mine = expected[0][block * plan.per_block : (block + 1) * plan.per_block]
        np.testing.assert_array_equal(table[block, : mine.size], mine.reshape(-1))
    _, unlimited, _ = oracles.reference_dispatch(ids[None].repeat(devices, 0), devices, experts, form, tokens * k)
    for d in range(devices):
        assert (totals[:, d] == np.sum(unlimited[0] // (tokens * k) == d)).all()


@hypothesis.given(
    tokens=st.integers(1, 5000), k=st.integers(1, 15), devices=st.integers(2, 8), blocks=st.integers(1, 132)
)
def test_every_token_belongs_to_one_block(tokens, k, devices, blocks):
    plan = RowPlan(Routes(tokens, k, devices, 4, tokens, "per_peer"), TuningConfig(blocks))
    assert plan.per_block * blocks >= tokens
    assert plan.tiles * 128 >= plan.per_block
    assert plan.table == plan.tiles * 128 * devices


# --- rows as they are sent ---


@pytest.mark.slow
@pytest.mark.parametrize(("hidden", "dtype"), [(2560, jnp.bfloat16), (400, jnp.float32)])
def test_fp8_rows_have_the_bits_of_xla(rng, hidden, dtype):
    """Two steps of the lanes, and a last group that is not full; zeros, NaN, infinity, subnormals."""
    x = rng.standard_normal((4, hidden)) * np.exp(rng.uniform(-60, 60, (4, 1)))
    x[1, :300], x[2, 5], x[2, 300], x[3] = 0, np.inf, np.nan, x[3] / np.abs(x[3]).max() * 1e-38
    x = jnp.asarray(x, dtype)
    maker = row_maker([x], "fp8")

    def body(x_ref, values_ref, scales_ref, values, scales):
        for row in range(4):
            loaded = maker.load([x_ref], jnp.int32(row), jnp.bool_(True))
            maker.store([x_ref], loaded, [values, scales], jnp.int32(row), None)
        lanes.sync()
        for smem, ref in ((values, values_ref), (scales, scales_ref)):
            words = ref.size * ref.dtype.itemsize // 4
            for start in range(0, words, lanes.LANES):
                at = start + lanes.lane_index()
                lanes.scatter(ref, at, lanes.gather(smem, at, where=at < words), where=at < words)

    scratch = [plgpu.SMEM(s.shape, s.dtype) for s in maker.sent]
    # One warpgroup, so nothing for a race detector, which would take minutes.
    kernel = launch.kernel(body, tuple(maker.sent), grid=1, scratch_types=scratch, interpret=plgpu.InterpretGPUParams())
    values, scales = kernel(x)
    expected = to_fp8(x)
    for got, right in zip((values, scales), expected, strict=True):
        got, right = (np.asarray(a, np.float32) for a in (got, right))
        np.testing.assert_array_equal(got, right)
        np.testing.assert_array_equal(np.signbit(got) & ~np.isnan(got), np.signbit(right) & ~np.isnan(right))
    assert np.isnan(np.asarray(values, np.float32)).sum() == 1 + min(128, hidden - 256)


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["per_token", 0.01])
def test_nvfp4_rows_with_nan_and_inf_have_the_bits_of_the_oracle(rng, scale):
    x, _, _ = poison(rng.standard_normal((17, 64)))
    x = x[[0, 1, 6, 11, 12, 16]]
    maker = row_maker([jnp.asarray(x)], scale if scale == "per_token" else jnp.float32(scale))
    operands, sent = maker.operands, maker.sent

    def body(*refs):
        sources, outs, scratch = refs[: len(operands)], refs[len(operands) : -1], refs[-1]
        for row in range(len(x)):
            loaded = maker.load(sources, jnp.int32(row), jnp.bool_(True))
            for single in maker.store(sources, loaded, outs[:2], jnp.int32(row), scratch):
                lanes.scatter(outs[2], lanes.splat(row, jnp.int32), [single], where=lanes.lane_index() == 0)

    out = tuple(struct((len(x), s.shape[1]), s.dtype) for s in sent)
    scratch = [plgpu.SMEM((4,), jnp.int32)]
    kernel = launch.kernel(body, out, grid=1, scratch_types=scratch, interpret=plgpu.InterpretGPUParams())
    qdata, scales, *singles = kernel(*operands)
    g = oracles.computed_scale(x, -1) if scale == "per_token" else np.float32(scale)
    expected = oracles.quantize_exact(x, g)
    np.testing.assert_array_equal(qdata, expected[0])
    np.testing.assert_array_equal(np.asarray(scales).view(np.uint8), expected[1])
    if singles:
        np.testing.assert_array_equal(singles[0], g)


# --- lowering for CUDA ---


def lowered_text(devices, fn, *structs):
    """StableHLO of `fn` inside shard_map over H100s; arguments of one device each."""
    mesh = AbstractMesh((devices,), ("ep",), axis_types=(AxisType.Auto,), abstract_device=H100)
    whole = jax.tree.map(lambda s: struct((devices * s.shape[0], *s.shape[1:]), s.dtype), structs)
    with use_abstract_mesh(mesh):
        mapped = jax.shard_map(fn, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
        return jax.jit(mapped).trace(*whole).lower(lowering_platforms=("cuda",)).as_text()


def there_and_back(form, wire, experts, implementation=None, scale="per_token"):
    def body(x, ids, weights):
        options = dict(global_scale=scale) if wire == "nvfp4" else {}
        d = dispatch(
            x, ids, weights, num_experts=experts, form=form, wire_format=wire, implementation=implementation, **options
        )
        leaf = jax.tree.leaves(d.x)[0]
        y = jnp.where(jnp.any(d.local_ids >= 0, axis=1, keepdims=True), leaf.astype(jnp.bfloat16), 0)
        home = weights if form == "per_slot" else None
        return combine(y, d, y[: x.shape[0]], topk_weights=home, implementation=implementation)

    return body


@pytest.mark.parametrize(
    ("devices", "tokens", "hidden", "k", "form", "wire", "kernels"),
    [
        # The layer of test_moe_layer_exchanges_without_a_collective takes these kernels too.
        pytest.param(2, 128, 7168, 8, "per_peer", "nvfp4", 2, marks=pytest.mark.slow),
        pytest.param(4, 4096, 2048, 8, "per_peer", "nvfp4", 3, marks=pytest.mark.slow),
        pytest.param(8, 4096, 8192, 8, "per_slot", "nvfp4", 3, marks=pytest.mark.slow),
        pytest.param(4, 16384, 2560, 6, "per_slot", "nvfp4", 3, marks=pytest.mark.slow),
        pytest.param(2, 1024, 7168, 8, "per_peer", "bf16", 2, marks=pytest.mark.slow),
        (4, 16, 2048, 8, "per_slot", "fp8", 2),
        (2, 64, 128, 4, "per_peer", "fp8", 2),  # one scale per row
        (2, 64, 128, 4, "per_peer", "bf16", 2),
    ],
)
def test_models_take_the_kernels(devices, tokens, hidden, k, form, wire, kernels):
    x = struct((tokens, hidden), jnp.bfloat16)
    routing = struct((tokens, k), jnp.int32), struct((tokens, k), jnp.float32)
    text = lowered_text(devices, there_and_back(form, wire, 64), x, *routing)
    assert text.count("@mosaic_gpu_v2") == kernels
    assert "all_to_all" not in text


def test_xla_named_takes_no_kernel():
    x, ids, weights = struct((64, 256), jnp.bfloat16), struct((64, 4), jnp.int32), struct((64, 4), jnp.float32)
    text = lowered_text(2, there_and_back("per_peer", "nvfp4", 8, "xla"), x, ids, weights)
    assert "mosaic_gpu" not in text
    assert text.count("stablehlo.all_to_all") == 2


def test_rows_the_kernel_does_not_take_go_through_one_all_to_all():
    x, ids, weights = struct((64, 144), jnp.bfloat16), struct((64, 4), jnp.int32), struct((64, 4), jnp.float32)
    text = lowered_text(2, there_and_back("per_peer", "nvfp4", 8), x, ids, weights)
    assert text.count("stablehlo.all_to_all") == 1  # the way back has no such limit
    with pytest.raises(NotImplementedError, match="multiple of 16 bytes"):
        lowered_text(2, there_and_back("per_peer", "nvfp4", 8, "mosaic_gpu"), x, ids, weights)


@pytest.mark.slow
@pytest.mark.parametrize(("wire", "scale"), [("bf16", None), ("nvfp4", jnp.float32(0.01))])
def test_moe_layer_exchanges_without_a_collective(wire, scale):
    """A scale that is given is the same everywhere and needs no collective either."""
    packed = lambda n, k: PackedWeights(  # noqa: E731
        struct((8, n // 64, k // 64, 9, 64), jnp.uint32), struct((8, 1, 1), jnp.float32)
    )
    x, ids, weights = struct((128, 512), jnp.bfloat16), struct((128, 4), jnp.int32), struct((128, 4), jnp.float32)
    config = MoEConfig(num_experts=16, axis_name="ep", wire_format=wire, **W4A4)

    def layer(x, ids, weights, w13, w2):
        y, _ = moe_layer(x, ids, weights, MoEWeights(w13, w2, scale), config)
        return y

    text = lowered_text(2, layer, x, ids, weights, packed(512, 512), packed(512, 256))
    assert "mosaic_gpu" in text
    assert not re.search("all_to_all|all_reduce|all_gather|collective_permute", text)


@pytest.mark.parametrize("form", ["per_peer", "per_slot"])
def test_gradients_are_those_of_one_all_to_all(form):
    """Also where a kernel is named, and rows are no multiple of 16 bytes."""

    def result(x, ids, weights):
        d = dispatch(x, ids, weights, num_experts=8, form=form, wire_format="bf16", implementation="mosaic_gpu")
        home = weights if form == "per_slot" else None
        return combine(d.x * 2, d, topk_weights=home, implementation="mosaic_gpu")

    structs = struct((64, 256), jnp.bfloat16), struct((64, 3), jnp.int32), struct((64, 3), jnp.float32)
    text = lowered_text(2, lambda x, *rest: jax.jvp(lambda x: result(x, *rest), (x,), (x,)), *structs)
    assert "all_to_all" in text


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (dict(devices=1), TuningConfig(), "2 to 8 devices"),
        (dict(devices=9), TuningConfig(), "2 to 8 devices"),
        (dict(tokens=0), TuningConfig(), "needs tokens"),
        (dict(k=16), TuningConfig(), "1 to 15 slots"),
        (dict(capacity=2**22), TuningConfig(), "32-bit"),
        (dict(), TuningConfig(133), "blocks must be"),
        (dict(), TuningConfig(132, 8), "warpgroups 1..7"),
        (dict(tokens=132 * 12288, capacity=1), TuningConfig(132, 7), "shared memory"),
    ],
)
def test_dispatch_refuses_with_the_value(change, config, message):
    routes = dataclasses.replace(Routes(128, 8, 4, 16, 128, "per_peer"), **change)
    parts = [struct((max(1, routes.tokens), 7168), jnp.bfloat16)]
    problem = check_config(parts, routes, encode="per_token", config=config)
    assert message in problem


def problem_on(names, kind="NVIDIA H100 80GB HBM3"):
    mesh = AbstractMesh(
        (2,) * len(names),
        names,
        axis_types=(AxisType.Auto,) * len(names),
        abstract_device=AbstractDevice(kind, 132, "cuda"),
    )
    with use_abstract_mesh(mesh):
        return peers_problem("ep")


def test_who_can_store_to_whom(monkeypatch):
    assert problem_on(("ep",)) is None
    assert problem_on(("ep",), "NVIDIA H200") is None
    assert "one axis" in problem_on(("data", "ep"))
    assert "NVLink" in problem_on(("ep",), "NVIDIA H100 PCIe")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "one process" in problem_on(("ep",))


def test_a_named_kernel_needs_gpus(make_mesh):
    x, ids = jnp.ones((4, 256), jnp.bfloat16), jnp.zeros((4, 2), jnp.int32)
    for body in (
        lambda x, ids: dispatch(x, ids, jnp.ones(ids.shape), num_experts=4, implementation="mosaic_gpu").local_ids,
        lambda x, ids: combine(
            x.repeat(2, 0), dispatch(x, ids, jnp.ones(ids.shape), num_experts=4), implementation="mosaic_gpu"
        ),
    ):
        with pytest.raises(NotImplementedError, match="GPU"):
            jax.jit(jax.shard_map(body, mesh=make_mesh(2), in_specs=P("ep"), out_specs=P("ep")))(x, ids)


@pytest.mark.slow
def test_several_hosts_pack_in_one_kernel(monkeypatch):
    x, ids, weights = struct((128, 7168), jnp.bfloat16), struct((128, 8), jnp.int32), struct((128, 8), jnp.float32)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for form in ("per_peer", "per_slot"):
        text = lowered_text(4, there_and_back(form, "nvfp4", 64), x, ids, weights)
        assert text.count("stablehlo.all_to_all") == 2
        assert text.count("@mosaic_gpu_v2") == 2  # pack, depermute
    x, ids, weights = (struct((1200, *s.shape[1:]), s.dtype) for s in (x, ids, weights))
    for wire in ("nvfp4", "bf16"):  # 16 MB and more: the values of all rows in an all_to_all of their own
        text = lowered_text(4, there_and_back("per_peer", wire, 64), x, ids, weights)
        assert text.count("stablehlo.all_to_all") == 3
        assert text.count("@mosaic_gpu_v2") == 2
