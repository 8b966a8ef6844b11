"""The memory-bound ops as benchmark cases: inputs, bytes that must move, how each implementation is called.

Shapes are those of real models (contract: hidden, intermediate, experts, top k) with T tokens, all experts on one
device. Data is random: normal activations, random codes and scales, ids drawn uniformly without repetition per token.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fp4jax import scale_layout
from fp4jax.nvfp4 import quantize
from fp4jax.nvfp4_codes import decode_blocks
from fp4jax.permute import depermute_combine, permute_to_masked
from fp4jax.swiglu import swiglu_quantize
from pallas_kernels.rows import (
    permute as permute_kernels,
    quantize as quantize_kernel,
    route_metadata as metadata_kernels,
    swiglu_quantize as swiglu_kernel,
)
from pallas_kernels.simt.formats import AMAX_DIVISOR


class Model(NamedTuple):
    """Sizes of an expert layer."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int


MODELS = {
    "ernie-21b": Model(2560, 1536, 64, 6),
    "ernie-300b": Model(8192, 3584, 64, 8),
    "qwen3-30b": Model(2048, 768, 128, 8),
    "deepseek-v3": Model(7168, 2048, 256, 8),
    "large-ernie": Model(7168, 3584, 160, 4),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    functions: implementation -> function of `args`. valid: boolean array that selects what has a defined value in the
    leaves of a result (broadcast from the left), or None. max_mismatch: share of values that may differ between the
    implementations. kernel: its name in the tuning table, `tunable(config)` the function with another configuration.
    """

    op: str
    shape: dict[str, Any]
    num_bytes: int
    args: tuple[Any, ...]
    functions: dict[str, Callable[..., Any]]
    valid: Any = None
    max_mismatch: float = 0.0
    kernel: str | None = None
    items: int = 0
    tunable: Callable[[Any], Callable[..., Any]] | None = None


def _normal(*shape: int) -> jax.Array:
    return jax.jit(lambda: jax.random.normal(jax.random.key(0), shape, jnp.bfloat16))()


def _codes(tokens: int, hidden: int) -> tuple[jax.Array, jax.Array]:
    qdata = jax.jit(lambda: jax.random.bits(jax.random.key(1), (tokens, hidden // 2), jnp.uint8))()
    scales = jax.jit(lambda: jax.random.randint(jax.random.key(2), (tokens, hidden // 16), 40, 120, jnp.uint8))()
    return qdata, scales.view(jnp.float8_e4m3fn)


def routing(model: Model, tokens: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Ids [T, k] distinct per token, rows per expert, capacity (the largest, rounded up to 8)."""
    rng = np.random.default_rng(1000 * model.experts + tokens)
    ids = np.argsort(rng.random((tokens, model.experts), np.float32), axis=1)[:, : model.top_k].astype(np.int32)
    counts = np.bincount(ids.ravel(), minlength=model.experts).astype(np.int32)
    return ids, counts, -(-int(counts.max()) // 8) * 8


def _valid_rows(counts: np.ndarray, capacity: int) -> jax.Array:
    return jnp.arange(capacity) < jnp.asarray(counts)[:, None]


def quantize_cases(name: str, model: Model, tokens: int) -> list[Case]:
    """One global scale with linear and swizzled scales, and a scale per token."""
    x, g = _normal(tokens, model.hidden), jnp.float32(4.5 / AMAX_DIVISOR)
    shape = {"model": name, "T": tokens, "K": model.hidden}
    num_bytes = x.size * 2 + x.size // 2 + x.size // 16
    common = dict(shape=shape, args=(x, g), kernel="quantize", items=x.size // 16)

    def swizzled(x, g, config=None):
        return quantize_kernel.quantize(x, g, scale_layout="swizzled", config=config)[:2]

    def swizzled_xla(x, g):
        t = quantize(x, global_scale=g, implementation="xla")
        return t.qdata, scale_layout.swizzle(t.block_scale)

    def linear(implementation):
        return lambda x, g: quantize(x, global_scale=g, implementation=implementation)

    def per_token(implementation):
        return lambda x, _: quantize(x, global_scale="per_token", implementation=implementation)

    return [
        Case("quantize", num_bytes=num_bytes, **common,
             functions={"mosaic_gpu": linear("mosaic_gpu"), "xla": linear("xla")},
             tunable=lambda c: lambda x, g: quantize_kernel.quantize(x, g, config=c)[:2]),
        Case("quantize_swizzled", num_bytes=num_bytes, **common,
             functions={"mosaic_gpu": swizzled, "xla": swizzled_xla}),
        Case("quantize_per_token", num_bytes=num_bytes + 4 * tokens, **common,
             functions={"mosaic_gpu": per_token("mosaic_gpu"), "xla": per_token("xla")}),
    ]  # fmt: skip


def swiglu_cases(name: str, model: Model, tokens: int) -> list[Case]:
    """Masked rows with a scale per expert, to NVFP4 and to bf16 on its grid."""
    _, counts, capacity = routing(model, tokens)
    rows, i = int(counts.sum()), model.intermediate
    gate_up = _normal(model.experts, capacity, 2 * i)
    g = jnp.full((model.experts, 1, 1), 5 / AMAX_DIVISOR, jnp.float32)
    common = dict(
        shape={"model": name, "T": tokens, "E": model.experts, "I": i, "rows": rows},
        args=(gate_up, jnp.asarray(counts), g), valid=_valid_rows(counts, capacity), max_mismatch=1e-4,
        kernel="swiglu_quantize", items=gate_up.size // 32,
    )  # fmt: skip

    def op(out, implementation):
        return lambda x, m, g: swiglu_quantize(x, m, global_scale=g, out=out, implementation=implementation)

    return [
        Case("swiglu_quantize", num_bytes=rows * (4 * i + i // 2 + i // 16), **common,
             functions={n: op("nvfp4", n) for n in ("mosaic_gpu", "xla")},
             tunable=lambda c: lambda x, m, g: swiglu_kernel.swiglu_quantize(x, m, g, config=c)[:2]),
        Case("swiglu_quantize_as_bf16", num_bytes=rows * (4 * i + 2 * i), **common,
             functions={n: op("nvfp4_as_bf16", n) for n in ("mosaic_gpu", "xla")}),
    ]  # fmt: skip


def permute_cases(name: str, model: Model, tokens: int) -> list[Case]:
    """Metadata alone, the movement of rows alone, whole ops in three layouts, and the way back."""
    ids, counts, capacity = routing(model, tokens)
    experts, h, k = model.experts, model.hidden, model.top_k
    rows, num_rows = int(counts.sum()), experts * capacity
    ids = jnp.asarray(ids)
    qdata, scales = _codes(tokens, h)
    shape = {"model": name, "T": tokens, "E": experts, "K": h, "k": k}
    options = dict(num_experts=experts, capacity=capacity)
    packed_row = h // 2 + h // 16
    valid = _valid_rows(counts, capacity)
    both = ("mosaic_gpu", "xla")

    def metadata(config=None):
        def run(ids):
            meta = metadata_kernels.route_metadata(ids, experts, capacity=capacity, num_rows=num_rows, config=config)
            return meta.row_map, meta.filled, meta.bad + jnp.sum(meta.counts - meta.filled)

        return run

    def metadata_xla(ids):
        p = permute_to_masked(jnp.zeros((tokens, 1), jnp.uint8), None, ids, implementation="xla", **options)
        return p.row_map, p.masked_m, p.dropped

    def whole(implementation, **more):
        def run(q, s, ids):
            p = permute_to_masked(q, s, ids, implementation=implementation, **options, **more)
            return p.x, p.scales

        return run

    row_map = jax.jit(metadata_xla)(ids)[0]
    weights = jax.random.uniform(jax.random.key(3), (tokens, k), jnp.float32)
    y = _normal(experts, capacity, h)

    def move(config=None):
        return lambda q, s, r: permute_kernels.scatter_rows([q, s], r, num_rows, config=config)

    def move_xla(q, s, r):
        source = jnp.full(num_rows, -1, jnp.int32).at[jnp.where(r < 0, num_rows, r).reshape(-1)]
        source = source.set(jnp.repeat(jnp.arange(tokens, dtype=jnp.int32), k), mode="drop")
        return tuple(jnp.take(a, jnp.maximum(source, 0), axis=0) for a in (q, s))

    def decoded(config=None):
        return lambda q, s, r: permute_kernels.scatter_decoded_rows(q, s, r, num_rows, config=config)

    def decoded_xla(q, s, r):
        return decode_blocks(*move_xla(q, s, r))

    def combine(implementation):
        return lambda y, r, w: depermute_combine(y, r, w, implementation=implementation)

    moved = tokens * packed_row + rows * packed_row + 4 * tokens * k
    moved_decoded = tokens * packed_row + rows * 2 * h + 4 * tokens * k
    flat_valid = valid.reshape(-1)
    return [
        Case("route_metadata", shape, 8 * tokens * k, (ids,), {"mosaic_gpu": metadata(), "xla": metadata_xla},
             kernel="route_metadata", items=metadata_kernels.tuning_items(tokens * k), tunable=metadata),
        Case("permute_rows", shape, moved, (qdata, scales, row_map), {"mosaic_gpu": move(), "xla": move_xla},
             valid=flat_valid, kernel="scatter_rows", items=tokens * packed_row // 16, tunable=move),
        Case("permute_rows_decoded", shape, moved_decoded, (qdata, scales, row_map),
             {"mosaic_gpu": decoded(), "xla": decoded_xla}, valid=flat_valid, kernel="scatter_decoded_rows",
             items=tokens * h // 16, tunable=decoded),
        Case("permute", shape, moved + 8 * tokens * k, (qdata, scales, ids), {n: whole(n) for n in both}, valid=valid),
        Case("permute_swizzled", shape, moved + 8 * tokens * k + experts * (-(-capacity // 128) * 128) * (h // 16)
             - rows * (h // 16), (qdata, scales, ids), {n: whole(n, scale_layout="swizzled") for n in both},
             valid=valid),
        Case("permute_decoded", shape, moved_decoded + 8 * tokens * k, (qdata, scales, ids),
             {n: whole(n, decode=True) for n in both}, valid=valid),
        Case("depermute", shape, rows * 2 * h + tokens * 2 * h + 8 * tokens * k, (y, row_map, weights),
             {n: combine(n) for n in both}),
    ]  # fmt: skip


OPS = (
    "quantize", "quantize_swizzled", "quantize_per_token", "swiglu_quantize", "swiglu_quantize_as_bf16",
    "route_metadata", "permute_rows", "permute_rows_decoded", "permute", "permute_swizzled", "permute_decoded",
    "depermute",
)  # fmt: skip


def all_cases(name: str, tokens: int) -> list[Case]:
    """Every case of one model and token count, in the order of OPS."""
    model = MODELS[name]
    return quantize_cases(name, model, tokens) + swiglu_cases(name, model, tokens) + permute_cases(name, model, tokens)
