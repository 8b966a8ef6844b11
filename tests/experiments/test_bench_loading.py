"""Measuring how folders load: the numbers are there, and host memory does not grow with the number of layers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from python_runs import run_python
from refusals import check_refusals

from experiments import bench_loading
from experiments.bench_loading import drop_from_cache, load_in_a_process
from experiments.cases.checkpoint import Shape, layers_for, write_checkpoint

ROOT = Path(__file__).parents[2]
SHAPE = Shape(512, 256, 32, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)  # 7 MB a layer


@pytest.mark.slow
def test_the_script(tmp_path):
    folder, out = tmp_path / "model", tmp_path / "out"
    write_checkpoint(folder, 2, SHAPE)
    before = sorted(folder.iterdir())
    command = [sys.executable, "experiments/bench_loading.py", f"--model={folder}", "--rounds=1", f"--output_dir={out}"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "bench_loading.json").read_text())
    assert result["experiment"] == "bench_loading" and [row["cache"] for row in result["rows"]] == ["cold", "warm"]
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for row in result["rows"]:
        assert row["bytes"] == size and 0.9 * size < row["model_bytes"] < 1.1 * size
        assert row["gigabytes_per_second"] == pytest.approx(size / 1e9 / row["seconds"])
        assert row["largest_parameter_bytes"] == 32 * 512 * 512 // 2  # codes of w13
        assert row["peak_anonymous_bytes"] >= 0 and row["peak_file_bytes"] > 0
    assert sorted(folder.iterdir()) == before and "cold" in done.stdout


@pytest.mark.slow
def test_host_memory_does_not_grow_with_the_layers(tmp_path, monkeypatch):
    """What is beside the model: a parameter or two, never copies of earlier ones, nor their pages of the files."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    found = {}
    for layers in (2, 20):
        folder = tmp_path / str(layers)
        write_checkpoint(folder, layers, SHAPE)
        drop_from_cache(sorted(folder.glob("*.safetensors")))
        found[layers] = load_in_a_process(folder)
    few, many = found[2], found[20]
    added = many["model_bytes"] - few["model_bytes"]
    assert added > 120e6
    assert many["peak_anonymous_bytes"] - few["peak_anonymous_bytes"] < 0.25 * added
    assert many["peak_file_bytes"] - few["peak_file_bytes"] < 0.25 * added


def test_a_failed_load_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_loading.subprocess, "run", lambda command, **_: run_python(*command[1:]))
    with pytest.raises(RuntimeError, match=r"config\.json does not exist"):
        load_in_a_process(tmp_path)


def test_how_many_layers():
    assert layers_for(2_000_000_000) == 6 and layers_for(1) == 1


def test_refused_command_lines():
    check_refusals("bench_loading", {
        ("--model=/nowhere",): "--model: /nowhere/config.json does not exist",
        ("--gigabytes=0",): "gigabytes",
        ("--gigabytes=inf",): "--gigabytes=inf must be finite",
        ("--gigabytes=1e9",): "has room for",
        ("--rounds=0",): "rounds",
        ("now",): "unexpected arguments",
    })  # fmt: skip
