"""The training script end to end, as a user runs it, at a size that trains in seconds."""

import json
import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from python_runs import ROOT, run_python
from refusals import check_refusals
from safetensors import safe_open
from safetensors.numpy import load_file

from configs import tiny_lm
from experiments.harness.config_flag import find_config
from experiments.text import corpora as corpus
from experiments.text.evaluation import evaluate
from experiments.training import loop as training
from experiments.training.checks import check_config, check_lengths
from experiments.training.run_limits import RunLimits, Stopped
from fp4jax.layers.moe_block import MoEAux
from fp4jax.models.decoder import Output

pytestmark = pytest.mark.usefixtures("quick_compile")

_MICRO = {
    "model.hidden_size": 64,
    "model.num_hidden_layers": 1,
    "model.num_attention_heads": 2,
    "model.num_key_value_heads": 1,
    "model.head_dim": 32,
    "model.num_experts": 4,
    "model.moe_intermediate_size": 32,
    "train.steps": 20,
    "train.steps_per_call": 10,
    "train.batch_size": 4,
    "train.sequence_length": 64,
    "train.warmup_steps": 2,
    "train.learning_rate": 0.01,
    "train.eval_every": 10,
    "train.checkpoint_every": 10,
    "train.eval_batch_size": 4,
}


def _command(output_dir, text, *extra):
    command = ["-m", "experiments.train_tiny_lm", "--config=configs/tiny_lm.py", f"--corpus={text}"]
    return [*command, f"--output_dir={output_dir}", *(f"--config.{k}={v}" for k, v in _MICRO.items()), *extra]


def _start(output_dir, text, *extra):
    """The script in a folder that is not the project's."""
    command = [sys.executable, *_command(output_dir, text, *extra)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=text, env=environment, text=True, **pipes)


def _train(output_dir, text, *extra, expect=0):
    process = _start(output_dir, text, *extra)
    printed, errors = process.communicate(timeout=240)
    assert process.returncode == expect, errors[-4000:]
    return printed + errors


def _config(**changes):
    config = tiny_lm.get_config()
    config.update_from_flattened_dict({**_MICRO, **{name.replace("__", "."): v for name, v in changes.items()}})
    return config


class _StopsAt(RunLimits):
    """Stops when so many steps have been awaited, or inside the next evaluation where it is "evaluation"."""

    def __init__(self, when):
        super().__init__()
        self.when, self.steps = when, 0

    def wait(self, done):
        if self.steps == self.when:
            raise Stopped("the test", 0)
        super().wait(done)
        self.steps += 1

    def apart(self, work):
        if self.when == "evaluation" and self.steps:
            raise Stopped("the test", 0)
        return work()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for index in range(6):
        (folder / f"{index}.txt").write_text(
            "".join(f"line {i % 7} of file {index}: to be or not\n" for i in range(60))
        )
    return folder


@pytest.mark.slow
def test_loss_falls_and_another_run_is_refused_the_state(tmp_path, text):
    whole = tmp_path / "whole"
    printed = _train(whole, text)
    assert "bits per byte in bfloat16" in printed
    log = json.loads((whole / "train_log.json").read_text())["log"]
    assert [entry["step"] for entry in log] == [10, 20]
    assert log[0]["train_bits_per_byte"] < 8 + 1e-3  # 8 is a uniform guess
    assert log[1]["train_bits_per_byte"] < log[0]["train_bits_per_byte"] - 0.5
    assert log[1]["held_out_bits_per_byte"] < log[0]["held_out_bits_per_byte"]
    assert (whole / "loss_curve.png").read_bytes().startswith(b"\x89PNG")

    refused = _train(whole, text, "--config.train.learning_rate=0.5", expect=1)
    assert "train.learning_rate=0.01" in refused and "0.5" in refused and "--resume=never" in refused

    assert f"{whole}/state/state.safetensors" in _train(whole, text, "--resume=always")  # nothing is left to do


def _run_in_parts(folder, text, stops):
    for when in stops:
        run = training.Training(_config(), text, folder / "state.safetensors", _StopsAt(when))
        if run.state_path.exists():
            run.restore()
        try:
            training.train(run, folder)
        except Stopped:
            assert when is not None
    return json.loads((folder / "train_log.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["once", "for every part"])
def test_a_run_in_parts_has_the_bits_of_a_whole_one(tmp_path, text, monkeypatch, compiled):
    """Stopped after seven steps of twenty, and again in the evaluation after ten."""
    if compiled == "once":  # most of the time of this test
        run = training.Training(_config(), corpus.load_corpus(text), tmp_path / "none", RunLimits())
        program = run.compile()
        monkeypatch.setattr(training.Training, "compile", lambda run: program)
    words, whole, parts = corpus.load_corpus(text), tmp_path / "whole", tmp_path / "parts"
    log = _run_in_parts(whole, words, [None])
    assert [entry["step"] for entry in log["log"]] == [10, 20]
    assert all("held_out_bits_per_byte" in entry for entry in log["log"])
    assert _run_in_parts(parts, words, [7, "evaluation", None]) == log
    first, second = (load_file(folder / "state.safetensors") for folder in (whole, parts))
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name


def test_time_limit_holds_through_compiling_steps_and_saving(tmp_path, text):
    """A hundred thousand steps in three seconds, from before the model is made to after the plot is."""
    with RunLimits(minutes=3 / 60) as limits:
        config = _config(train__steps=100_000, train__checkpoint_every=100_000, train__eval_every=100_000)
        run = training.Training(config, corpus.load_corpus(text), tmp_path / "state.safetensors", limits)
        with pytest.raises(Stopped, match=r"--max_minutes=0.05"):
            training.train(run, tmp_path)
        assert limits.elapsed() < 13  # a busy machine makes a model and a plot slowly
    assert (tmp_path / "loss_curve.png").exists()
    with safe_open(tmp_path / "state.safetensors", framework="numpy") as file:
        assert file.get_tensor(".step") == run.step
        assert len(json.loads(file.metadata()["losses"])) == run.step % 10


def test_work_that_outlasts_the_limit_is_left():
    with RunLimits(minutes=0.2 / 60) as limits, pytest.raises(Stopped):
        limits.apart(lambda: time.sleep(30))
    assert limits.elapsed() < 10
    assert RunLimits().apart(lambda: 7) == 7
    with pytest.raises(KeyError, match="inside"):
        RunLimits().apart(lambda: {}["inside"])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_answered_at_the_next_check(number, status):
    before = signal.getsignal(signal.SIGINT)
    with RunLimits() as limits:
        limits.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped, match=signal.Signals(number).name) as stop:
            limits.wait(lambda: False)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # one more ends the process
        limits.wait(lambda: True)
    assert stop.value.status == status
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_exits(tmp_path, text, number, status):
    many = ("--config.train.steps=1000000", "--config.train.eval_every=1000000")
    process = _start(tmp_path, text, *many, "--resume=never")
    state = tmp_path / "state" / "state.safetensors"
    while not state.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors[-4000:]
    (line,) = printed.splitlines()
    assert line.startswith(f"stopped by {signal.Signals(number).name} at step ") and str(state) in line
    command = line.split("go on with: ")[1]
    assert "experiments.train_tiny_lm" in command and command.endswith("--resume=never --resume=auto")
    with safe_open(state, framework="numpy") as file:
        assert f"at step {file.get_tensor('.step')} of 1000000" in line
    assert not list(state.parent.glob("*.part"))


def test_committed_configuration_fits_the_clone():
    """At most 8 MiB of bfloat16, every size of the quantized GEMMs a multiple of 128."""
    model = tiny_lm.get_config().model
    attention = model.hidden_size * model.head_dim * 2 * (model.num_attention_heads + model.num_key_value_heads)
    experts = model.num_experts * (3 * model.hidden_size * model.moe_intermediate_size + model.hidden_size)
    norms = 2 * model.hidden_size + 2 * model.head_dim
    total = model.num_hidden_layers * (attention + experts + norms) + (model.vocab_size + 1) * model.hidden_size
    assert total == 4_008_704
    assert 2 * total < 8 * 2**20
    assert model.hidden_size % 128 == model.moe_intermediate_size % 128 == 0


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.train.steps=15", "train.steps=15"),
        pytest.param("--config.train.sequence_length=100000", "bytes do not fill one window", marks=pytest.mark.slow),
    ],
)
def test_bad_values_of_the_config_are_named(tmp_path, text, flag, message):
    done = run_python(*_command(tmp_path, text, flag), cwd=text)
    assert done.returncode == 1 and message in done.stdout + done.stderr


def test_bad_flags_are_named(tmp_path, text):
    (tmp_path / "file").write_text("")
    check_refusals(
        "train_tiny_lm",
        {
            ("--corpus=/no/such",): "/no/such",
            ("--corpus=",): "must not be empty",
            ("--max_minutes=0",): "--max_minutes=0.0 must be a positive number",
            ("--max_minutes=nan",): "--max_minutes=nan must be a positive number",
            (f"--corpus={text}", "--output_dir=/proc/here"): "--output_dir=/proc/here",
            (f"--output_dir={tmp_path}", f"--workdir={tmp_path}/file"): f"--workdir={tmp_path}/file",
            (f"--output_dir={tmp_path}", "--resume=always"): "state.safetensors does not exist",
            ("--config=configs/none.py",): "there is no file configs/none.py",
            ("stray",): "unexpected arguments",
        },
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.steps", 0),
        ("train.steps", 15),
        ("train.steps_per_call", 0),
        ("train.eval_every", 15),
        ("train.checkpoint_every", -10),
        ("train.batch_size", 0),
        ("train.sequence_length", 0),
        ("train.eval_batch_size", 0),
        ("train.learning_rate", -0.1),
        ("train.learning_rate", float("nan")),
        ("train.final_learning_rate", float("inf")),
        ("train.clip_norm", 0.0),
        ("train.weight_decay", -1.0),
        ("train.balance_loss_weight", float("nan")),
        ("train.warmup_steps", 20),
        ("train.warmup_steps", -1),
        ("train.compute_dtype", "float8"),
        ("model.vocab_size", 255),
        ("model.hidden_size", 0),
    ],
)
def test_numbers_that_cannot_work_are_refused(name, value):
    check_config(_config())
    config = _config()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=rf"{name.removeprefix('model.')}\b.*{value}"):
        check_config(config)


def test_sequences_that_do_not_fit_are_refused(text):
    words = corpus.load_corpus(text)
    check_lengths(_config(), words)
    with pytest.raises(ValueError, match=r"train.sequence_length=3000, held-out text: \d+ bytes do not fill"):
        check_lengths(_config(train__sequence_length=3000), words)
    with pytest.raises(ValueError, match=r"train.sequence_length=65 exceeds model.max_position_embeddings=64"):
        check_lengths(_config(train__sequence_length=65, model__max_position_embeddings=64), words)


def test_config_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/tiny_lm.py:part") == f"{ROOT}/configs/tiny_lm.py:part"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny_lm.py").write_text("")
    assert find_config("configs/tiny_lm.py") == "configs/tiny_lm.py"
    with pytest.raises(ValueError, match=r"there is no file configs/none.py in"):
        find_config("configs/none.py")


def test_split_depends_on_the_name_only(text):
    parts = corpus.load_corpus(text)
    assert set(parts.train_files) | set(parts.held_out_files) == {f"{i}.txt" for i in range(6)}
    assert not set(parts.train_files) & set(parts.held_out_files)
    assert parts.held_out.tobytes() == b"".join((text / n).read_bytes() + b"\0" for n in parts.held_out_files)
    assert corpus.is_held_out("asyncio/locks.py")
    assert not corpus.is_held_out("ast.py")


def test_standard_library_has_text_and_no_tests():
    _, names = corpus.list_files()
    assert len(names) > 300
    assert "ast.py" in names
    assert not any("test" in name.split("/")[:-1] or "site-packages" in name for name in names)


def test_windows_predict_every_byte_once():
    data = np.arange(23, dtype=np.uint8)
    found = corpus.windows(data, 5)
    assert found.tolist() == [list(range(s, s + 6)) for s in (0, 5, 10, 15)]
    assert corpus.windows(data, 5, limit=2).tolist() == [found[0].tolist(), found[3].tolist()]
    with pytest.raises(ValueError, match="23 bytes"):
        corpus.windows(data, 23)


class Bigrams(nnx.Module):
    """A byte's logits are a row of a table; one route is lost in every call."""

    def __init__(self, logits):
        self.logits = nnx.Param(jnp.asarray(logits, jnp.float32))

    def forward(self, ids):
        return Output(self.logits[...][ids], None, MoEAux(jnp.int32(1), jnp.float32(0)))


def test_bits_per_byte_are_those_of_the_predicted_bytes(rng):
    """A window of 6 bytes predicts 5; the last of two batches is half full."""
    windows = rng.integers(0, 256, (3, 6)).astype(np.uint8)
    assert evaluate(Bigrams(np.zeros((256, 256))), windows, 2).bits_per_byte == pytest.approx(8, rel=1e-6)
    logits = rng.standard_normal((256, 256)) * 3
    found = evaluate(Bigrams(logits), windows, 2)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -log_p[windows[:, :-1], windows[:, 1:]].mean() / np.log(2)
    assert found.bits_per_byte == pytest.approx(expected, rel=1e-5)
    assert found.dropped == 2
