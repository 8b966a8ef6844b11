"""The benchmark of the engine: its traces, what it says about them, and a whole run with a tiny model."""

import json

import numpy as np
import pytest
from python_runs import ROOT, run_python

from experiments.cases.traces import Arrival, poisson_trace, replay
from experiments.harness.serving_report import serving_text
from fp4jax.engine import EngineReport, Generated


def test_a_trace_is_a_poisson_process_of_log_normal_lengths():
    trace = poisson_trace(4000, 5.0, 97, prompt=20, answer=10, longest=400, seed=3)
    gaps = np.diff([0.0, *(a.second for a in trace)])
    assert gaps.min() >= 0 and (gaps.mean(), gaps.std()) == pytest.approx((0.2, 0.2), rel=0.08)
    lengths = np.array([(len(a.prompt), a.new_tokens) for a in trace])
    assert (lengths.sum(1) <= 400).all() and (lengths >= 1).all()
    np.testing.assert_allclose(np.median(lengths, axis=0), (20, 10), atol=1)
    np.testing.assert_allclose(np.log(lengths[:, 0]).std(), 0.6, rtol=0.08)
    assert max(len(a.prompt) + a.new_tokens for a in poisson_trace(99, 1, 9, prompt=20, answer=20, longest=30)) == 30
    assert max(max(a.prompt) for a in trace) == 96
    again = poisson_trace(4000, 10.0, 97, prompt=20, answer=10, longest=400, seed=3)
    assert [a.prompt for a in again] == [a.prompt for a in trace]
    np.testing.assert_allclose([a.second for a in again], [a.second / 2 for a in trace], rtol=1e-9)


class FakeEngine:
    """Gives every running request a token per step."""

    def __init__(self):
        self.left, self.count = {}, 0

    def submit(self, prompt, new_tokens):
        self.left[self.count] = new_tokens
        self.count += 1
        return self.count - 1

    @property
    def is_idle(self):
        return not self.left

    def step(self):
        events = []
        for id in list(self.left):
            self.left[id] -= 1
            events.append(Generated(id, [0], None if self.left[id] else "length", None))
            if not self.left[id]:
                del self.left[id]
        return events

    def report(self):
        return EngineReport(0, 0, 0, 0, 0, len(self.left), 0, len(self.left), 10, 0)


def test_what_a_replay_says():
    trace = [Arrival(0.0, [1], 4), Arrival(0.0, [1], 1), Arrival(0.02, [1], 2)]
    found = replay(FakeEngine(), trace)
    assert [len(a.token_seconds) for a in trace] == [4, 1, 2]
    assert found["seconds"] >= 0.02 and found["tokens_per_s"] == pytest.approx(7 / found["seconds"], rel=0.1)
    assert 0 < found["first_token_ms"]["p50"] <= found["first_token_ms"]["p99"]
    assert found["most_pages"] == 0.1 and found["steps"] == 6


@pytest.mark.slow
def test_the_script_with_a_tiny_model(tmp_path):
    settings = {"jax_disable_most_optimizations": True}
    script = ROOT / "experiments" / "bench_serving.py"
    done = run_python(script, "--layers=1", "--rates=50,inf", f"--output_dir={tmp_path}", settings=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "bench_serving.json").read_text())["rows"]
    assert [(row["phase"], row.get("rate")) for row in rows] == [("trace", "50.0"), ("trace", "inf"), ("decode", None)]
    assert all(row["tokens_per_s"] > 0 for row in rows) and rows[2]["us_per_step"] > 0
    assert (tmp_path / "bench_serving.png").read_bytes().startswith(b"\x89PNG") and serving_text(rows) in done.stdout
    bad = run_python(script, "--rates=0", settings=settings)
    assert bad.returncode != 0 and "--rates: '0' is no positive number" in bad.stdout + bad.stderr
