"""Inputs and implementations of the grouped GEMM benchmark: this library's, and others that can be called from JAX.

Letters of the shapes: E experts, m mean rows per expert, weights [N, K] per expert.
"""

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
BYTES_PER_WEIGHT = 0.5625  # half a byte of code, and one byte of block scale per 16 weights
# Shapes whose masked layout is more than this many times as large as their rows are not measured in that layout.
_MOST_PADDING = 8


@dataclasses.dataclass(frozen=True)
class GemmShape:
    """The sizes of one grouped GEMM, and how its rows are distributed over the experts.

    Attributes:
      experts: the number of experts, E.
      k: the size that the product sums over, K.
      n: the number of columns of the result, N.
      m: rows per expert on average.
      distribution: "multinomial" (every row goes to a random expert), "uniform" (m rows for each) or "one_hot" (all
        rows on one expert).
    """

    experts: int
    k: int
    n: int
    m: int
    distribution: str = "multinomial"

    def counts(self) -> np.ndarray:
        """Rows per expert, i32 [E]. Multinomial counts use the seed that the quoted figures of the peers used."""
        rows = self.experts * self.m
        if self.distribution == "uniform":
            return np.full(self.experts, self.m, np.int32)
        if self.distribution == "one_hot":
            return np.where(np.arange(self.experts) == self.experts // 2, rows, 0).astype(np.int32)
        rng = np.random.default_rng(1000 * self.experts + self.m)
        return rng.multinomial(rows, [1 / self.experts] * self.experts).astype(np.int32)

    @property
    def capacity(self) -> int:
        """Rows per expert of the masked layout, M: the largest count, rounded up to a multiple of 8."""
        return -(-int(self.counts().max()) // 8) * 8

    @property
    def fits_masked(self) -> bool:
        """Whether the masked layout is small enough to measure; with one hot expert it is mostly padding."""
        return self.experts * self.capacity <= _MOST_PADDING * max(self.experts * self.m, 64)

    @property
    def weight_bytes(self) -> float:
        """Bytes of the NVFP4 weights of those experts that have rows."""
        return int((self.counts() > 0).sum()) * self.n * self.k * BYTES_PER_WEIGHT

    @property
    def num_bytes(self) -> float:
        """Bytes that must move: weights, x and the result, each once."""
        return self.weight_bytes + 2 * self.experts * self.m * (self.k + self.n)

    @property
    def num_bytes_bf16(self) -> float:
        """Bytes that must move if the weights are bf16."""
        return self.num_bytes + self.weight_bytes * (2 / BYTES_PER_WEIGHT - 1)

    @property
    def flops(self) -> float:
        """FLOPs that the valid rows need."""
        return 2 * self.experts * self.m * self.n * self.k

    def as_dict(self) -> dict[str, Any]:
        """The shape as rows of results store it."""
        return {"E": self.experts, "K": self.k, "N": self.n, "m": self.m, "distribution": self.distribution}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Random data on the device for one shape.

    Attributes:
      shape: its sizes.
      packed: the NVFP4 weights.
      x_rows: bf16 [rows, K], sorted by expert.
      counts: rows per expert, i32 [E].
      dense: a function that returns the same weights in bf16, [E, N, K] and [E, K, N], and makes them on its first
        call;
        None: no baselines are measured.
    """

    shape: GemmShape
    packed: PackedWeights
    x_rows: jax.Array  # [rows, K], sorted by expert
    counts: jax.Array
    dense: Callable[[], tuple[jax.Array, jax.Array]] | None = None

    def x_masked(self, *, poisoned: bool) -> jax.Array:
        """The rows in the masked layout [E, M, K].

        Args:
          poisoned: True fills the pads with NaN, to check that they do not matter. False fills them with copies of
            rows, for timing.
        """
        counts, capacity = self.shape.counts(), self.shape.capacity
        row = np.concatenate([e * capacity + np.arange(c) for e, c in enumerate(counts)])
        every = self.shape.experts * capacity
        pads = jnp.nan if poisoned else jnp.resize(self.x_rows, (every, self.shape.k))
        x = jnp.full((every, self.shape.k), pads, jnp.bfloat16).at[row].set(self.x_rows)
        return x.reshape(self.shape.experts, capacity, -1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def random_weights(experts: int, n: int, k: int) -> PackedWeights:
    """Random codes, block scales from 2^-3 to 2^2.6, and a random global scale per row [E, N, 1]."""

    def expert(key):
        tiles = n // weight_layout.TILE, k // weight_layout.TILE
        codes = jax.random.bits(key, (*tiles, weight_layout.WORDS - 1, weight_layout.TILE), jnp.uint32)
        scales = jax.random.randint(key, (*tiles, 1, weight_layout.TILE, 4), 60, 101).astype(jnp.uint8)
        return jnp.concatenate([codes, lax.bitcast_convert_type(scales, jnp.uint32)], axis=2)

    words = lax.map(expert, jax.random.split(jax.random.key(1), experts))
    return PackedWeights(words, jax.random.uniform(jax.random.key(2), (experts, n, 1), jnp.float32, 0.5, 2))


@jax.jit
def densify(packed: PackedWeights) -> tuple[jax.Array, jax.Array]:
    """The weights in bf16, [E, N, K] and [E, K, N], made one expert at a time to bound the temporary memory."""

    def expert(one):
        dense = dequantize(unpack_weights(one))
        return dense, dense.T

    return lax.map(expert, packed)


def make_inputs(
    shape: GemmShape, packed: PackedWeights, dense: Callable[[], tuple[jax.Array, jax.Array]] | None = None
) -> Inputs:
    """Normally distributed x for one shape. All shapes with the same (E, K, N) share the weights."""
    make_x = jax.jit(lambda: jax.random.normal(jax.random.key(3), (shape.experts * shape.m, shape.k), jnp.bfloat16))
    return Inputs(shape, packed, make_x(), jnp.asarray(shape.counts()), dense)


Call = tuple[Callable[..., Any], tuple[Any, ...]]  # a function and its arguments
Calls = dict[str, Call]


def our_functions(inputs: Inputs, implementation: Implementation, *, poisoned: bool) -> Calls:
    """This library's grouped GEMMs as {op: (function, arguments)}.

    Args:
      inputs: the data.
      implementation: which implementation is called.
      poisoned: whether the pads of x hold NaN.
    """
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
    """GEMM 1 followed by SwiGLU, as {format of the result: (function, arguments)}.

    Args:
      inputs: the data.
      implementation: which implementation is called.
      poisoned: whether the pads of x hold NaN.
      fused: True computes SwiGLU in the epilogue of the GEMM; False calls the two ops one after the other.
    """
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
    """Bytes that must move with SwiGLU in the epilogue: the result has half the columns, in the format `out`."""
    per_value = BYTES_PER_WEIGHT if out == "nvfp4" else 2
    return shape.weight_bytes + shape.experts * shape.m * (2 * shape.k + per_value * shape.n / 2)


def with_hot_expert_rotated(calls: Calls, shape: GemmShape, copies: int = 8) -> Calls:
    """Wrap functions with one-hot counts so that one call computes `copies` GEMMs, each with another hot expert.

    With a single hot expert the L2 cache would keep its weights from one iteration to the next.
    """
    hot = jnp.asarray(shape.counts())
    rotated = tuple(jnp.roll(hot, i * (shape.experts // copies)) for i in range(copies))

    def rotate(function):
        once = jax.jit(function)
        return lambda *args: [once(*args[:-1], counts) for counts in args[-1]]

    return {name: (rotate(function), (*args[:-1], rotated)) for name, (function, args) in calls.items()}


def bf16_baselines(inputs: Inputs, gpu: bool) -> dict[str, Callable[[], Call]]:
    """Grouped GEMMs with bf16 weights that JAX offers, as {name: function that makes (function, arguments)}.

    If a function takes the counts, they are its last argument. Making a call allocates bf16 weights and tokens, and may
    run out of memory.
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
    """Whether tokamax and qwix, which have a GEMM with int4 weights, are installed and that GEMM takes the shape."""
    return all(importlib.util.find_spec(name) for name in ("tokamax", "qwix")) and shape.k % 128 == 0


def tokamax_int4(inputs: Inputs) -> Call:
    """tokamax's ragged dot with int4 weights and a scale per 128 of K, as it tunes itself.

    Its weights are random and not those of `inputs`, so only its speed can be compared.
    """
    import tokamax  # pyrefly: ignore[missing-import]
    from qwix import QArray  # pyrefly: ignore[missing-import]

    e, k, n = inputs.shape.experts, inputs.shape.k, inputs.shape.n
    codes = jax.random.randint(jax.random.key(4), (e, k, n), -7, 8, jnp.int8).astype(jnp.int4)
    scales = jnp.ones((e, k // 128, n), jnp.bfloat16)
    return (
        lambda x, q, s, c: tokamax.ragged_dot(x, QArray(q, s), c),
        (inputs.x_rows, codes, scales, inputs.counts),
    )
