"""Dispatch into buffers that the program keeps: lowering and refusals on a CPU; on GPUs, against plain dispatch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh
from test_multigpu import DEVICES, EP, watchdog  # noqa: F401

from cuda_lowering import H100, struct
from fp4jax.expert_parallel import dispatch
from fp4jax.layers import ExpertSettings
from fp4jax.low_latency import ReceiveBuffers, copies_in
from fp4jax.models import BucketedModel, Qwen3Moe, Qwen3MoeConfig, configure_experts, quantize_experts

EXPERTS, K, HIDDEN = 16, 4, 512


def received(x, ids, weights, buffers, form="per_peer", wire="nvfp4"):
    """-> i32 [3]: sums that depend on every byte received, on ids and weights, and on the map; and the buffers."""
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
    return jnp.stack([rows, words, digest(d.send_map)]), d.buffers


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
        a, buffers = received(x, ids, weights, ReceiveBuffers(), form, wire)
        b, buffers = received(x, ids, weights, buffers, form, wire)
        assert buffers.turn == 2 and len(buffers.sets[0]) == arrays
        return a[None], b[None]

    text = lowered_text(twice, *inputs(8))
    assert text.count("@mosaic_gpu_v2") >= 2
    assert text.count("stablehlo.output_operand_alias") == 2 * (arrays + 1)
    assert "all_to_all" not in text


@pytest.mark.usefixtures("on_the_cpu")
def test_buffers_of_another_call_are_refused():
    def body(x, ids, weights):
        _, buffers = received(x, ids, weights, ReceiveBuffers())
        return received(x[:4], ids[:4], weights[:4], buffers)[0][None]

    with pytest.raises(ValueError, match=r"the buffers are .*\(2, 8, 256\).* needs .*\(2, 4, 256\)"):
        lowered_text(body, *inputs(8))


def test_there_is_no_other_way_to_keep_buffers(make_mesh):
    body = lambda *a: received(*a, ReceiveBuffers())[0][None]  # noqa: E731
    x, ids, weights = jnp.ones((4, HIDDEN), jnp.bfloat16), jnp.zeros((4, K), jnp.int32), jnp.ones((4, K))
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(NotImplementedError, match=r"buffers, implementation=None: .*GPU"),
    ):
        mapped = jax.shard_map(body, mesh=make_mesh(2), in_specs=EP, out_specs=EP, check_vma=False)
        jax.jit(mapped)(x, ids, weights)
    with pytest.raises(ValueError, match="there is none"):
        ExpertSettings(low_latency=True)


def test_copies_are_found():
    buffers = ReceiveBuffers(((struct((4, 8), jnp.uint8),),) * 2, struct((2, 32), jnp.int32), 1)

    def program(keep):
        def run(x, y):
            changed = x.at[0, 0].set(y)
            return (changed, x) if keep else changed

        x = struct((4, 8), jnp.uint8)
        return jax.jit(run, donate_argnums=0).lower(x, struct((), jnp.uint8)).compile()

    with jax.default_device(jax.devices("cpu")[0]):
        assert set(copies_in(program(keep=True), buffers)) == {"u8[4,8]"}
        assert copies_in(program(keep=False), buffers) == []


# --- on several GPUs ---


def chained(mesh, form, wire, tokens, steps, kept):
    """Digests [devices, 1 + steps, 3] of dispatches with random routing, one right behind the other, in one program."""

    def body(seed):
        def step(i, buffers, before):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed[0]), i), lax.axis_index("ep"))
            k1, k2, k3, k4, k5 = jax.random.split(key, 5)
            ids = lax.top_k(jax.random.uniform(k1, (tokens, EXPERTS)), K)[1].astype(jnp.int32)
            ids = jnp.where(jax.random.uniform(k4, (tokens, 1)) < jax.random.uniform(k5, ()), -1, ids)
            x = jax.random.normal(k2, (tokens, HIDDEN), jnp.bfloat16)
            ids = ids + seed[1] * before[0]  # nothing is added, but the rows before have been read
            return received(x, ids, jax.random.uniform(k3, ids.shape), buffers, form, wire)

        first, buffers = step(0, ReceiveBuffers() if kept else None, seed)

        def two(carry, i):
            buffers, before = carry
            a, buffers = step(2 * i + 1, buffers, before)
            b, buffers = step(2 * i + 2, buffers, a)
            return (buffers, b), jnp.stack([a, b])

        _, rest = lax.scan(two, (buffers, first), jnp.arange(steps // 2))
        return jnp.concatenate([first[None], rest.reshape(-1, 3)])[None]

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
    capacity = tokens * (K if form == "per_slot" else 1)
    widths = {"nvfp4": [(HIDDEN // 2, jnp.uint8), (HIDDEN // 16, jnp.float8_e4m3fn)],
              "fp8": [(HIDDEN, jnp.float8_e4m3fn), (HIDDEN // 128, jnp.float32)]}[wire]  # fmt: skip
    one = tuple(struct((devices, capacity, n), dtype) for n, dtype in widths)
    assert copies_in(compiled, ReceiveBuffers((one, one), struct((2, 32), jnp.int32))) == []


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
    for low_latency in (False, True):
        configure_experts(
            model, mesh=make_mesh(devices), activation_format="nvfp4", wire_format="nvfp4", low_latency=low_latency
        )
        served = BucketedModel(model, buckets=(8,), batch_buckets=(4,), max_length=64)
        served.warm_up(workers=4)
        answers.append(served.generate(prompts, 40))
    assert answers[0] == answers[1]
    (decode,) = served.decoders[4]._executables.values()
    tokens = 4 // devices
    one = (struct((devices, tokens, 128), jnp.uint8), struct((devices, tokens, 16), jnp.float8_e4m3fn))
    assert copies_in(decode, ReceiveBuffers((one, one), struct((max(1, tokens // 2), 32), jnp.int32))) == []
