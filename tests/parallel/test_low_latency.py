"""Dispatch into buffers that the program keeps: lowering and refusals on a CPU; on GPUs, against plain dispatch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec as P, use_abstract_mesh
from test_multigpu import DEVICES, EP, watchdog  # noqa: F401

from cuda_lowering import H100, struct
from fp4jax.engine import BucketedModel
from fp4jax.expert_parallel import ReceiveBuffers, check_no_copies, combine, combine_into_buffers, dispatch, low_latency
from fp4jax.grouped_gemm import pack_weights
from fp4jax.implementations import multiprocessors as seen
from fp4jax.models import Qwen3Moe, Qwen3MoeConfig, configure_experts, quantize_experts
from fp4jax.moe import MoEConfig, MoEWeights, moe_layer
from fp4jax.nvfp4 import quantize
from fp4jax.permute import depermute_combine
from oracles import ALL_NVFP4
from pallas_kernels.exchange import push_combine

pytestmark = pytest.mark.usefixtures("quick_compile")

EXPERTS, K, HIDDEN = 16, 4, 512


def there_and_back(x, ids, weights, buffers, form="per_peer", wire="nvfp4", seed=0, y=(HIDDEN, jnp.bfloat16), **more):
    """-> i32 [4]: sums that depend on every byte received, on ids and weights, on the map, on what returns; buffers.

    y: width and dtype of what returns.
    """
    scale = "per_token" if wire == "nvfp4" else None
    options = dict(num_experts=EXPERTS, form=form, wire_format=wire, global_scale=scale, buffers=buffers, **more)
    d = dispatch(x, ids, weights, **options)
    here = jnp.any(d.local_ids >= 0, axis=1, keepdims=True)

    def digest(array, where=True):
        words = lax.bitcast_convert_type(array, jnp.uint32 if array.dtype.itemsize == 4 else jnp.uint8)
        words = words.reshape(array.shape[0], -1).astype(jnp.uint32)
        places = jax.random.bits(jax.random.key(1), words.shape)
        return lax.bitcast_convert_type(jnp.sum(jnp.where(where, words * places, 0), dtype=jnp.uint32), jnp.int32)

    rows = sum(digest(a, here) for a in jax.tree.leaves(d.x) if a.ndim)
    words = digest(d.local_ids) + digest(d.local_weights, here)
    # The experts: a row of random numbers for every route, anywhere; some routes found no place.
    key = jax.random.fold_in(jax.random.key(3), rows + seed)
    full = jax.random.uniform(key, d.local_ids.shape) < 0.2
    places = jax.random.permutation(key, full.size).astype(jnp.int32).reshape(full.shape)
    row_map = jnp.where((d.local_ids >= 0) & ~full, places, -1)
    used = jnp.zeros(full.size, bool).at[jnp.where(row_map >= 0, row_map, full.size).reshape(-1)].set(True, mode="drop")
    made = jax.random.normal(key, (full.size, y[0]), y[1])
    made = jnp.where(used[:, None], made, jnp.nan)  # nobody may use what no route names
    home = weights if form == "per_slot" else None
    residual = jax.random.normal(key, (x.shape[0], y[0]), y[1]) if wire != "fp8" else None
    if buffers is None:
        back = combine(depermute_combine(made, row_map, d.local_weights), d, residual, topk_weights=home)
    else:
        back, buffers = combine_into_buffers(made, row_map, d, residual, topk_weights=home)
    return jnp.stack([rows, words, digest(d.send_map), digest(back)]), buffers


# --- without GPUs ---


def lowered_text(fn, *structs, devices=2):
    mesh = AbstractMesh((devices,), ("ep",), axis_types=(AxisType.Auto,), abstract_device=H100)
    whole = jax.tree.map(lambda s: struct((devices * s.shape[0], *s.shape[1:]), s.dtype), structs)
    with use_abstract_mesh(mesh):
        mapped = jax.shard_map(fn, mesh=mesh, in_specs=EP, out_specs=EP, check_vma=False)
        return jax.jit(mapped).trace(*whole).lower(lowering_platforms=("cuda",)).as_text()


def inputs(tokens):
    shapes = ((tokens, HIDDEN), jnp.bfloat16), ((tokens, K), jnp.int32), ((tokens, K), jnp.float32)
    return [struct(*shape) for shape in shapes]


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    ("form", "wire", "arrays"), [("per_peer", "nvfp4", 5), pytest.param("per_slot", "bf16", 2, marks=pytest.mark.slow)]
)
def test_a_dispatch_changes_one_set_and_the_counters_in_place(form, wire, arrays):
    def twice(x, ids, weights):
        a, buffers = there_and_back(x, ids, weights, ReceiveBuffers(), form, wire)
        b, buffers = there_and_back(x, ids, weights, buffers, form, wire)
        assert buffers.there.turn == buffers.back.turn == 2 and len(buffers.there.sets[0]) == arrays
        return a[None], b[None]

    text = lowered_text(twice, *inputs(8))
    assert text.count("@mosaic_gpu_v2") >= 4
    assert text.count("stablehlo.output_operand_alias") == 2 * (arrays + 1 + 2)
    assert "all_to_all" not in text


@pytest.mark.usefixtures("on_the_cpu")
def test_two_sets_take_turns():
    """What call n stores stays where it is until call n + 2; only the first call waits for a barrier."""
    arrays, seen = low_latency.KeptArrays(), []
    for call in range(1, 6):
        turn = low_latency._Turn(arrays, [struct((2, 3), jnp.int32)], 4, "dispatch")
        turn.now[0][...] = jnp.full((2, 3), call)
        turn.kept[-1][...] += 1
        seen.append((arrays.turn, turn.first))
        received, arrays = turn.end()
        np.testing.assert_array_equal(received[0], np.full((2, 3), call))
        held = {int(np.asarray(some[0])[0, 0]) for some in arrays.sets}
        assert call in held and (call == 1 or held == {call - 1, call})
    assert seen == [(0, True), (1, False), (2, False), (1, False), (2, False)]
    np.testing.assert_array_equal(arrays.counters, np.full(arrays.counters.shape, 5))


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    "y",
    [
        (HIDDEN, jnp.bfloat16),
        *(pytest.param(y, marks=pytest.mark.slow) for y in ((130, jnp.float32), (6, jnp.bfloat16))),
    ],
)
@pytest.mark.parametrize(("form", "more"), [("per_peer", {}), ("per_slot", {"pair_capacity": 5})])
def test_kernels_lower_in_64_bits_too(form, more, y):
    def body(x, ids, weights):
        return there_and_back(x, ids, weights, ReceiveBuffers(), form, "bf16", 0, y, **more)[0][None]

    with jax.enable_x64():
        assert lowered_text(body, *inputs(8)).count("@mosaic_gpu_v2") >= 2


@pytest.mark.usefixtures("on_the_cpu")
def test_blocks_that_wait_for_each_other_leave_multiprocessors_free():
    def blocks(number):
        mesh = AbstractMesh((2,), ("ep",), abstract_device=AbstractDevice("NVIDIA H100", number, "cuda"))
        with use_abstract_mesh(mesh):
            few, many = (push_combine.default_config(rows, 14336, seen()).blocks for rows in (2, 4096))
            return few, many

    assert blocks(132) == blocks(200) == (66, 120)
    assert blocks(78) == (39, 66)
    assert blocks(13) == (6, 1)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("form", ["per_peer", "per_slot"])
def test_what_does_not_belong_to_the_form_is_refused(form):
    """k = 2 slots on 2 devices: shapes alone do not tell columns of devices from slots."""

    def result(change):
        def body(x, ids, weights):
            ids, weights = ids[:, :2], weights[:, :2]
            d = dispatch(x, ids, weights, num_experts=4, form=form, wire_format="bf16", buffers=ReceiveBuffers())
            home = weights if form == "per_slot" else None
            given = change(dict(y=jnp.ones((8, HIDDEN)), row_map=d.local_ids, dispatched=d, topk_weights=home), weights)
            return combine_into_buffers(**given)[0]

        return lowered_text(body, *inputs(8))

    assert "mosaic_gpu_v2" in result(lambda given, _: given)
    with pytest.raises(ValueError, match="the dispatch had no buffers"):
        result(lambda given, _: given | {"dispatched": given["dispatched"]._replace(buffers=None)})
    with pytest.raises(ValueError, match="row_map must be"):
        result(lambda given, _: given | {"row_map": given["row_map"][:-1]})
    if form == "per_peer":
        with pytest.raises(ValueError, match="belong to the per-slot form"):
            result(lambda given, weights: given | {"topk_weights": weights})
    else:
        with pytest.raises(ValueError, match="belong to the per-slot form"):
            result(lambda given, weights: given | {"topk_weights": weights[:, :1]})
    with pytest.raises(NotImplementedError, match="bfloat16 or float32"):
        result(lambda given, _: given | {"y": given["y"].astype(jnp.float16)})


def small_weights():
    """Weights of 8 experts of width 128 for tokens of 256 values."""
    rng = np.random.default_rng(0)
    w13, w2 = (jnp.asarray(rng.standard_normal(s) / 16) for s in ((8, 256, 256), (8, 256, 128)))
    return MoEWeights(*(pack_weights(quantize(w, global_scale="per_expert")) for w in (w13, w2)))


def small_layer(form, weights):
    """The weights, their specs on a mesh, and a config."""
    return (
        weights,
        jax.tree.map(lambda leaf: EP if leaf.ndim else P(), weights),
        MoEConfig(8, form=form, axis_name="ep", **ALL_NVFP4),
    )


def layers(x, ids, topk_weights, weights, buffers, config, number):
    """`number` layers, each of what the one before made; the tokens, and the buffers."""
    for _ in range(number):
        y, stats = moe_layer(x, ids, topk_weights, weights, config, buffers)
        x, buffers = x + y, stats.buffers
    return x, buffers


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("form", ["per_peer", "per_slot"])
def test_a_layer_has_six_kernels_and_no_collective_but_of_drops(form):
    weights, specs, config = small_layer(form, jax.eval_shape(small_weights))
    mesh = AbstractMesh((2,), ("ep",), axis_types=(AxisType.Auto,), abstract_device=H100)
    with use_abstract_mesh(mesh):
        fn = lambda *a: layers(*a, ReceiveBuffers(), config, 2)[0]  # noqa: E731
        mapped = jax.shard_map(fn, mesh=mesh, in_specs=(EP, EP, EP, specs), out_specs=EP, check_vma=False)
        x, routing = struct((16, 256), jnp.bfloat16), [struct((16, 2), t) for t in (jnp.int32, jnp.float32)]
        text = jax.jit(mapped).trace(x, *routing, weights).lower(lowering_platforms=("cuda",)).as_text()
    assert "all_to_all" not in text
    found = set(re.findall(r"\d\d(\w+)_mosaic_gpu", text))
    assert {"dispatch_Kernel_run_into", "push_combine", "few_routes_metadata"} <= found
    assert not found & {"dispatch_Kernel_run", "combine", "permute_depermute_combine"}


@pytest.mark.slow
def test_decode_steps_are_checked(make_mesh):
    for kept in (False, True):
        served = BucketedModel(small_model(make_mesh(2), kept), buckets=(8,), batch_buckets=(4,), max_length=64)
        assert served.decoders[4]._block.check_compiled is (check_no_copies if kept else None)


@pytest.mark.usefixtures("on_the_cpu")
def test_buffers_of_another_call_are_refused():
    def body(x, ids, weights):
        _, buffers = there_and_back(x, ids, weights, ReceiveBuffers())
        return there_and_back(x[:4], ids[:4], weights[:4], buffers)[0][None]

    with pytest.raises(ValueError, match=r"the buffers are .*\(2, 8, 256\).* needs .*\(2, 4, 256\)"):
        lowered_text(body, *inputs(8))


def test_there_is_no_other_way_to_keep_buffers(make_mesh):
    body = lambda *a: there_and_back(*a, ReceiveBuffers())[0][None]  # noqa: E731
    x, ids, weights = jnp.ones((4, HIDDEN), jnp.bfloat16), jnp.zeros((4, K), jnp.int32), jnp.ones((4, K))
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(NotImplementedError, match=r"buffers, implementation=None: .*GPU"),
    ):
        mapped = jax.shard_map(body, mesh=make_mesh(2), in_specs=EP, out_specs=EP, check_vma=False)
        jax.jit(mapped)(x, ids, weights)
    with pytest.raises(ValueError, match="axis_name is None"):
        MoEConfig(8, low_latency=True)


_KERNEL = """
  %k.1 = (s32[16,2]{1,0}, u8[2,16,64]{2,1,0}, /*index=2*/s32[8,32]{1,0}) custom-call(%a, %b), \
custom_call_target="mosaic_gpu_v2", output_to_operand_aliasing={{1}: (4, {}), {2}: (12, {})}, api_version=X
  %k.2 = bf16[4,8]{1,0} custom-call(%c), custom_call_target="mosaic_gpu_v2", output_to_operand_aliasing={{}: (0, {})}
  %k.3 = f32[4,8]{1,0} custom-call(%c), custom_call_target="mosaic_gpu_v2", api_version=X
  %k.4 = (f32[3,8]{1,0}, s32[66]{0}) custom-call(%c), custom_call_target="mosaic_gpu_v2", \
output_to_operand_aliasing={{1}: (1, {})}, api_version=X
"""


@pytest.mark.parametrize("copied", ["u8[2,16,64]{2,1,0}", "s32[8,32]", "bf16[4,8]{1,0:T(8,128)}"])
def test_copies_of_what_kernels_change_are_refused(copied):
    """Text like XLA's; with a real program on GPUs."""

    class Program(jax.stages.Compiled):
        def __init__(self, text, kernels=_KERNEL):
            self.text = kernels + text

        def as_text(self):
            return self.text

    check_no_copies(Program("  %copy.1 = s32[16,2]{1,0} copy(%x)\n  ROOT %copy.2 = f32[4,8]{1,0} copy(%y)\n"))
    check_no_copies(Program("  %copy.1 = s32[66]{0} copy(%semaphores)\n"))
    with pytest.raises(RuntimeError, match="no kernel that changes"):
        check_no_copies(Program("", kernels=""))
    with pytest.raises(RuntimeError, match=re.escape(copied.partition("{")[0])):
        check_no_copies(Program(f"  %start = ({copied}, {copied}, u32[]) copy-start(%x), metadata=y\n"))
    with pytest.raises(RuntimeError, match=re.escape(copied.partition("{")[0])):
        check_no_copies(Program(f"  %copy.1 = {copied} copy(%x), metadata=y\n"))


# --- on several GPUs ---


def chained(mesh, form, wire, tokens, steps, kept, y=(HIDDEN, jnp.bfloat16), **more):
    """Digests [devices, 1 + steps, 4] of ways there and back, random routing, one after the other in one program."""

    def body(seed):
        def step(i, buffers, before):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed[0]), i), lax.axis_index("ep"))
            k1, k2, k3, k4, k5 = jax.random.split(key, 5)
            ids = lax.top_k(jax.random.uniform(k1, (tokens, EXPERTS)), K)[1].astype(jnp.int32)
            ids = jnp.where(jax.random.uniform(k4, (tokens, 1)) < jax.random.uniform(k5, ()), -1, ids)
            x = jax.random.normal(k2, (tokens, HIDDEN), jnp.bfloat16)
            ids = ids + seed[1] * before[0]  # nothing is added, but the rows before have been read
            weights = jax.random.uniform(k3, ids.shape)
            return there_and_back(x, ids, weights, buffers, form, wire, seed[0] + i, y, **more)

        first, buffers = step(0, ReceiveBuffers() if kept else None, seed)

        def two(carry, i):
            buffers, before = carry
            a, buffers = step(2 * i + 1, buffers, before)
            b, buffers = step(2 * i + 2, buffers, a)
            return (buffers, b), jnp.stack([a, b])

        _, rest = lax.scan(two, (buffers, first), jnp.arange(steps // 2))
        return jnp.concatenate([first[None], rest.reshape(-1, 4)])[None]

    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=EP, out_specs=EP, check_vma=False))
    seeds = jnp.tile(jnp.array([5, 0], jnp.int32), mesh.size)
    compiled = run.lower(seeds).compile()
    return np.asarray(compiled(seeds)), compiled


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize(
    ("form", "wire", "tokens", "y", "more"),
    [
        ("per_peer", "nvfp4", 1, (HIDDEN, jnp.bfloat16), {}),
        ("per_peer", "nvfp4", 130, (2050, jnp.float32), {}),  # more than half a MB: most blocks
        ("per_slot", "fp8", 33, (130, jnp.bfloat16), {}),
        ("per_peer", "bf16", 70, (HIDDEN, jnp.bfloat16), {"pair_capacity": 20}),  # overflow
    ],
)
def test_200_random_routings(make_mesh, devices, form, wire, tokens, y, more):
    mesh = make_mesh(devices)
    got, compiled = chained(mesh, form, wire, tokens, 200, kept=True, y=y, **more)
    expected, _ = chained(mesh, form, wire, tokens, 200, kept=False, y=y, **more)
    np.testing.assert_array_equal(got, expected)
    assert len(np.unique(got[..., 0])) > 100  # rows differ, and the digests with them
    check_no_copies(compiled)


@pytest.mark.parametrize("devices", DEVICES)
def test_a_program_that_reads_old_rows_is_refused(make_mesh, devices):
    def body(x, ids, weights):
        options = dict(num_experts=EXPERTS, wire_format="bf16")
        first = dispatch(x, ids, weights, **options, buffers=ReceiveBuffers())
        second = dispatch(x, ids, weights, **options, buffers=first.buffers)
        third = dispatch(x, ids, weights, **options, buffers=second.buffers)
        return first.x, third.x  # the third receives where the first did

    shapes = ((8, HIDDEN), jnp.bfloat16), ((8, K), jnp.int32), ((8, K), jnp.float32)
    structs = [struct((devices * shape[0], *shape[1:]), dtype) for shape, dtype in shapes]
    mapped = jax.shard_map(body, mesh=make_mesh(devices), in_specs=EP, out_specs=EP, check_vma=False)
    compiled = jax.jit(mapped).lower(*structs).compile()
    with pytest.raises(RuntimeError, match=rf"bf16\[{devices},8,{HIDDEN}\].*would be lost"):
        check_no_copies(compiled)


def small_model(mesh, kept):
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=256, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128,
    )  # fmt: skip
    model = Qwen3Moe(config, rngs=nnx.Rngs(0))
    quantize_experts(model)
    configure_experts(
        model,
        mesh=mesh,
        activation_format_1="nvfp4",
        activation_format_2="nvfp4",
        wire_format="nvfp4",
        low_latency=kept,
    )
    return model


@pytest.mark.parametrize("devices", DEVICES)
def test_a_model_decodes_the_same_tokens(make_mesh, devices):
    prompts = [[1, 2, 3], [7, 8], [9, 250, 17, 4], [5]]
    answers = []
    for kept in (False, True):
        model = small_model(make_mesh(devices), kept)
        served = BucketedModel(model, buckets=(8,), batch_buckets=(4,), max_length=64)
        served.warm_up(workers=4)
        answers.append(served.generate(prompts, 40))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("form", ["per_peer", "per_slot"])
def test_layers_have_the_bits_of_layers_without(make_mesh, rng, devices, form):
    weights, specs, config = small_layer(form, small_weights())
    tokens = 24 * devices
    x = jnp.asarray(rng.standard_normal((tokens, 256)), jnp.bfloat16)
    ids = jnp.asarray(rng.integers(-1, 8, (tokens, 2)), jnp.int32)
    topk_weights = jnp.asarray(rng.random((tokens, 2)), jnp.float32)
    results = []
    for buffers in (None, ReceiveBuffers()):
        fn = lambda *a, buffers=buffers: layers(*a, buffers, config, 5)[0]  # noqa: E731
        mapped = jax.shard_map(
            fn, mesh=make_mesh(devices), in_specs=(EP, EP, EP, specs), out_specs=EP, check_vma=False
        )  # fmt: skip
        results.append(np.asarray(jax.jit(mapped)(x, ids, topk_weights, weights), np.float32))
    np.testing.assert_array_equal(*results)
    assert np.abs(results[0] - np.asarray(x, np.float32)).max() > 0.01
