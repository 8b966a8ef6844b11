"""A baseline that asks for a pebibyte: its row says that it ran out of memory, everything else has its time."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from refusals import ROOT

from experiments.harness import timing

# Each changes one baseline of a script, runs one cell and leaves `rows` and their `table`. Scripts share names of
# flags, so that each runs in a process of its own.
_START = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from absl import flags
from experiments.harness import timing

pebibyte = lambda *_: jnp.zeros(1 << 50, jnp.uint8) + jax.random.bits(jax.random.key(0), (), jnp.uint8)
ceilings = timing.Ceilings(1e10, 1e10)
"""
_CELLS = {
    "bench_gemm": """
from experiments import bench_gemm as script
from experiments.cases import gemm as gemm_cases
flags.FLAGS([script.__name__])
usual = gemm_cases.bf16_baselines
gemm_cases.bf16_baselines = lambda inputs, gpu: {
    **usual(inputs, gpu),
    "called bf16": lambda: (pebibyte, (inputs.counts,)),
    "made bf16": lambda: (pebibyte, (jax.jit(pebibyte)(),)),
}
packed = gemm_cases.random_weights(2, 64, 64)
inputs = gemm_cases.make_inputs(gemm_cases.GemmShape(2, 64, 64, 2), packed, lambda: gemm_cases.densify(packed))
rows, wrong = script.run_cell(inputs, ceilings)
table = timing.format_table(rows)
""",
    "bench_dense": """
from experiments import bench_dense as script
flags.FLAGS([script.__name__])
usual = script.functions
script.functions = lambda x, weights: {**usual(x, weights), "bf16": (large, (x,))}
large = lambda x: x[:, :1] + jax.lax.optimization_barrier(pebibyte())[:64].astype(x.dtype)
rows, wrong = script.run_cell(64, 64, 2, script.make_weights(64, 64), ceilings)
table = timing.format_table(rows)
""",
    "bench_ops": """
from experiments import bench_ops as script
from experiments.cases import ops as op_cases
flags.FLAGS([script.__name__])
cases = [
    op_cases.Case(op, {"model": "qwen3-30b", "T": 1}, 1, (jnp.ones(4),), {"xla": function})
    for op, function in (("large", pebibyte), ("small", jnp.sin))
]
rows, wrong = script.run_cases(cases, ceilings)
table = timing.format_table(rows)
""",
    "bench_moe": """
from experiments import bench_moe as script
from experiments.cases import moe as moe_cases
flags.FLAGS([script.__name__, "--noprofile", "--repeats=1"])
moe_cases.densify = jax.jit(pebibyte)
rows = script.run_cell(moe_cases.make_shape("tiny", 2, 8), "nvfp4", ["bf16 jax", "nvfp4"], ceilings)
wrong, table = [], script.table(rows)
""",
    "bench_dispatch": """
from experiments import bench_dispatch as script
flags.FLAGS([script.__name__, "--repeats=1"])
script.exchange = lambda state, operands, zero, ranks: (state, pebibyte())
rows = script.run_cell(script.Cell(2, 8, "random", 64, "per_peer", 4, 2), ["nvfp4"], ["xla"])
wrong, table = [], script.table(rows)
""",
    "bench_block_graph": """
from experiments import bench_block_graph as script
flags.FLAGS([script.__name__, "--repeats=1"])
calls, failures = {("graph", "head"): (8, lambda: jnp.ones(4)), ("exact", "head"): (8, jax.jit(pebibyte))}, {}
times = script.wall_us(calls, failures)
rows = script.failed_rows(failures, 8)
rows += [{"part": "blocks", "block": b, "variant": v, "tokens": 8, "bucket": 8, **t} for (v, b), t in times.items()]
wrong, table = [], script.block_table(rows)
""",
}
_FAILED = {
    "bench_gemm": 2, "bench_dense": 1, "bench_ops": 1, "bench_moe": 1, "bench_dispatch": 1, "bench_block_graph": 1
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("script", _CELLS)
def test_a_baseline_without_memory_leaves_the_others_their_times(script):
    code = _START + _CELLS[script] + "print(json.dumps([rows, wrong, table]))"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    rows, wrong, table = json.loads(done.stdout.splitlines()[-1])
    assert not wrong
    failed = [row for row in rows if row["us"] is None]
    assert len(failed) == _FAILED[script] < len(rows)
    assert all(row["error"].startswith("out of memory: ") for row in failed)
    assert all(row["us"] > 0 for row in rows if row not in failed)
    assert sum("out of memory" in line for line in table.splitlines()) == len(failed)


def _pebibyte(x):
    return jnp.zeros(1 << 50, jnp.uint8) + x


def test_what_runs_out_of_memory_is_noted_and_let_go():
    x, failures = jnp.uint8(1), {}
    jobs = {"large": (_pebibyte, [x], 1), "small": (jnp.sin, [jnp.ones(4)], 1)}
    compiled = timing.compile_all(jobs, failures)
    us = timing.interleaved_us(compiled, rounds=1, failures=failures)
    assert us.keys() == compiled.keys() == {"small"} and us["small"] > 0
    assert failures.keys() == {"large"} and failures["large"].startswith("out of memory: RESOURCE_EXHAUSTED")


def test_without_a_place_to_note_it_or_for_another_reason_it_raises():
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        timing.interleaved_us(timing.compile_all({"large": (_pebibyte, [jnp.uint8(1)], 1)}), rounds=1)
    failures = {}
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), timing.noting_out_of_memory(failures, "x"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
    assert not failures


def test_a_row_without_a_time_says_why_in_the_table():
    ceilings = timing.Ceilings(1e10, 1e10)
    row = timing.result_row(
        "op", "xla", {"T": 1}, None, num_bytes=100.0, flops=0.0, ceilings=ceilings, error="out of memory: X"
    )
    assert row["us"] is row["speedup"] is row["gbps"] is None and row["floor_us"] == 0.01
    assert "out of memory" in timing.format_table([row])
