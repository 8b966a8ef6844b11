"""Ops in a bucket against the same ops of exactly these tokens: the same bits, whatever the size; dots within 2 ulp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fp4jax.block_graph import block_graph
from fp4jax.grouped_gemm import masked_grouped_gemm, pack_weights
from fp4jax.layers.linear import Linear, RMSNorm
from fp4jax.nvfp4 import quantize
from fp4jax.permute import depermute_combine, permute_to_masked

HIDDEN, EXPERTS, TOP_K = 128, 4, 2
BUCKETS = (16, 64)
CPU_AND_GPU = pytest.mark.parametrize("platform", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])


def norm(weights, x, ids):
    del weights, ids
    return RMSNorm(HIDDEN, eps=1e-6, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)(x)


def codes(weights, x, ids):
    del weights, ids
    t = quantize(x, global_scale="per_token")
    return t.qdata, t.block_scale, t.global_scale


def experts(weights, x, ids, num_tokens=None):
    """Permute, grouped GEMM, depermute: what a token gets does not depend on how many others there are."""
    if num_tokens is not None:
        ids = jnp.where((jnp.arange(ids.shape[0]) < num_tokens)[:, None], ids, -1)
    p = permute_to_masked(x, None, ids, num_experts=EXPERTS, capacity=BUCKETS[-1])
    y = masked_grouped_gemm(p.x, weights, p.masked_m)
    return depermute_combine(y, p.row_map, jnp.full(ids.shape, 0.5, jnp.float32))


def inputs(rng, tokens):
    x = rng.standard_normal((tokens, HIDDEN)) * rng.lognormal(size=(tokens, 1))
    ids = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :TOP_K].astype(np.int32)
    weights = quantize(
        jnp.asarray(rng.standard_normal((EXPERTS, 192, HIDDEN)), jnp.bfloat16), global_scale="per_expert"
    )
    return pack_weights(weights), np.asarray(x, jnp.bfloat16), ids


def bits(leaf):
    return np.asarray(leaf).view(np.uint8)


@CPU_AND_GPU
@pytest.mark.parametrize("op", [norm, codes, experts])
@pytest.mark.parametrize("tokens", [1, 13, 16, 47])
def test_bits_are_those_of_the_exact_size(rng, platform, op, tokens):
    del platform
    weights, x, ids = inputs(rng, tokens)
    count = {"count_argname": "num_tokens"} if op is experts else {}
    graph = block_graph(op, buckets=BUCKETS, in_axes=(None, 0, 0), **count)
    exact = jax.jit(op)(weights, x, ids)
    for got, expected in zip(jax.tree.leaves(graph(weights, x, ids)), jax.tree.leaves(exact), strict=True):
        assert got.shape == expected.shape and np.asarray(expected).astype(np.float64).any()
        np.testing.assert_array_equal(bits(got), bits(expected))


@CPU_AND_GPU
@pytest.mark.parametrize("tokens", [1, 13, 47])
def test_dots_agree_within_two_ulp(rng, platform, tokens):
    """Libraries may add in another order for another number of rows."""
    del platform
    linear = Linear(HIDDEN, 96, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, stddev=0.1, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(linear)
    graph = block_graph(lambda s, x: nnx.merge(graphdef, s)(x), buckets=BUCKETS, in_axes=(None, 0))
    x = np.asarray(rng.standard_normal((tokens, HIDDEN)), jnp.bfloat16)
    got, exact = (np.asarray(a, np.float64) for a in (graph(state, x), jax.jit(linear)(x)))
    ulp = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), 2.0**-20))) - 7)
    assert (np.abs(got - exact) <= 2 * ulp).all() and np.abs(exact).max() > 0.1
