"""What public ops say to arguments of the wrong kind, and the one line that tensors print.

The first part runs in a process of its own, without the type checker of this suite, as users do.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from model_oracles import calc_diff
from python_runs import last_json, run_python

from fp4jax import MoEConfig, MoEWeights, NVFP4Tensor, PackedWeights, moe_layer
from fp4jax.block_fp8 import BlockFP8Weights
from fp4jax.operands import described

# Evaluates every expression eagerly and under jit; prints the type and the text of what they raise, in JSON.
_RUN_ALL = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from fp4jax import *
from fp4jax.block_fp8 import block_fp8_matmul, dequantize_blocks, quantize_blocks
from fp4jax.expert_parallel import agree_global_scale
from fp4jax.sharded_moe import expert_mesh
from fp4jax.models import quantize_experts

jax.config.update("jax_num_cpu_devices", 2)
arrays = dict(
    x=jnp.ones((4, 64)), x3=jnp.ones((2, 4, 64)), ids=jnp.zeros((4, 2), jnp.int32), weights=jnp.ones((4, 2)),
    w13=jnp.ones((2, 128, 64)), w2=jnp.ones((2, 64, 64)), counts=jnp.ones(2, jnp.int32),
)
arrays["q"] = NVFP4Tensor(
    jnp.zeros((2, 64, 32), jnp.uint8), jnp.ones((2, 64, 4), jnp.float8_e4m3fn), jnp.ones((2, 1, 1))
)
arrays["rows"] = NVFP4Tensor(jnp.zeros((4, 32), jnp.uint8), jnp.ones((4, 4), jnp.float8_e4m3fn), jnp.float32(1))
arrays["packed"] = PackedWeights(jnp.zeros((2, 1, 1, 9, 64), jnp.uint32), jnp.ones((2, 1, 1)))
arrays["experts"] = MoEWeights(arrays["w13"], arrays["w2"])
explicit = NamedSharding(jax.make_mesh((2,), ("ep",)), P("ep"))
auto = jax.make_mesh((2,), ("ep",), axis_types=(AxisType.Auto,))
two = MoEConfig(num_experts=2)
for name in ("x", "x3", "ids", "q", "packed", "experts", "counts", "weights"):
    arrays["spread_" + name] = jax.device_put(arrays[name], explicit)

def inside(body):
    return jax.shard_map(body, mesh=auto, in_specs=P("ep"), out_specs=P("ep"))(*(arrays[n] for n in names))

names, found = ("x", "ids", "weights"), []
for code in json.loads(sys.argv[1]):
    for run in (lambda f: f(arrays), lambda f: jax.jit(f)(arrays)):
        try:
            run(lambda values: jax.tree.leaves(eval(code, {**globals(), **values})))
            found.append((code, "nothing", ""))
        except Exception as error:
            found.append((code, type(error).__name__, str(error)))
print(json.dumps(found))
"""

ASARRAY = "`jax.numpy.asarray` makes one"
NVFP4 = "NVFP4Tensor(shape=(4, 64), nvfp4, global_scale (), 148 bytes)"
SHARD_MAP = "axis_name='ep' is an axis of a mesh, and there is no surrounding jax.shard_map"
NO_SUCH_AXIS = "axis_name='data' is no axis of the surrounding jax.shard_map, which has ('ep',)"
EXPLICIT = "over a mesh of Explicit axes; call the op inside jax.shard_map"
# Expression -> the exception and what its text contains.
WRONG = {
    # things that are not arrays
    "quantize([[1.0] * 64] * 4)": ("TypeError", "quantize: x must be an array, got a list of 4", ASARRAY),
    "quantize(None)": ("TypeError", "quantize: x must be an array, got None"),
    "quantize(rows)": ("TypeError", f"quantize: x must be an array, got {NVFP4}; `fp4jax.dequantize` makes one"),
    "quantize(x, global_scale=rows)": ("TypeError", "quantize: global_scale must be an array", NVFP4),
    "quantize(x, global_scale={})": ("TypeError", "quantize: global_scale must be an array, got a dict of 0"),
    "quantize(x3, masked_m=[4, 4])": ("TypeError", "quantize: masked_m must be an array, got a list of 2", ASARRAY),
    "quantize(x3, masked_m=jnp.ones(2))": ("TypeError", "masked_m must be an integer array, got float32 (2,)"),
    "dequantize(x)": ("TypeError", "dequantize: t must be of type NVFP4Tensor, got float32 (4, 64); `quantize` makes"),
    "dequantize(packed)": ("TypeError", "got PackedWeights(shape=(2, 64, 64)", "`unpack_weights` of PackedWeights"),
    "dequantize(NVFP4Tensor(rows.qdata, rows.block_scale, None))": ("TypeError", "global_scale must be float32, got"),
    "pack_weights(w2)": ("TypeError", "pack_weights: w must be of type NVFP4Tensor, got float32 (2, 64, 64)", "quant"),
    "pack_weights(packed)": ("TypeError", "pack_weights: w must be of type NVFP4Tensor, got PackedWeights(shape=(2"),
    "unpack_weights(q)": ("TypeError", "unpack_weights: packed must be of type PackedWeights, got NVFP4Tensor(shape="),
    "swiglu_quantize(rows, None, global_scale=1.0)": ("TypeError", "swiglu_quantize: gate_up must be an array", NVFP4),
    "swiglu_quantize(x3, [4, 4], global_scale=1.0)": ("TypeError", "masked_m must be an array, got a list of 2"),
    "route([[1.0, 2.0]], top_k=1)": ("TypeError", "route: logits must be an array, got a list of 1", ASARRAY),
    "route(x[0], top_k=1)": ("ValueError", "route: logits must be [T, E], got (64,)"),
    "permute_to_masked(rows, rows.block_scale, ids, num_experts=2, capacity=4)": (
        "ValueError", "permute_to_masked: scales and row_scale belong to an array x", NVFP4,
    ),
    "permute_to_contiguous(rows, None, ids, num_experts=2, scale_layout='m_major')": (
        "ValueError", "permute_to_contiguous: the block scales of an NVFP4Tensor stay linear", "m_major",
    ),
    "permute_to_masked((x, x), None, ids, num_experts=2, capacity=4)": ("TypeError", "x must be an array, got a tuple"),
    "permute_to_masked(x3, None, ids, num_experts=2, capacity=4)": ("ValueError", "x must be [T, Hx]", "(2, 4, 64)"),
    "permute_to_masked(x, None, [[0]], num_experts=2, capacity=4)": ("TypeError", "topk_ids must be an array", ASARRAY),
    "permute_to_contiguous(x, None, weights, num_experts=2)": ("TypeError", "topk_ids must be int32 or int64, got flo"),
    "permute_to_contiguous(x, x[0], ids, num_experts=2)": ("ValueError", "scales must be [T, S] with T = 4, got (64,)"),
    "depermute_combine(rows, ids, weights)": ("TypeError", "depermute_combine: y must be an array", NVFP4),
    "depermute_combine(x, weights, weights)": ("TypeError", "row_map must be an integer array, got float32 (4, 2)"),
    "depermute_combine(x, ids, None)": ("TypeError", "depermute_combine: topk_weights must be an array, got None"),
    "masked_grouped_gemm(x3, [w2], counts)": ("TypeError", "masked_grouped_gemm: w must be an array, got a list of 1"),
    "masked_grouped_gemm(packed, q, counts)": ("TypeError", "x must be an NVFP4Tensor or an array, got PackedWeights("),
    "masked_grouped_gemm(x3, q, [1, 1])": ("TypeError", "counts must be an array, got a list of 2", ASARRAY),
    "masked_grouped_gemm(x3, q, counts, x_scale='x')": ("TypeError", "x_scale must be an array, got a str"),
    "contiguous_grouped_gemm([[1.0]], q, counts)": ("TypeError", "contiguous_grouped_gemm: x must be", ASARRAY),
    "grouped_gemm_swiglu(None, q, counts)": ("TypeError", "grouped_gemm_swiglu: x must be an array, got None"),
    "block_fp8_matmul(x, w2[0])": ("TypeError", "block_fp8_matmul: w must be of type BlockFP8Weights, got float32"),
    "quantize_blocks(w2)": ("ValueError", "quantize_blocks: w must be [N, K], got (2, 64, 64)"),
    "dequantize_blocks(x)": ("TypeError", "dequantize_blocks: w must be of type BlockFP8Weights, got float32 (4, 64)"),
    # moe_layer
    "moe_layer(x, ids, weights, (w13, w2), two)": (
        "TypeError", "moe_layer: weights must be of type MoEWeights, got a tuple of 2; MoEWeights(w13, w2) makes one",
    ),
    "moe_layer(x, ids, weights, [w13, w2], two)": ("TypeError", "must be of type MoEWeights, got a list of 2"),
    "moe_layer(x, ids, weights, dict(w13=w13, w2=w2), two)": ("TypeError", "type MoEWeights, got a dict of 2"),
    "moe_layer(x, ids, weights, MoEWeights(w13, (w2,)), two)": ("TypeError", "w2 must be an array, got a tuple of 1"),
    "moe_layer(x, ids, weights, MoEWeights(w13, w2, None, 0.5), two)": ("TypeError", "input_scale_2 must be an array"),
    "moe_layer(x, ids, weights, experts, dict(num_experts=2))": ("TypeError", "config must be of type MoEConfig, got"),
    "moe_layer(x3, ids, weights, experts, two)": (
        "ValueError", "moe_layer: x must be [T, H], one row per token, got (2, 4, 64); x.reshape(-1, H) makes rows",
    ),
    "moe_layer(rows, ids, weights, experts, two)": ("TypeError", "moe_layer: x must be an array", NVFP4),
    "moe_layer(ids, ids, weights, experts, two)": ("TypeError", "x must be a floating-point array, got int32 (4, 2)"),
    "moe_layer(x, ids[:3], weights, experts, two)": ("ValueError", "topk_ids must be [T, k] with T = 4", "(3, 2)"),
    "moe_layer(x, ids[:, 0], weights, experts, two)": ("ValueError", "topk_ids must be [T, k] with T = 4", "(4,)"),
    "moe_layer(x, weights, weights, experts, two)": ("TypeError", "topk_ids must be int32 or int64, got float32"),
    "moe_layer(x, ids, ids, experts, two)": ("TypeError", "topk_weights must be a floating-point array, got int32"),
    "moe_layer(x, ids, weights[:, :1], experts, two)": ("ValueError", "topk_weights must be [T, k] = (4, 2)", "(4, 1)"),
    "MoEConfig(num_experts='2')": ("TypeError", "MoEConfig: num_experts must be an int, got a str"),
    "MoEConfig(num_experts=2, capacity=2.5)": ("TypeError", "MoEConfig: capacity must be an int, got a float"),
    "MoEConfig(num_experts=2, axis_name=('a', 'b'))": ("TypeError", "name of one mesh axis or None, got ('a', 'b')"),
    "MoEConfig(2, implementation='triton')": ("ValueError", "implementation='triton' is unknown", "mosaic_gpu"),
    "MoEConfig(2, axis_name='ep', differentiable=True)": ("ValueError", "differentiable=True runs on one device"),
    "moe_layer(x, ids, weights, MoEWeights(q, q), MoEConfig(2, differentiable=True))": (
        "ValueError", "differentiable=True needs plain expert weights", "w13",
    ),
    "prepare_experts([1.0], w2, w2)": ("TypeError", "prepare_experts: gate must be an array, got a list", ASARRAY),
    "prepare_experts(w13, w2, w2)": ("ValueError", "gate and up must be [E, I, H] and down [E, H, I]", "(2, 128, 64)"),
    "prepare_experts(w2, w2, w2, activation_format='fp4')": ("ValueError", "activation_format='fp4' is unknown"),
    "sharded_moe_layer(x, ids, weights, experts, None, auto)": ("TypeError", "config must be of type MoEConfig, got N"),
    "sharded_moe_layer(x, ids, weights, experts, MoEConfig(2, axis_name='data'), auto)": (
        "ValueError", "sharded_moe_layer: axis_name must be None or 'ep', got 'data'",
    ),
    "sharded_moe_layer(x, ids, weights, experts, MoEConfig(3), auto)": ("ValueError", "3 experts cannot be split over"),
    "sharded_moe_layer(x, ids, weights, experts, two, 'ep')": ("TypeError", "mesh must be of type Mesh, got a str"),
    # models
    "expert_mesh('ep')": ("TypeError", "mesh must be of type Mesh, got a str; `jax.make_mesh((devices,), ('ep',))`"),
    "quantize_experts(None, [[1, 2]])": ("TypeError", "quantize_experts: sample_ids must be an array, got a list of 1"),
    "quantize_experts(None, x)": ("TypeError", "sample_ids must be an integer array, got float32 (4, 64)"),
    "quantize_experts(None, ids[0])": ("ValueError", "quantize_experts: sample_ids must be [B, S], got (2,)"),
    # axis names
    "quantize(x, axis_name='ep')": ("ValueError", f"quantize: {SHARD_MAP}"),
    "agree_global_scale(x, 'ep')": ("ValueError", f"agree_global_scale: {SHARD_MAP}"),
    "dispatch(x, ids, weights, num_experts=2)": ("ValueError", f"dispatch: {SHARD_MAP}"),
    "combine(x, None)": ("ValueError", f"combine: {SHARD_MAP}"),
    "moe_layer(x, ids, weights, experts, MoEConfig(2, axis_name='ep'))": ("ValueError", f"moe_layer: {SHARD_MAP}"),
    "inside(lambda x, i, w: quantize(x, axis_name='data').qdata)": ("ValueError", f"quantize: {NO_SUCH_AXIS}"),
    "inside(lambda x, i, w: dispatch(x, i, w, num_experts=2, axis_name='data'))": ("ValueError", NO_SUCH_AXIS),
    "inside(lambda x, i, w: combine(x, None, axis_name='data'))": ("ValueError", f"combine: {NO_SUCH_AXIS}"),
    "inside(lambda x, i, w: moe_layer(x, i, w, experts, MoEConfig(2, axis_name='data')))": (
        "ValueError", f"moe_layer: {NO_SUCH_AXIS}",
    ),
    "inside(lambda x, i, w: combine(x, (x, i, w)))": ("TypeError", "dispatched must be of type Dispatched, got a"),
    "inside(lambda x, i, w: dispatch([x], i, w, num_experts=2))": ("TypeError", "dispatch: x must be an array, got a"),
    "inside(lambda x, i, w: dispatch(x, w, w, num_experts=2))": ("TypeError", "dispatch: topk_ids must be int32 or in"),
    "inside(lambda x, i, w: dispatch(x, i, i, num_experts=2))": ("TypeError", "dispatch: topk_weights must be a float"),
    # arrays that are sharded over Explicit axes, outside of shard_map
    "moe_layer(spread_x, spread_ids, weights, spread_experts, two)": (
        "ValueError", f"moe_layer: an array of shape (4, 64) is sharded as {P('ep', None)} {EXPLICIT}",
    ),
    "permute_to_masked(x, None, spread_ids, num_experts=2, capacity=4)": ("ValueError", "permute_to_masked:", EXPLICIT),
    "permute_to_contiguous(spread_x, None, ids, num_experts=2)": ("ValueError", "permute_to_contiguous:", EXPLICIT),
    "depermute_combine(spread_x, spread_ids, spread_weights)": ("ValueError", "depermute_combine:", EXPLICIT),
    "masked_grouped_gemm(spread_x3, spread_q, spread_counts)": ("ValueError", "masked_grouped_gemm:", EXPLICIT),
    "contiguous_grouped_gemm(x, spread_q, counts)": ("ValueError", "contiguous_grouped_gemm:", EXPLICIT),
    "pack_weights(spread_q)": ("ValueError", "pack_weights:", EXPLICIT, "axis_types=(jax.sharding.AxisType.Auto,)"),
    "unpack_weights(spread_packed)": ("ValueError", "unpack_weights:", EXPLICIT),
}  # fmt: skip


def test_what_ops_say_to_arguments_of_the_wrong_kind():
    found = last_json(run_python("-c", _RUN_ALL, json.dumps(list(WRONG)), timeout=280))
    assert len(found) == 2 * len(WRONG)
    for code, error, text in found:
        wanted, *parts = WRONG[code]
        assert error == wanted and all(part in text for part in parts), (code, error, text)
        assert "\n" not in text and len(text) < 400, (code, text)


def test_a_layer_inside_shard_map_over_explicit_axes(rng, make_mesh):
    devices = list(make_mesh(2).devices)
    mesh = jax.make_mesh((2,), ("ep",), axis_types=(AxisType.Explicit,), devices=devices)
    bf16 = dict(wire_format="bf16", activation_format_1="bf16", activation_format_2="bf16")
    layer = functools.partial(moe_layer, config=MoEConfig(2, axis_name="ep", **bf16))
    x, w13, w2 = (np.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((4, 32), (2, 32, 32), (2, 32, 16)))
    ids = np.array([[0, 1], [1, 1], [1, 0], [-1, 0]], np.int32)
    placed = jax.device_put((x, ids, np.ones((4, 2), np.float32), MoEWeights(w13, w2)), NamedSharding(mesh, P("ep")))
    y, _ = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=P("ep"), out_specs=(P("ep"), P())))(*placed)
    gate, up = np.split(np.einsum("th,enh->ten", *(a.astype(np.float64) for a in (x, w13))), 2, axis=2)
    experts = np.einsum("tei,ehi->teh", gate / (1 + np.exp(-gate)) * up, w2.astype(np.float64))
    expected = np.einsum("te,teh->th", (ids[..., None] == np.arange(2)).sum(1), experts)
    assert calc_diff(y, expected) < 1e-4


# --- repr ---


def structs(shapes):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]


LARGE = [((8, 256, 256), jnp.uint8), ((8, 256, 32), jnp.float8_e4m3fn), ((8, 1, 1), jnp.float32)]
SMALL = [((2, 32), jnp.uint8), ((2, 4), jnp.float8_e4m3fn), ((2, 1), jnp.float32)]


def test_repr_is_one_line_with_shape_format_and_bytes():
    tensor = NVFP4Tensor(*structs(LARGE))
    assert repr(tensor) == "NVFP4Tensor(shape=(8, 256, 512), nvfp4, global_scale (8, 1, 1), 0.59 MB)"
    small = NVFP4Tensor(*(jnp.zeros(shape, dtype) for shape, dtype in SMALL))
    assert repr(small) == "NVFP4Tensor(shape=(2, 64), nvfp4, global_scale (2, 1), 80 bytes)"
    huge = PackedWeights(*structs([((256, 64, 112, 9, 64), jnp.uint32), ((256, 1, 1), jnp.float32)]))
    assert repr(huge) == "PackedWeights(shape=(256, 4096, 7168), nvfp4 packed, global_scale (256, 1, 1), 4.23 GB)"
    blocks = BlockFP8Weights(*structs([((130, 64), jnp.float8_e4m3fn), ((2, 1), jnp.float32)]))
    assert repr(blocks) == "BlockFP8Weights(shape=(130, 64), e4m3 in blocks of 128 x 128, 8328 bytes)"


def test_repr_of_tracers():
    seen = []

    def look(t):
        seen.append(repr(t))
        return t

    jax.eval_shape(look, NVFP4Tensor(*structs(SMALL)))
    assert seen == ["NVFP4Tensor(shape=(2, 64), nvfp4, global_scale (2, 1), 80 bytes)"]


@pytest.mark.parametrize("kind", [NVFP4Tensor, PackedWeights, BlockFP8Weights])
@pytest.mark.parametrize(
    ("leaf", "shown"),
    [
        (None, "None"),
        (P("ep", None), repr(P("ep", None))),
        (object(), "an object"),
        ([np.zeros(3)], "a list of 1"),
        ("line\nline", "a str"),
        (np.float32(1), "float32 ()"),
        (jax.ShapeDtypeStruct((), jnp.float32), "float32 ()"),
    ],
    ids=["None", "spec", "object", "list", "text", "numpy scalar", "struct"],
)
def test_repr_of_leaves_that_are_no_arrays_of_the_format(kind, leaf, shown):
    leaves = [leaf] * len(kind.__dataclass_fields__)
    if kind is BlockFP8Weights and shown == "float32 ()":
        assert repr(kind(*leaves)) == "BlockFP8Weights(shape=(), e4m3 in blocks of 128 x 128, 8 bytes)"
        return
    assert repr(kind(*leaves)) == f"{kind.__name__}({', '.join(f'{f}={shown}' for f in kind.__dataclass_fields__)})"


def test_repr_fetches_nothing():
    class Untouchable:
        shape, dtype = (4, 32), np.dtype(np.uint8)

        def __array__(self, *args, **kwargs):
            raise AssertionError("fetched")

    assert repr(NVFP4Tensor(*[Untouchable()] * 3)) == (
        "NVFP4Tensor(shape=(4, 64), nvfp4, global_scale (4, 32), 384 bytes)"
    )
    assert described(Untouchable()) == "uint8 (4, 32)"
