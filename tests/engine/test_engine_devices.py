"""An engine in bf16 over several devices gives the tokens of one; on GPUs with all kernels."""

import jax
import numpy as np
import pytest
from flax import nnx

from fp4jax.engine import Engine
from fp4jax.models import Qwen3Moe, Qwen3MoeConfig, configure_experts, quantize_experts

SIZES = dict(max_requests=4, max_length=192, prefill_buckets=(64,))
_CONFIG = Qwen3MoeConfig(
    vocab_size=512, hidden_size=512, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
    num_experts=16, num_experts_per_tok=4, moe_intermediate_size=256, max_position_embeddings=256,
)  # fmt: skip


def _answers(ranks, **settings):
    """The tokens of 16 requests, a third of them drawn, that run on so many devices."""
    model = Qwen3Moe(_CONFIG, rngs=nnx.Rngs(0))
    quantize_experts(model)
    mesh = None if ranks == 1 else jax.make_mesh((ranks,), ("ep",), devices=jax.devices()[:ranks])
    configure_experts(model, mesh=mesh, **settings)
    engine = Engine(model, mesh=mesh, **SIZES)
    engine.warm_up(workers=8)
    programs, rng = engine.report().programs, np.random.default_rng(0)
    for i in range(16):
        prompt = rng.integers(0, _CONFIG.vocab_size, int(rng.integers(1, 140))).tolist()
        engine.submit(prompt, int(rng.integers(1, 50)), temperature=float(i % 3 == 0), seed=i)
    found = engine.run()
    assert engine.report().programs == programs and engine.report().pages_in_use == 0
    return [found[id] for id in sorted(found)]


@pytest.mark.slow
def test_per_slot_on_virtual_devices(make_mesh):
    make_mesh(2)  # skips where there are fewer devices
    assert _answers(2, wire_format="bf16", form="per_slot") == _answers(1)


@pytest.mark.multigpu(2)
@pytest.mark.parametrize("layout", ["masked", "contiguous"])
def test_per_slot_gives_the_tokens_of_one_gpu(layout):
    """Rows have the same bits on any GPU, and their sums with the residual too."""
    alone = _answers(1, layout=layout)
    assert _answers(2, layout=layout, wire_format="bf16", form="per_slot") == alone
    assert min(map(len, alone)) > 0


@pytest.mark.multigpu(2)
@pytest.mark.parametrize("wire_format", ["nvfp4", "fp8", "bf16"])
def test_kept_buffers_give_the_tokens_of_new_ones(wire_format):
    assert _answers(2, wire_format=wire_format, low_latency=True) == _answers(2, wire_format=wire_format)
