"""Several processes, each with some of the devices: all take the same decisions, and give the tokens of one process."""

import json
import socket
import subprocess
import sys

import pytest
from python_runs import ROOT

# The arguments are the number of processes, the index of this one, and a port.
_PROGRAM = """
import json, sys
import jax
count, index, port = map(int, sys.argv[1:])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", 2 // count)
if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, index)
import numpy as np
from flax import nnx
from fp4jax.engine import Engine
from fp4jax.models import Qwen3Moe, Qwen3MoeConfig, configure_experts
config = Qwen3MoeConfig(
    vocab_size=97, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, max_position_embeddings=64, dtype="float32",
    initializer_range=0.15,
)
model, mesh = Qwen3Moe(config, rngs=nnx.Rngs(0)), jax.make_mesh((2,), ("ep",))
configure_experts(model, mesh=mesh, wire_format="bf16", form="per_slot")
engine = Engine(
    model, max_requests=2, max_length=32, num_pages=12, page_size=4, prefill_buckets=(8,), decode_steps=3, mesh=mesh
)
engine.warm_up()
programs, rng = engine.report().programs, np.random.default_rng(0)
for seed in range(7):
    prompt = rng.integers(0, 97, rng.integers(1, 16)).tolist()
    engine.submit(prompt, int(rng.integers(1, 16)), temperature=float(seed % 2), seed=seed)
answers = engine.run()
assert engine.report().programs == programs
print(json.dumps([answers[id] for id in sorted(answers)]))
"""


@pytest.mark.slow
def test_two_processes_give_the_tokens_of_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def start(count, index):
        command = [sys.executable, "-c", _PROGRAM, str(count), str(index), str(port)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    answers = []
    for processes in ([start(1, 0)], [start(2, 0), start(2, 1)]):
        for process in processes:
            out, _ = process.communicate(timeout=240)
            assert process.returncode == 0
            answers.append(json.loads(out.splitlines()[-1]))
    assert answers[0] == answers[1] == answers[2] and min(map(len, answers[0])) > 0
