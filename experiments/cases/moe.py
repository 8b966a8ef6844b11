"""Expert layers to compare: shapes of models, random weights, the layer in NVFP4 and in bf16, floors of its stages."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from experiments.cases.gemm import BYTES_PER_WEIGHT, densify, random_weights
from experiments.harness import timing
from fp4jax.expert_parallel import WireFormat, combine, dispatch
from fp4jax.grouped_gemm import PackedWeights
from fp4jax.implementations import Implementation
from fp4jax.moe import MoEConfig, MoEWeights, moe_layer
from fp4jax.permute import depermute_combine, permute_to_contiguous
from fp4jax.swiglu import swiglu_quantize
from pallas_kernels.simt.formats import AMAX_DIVISOR

STAGES = ("quantize", "dispatch", "permute", "gemm_1_swiglu", "gemm_2", "depermute", "combine")
# GB/s that leave an H100 with rows of 4 KB and of 14 KB, both ways busy: what a feasibility study of ours measured.
LINK_BYTES_PER_S = {"short": 300e9, "long": 346e9}
ROW_BYTES = {"nvfp4": 9 / 16, "fp8": 1 + 1 / 32, "bf16": 2.0}  # of a value on the wire


class Shape(NamedTuple):
    """A layer on `ranks` devices: T tokens on each, `experts` on all of them together."""

    model: str
    ranks: int
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    @property
    def local_experts(self) -> int:
        return self.experts // self.ranks

    @property
    def rows(self) -> int:
        """Rows that the experts of a device compute, on average: as many routes as its tokens have."""
        return self.tokens * self.top_k

    @property
    def capacity(self) -> int:
        """Rows of the buffers that the experts work on, for all variants alike: a quarter more than the average."""
        return -(-int(1.25 * self.rows + 8 * self.top_k) // 128) * 128


# hidden, intermediate, experts, top k. DeepSeek-V3 with at most 64 experts on a device.
_MODELS = {
    "qwen3-30b": (2048, 768, 128, 8),
    "deepseek-v3": (7168, 2048, 256, 8),
    "ernie-21b": (2560, 1536, 64, 6),
    "ernie-300b": (8192, 3584, 64, 8),
    "large-ernie": (7168, 3584, 160, 4),
    "tiny": (256, 128, 8, 2),
}
MODELS = tuple(_MODELS)


def make_shape(model: str, ranks: int, tokens: int) -> Shape:
    """A model's layer; no device gets more than 64 experts."""
    hidden, intermediate, experts, top_k = _MODELS[model]
    return Shape(model, ranks, tokens, hidden, intermediate, min(experts, 64 * ranks), top_k)


_ACTIVATION_SCALE = 6 / AMAX_DIVISOR  # static, as checkpoints bring it: values up to 6


class Weights(NamedTuple):
    """Expert weights, sharded over `ep`: packed, with scales of GEMM 2's operand; and dense in bf16 (or empty)."""

    packed: tuple[Any, ...]
    dense: tuple[Any, ...]


def make_tokens(shape: Shape, mesh: Mesh) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x bf16 [ranks * T, H], normal; ids, distinct experts per token drawn uniformly with a fixed seed; weights."""
    sharding = NamedSharding(mesh, P("ep"))
    rng = np.random.default_rng(0)
    tokens = shape.ranks * shape.tokens
    ids = np.argsort(rng.random((tokens, shape.experts)), axis=-1)[:, : shape.top_k].astype(np.int32)
    rows = np.bincount(ids.reshape(-1) // shape.local_experts)
    if rows.max() > shape.capacity:  # nothing may be dropped
        raise RuntimeError(f"{shape}: {rows.max()} rows for one device do not fit its {shape.capacity}")
    weights = rng.random((tokens, shape.top_k)).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    x = rng.standard_normal((tokens, shape.hidden), np.float32).astype(jnp.bfloat16)
    x, ids, weights = (
        jax.make_array_from_callback(a.shape, sharding, lambda index, a=a: a[index]) for a in (x, ids, weights)
    )
    return x, ids, weights


def make_weights(shape: Shape, mesh: Mesh, *, with_dense: bool) -> Weights:
    """Random, the same on every device; kept for the next shape of the same layer, and for its dense weights."""
    key = shape._replace(tokens=0)
    if key not in _made:
        _made.clear()
        gemm_1, gemm_2 = _local_weights(shape)
        scale_2 = jnp.full((shape.local_experts, 1, 1), _ACTIVATION_SCALE, jnp.float32)
        _made[key] = Weights(_everywhere((gemm_1, gemm_2, scale_2), shape, mesh), ())
    if with_dense and not _made[key].dense:
        dense = tuple(densify(w)[0] for w in _local_weights(shape))
        _made[key] = _made[key]._replace(dense=jax.block_until_ready(_everywhere(dense, shape, mesh)))
    return _made[key]


_made: dict[Shape, Weights] = {}


def _local_weights(shape: Shape) -> tuple[PackedWeights, PackedWeights]:
    """Those of one device."""
    gemm_1 = random_weights(shape.local_experts, 2 * shape.intermediate, shape.hidden)
    gemm_2 = random_weights(shape.local_experts, shape.hidden, shape.intermediate)
    # Random codes and scales are of size 5: scaled so that the layer neither grows nor shrinks its input much.
    gemm_1, gemm_2 = (PackedWeights(w.words, w.global_scale / (5 * w.shape[2] ** 0.5)) for w in (gemm_1, gemm_2))
    return gemm_1, gemm_2


def _everywhere(local: Any, shape: Shape, mesh: Mesh) -> Any:
    """Arrays sharded over `ep` that have the leaves of `local` on every device."""
    mine = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]

    def spread(leaf):
        whole, parts = (shape.ranks * leaf.shape[0], *leaf.shape[1:]), [jax.device_put(leaf, d) for d in mine]
        return jax.make_array_from_single_device_arrays(whole, NamedSharding(mesh, P("ep")), parts)

    return jax.tree.map(spread, local)


def nvfp4_layer(shape: Shape, wire_format: WireFormat):
    """(x, ids, weights, packed weights, receive buffers or None) -> y with 4-bit weights and activations, buffers."""
    prefill = shape.rows > 128 * shape.local_experts
    config = MoEConfig(
        num_experts=shape.experts, axis_name="ep", wire_format=wire_format,
        layout="contiguous" if prefill else "masked", capacity=shape.capacity if prefill else None,
    )  # fmt: skip

    def layer(x, ids, weights, packed, buffers):
        w13, w2, scale_2 = packed
        experts = MoEWeights(w13, w2, jnp.float32(_ACTIVATION_SCALE), scale_2)
        y, stats = moe_layer(x, ids, weights, experts, config, buffers)
        return y, stats.buffers

    return layer


def bf16_layer(shape: Shape, *, own: bool):
    """The same in bf16 around JAX's Pallas ragged dot. own: with our kernels where they are faster; else XLA's ops."""
    implementation: Implementation | None = None if own else "xla"

    def layer(x, ids, weights, dense, buffers):
        scope, options = jax.named_scope, dict(implementation=implementation)
        with scope("dispatch"):
            d = dispatch(x, ids, weights, num_experts=shape.experts, wire_format="bf16", **options)
        with scope("permute"):
            p = permute_to_contiguous(
                d.x, None, d.local_ids, num_experts=shape.local_experts, num_rows=shape.capacity, **options
            )
        with scope("gemm_1_swiglu"):
            gate_up = ragged_dot(p.x, dense[0], p.group_sizes, shape)
            act = swiglu_quantize(gate_up, None, global_scale=None, out="bf16", **options)
        with scope("gemm_2"):
            y = ragged_dot(act, dense[1], p.group_sizes, shape)
        with scope("depermute"):
            y = depermute_combine(y, p.row_map, d.local_weights, **options)
        with scope("combine"):
            return combine(y, d, **options), buffers

    return layer


def ragged_dot(x, w, group_sizes, shape: Shape):
    """bf16 x [rows, K] times w [E, N, K] transposed, rows sorted by expert."""
    if not timing.on_gpu():
        return lax.ragged_dot(x, jnp.swapaxes(w, 1, 2), group_sizes, preferred_element_type=x.dtype)
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    return ragged_dot_mgpu.ragged_dot(
        x, w, group_sizes=group_sizes, block_m=64 if shape.rows <= 64 * shape.local_experts else 128, block_n=128,
        block_k=64, max_concurrent_steps=5, grid_block_n=4, transpose_rhs=True,
    )  # fmt: skip


def layer_step(state, operands, zero, *, ranks, layer):
    """One layer for `chained_steps.ChainedSteps`; operands: x, ids, weights and what `layer` takes as weights.

    state: a number [1], and the receive buffers that the program keeps, or None.
    """
    del ranks
    (x, ids, weights, experts), (number, buffers) = operands, state
    x, number = lax.optimization_barrier((x, number))
    y, buffers = layer(x, ids + zero * number, weights, experts, buffers)
    return (y[:1, 0].astype(jnp.int32), buffers), y


def floors_us(shape: Shape, wire_format: str, ceilings: timing.Ceilings, *, quantized: bool) -> dict[str, float]:
    """Least time of every stage on one device: bytes over the link or the memory's rate, or FLOPs over the peak."""
    t, h, i = shape.tokens, shape.hidden, shape.intermediate
    copies = shape.ranks * (1 - (1 - 1 / shape.ranks) ** shape.top_k)  # devices that a token goes to, about
    away = t * copies * (shape.ranks - 1) / shape.ranks
    there, back = h * ROW_BYTES[wire_format], 2 * h
    link = lambda row: away * row / LINK_BYTES_PER_S["long" if row > 8192 else "short"] * 1e6  # noqa: E731
    hit = shape.local_experts * (1 - (1 - shape.top_k / shape.experts) ** (t * shape.ranks))
    per_weight = BYTES_PER_WEIGHT if quantized else 2
    memory = ceilings.floor_us
    gemm_1 = memory(hit * 2 * i * h * per_weight + shape.rows * (2 * h + 2 * i), 4 * shape.rows * h * i)
    if not quantized:  # SwiGLU reads and writes what the fused epilogue keeps
        gemm_1 += memory(shape.rows * (2 * i * 2 * 2))
    return {
        "dispatch": max(link(there), memory(2 * t * h)),
        "permute": memory(t * copies * there + shape.rows * 2 * h),
        "gemm_1_swiglu": gemm_1,
        "gemm_2": memory(hit * i * h * per_weight + shape.rows * (2 * i + 2 * h), 2 * shape.rows * h * i),
        "depermute": memory(shape.rows * 2 * h + t * copies * 2 * h),
        "combine": max(link(back), memory(t * copies * 2 * h + 2 * t * h)),
    }
