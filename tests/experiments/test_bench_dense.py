"""bench_dense as users run it, on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from refusals import check_refusals

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_small_run_writes_rows_with_floors_and_errors(tmp_path):
    command = [sys.executable, str(ROOT / "experiments" / "bench_dense.py"), "--shapes=192x128", "--tokens=3,16"]
    done = subprocess.run([*command, f"--output_dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench_dense.json").read_text())
    rows, ceilings = report["rows"], report["ceilings"]
    forms = ["bf16", "block_fp8", "nvfp4 w4a16", "nvfp4 w4a4"]
    assert [(r["shape"]["T"], r["op"]) for r in rows] == [(t, form) for t in (3, 16) for form in forms]
    for row in rows:
        tokens, per_weight = row["shape"]["T"], {"bf16": 2, "block_fp8": 1}.get(row["op"], 0.5625)
        num_bytes = per_weight * 192 * 128 + 2 * tokens * (192 + 128)
        floor = 1e6 * max(
            num_bytes / ceilings["copy_bytes_per_s"], 2 * tokens * 192 * 128 / ceilings["bf16_flops"]
        )  # fmt: skip
        if row["op"] == "block_fp8":  # tensor cores for FP8 are twice as fast, memory is not
            floor = max(floor / 2, 1e6 * per_weight * 192 * 128 / ceilings["copy_bytes_per_s"])
        assert abs(row["floor_us"] - floor) <= 1e-3
        assert 0 < row["error"] < 1e-5
        if row["op"] != "bf16":
            assert abs(row["speedup"] - row["baseline_us"] / row["us"]) <= 0.01
    assert (tmp_path / "bench_dense.png").stat().st_size > 5000


def test_bad_flags_name_the_value():
    check_refusals(
        "bench_dense",
        {
            ("--shapes=100x128",): "100x128",
            ("--shapes=7168",): "KxN",
            ("--tokens=0",): "positive",
            ("stray",): "unexpected arguments",
        },
    )
