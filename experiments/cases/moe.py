"""Expert layers to compare: sizes of real models, random data, the layer in NVFP4 and in bf16, floors of its stages."""

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
# Bytes/s that leave an H100 over NVLink while as many arrive: measured with rows of 4 KB (short) and of 14 KB (long).
LINK_BYTES_PER_S = {"short": 300e9, "long": 346e9}
ROW_BYTES = {"nvfp4": 9 / 16, "fp8": 1 + 1 / 32, "bf16": 2.0}  # bytes per value on the wire, scales included


class Shape(NamedTuple):
    """The sizes of one expert layer across devices.

    Attributes:
      model: the name of the model that has this layer.
      ranks: the number of devices.
      tokens: tokens per device, T.
      hidden: the hidden size, H.
      intermediate: the intermediate size of an expert, I.
      experts: the number of experts on all devices together, E.
      top_k: experts per token, k.
    """

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
        """Rows that the experts of one device compute on average: as many as its own tokens have routes."""
        return self.tokens * self.top_k

    @property
    def capacity(self) -> int:
        """Rows of the buffers that a device's experts work on, the same in NVFP4 and bf16: 1.25 times the average."""
        return -(-int(1.25 * self.rows + 8 * self.top_k) // 128) * 128


# Model -> hidden, intermediate, experts, top k.
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
    """The layer of a model; if the model has more than 64 experts per device, the layer has 64 per device."""
    hidden, intermediate, experts, top_k = _MODELS[model]
    return Shape(model, ranks, tokens, hidden, intermediate, min(experts, 64 * ranks), top_k)


_ACTIVATION_SCALE = 6 / AMAX_DIVISOR  # a stored scale, as checkpoints have it, for values up to 6


class Weights(NamedTuple):
    """Expert weights, sharded over the mesh axis "ep".

    Attributes:
      packed: the NVFP4 weights of GEMM 1 and GEMM 2, and the global scale of GEMM 2's input.
      dense: the same weights in bf16, or () until they are asked for.
    """

    packed: tuple[Any, ...]
    dense: tuple[Any, ...]


def make_tokens(shape: Shape, mesh: Mesh) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens and routes: normal x bf16 [ranks * T, H], ids i32 [ranks * T, k] and weights f32 [ranks * T, k].

    The experts of a token are distinct and drawn uniformly with a fixed seed; its weights sum to 1.

    Raises:
      RuntimeError: more rows than `shape.capacity` go to one device, so that routes would be dropped.
    """
    sharding = NamedSharding(mesh, P("ep"))
    rng = np.random.default_rng(0)
    tokens = shape.ranks * shape.tokens
    ids = np.argsort(rng.random((tokens, shape.experts)), axis=-1)[:, : shape.top_k].astype(np.int32)
    rows = np.bincount(ids.reshape(-1) // shape.local_experts)
    if rows.max() > shape.capacity:  # a layer that drops routes would have less work
        raise RuntimeError(f"{shape}: {rows.max()} rows for one device do not fit its {shape.capacity}")
    weights = rng.random((tokens, shape.top_k)).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    x = rng.standard_normal((tokens, shape.hidden), np.float32).astype(jnp.bfloat16)
    x, ids, weights = (
        jax.make_array_from_callback(a.shape, sharding, lambda index, a=a: a[index]) for a in (x, ids, weights)
    )
    return x, ids, weights


def make_weights(shape: Shape, mesh: Mesh, *, with_dense: bool) -> Weights:
    """Random weights, the same on every device.

    They are kept until another layer asks for weights, so that all token counts of a layer share them.

    Args:
      shape: the layer.
      mesh: the devices.
      with_dense: whether the bf16 weights are made too.
    """
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
    """The weights of one device."""
    gemm_1 = random_weights(shape.local_experts, 2 * shape.intermediate, shape.hidden)
    gemm_2 = random_weights(shape.local_experts, shape.hidden, shape.intermediate)
    # Random codes times block scales have a magnitude of about 5. This factor keeps the layer's result about as large
    # as its input.
    gemm_1, gemm_2 = (PackedWeights(w.words, w.global_scale / (5 * w.shape[2] ** 0.5)) for w in (gemm_1, gemm_2))
    return gemm_1, gemm_2


def _everywhere(local: Any, shape: Shape, mesh: Mesh) -> Any:
    """Arrays sharded over "ep" whose shard on every device is a leaf of `local`."""
    mine = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]

    def spread(leaf):
        whole, parts = (shape.ranks * leaf.shape[0], *leaf.shape[1:]), [jax.device_put(leaf, d) for d in mine]
        return jax.make_array_from_single_device_arrays(whole, NamedSharding(mesh, P("ep")), parts)

    return jax.tree.map(spread, local)


def nvfp4_layer(shape: Shape, wire_format: WireFormat):
    """The layer in NVFP4, as a function.

    Its arguments are x, ids, weights, the packed expert weights, and receive buffers or None. It returns y and the
    receive buffers. Weights and activations have 4 bits. Above 128 rows per expert the rows are contiguous, otherwise
    masked.
    """
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
    """The layer in bf16 around JAX's Pallas ragged dot, as a function with the signature of `nvfp4_layer`'s.

    Args:
      shape: the layer.
      own: True uses the fastest implementation of the ops beside the GEMMs, False uses XLA's.
    """
    implementation: Implementation | None = None if own else "xla"

    def layer(x, ids, weights, dense, buffers):
        scope, options = jax.named_scope, dict(implementation=implementation)
        with scope("dispatch"):
            d: Any = dispatch(x, ids, weights, num_experts=shape.experts, wire_format="bf16", **options)
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
    """Multiply bf16 x [rows, K], sorted by expert, with the transposed weights w [E, N, K] -> [rows, N]."""
    if not timing.on_gpu():
        return lax.ragged_dot(x, jnp.swapaxes(w, 1, 2), group_sizes, preferred_element_type=x.dtype)
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    return ragged_dot_mgpu.ragged_dot(
        x, w, group_sizes=group_sizes, block_m=64 if shape.rows <= 64 * shape.local_experts else 128, block_n=128,
        block_k=64, max_concurrent_steps=5, grid_block_n=4, transpose_rhs=True,
    )  # fmt: skip


def layer_step(state, operands, zero, *, ranks, layer):
    """One layer as a step of `chained_steps.ChainedSteps`.

    Args:
      state: a number [1], and the receive buffers that the program keeps (or None).
      operands: x, ids, weights, and the expert weights that `layer` takes.
      zero: 0, which the compiler does not know.
      ranks: the number of devices.
      layer: the layer.
    """
    del ranks
    (x, ids, weights, experts), (number, buffers) = operands, state
    x, number = lax.optimization_barrier((x, number))
    y, buffers = layer(x, ids + zero * number, weights, experts, buffers)
    return (y[:1, 0].astype(jnp.int32), buffers), y


def floors_us(shape: Shape, wire_format: str, ceilings: timing.Ceilings, *, quantized: bool) -> dict[str, float]:
    """The least time of every stage on one device, in microseconds.

    It is the time of the bytes over the link or over the memory, or of the FLOPs at the device's peak, whichever is
    largest.

    Args:
      shape: the layer.
      wire_format: the format of tokens that are dispatched.
      ceilings: the rates of the device.
      quantized: whether weights are NVFP4; otherwise bf16, and SwiGLU is an op of its own.
    """
    t, h, i = shape.tokens, shape.hidden, shape.intermediate
    copies = shape.ranks * (1 - (1 - 1 / shape.ranks) ** shape.top_k)  # expected number of devices that a token goes to
    away = t * copies * (shape.ranks - 1) / shape.ranks
    there, back = h * ROW_BYTES[wire_format], 2 * h
    link = lambda row: away * row / LINK_BYTES_PER_S["long" if row > 8192 else "short"] * 1e6  # noqa: E731
    hit = shape.local_experts * (1 - (1 - shape.top_k / shape.experts) ** (t * shape.ranks))
    per_weight = BYTES_PER_WEIGHT if quantized else 2
    memory = ceilings.floor_us
    gemm_1 = memory(hit * 2 * i * h * per_weight + shape.rows * (2 * h + 2 * i), 4 * shape.rows * h * i)
    if not quantized:  # SwiGLU is an op of its own and reads gate and up again
        gemm_1 += memory(shape.rows * (2 * i * 2 * 2))
    return {
        "dispatch": max(link(there), memory(2 * t * h)),
        "permute": memory(t * copies * there + shape.rows * 2 * h),
        "gemm_1_swiglu": gemm_1,
        "gemm_2": memory(hit * i * h * per_weight + shape.rows * (2 * i + 2 * h), 2 * shape.rows * h * i),
        "depermute": memory(shape.rows * 2 * h + t * copies * 2 * h),
        "combine": max(link(back), memory(t * copies * 2 * h + 2 * t * h)),
    }
