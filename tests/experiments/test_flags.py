"""Flag over environment over default: the bytes that cross in a run of bench_moe, and refusals."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver
from refusals import check_refusals

from experiments.cases import dispatch as dispatch_cases
from experiments.cases.moe import make_shape
from experiments.harness import store_flag, wire_flag

ROOT = pathlib.Path(__file__).parents[2]


def run(folder, *arguments, **environment):
    env = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **environment,
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "experiments" / "bench_moe.py"), f"--output_dir={folder}", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "arguments", "row_bytes"),
    [
        ({"FD_DISPATCH_USE_FP4": "1"}, [], 256 // 2 + 256 // 16),
        ({"FD_DISPATCH_USE_FP4": "0"}, [], 2 * 256),
        ({"FD_DISPATCH_USE_FP4": "0", "FD_USE_NVFP4_COMM_QUANT": "1"}, ["--wire_format=fp8"], 256 + 2 * 4),
    ],
)
def test_wire_bytes(tmp_path, environment, arguments, row_bytes):
    arguments = [*arguments, "--layers=nvfp4", "--noprofile", "--repeats=1", "--tokens=8"]
    result = run(tmp_path, *arguments, **environment)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "bench_moe.json").read_text())["rows"]
    shape = make_shape("tiny", 2, 8)
    dispatched = max(row["all_to_all_bytes"][:1])
    assert dispatched == 2 * 8 * (row_bytes + 8 * shape.top_k)  # worst case; an id and a weight per slot
    assert row["all_to_all_bytes"][1:] == [2 * 8 * 2 * 256]  # bf16 on the way back
    warned = "set FD_DISPATCH_USE_FP4" in result.stderr
    assert warned == ("FD_USE_NVFP4_COMM_QUANT" in environment)


def test_a_value_that_is_no_boolean_is_refused(monkeypatch):
    flags.FLAGS.mark_as_parsed()
    monkeypatch.setenv("FD_DISPATCH_USE_FP4", "yes please")
    with flagsaver.as_parsed(), pytest.raises(app.UsageError, match="FD_DISPATCH_USE_FP4='yes please' is not one of"):
        wire_flag.wire_format("nvfp4")


@pytest.mark.parametrize("given", [None, "0"])
def test_the_order(monkeypatch, given):
    for name in ("FD_DISPATCH_USE_FP4", "FD_USE_NVFP4_COMM_QUANT"):
        monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv("FD_DISPATCH_USE_FP4", given)
    flags.FLAGS.mark_as_parsed()
    with flagsaver.as_parsed():
        assert wire_flag.wire_format("fp8") == ("fp8" if given is None else "bf16")
    with flagsaver.as_parsed(wire_format="nvfp4"):
        assert wire_flag.wire_format("fp8") == "nvfp4"


def test_bench_moe_refuses_what_cannot_run():
    processes = ("--coordinator_address=localhost:1", "--num_processes=2")
    check_refusals(
        "bench_moe",
        {
            ("--num_processes=2",): "go together",
            (*processes, "--process_id=2"): "--process_id=2 must be below --num_processes=2",
            ("--coordinator_address=localhost", "--num_processes=2", "--process_id=0"): "'localhost' is not host:port",
            ("--ranks=3",): "--ranks=3 does not divide the 8 experts of tiny",
            ("--ranks=4",): "JAX sees 3",
            ("--layers=nvfp4 low latency",): "needs kernels that store to peers",
            ("--models=gpt2",): "['gpt2'] unknown",
        },
        devices=3,
    )


@pytest.mark.slow
def test_bench_dispatch_writes_rows_for_every_cell(tmp_path):
    env = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "experiments" / "bench_dispatch.py"), f"--output_dir={tmp_path}"]
    options = ["--repeats=1", "--ranks=1,2", "--experts=12", "--top_k=3"]
    result = subprocess.run([*command, *options], env=env, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "bench_dispatch.json").read_text())["rows"]
    found = {(r["op"], r["wire_format"], r["routing"]) for r in rows}
    assert {("dispatch", w, r) for w in ("nvfp4", "fp8", "bf16") for r in ("random", "even")} <= found
    assert {("combine", "bf16", "random"), ("all_to_all", "bf16", "even")} <= found
    assert all(r["us"] > 0 and (r["experts"], r["ranks"]) in ((12, 1), (12, 2)) for r in rows)
    # Worst-case buffers of 16 tokens of 256 values: half of them for the other rank, none where there is none.
    sent = {r["ranks"]: r["bytes_out"] for r in rows if (r["op"], r["routing"]) == ("all_to_all", "random")}
    assert sent == {1: 0, 2: 16 * 256 * 2}
    assert (tmp_path / "bench_dispatch.png").read_bytes().startswith(b"\x89PNG")
    for flag, message in (
        ("--tokens=0", "--tokens must be positive"),
        ("--experts=9", "--experts=9 must be a multiple"),
        ("--hidden=40", "--hidden=40 must be a multiple of 16"),
        ("--implementations=low_latency", "kernels need GPUs"),
    ):
        refused = subprocess.run([*command, flag], env=env, capture_output=True, text=True, timeout=100, cwd=ROOT)
        assert refused.returncode == 1
        assert message in refused.stdout + refused.stderr


def test_rows_that_kernels_send_are_counted_from_the_routing():
    cell = dispatch_cases.Cell(2, 500, "random", 256, "per_peer", 12, 3)
    ids = np.asarray(dispatch_cases.make_routing(cell)[0])
    assert dispatch_cases.rows_sent(cell, ids).tolist() == [len({int(i) // 6 for i in row}) for row in ids]
    assert dispatch_cases.rows_sent(cell._replace(form="per_slot"), ids).tolist() == [3] * 1000


def test_the_program_store(tmp_path, monkeypatch):
    flags.FLAGS.mark_as_parsed()
    assert store_flag.program_store() is None
    monkeypatch.setattr(store_flag, "ProgramStore", lambda folder: ["a store in", folder])
    with flagsaver.flagsaver(program_store="somewhere"):
        assert store_flag.program_store() == ["a store in", "somewhere"]
    monkeypatch.undo()
    if not jax.config.jax_compilation_cache_dir:
        pytest.skip("this run has no cache of JAX, which a store refuses")
    with flagsaver.flagsaver(program_store=str(tmp_path)), pytest.raises(app.UsageError, match="program_store: JAX's"):
        store_flag.program_store()
