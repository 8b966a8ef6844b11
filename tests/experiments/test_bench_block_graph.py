"""Switches of the block graphs: flag over environment over default, each seen in a run of bench_block_graph."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from absl import app, flags
from absl.testing import flagsaver
from refusals import check_refusals

from experiments.harness import block_graph_flags
from experiments.harness.graph_kernels import KEEP_GRAPHS, Kernel, kernel_columns, profile_kernels
from fp4jax.block_graph import parse_buckets

ROOT = pathlib.Path(__file__).parents[2]
SWITCHES = ("FD_USE_BLOCK_WISE_CUDA_GRAPH", "FD_BLOCK_WISE_CUDA_GRAPH_SIZES", "FD_BLOCK_WISE_DEBUG")


def run(folder, *arguments, **environment):
    env = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **environment,
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "experiments" / "bench_block_graph.py"), f"--output_dir={folder}"]
    few = ["--layers=1", "--tokens=3", "--repeats=1"]
    done = subprocess.run(
        [*command, *few, *arguments], env=env, capture_output=True, text=True, timeout=500, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "bench_block_graph.json").read_text())["rows"], done


@pytest.mark.slow
def test_sizes_and_debug_of_the_environment(tmp_path):
    rows, done = run(tmp_path, FD_BLOCK_WISE_CUDA_GRAPH_SIZES="4,9", FD_BLOCK_WISE_DEBUG="1")
    blocks = [r for r in rows if r["part"] == "blocks"]
    found = {(r["block"], r["variant"]): r["bucket"] for r in blocks}
    assert found["prefill", "graph"] == found["prefill", "graph, no command buffers"] == 4
    assert found["prefill", "padded to the largest"] == 9
    assert found["prefill", "exact"] == 3
    assert found["decode step", "graph"] == 2
    assert all(r["us"] > 0 for r in blocks)
    assert "block graph: compiled layers for 9 tokens in" in done.stderr
    assert "calls per bucket" in done.stderr and "misses" in done.stderr
    first, second = [r["seconds"] for r in rows if r["part"] == "start"]
    assert second < first  # from the compilation cache
    padded = {r["plan"]: r["padded"] for r in rows if r["part"] == "plans"}
    tokens = next(r["tokens"] for r in rows if r["part"] == "plans")
    assert padded["planned"] - tokens <= 0.8 * (padded["powers of two"] - tokens)
    assert padded["planned"] < padded["reference system"]
    assert (tmp_path / "bench_block_graph.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_switched_off_by_the_environment(tmp_path):
    (tmp_path / "trace.txt").write_text("10\n10\n300\n")
    rows, done = run(
        tmp_path, f"--trace={tmp_path}/trace.txt", "--max_buckets=2", "--granularity=1",
        FD_USE_BLOCK_WISE_CUDA_GRAPH="0",
    )  # fmt: skip
    assert {r["variant"] for r in rows if r["part"] == "blocks"} == {"exact"}
    assert not [r for r in rows if r["part"] == "start"]
    assert next(r["buckets"] for r in rows if r["part"] == "plans") == [10, 300]
    assert parse_buckets(str(tmp_path / "plan.json")) == (10, 300)
    assert "block graph: compiled" not in done.stderr


def test_kernels_inside_and_outside_of_graphs_are_counted_per_call():
    kernels = [Kernel("a", 0.0, 2.0, True), Kernel("copy", 3.0, 1.0, False), Kernel("a", 5.0, 4.0, True)]
    assert kernel_columns(kernels, calls=2) == {
        "kernels_in_graphs": 1.0, "kernels_outside": 0.5, "kernel_us": 3.5, "outside": ["copy"],
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_profiles_tell_kernels_of_graphs(graphs):
    def many(x):
        for _ in range(6):
            x = jnp.sin(x @ x) + x.sum(0)
        return x

    options = KEEP_GRAPHS if graphs else {"xla_gpu_enable_command_buffer": ""}
    x = jnp.ones((64, 64))
    compiled = jax.jit(many).lower(x).compile(compiler_options=options)
    kernels = profile_kernels(lambda: compiled(x))
    assert len(kernels) >= 6 and {kernel.in_graph for kernel in kernels} == {graphs}
    assert all(kernel.us > 0 for kernel in kernels) and kernels[0].begin_us == 0


def test_flag_over_environment_over_default(monkeypatch, tmp_path):
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    flags.FLAGS.mark_as_parsed()
    with flagsaver.as_parsed():
        assert block_graph_flags.block_graph_options(buckets=(3, 5)) == (True, (3, 5), False)
        for name, value in zip(SWITCHES, ("false", "16, 32", "1"), strict=True):
            monkeypatch.setenv(name, value)
        assert block_graph_flags.block_graph_options(buckets=(3, 5)) == (False, (16, 32), True)
    (tmp_path / "plan.json").write_text('{"buckets": [7, 9]}')
    with flagsaver.as_parsed(
        block_graph="true", block_graph_sizes=str(tmp_path / "plan.json"), block_graph_debug="false"
    ):
        assert block_graph_flags.block_graph_options(buckets=(3, 5)) == (True, (7, 9), False)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FD_USE_BLOCK_WISE_CUDA_GRAPH", "on", "FD_USE_BLOCK_WISE_CUDA_GRAPH='on' is not one of"),
        ("FD_BLOCK_WISE_DEBUG", "", "FD_BLOCK_WISE_DEBUG='' is not one of"),
        ("FD_BLOCK_WISE_CUDA_GRAPH_SIZES", "128;256", "FD_BLOCK_WISE_CUDA_GRAPH_SIZES: bucket sizes must be numbers"),
        ("FD_BLOCK_WISE_CUDA_GRAPH_SIZES", "256,128", "ascending"),
    ],
)
def test_bad_values_of_the_environment_are_refused(monkeypatch, variable, value, message):
    flags.FLAGS.mark_as_parsed()
    monkeypatch.setenv(variable, value)
    with flagsaver.as_parsed(), pytest.raises(app.UsageError, match=message):
        block_graph_flags.block_graph_options()


def test_bad_flags_are_refused():
    check_refusals(
        "bench_block_graph",
        {
            ("--block_graph_sizes=12,x",): "--block_graph_sizes: bucket sizes must be numbers",
            ("--block_graph_sizes=8", "--tokens=9"): "9 is above the largest bucket, 8",
            ("--tokens=0",): "--tokens must be positive",
            ("--trace=/does/not/exist",): "No such file",
            ("--max_buckets=0",): "--max_buckets",
            ("--noblock_graph", "--block_graph_debug"): "--block_graph_debug and --noblock_graph contradict each other",
            ("--block_graph_sizes=100000", "--tokens=1"): "bucket sizes up to",
            ("stray",): "unexpected arguments",
        },
    )
