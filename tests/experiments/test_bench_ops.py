"""bench_ops as users run it, on the CPU, and the pieces of timing.py that need no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import use_abstract_mesh
from refusals import check_refusals

from cuda_lowering import H100_MESH
from experiments.cases import ops as op_cases
from experiments.harness import timing
from pallas_kernels.rows import permute, quantize, route_metadata
from pallas_kernels.simt import tuning

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = Path(__file__).parents[2]


def _run(*args):
    command = [sys.executable, str(ROOT / "experiments" / "bench_ops.py"), *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)


@pytest.mark.slow
def test_a_small_run_writes_rows_with_a_floor(tmp_path):
    done = _run("--tokens=8", "--ops=quantize,permute_rows_decoded,depermute", f"--output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench_ops.json").read_text())
    assert report["experiment"] == "bench_ops" and report["ceilings"]["copy_bytes_per_s"] > 0
    assert [(r["op"], r["implementation"]) for r in report["rows"]] == [
        ("quantize", "xla"),
        ("permute_rows_decoded", "xla"),
        ("depermute", "xla"),
    ]
    quantized = report["rows"][0]
    num_bytes = 8 * 2048 * (2 + 1 / 2 + 1 / 16)
    # gbps and floor_us are rounded to a tenth and a thousandth in the file.
    assert abs(quantized["gbps"] - num_bytes / quantized["us"] / 1e3) <= 0.06
    assert abs(quantized["floor_us"] - 1e6 * num_bytes / report["ceilings"]["copy_bytes_per_s"]) <= 1e-3
    assert (tmp_path / "bench_ops.png").stat().st_size > 5000
    assert "% floor" in done.stdout


def test_bad_flags_name_the_value():
    check_refusals(
        "bench_ops",
        {
            ("--models=gpt2",): "gpt2",
            ("--tokens=many",): "many",
            ("--tokens=0",): "positive",
            ("--ops=sort",): "route_metadata",
            ("--ops=quantize,sort",): "['sort'] unknown",
            ("stray",): "unexpected arguments",
        },
    )


def test_every_op_has_a_case(monkeypatch):
    monkeypatch.setitem(op_cases.MODELS, "tiny", op_cases.Model(128, 128, 4, 2))
    assert [case.op for case in op_cases.all_cases("tiny", 2)] == list(op_cases.OPS)


def test_mismatch_counts_valid_elements_only():
    a = jnp.zeros((2, 3, 4), jnp.uint8)
    b = a.at[0, 1, 2].set(1).at[1, 2].set(9)
    valid = jnp.ones((2, 3), bool).at[1, 2].set(False)
    assert float(timing.mismatch(a, b, None)) == pytest.approx(5 / 24)
    assert float(timing.mismatch(a, b, valid)) == pytest.approx(1 / 20)
    assert float(timing.mismatch((a, a), (a, b), valid)) == pytest.approx(1 / 20)  # the worst leaf


def test_floor_is_the_larger_of_traffic_and_arithmetic():
    ceilings = timing.Ceilings(copy_bytes_per_s=2e12, bf16_flops=500e12)
    assert ceilings.floor_us(2e9) == pytest.approx(1000)
    assert ceilings.floor_us(2e9, flops=1e12) == pytest.approx(2000)


def test_routing_of_the_cases_is_distinct_and_fits():
    for name, model in op_cases.MODELS.items():
        ids, counts, capacity = op_cases.routing(model, 64)
        assert all(len(set(row)) == model.top_k for row in ids.tolist()), name
        np.testing.assert_array_equal(counts, np.bincount(ids.ravel(), minlength=model.experts))
        assert counts.max() <= capacity < counts.max() + 8


def test_every_entry_of_the_tuning_table_is_a_valid_configuration():
    table = json.loads(tuning.TABLE.read_text())[tuning.DEVICE]
    assert set(table) == {"quantize", "swiglu_quantize", "route_metadata", "scatter_rows", "scatter_decoded_rows"}
    x, ids = jnp.zeros((4, 32), jnp.bfloat16), jnp.zeros((4, 2), jnp.int32)
    for kernel, by_class in table.items():
        assert set(by_class) == {"small", "medium", "large"}
        for fields in by_class.values():
            if kernel in ("quantize", "swiglu_quantize"):
                problem = quantize.check_config(x, jnp.float32(1), None, config=quantize.TuningConfig(**fields))
            elif kernel == "route_metadata":
                problem = route_metadata.check_config(ids, 4, route_metadata.TuningConfig(**fields))
            else:
                problem = permute.check_config((x,), 8, permute.TuningConfig(**fields))
            assert problem is None


@pytest.mark.slow
def test_implementations_of_a_case_give_the_same_arrays():
    """They are compared before they are timed, on a GPU, where no test runs the script."""
    for case in op_cases.all_cases("qwen3-30b", 16):
        with use_abstract_mesh(H100_MESH):
            found = {
                name: [(leaf.size, leaf.dtype) for leaf in jax.tree.leaves(jax.eval_shape(fn, *case.args))]
                for name, fn in case.functions.items()
            }
        assert set(found) == {"mosaic_gpu", "xla"} and found["mosaic_gpu"] == found["xla"], case.op
