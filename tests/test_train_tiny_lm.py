"""The training script end to end, as a user runs it, at a size that trains in seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from configs import tiny_lm
from experiments import corpus
from experiments.evaluation import evaluate
from fp4jax.layers.moe_block import MoEAux
from fp4jax.models.decoder import Output

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = Path(__file__).resolve().parent.parent
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


def _train(output_dir, text, *extra, expect=0):
    command = [sys.executable, "-m", "experiments.train_tiny_lm", "--config=configs/tiny_lm.py", f"--corpus={text}"]
    command += [f"--output_dir={output_dir}", *(f"--config.{k}={v}" for k, v in _MICRO.items()), *extra]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == expect, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for index in range(6):
        (folder / f"{index}.txt").write_text(
            "".join(f"line {i % 7} of file {index}: to be or not\n" for i in range(60))
        )
    return folder


@pytest.mark.slow
def test_loss_falls_and_a_resumed_run_equals_an_uninterrupted_one(tmp_path, text):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    printed = _train(whole, text)
    assert "bits per byte in bfloat16" in printed
    log = json.loads((whole / "train_log.json").read_text())["log"]
    assert [entry["step"] for entry in log] == [10, 20]
    assert log[0]["train_bits_per_byte"] < 8 + 1e-3  # 8 is a uniform guess
    assert log[1]["train_bits_per_byte"] < log[0]["train_bits_per_byte"] - 0.5
    assert log[1]["held_out_bits_per_byte"] < log[0]["held_out_bits_per_byte"]
    assert (whole / "loss_curve.png").read_bytes().startswith(b"\x89PNG")

    _train(parts, text, "--max_minutes=0")
    assert not (parts / "model.safetensors").exists()
    assert "continuing" in _train(parts, text, "--resume=always")
    for file in ("model.safetensors", "state/state.safetensors"):
        first, second = load_file(whole / file), load_file(parts / file)
        assert first.keys() == second.keys()
        for name in first:
            assert first[name].tobytes() == second[name].tobytes(), name
    resumed_log = json.loads((parts / "train_log.json").read_text())["log"]
    assert resumed_log == log

    refused = _train(parts, text, "--config.train.learning_rate=0.5", expect=1)
    assert "train.learning_rate=0.01" in refused and "0.5" in refused and "--resume=never" in refused


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
        pytest.param("--config.train.steps_per_call=0", "train.steps_per_call=0", marks=pytest.mark.slow),
        pytest.param("--config.train.sequence_length=100000", "bytes do not fill one window", marks=pytest.mark.slow),
        pytest.param("--corpus=/no/such", "/no/such", marks=pytest.mark.slow),
        ("--corpus=", "must not be empty"),
    ],
)
def test_bad_values_are_named(tmp_path, text, flag, message):
    assert message in _train(tmp_path, text, flag, expect=1)


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
