"""Inputs and implementations of the grouped GEMM benchmark: ours, and what else one can call from JAX."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fp4jax.grouped_gemm import (
    PackedWeights,
    contiguous_grouped_gemm,
    grouped_gemm_swiglu,
    masked_grouped_gemm,
    unpack_weights,
)
from fp4jax.implementations import Implementation
from fp4jax.nvfp4 import dequantize
from fp4jax.swiglu import swiglu_quantize
from pallas_kernels.gemm import weight_layout

DISTRIBUTIONS = ("multinomial", "uniform", "one_hot")
BYTES_PER_WEIGHT = 0.5625
# A masked array, or a padded one, larger than this many times its rows is left out: one hot expert would need it.
_MOST_PADDING = 8


@dataclasses.dataclass(frozen=True)
class GemmShape:
    """Weights [experts, n, k], m rows per expert on average, spread over the experts by `distribution`."""

    experts: int
    k: int
    n: int
    m: int
    distribution: str = "multinomial"

    def counts(self) -> np.ndarray:
        """Rows per expert, i32 [E]; the seed is that of the figures in the table of peers."""
        rows = self.experts * self.m
        if self.distribution == "uniform":
            return np.full(self.experts, self.m, np.int32)
        if self.distribution == "one_hot":
            return np.where(np.arange(self.experts) == self.experts // 2, rows, 0).astype(np.int32)
        rng = np.random.default_rng(1000 * self.experts + self.m)
        return rng.multinomial(rows, [1 / self.experts] * self.experts).astype(np.int32)

    @property
    def capacity(self) -> int:
        """Rows of the masked layout: the most any expert has, rounded up to 8."""
        return -(-int(self.counts().max()) // 8) * 8

    @property
    def fits_masked(self) -> bool:
        """Whether the masked layout is not mostly padding."""
        return self.experts * self.capacity <= _MOST_PADDING * max(self.experts * self.m, 64)

    @property
    def weight_bytes(self) -> float:
        """NVFP4 weights of the experts that have rows."""
        return int((self.counts() > 0).sum()) * self.n * self.k * BYTES_PER_WEIGHT

    @property
    def num_bytes(self) -> float:
        """Weights, x and the result, once."""
        return self.weight_bytes + 2 * self.experts * self.m * (self.k + self.n)

    @property
    def num_bytes_bf16(self) -> float:
        """The same with weights in bf16."""
        return self.num_bytes + self.weight_bytes * (2 / BYTES_PER_WEIGHT - 1)

    @property
    def flops(self) -> float:
        """Operations that the valid rows need."""
        return 2 * self.experts * self.m * self.n * self.k

    def as_dict(self) -> dict[str, Any]:
        """The shape as a row of results has it."""
        return {"E": self.experts, "K": self.k, "N": self.n, "m": self.m, "distribution": self.distribution}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Random data on the device. dense: makes the same weights in bf16 [E, N, K] and [E, K, N], once; or None."""

    shape: GemmShape
    packed: PackedWeights
    x_rows: jax.Array  # [rows, K], sorted by expert
    counts: jax.Array
    dense: Callable[[], tuple[jax.Array, jax.Array]] | None = None

    def x_masked(self, *, poisoned: bool) -> jax.Array:
        """The rows in the masked layout; pads hold NaN, or copies of rows (numbers, for timing)."""
        counts, capacity = self.shape.counts(), self.shape.capacity
        row = np.concatenate([e * capacity + np.arange(c) for e, c in enumerate(counts)])
        every = self.shape.experts * capacity
        pads = jnp.nan if poisoned else jnp.resize(self.x_rows, (every, self.shape.k))
        x = jnp.full((every, self.shape.k), pads, jnp.bfloat16).at[row].set(self.x_rows)
        return x.reshape(self.shape.experts, capacity, -1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def random_weights(experts: int, n: int, k: int) -> PackedWeights:
    """Random codes, block scales of 2^-3 .. 2^2.6, one global scale per row."""

    def expert(key):
        tiles = n // weight_layout.TILE, k // weight_layout.TILE
        codes = jax.random.bits(key, (*tiles, weight_layout.WORDS - 1, weight_layout.TILE), jnp.uint32)
        scales = jax.random.randint(key, (*tiles, 1, weight_layout.TILE, 4), 60, 101).astype(jnp.uint8)
        return jnp.concatenate([codes, lax.bitcast_convert_type(scales, jnp.uint32)], axis=2)

    words = lax.map(expert, jax.random.split(jax.random.key(1), experts))
    return PackedWeights(words, jax.random.uniform(jax.random.key(2), (experts, n, 1), jnp.float32, 0.5, 2))


@jax.jit
def densify(packed: PackedWeights) -> tuple[jax.Array, jax.Array]:
    """The same weights in bf16, [E, N, K] and [E, K, N], one expert at a time."""

    def expert(one):
        dense = dequantize(unpack_weights(one))
        return dense, dense.T

    return lax.map(expert, packed)


def make_inputs(
    shape: GemmShape, packed: PackedWeights, dense: Callable[[], tuple[jax.Array, jax.Array]] | None = None
) -> Inputs:
    """Normal x; weights, packed and what makes them dense, are shared by the shapes of one (E, K, N)."""
    make_x = jax.jit(lambda: jax.random.normal(jax.random.key(3), (shape.experts * shape.m, shape.k), jnp.bfloat16))
    return Inputs(shape, packed, make_x(), jnp.asarray(shape.counts()), dense)


Call = tuple[Callable[..., Any], tuple[Any, ...]]  # a function and its arguments
Calls = dict[str, Call]


def our_functions(inputs: Inputs, implementation: Implementation, *, poisoned: bool) -> Calls:
    """Op -> (function, arguments). poisoned: NaN in every pad of x."""
    options = dict(expected_m=inputs.shape.m, implementation=implementation)
    found: Calls = {
        "contiguous_grouped_gemm": (
            lambda x, w, c: contiguous_grouped_gemm(x, w, c, **options),
            (inputs.x_rows, inputs.packed, inputs.counts),
        )
    }
    if inputs.shape.fits_masked:
        found["masked_grouped_gemm"] = (
            lambda x, w, c: masked_grouped_gemm(x, w, c, **options),
            (inputs.x_masked(poisoned=poisoned), inputs.packed, inputs.counts),
        )
    return found


def fused_functions(inputs: Inputs, implementation: Implementation, *, poisoned: bool, fused: bool = True) -> Calls:
    """Form of the result -> GEMM 1 with SwiGLU in its epilogue, or (not fused) one op after the other."""
    experts, options = inputs.shape.experts, dict(expected_m=inputs.shape.m, implementation=implementation)

    def call(out):
        def run(x, w, c):
            scale = None if out == "bf16" else jnp.full((experts, 1, 1), 0.01, jnp.float32)
            if fused:
                return grouped_gemm_swiglu(x, w, c, global_scale=scale, out=out, **options)
            gate_up = masked_grouped_gemm(x, w, c, **options)
            return swiglu_quantize(gate_up, c, global_scale=scale, out=out, implementation=implementation)

        return run

    args = (inputs.x_masked(poisoned=poisoned), inputs.packed, inputs.counts)
    return {out: (call(out), args) for out in ("bf16", "nvfp4", "nvfp4_as_bf16")}


def fused_bytes(shape: GemmShape, out: str) -> float:
    """Bytes that must move with SwiGLU fused: half the columns, in the form `out`."""
    per_value = BYTES_PER_WEIGHT if out == "nvfp4" else 2
    return shape.weight_bytes + shape.experts * shape.m * (2 * shape.k + per_value * shape.n / 2)


def with_hot_expert_rotated(calls: Calls, shape: GemmShape, copies: int = 8) -> Calls:
    """One-hot counts touch the weights of one expert, which the L2 cache would keep: another one every time."""
    hot = jnp.asarray(shape.counts())
    rotated = tuple(jnp.roll(hot, i * (shape.experts // copies)) for i in range(copies))

    def rotate(function):
        once = jax.jit(function)
        return lambda *args: [once(*args[:-1], counts) for counts in args[-1]]

    return {name: (rotate(function), (*args[:-1], rotated)) for name, (function, args) in calls.items()}


def bf16_baselines(inputs: Inputs, gpu: bool) -> dict[str, Callable[[], Call]]:
    """Name -> what makes a call of unquantized weights through what JAX offers, counts last where it takes them.

    Making a call allocates its weights and tokens, and may run out of memory.
    """
    dense, shape = inputs.dense, inputs.shape
    if dense is None:
        return {}
    found: dict[str, Callable[[], Call]] = {}
    if shape.fits_masked and shape.distribution != "one_hot":
        found["padded einsum bf16"] = lambda: (
            lambda x, w: jnp.einsum("emk,enk->emn", x, w),
            (inputs.x_masked(poisoned=False), dense()[0]),
        )
    found["lax.ragged_dot bf16"] = lambda: (
        lambda x, w, c: lax.ragged_dot(x, w, c, preferred_element_type=jnp.bfloat16),
        (inputs.x_rows, dense()[1], inputs.counts),
    )
    if gpu:
        from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

        rows = 64 if shape.m <= 64 else 128
        found["pallas ragged_dot bf16"] = lambda: (
            lambda x, w, c: ragged_dot_mgpu.ragged_dot(
                x, w, group_sizes=c, block_m=rows, block_n=128, block_k=64, max_concurrent_steps=5,
                grid_block_n=4, transpose_rhs=True,
            ),
            (inputs.x_rows, dense()[0], inputs.counts),
        )  # fmt: skip
    return found


def has_tokamax(shape: GemmShape) -> bool:
    """Whether the peer with int4 weights can be imported and takes the shape."""
    return all(importlib.util.find_spec(name) for name in ("tokamax", "qwix")) and shape.k % 128 == 0


def tokamax_int4(inputs: Inputs) -> Call:
    """Its ragged dot as it tunes itself, int4 weights with scales per 128: a peer in speed, not in values."""
    import tokamax  # pyrefly: ignore[missing-import]
    from qwix import QArray  # pyrefly: ignore[missing-import]

    e, k, n = inputs.shape.experts, inputs.shape.k, inputs.shape.n
    codes = jax.random.randint(jax.random.key(4), (e, k, n), -7, 8, jnp.int8).astype(jnp.int4)
    scales = jnp.ones((e, k // 128, n), jnp.bfloat16)
    return (
        lambda x, q, s, c: tokamax.ragged_dot(x, QArray(q, s), c),
        (inputs.x_rows, codes, scales, inputs.counts),
    )
