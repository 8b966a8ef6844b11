"""bench_gemm as users run it, on the CPU, and its pieces."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import check_refusals

from experiments.cases import gemm as gemm_cases
from experiments.cases.gemm import GemmShape

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = Path(__file__).resolve().parents[2]


def run(*args):
    command = [sys.executable, str(ROOT / "experiments" / "bench_gemm.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("distributions", ["multinomial", "uniform,one_hot"])
def test_a_run_writes_rows_with_errors_floors_and_baselines(tmp_path, distributions):
    result = run(f"--output_dir={tmp_path}", "--rounds=1", f"--distributions={distributions}", "--m=3")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "bench_gemm.json").read_text())
    assert report["experiment"] == "bench_gemm"
    rows = {(r["op"], r["implementation"], r["shape"]["distribution"]): r for r in report["rows"]}
    for distribution in distributions.split(","):
        ours = rows["masked_grouped_gemm", "xla", distribution]
        assert 0 < ours["error"] < 3e-3 and ours["floor_us"] > 0
        assert ours["baseline"].endswith("bf16") and ours["baseline_us"] > 0 and ours["shape"]["m"] == 3
        assert rows["grouped_gemm", "lax.ragged_dot bf16", distribution]["us"] > 0
    if distributions == "multinomial":
        assert rows["grouped_gemm_swiglu nvfp4", "xla", "multinomial"]["error"] == 0
    assert (tmp_path / "bench_gemm.png").stat().st_size > 5000


def test_bad_flags_say_what_is_wrong():
    check_refusals(
        "bench_gemm",
        {
            ("--shapes=4x100x128",): "multiples of 64",
            ("--shapes=4x128",): "ExKxN",
            ("--m=0",): "positive",
            ("--m=x",): "--m",
            ("--distributions=zipf",): "zipf",
            ("--sweep",): "needs a GPU",
            ("--sweep", "--shapes=1x128x128"): "single matrix",
            ("extra",): "unexpected",
        },
    )


def test_distributions_have_the_same_number_of_rows():
    for distribution in gemm_cases.DISTRIBUTIONS:
        counts = GemmShape(32, 64, 64, 4, distribution).counts()
        assert counts.sum() == 128 and counts.dtype == np.int32
    np.testing.assert_array_equal(
        GemmShape(32, 64, 64, 4).counts(), np.random.default_rng(32004).multinomial(128, [1 / 32] * 32)
    )


def test_bytes_and_flops():
    shape = GemmShape(4, 128, 256, 8, "one_hot")
    assert shape.weight_bytes == 128 * 256 * 0.5625
    assert shape.num_bytes == shape.weight_bytes + 2 * 32 * (128 + 256)
    assert shape.num_bytes_bf16 == 2 * 128 * 256 + 2 * 32 * (128 + 256)
    assert shape.flops == 2 * 32 * 128 * 256
    assert gemm_cases.fused_bytes(shape, "nvfp4") == shape.weight_bytes + 32 * (2 * 128 + 0.5625 * 128)
    assert gemm_cases.fused_bytes(shape, "bf16") == shape.weight_bytes + 32 * (2 * 128 + 2 * 128)


def test_inputs_of_both_layouts_agree_and_pads_are_as_asked():
    shape = GemmShape(4, 128, 64, 3)
    inputs = gemm_cases.make_inputs(shape, gemm_cases.random_weights(4, 64, 128))
    counts = shape.counts()
    valid = np.arange(shape.capacity) < counts[:, None]
    poisoned, plain = (np.asarray(inputs.x_masked(poisoned=p).astype(jnp.float32)) for p in (True, False))
    np.testing.assert_array_equal(poisoned[valid], np.asarray(inputs.x_rows.astype(jnp.float32)))
    np.testing.assert_array_equal(plain[valid], poisoned[valid])
    assert np.isnan(poisoned[~valid]).all() and np.isfinite(plain).all()


def test_one_hot_timing_takes_another_expert_every_time():
    shape = GemmShape(8, 64, 64, 2, "one_hot")
    calls = gemm_cases.with_hot_expert_rotated({"f": (lambda x, c: c + x, (jnp.int32(0), None))}, shape)
    function, args = calls["f"]
    hot = [int(np.argmax(c)) for c in jax.tree.leaves(function(*args))]
    assert sorted(hot) == list(range(8))
