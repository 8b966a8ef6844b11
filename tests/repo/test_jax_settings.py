"""JAX's settings that forbid what is untyped or unsaid: 64-bit types, strict type promotion, no rank promotion."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import make_qwen3_moe as make_model, sample_ids

from fp4jax.models import generate
from fp4jax.moe import MoEConfig, MoEWeights, moe_layer
from oracles import W4A4

ROOT = Path(__file__).parents[2]
# Ops, layers, models, generation and loading; not what runs scripts or many devices for long.
CORE = (
    "ops/test_nvfp4.py", "ops/test_dialects.py", "ops/test_scale_layout.py", "ops/test_routing.py",
    "ops/test_permute.py", "ops/test_packed_weights.py", "ops/test_grouped_gemm.py", "ops/test_swiglu.py",
    "ops/test_moe.py", "ops/test_block_fp8.py", "parallel/test_expert_parallel.py", "models/test_layers.py",
    "models/test_qwen3_moe.py", "models/test_deepseek_v3.py", "models/test_ernie45_moe.py",
    "ops/test_attention.py", "ops/test_latent_attention.py", "models/test_fused.py", "engine/test_sampling.py",
    "engine/test_bucketed_model.py", "checkpoint/test_checkpoint.py", "checkpoint/test_quantized_checkpoints.py",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("quick_compile")


@contextlib.contextmanager
def all_settings():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.slow
def test_generating_gives_the_same_tokens():
    """Choosing, positions and the cache know no other integers than int32; without experts, which compile long."""
    model, prompt = make_model(num_hidden_layers=1, mlp_only_layers=(0,)), sample_ids(1, 3)
    expected = generate(model, prompt, max_new_tokens=3)
    with all_settings():
        found = generate(model, prompt, max_new_tokens=3)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)


def test_an_expert_layer_has_the_same_bits(rng):
    """W4A4, with a route that is not here and one to no expert."""
    x, w13, w2 = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((3, 64), (2, 64, 64), (2, 64, 32)))
    ids = jnp.asarray([[0, 1], [1, -1], [2, 0]], jnp.int32)
    operands = x, ids, jnp.asarray(rng.random((3, 2)), jnp.float32), MoEWeights(w13, w2)
    layer = jax.jit(moe_layer, static_argnums=4)
    expected, _ = layer(*operands, MoEConfig(num_experts=2, **W4A4))
    with all_settings():
        found, stats = layer(*operands, MoEConfig(num_experts=2, **W4A4))
    assert found.dtype == jnp.bfloat16 and stats.dropped.dtype == jnp.int32 and int(stats.dropped) == 1
    np.testing.assert_array_equal(np.asarray(found).view(np.uint16), np.asarray(expected).view(np.uint16))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("variable", "value"),
    [("JAX_ENABLE_X64", "1"), ("JAX_NUMPY_DTYPE_PROMOTION", "strict"), ("JAX_NUMPY_RANK_PROMOTION", "raise")],
)
def test_the_core_of_the_suite_passes(variable, value):
    env = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "not slow"]
    files = [f"tests/{name}" for name in CORE]
    done = subprocess.run(
        [*command, *files], env={**env, variable: value}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:]
