"""Dispatch into buffers that the program keeps: lowering and refusals on a CPU; on GPUs, against plain dispatch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh
from test_multigpu import DEVICES, EP, watchdog  # noqa: F401

from cuda_lowering import H100, struct
from fp4jax import low_latency
from fp4jax.expert_parallel import combine, dispatch
from fp4jax.layers import ExpertSettings
from fp4jax.low_latency import ReceiveBuffers, check_no_copies
from fp4jax.models import BucketedModel, Qwen3Moe, Qwen3MoeConfig, configure_experts, quantize_experts
from fp4jax.permute import depermute_combine

EXPERTS, K, HIDDEN = 16, 4, 512


def there_and_back(x, ids, weights, buffers, form="per_peer", wire="nvfp4", seed=0):
    """-> i32 [4]: sums that depend on every byte received, on ids and weights, on the map, on what returns; buffers."""
    scale = "per_token" if wire == "nvfp4" else None
    d = dispatch(x, ids, weights, num_experts=EXPERTS, form=form, wire_format=wire, global_scale=scale, buffers=buffers)
    here = jnp.any(d.local_ids >= 0, axis=1, keepdims=True)

    def digest(array, where=True):
        words = lax.bitcast_convert_type(array, jnp.uint32 if array.dtype.itemsize == 4 else jnp.uint8)
        words = words.reshape(array.shape[0], -1).astype(jnp.uint32)
        places = jax.random.bits(jax.random.key(1), words.shape)
        return lax.bitcast_convert_type(jnp.sum(jnp.where(where, words * places, 0), dtype=jnp.uint32), jnp.int32)

    rows = sum(digest(a, here) for a in jax.tree.leaves(d.x) if a.ndim)
    words = digest(d.local_ids) + digest(d.local_weights, here)
    # The experts: a row of random numbers for every route, other ones for other rows; some routes found no place.
    key = jax.random.fold_in(jax.random.key(3), rows + seed)
    full = jax.random.uniform(key, d.local_ids.shape) < 0.2
    row_map = jnp.where((d.local_ids >= 0) & ~full, jnp.arange(full.size, dtype=jnp.int32).reshape(full.shape), -1)
    y = jax.random.normal(key, (full.size, HIDDEN), jnp.bfloat16)
    y = jnp.where(row_map.reshape(-1, 1) >= 0, y, jnp.nan)  # nobody may use what no route names
    home = weights if form == "per_slot" else None
    if buffers is None:
        back = combine(depermute_combine(y, row_map, d.local_weights), d, topk_weights=home)
    else:
        back, buffers = low_latency.combine(y, row_map, d, topk_weights=home)
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
@pytest.mark.parametrize(("form", "wire", "arrays"), [("per_peer", "nvfp4", 5), ("per_slot", "bf16", 2)])
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
    with pytest.raises(ValueError, match="there is none"):
        ExpertSettings(low_latency=True)


_KERNEL = """
  %k.1 = (s32[16,2]{1,0}, u8[2,16,64]{2,1,0}, /*index=2*/s32[8,32]{1,0}) custom-call(%a, %b), \
custom_call_target="mosaic_gpu_v2", output_to_operand_aliasing={{1}: (4, {}), {2}: (12, {})}, api_version=X
  %k.2 = bf16[4,8]{1,0} custom-call(%c), custom_call_target="mosaic_gpu_v2", output_to_operand_aliasing={{}: (0, {})}
  %k.3 = f32[4,8]{1,0} custom-call(%c), custom_call_target="mosaic_gpu_v2", api_version=X
"""


@pytest.mark.parametrize("copied", ["u8[2,16,64]{2,1,0}", "s32[8,32]", "bf16[4,8]{1,0:T(8,128)}"])
def test_copies_of_what_kernels_change_are_refused(copied):
    """Text like XLA's; with a real program on GPUs."""

    class Program(jax.stages.Compiled):
        def __init__(self, text):
            self.text = text

        def as_text(self):
            return _KERNEL + self.text

    check_no_copies(Program("  %copy.1 = s32[16,2]{1,0} copy(%x)\n  ROOT %copy.2 = f32[4,8]{1,0} copy(%y)\n"))
    with pytest.raises(RuntimeError, match=re.escape(copied.partition("{")[0])):
        check_no_copies(Program(f"  %copy.1 = {copied} copy(%x), metadata=y\n"))


# --- on several GPUs ---


def chained(mesh, form, wire, tokens, steps, kept):
    """Digests [devices, 1 + steps, 4] of ways there and back, random routing, one after the other in one program."""

    def body(seed):
        def step(i, buffers, before):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed[0]), i), lax.axis_index("ep"))
            k1, k2, k3, k4, k5 = jax.random.split(key, 5)
            ids = lax.top_k(jax.random.uniform(k1, (tokens, EXPERTS)), K)[1].astype(jnp.int32)
            ids = jnp.where(jax.random.uniform(k4, (tokens, 1)) < jax.random.uniform(k5, ()), -1, ids)
            x = jax.random.normal(k2, (tokens, HIDDEN), jnp.bfloat16)
            ids = ids + seed[1] * before[0]  # nothing is added, but the rows before have been read
            return there_and_back(x, ids, jax.random.uniform(k3, ids.shape), buffers, form, wire, seed[0] + i)

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
    ("form", "wire", "tokens"), [("per_peer", "nvfp4", 1), ("per_peer", "nvfp4", 130), ("per_slot", "fp8", 33)]
)
def test_200_random_routings(make_mesh, devices, form, wire, tokens):
    mesh = make_mesh(devices)
    got, compiled = chained(mesh, form, wire, tokens, 200, kept=True)
    expected, _ = chained(mesh, form, wire, tokens, 200, kept=False)
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


@pytest.mark.parametrize("devices", DEVICES)
def test_a_model_decodes_the_same_tokens(make_mesh, devices):
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=256, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128,
    )  # fmt: skip
    model = Qwen3Moe(config, rngs=nnx.Rngs(0))
    quantize_experts(model)
    prompts = [[1, 2, 3], [7, 8], [9, 250, 17, 4], [5]]
    answers = []
    for kept in (False, True):
        configure_experts(
            model, mesh=make_mesh(devices), activation_format="nvfp4", wire_format="nvfp4", low_latency=kept
        )
        served = BucketedModel(model, buckets=(8,), batch_buckets=(4,), max_length=64)
        served.warm_up(workers=4)
        answers.append(served.generate(prompts, 40))
    assert answers[0] == answers[1]
