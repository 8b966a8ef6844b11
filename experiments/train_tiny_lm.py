"""Trains the byte-level Mixture-of-Experts language model that `make demo` uses, on real text.

    python experiments/train_tiny_lm.py --output_dir=checkpoints/tiny_lm
    python experiments/train_tiny_lm.py --max_minutes=30 --config.train.batch_size=8

Writes a folder in Hugging Face layout (config.json, model.safetensors in bfloat16), train_log.json and loss_curve.png.
The whole run of configs/tiny_lm.py is 4000 steps of 64 x 512 bytes. On held-out files, bits per byte fall from 8 (a
uniform guess) to 1.05.

The whole run is meant for an accelerator. On two CPU cores a step takes about half a minute, the run more than a day,
and the process 11 GiB; with --config.train.batch_size=8 a step takes about 4 seconds, and the process 2.2 GiB. Setting
up and compiling take up to half a minute before the first step.

An interrupted run continues with the same command, bit for bit on one machine. Its state is in --workdir. It is saved
every config.train.checkpoint_every steps, and at an early end: when --max_minutes are over (which include compiling,
evaluating and saving), and at Ctrl-C or SIGTERM (exit status 130 or 143). The continued run repeats a step that an
early end interrupted. A second Ctrl-C ends the process without saving.
"""

import math
import os
import shlex
import sys
from pathlib import Path

from absl import app, flags
from flax import nnx
from ml_collections import ConfigDict

from experiments.harness import outputs, script
from experiments.harness.config_flag import define_config
from experiments.text.corpora import Corpus, load_corpus
from experiments.text.evaluation import evaluate
from experiments.training.checks import check_config, check_lengths
from experiments.training.loop import Training, train
from experiments.training.run_limits import RunLimits, Stopped
from fp4jax.checkpoint import load_model, save_model
from fp4jax.models.qwen3_moe import Qwen3MoeConfig

_CONFIG = define_config("configs/tiny_lm.py", "Model and training settings.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "checkpoints/tiny_lm", "Folder for the trained model, log and plot.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the resumable state; default: <output_dir>/state.")
_CORPUS = flags.DEFINE_string("corpus", None, "Folder of text to train on; default: Python's standard library.")
_RESUME = flags.DEFINE_enum(
    "resume",
    "auto",
    ["auto", "never", "always"],
    "Whether to continue from the state in --workdir; auto: if there is one.",
)
_MAX_MINUTES = flags.DEFINE_float(
    "max_minutes",
    None,
    "Save the state and stop within this many minutes; the same command continues. Default: no limit.",
)

_STATE_NAME = "state.safetensors"


def export(model: nnx.Module, config: ConfigDict, output_dir: Path, run: Training) -> None:
    """Write the model in bfloat16, load it again, and print its size and its bits per byte on the held-out text."""
    save_model(model, Qwen3MoeConfig.from_hf({**config.model, "dtype": "bfloat16"}), output_dir)
    size = sum(path.stat().st_size for path in output_dir.glob("*.safetensors"))
    served, _ = load_model(output_dir)
    found = run.limits.apart(lambda: evaluate(served, run.held_out, config.train.eval_batch_size))
    print(f"{output_dir}: {size / 2**20:.2f} MiB, held out {found.bits_per_byte:.4f} bits per byte in bfloat16")


def begin(config: ConfigDict, corpus: Corpus, state_path: Path, limits: RunLimits) -> Training:
    """Make a new run, or continue the saved one, as --resume says.

    Raises:
      app.UsageError: the saved state cannot be continued with these settings.
    """
    try:
        run = Training(config, corpus, state_path, limits)
        if _RESUME.value != "never" and state_path.exists():
            run.restore()
    except ValueError as error:
        raise app.UsageError(f"--config, --workdir: {error}") from error
    return run


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    config, minutes = _CONFIG.value, _MAX_MINUTES.value
    if minutes is not None and not 0 < minutes < math.inf:
        raise app.UsageError(f"--max_minutes={minutes} must be a positive number")
    with RunLimits(minutes) as limits:
        try:
            check_config(config)
            corpus = load_corpus(_CORPUS.value)
            check_lengths(config, corpus)
        except ValueError as error:
            raise app.UsageError(f"--corpus={_CORPUS.value}, --config: {error}") from error
        output_dir = outputs.check_folder("output_dir", _OUTPUT_DIR.value)
        workdir = outputs.check_folder("workdir", _WORKDIR.value) if _WORKDIR.value else output_dir / "state"
        state_path = workdir / _STATE_NAME
        if _RESUME.value == "always" and not state_path.exists():
            raise app.UsageError(f"--resume=always, but {state_path} does not exist")
        run = None
        try:
            run = limits.apart(lambda: begin(config, corpus, state_path, limits))
            export(train(run, output_dir), config, output_dir, run)
        except Stopped as stop:
            again = shlex.join([*sys.orig_argv, *(["--resume=auto"] if _RESUME.value == "never" and run else [])])
            where = f"at step {run.step} of {config.train.steps}, saved in {state_path}" if run else "before the start"
            print(f"stopped by {stop} {where}; go on with: {again}", flush=True)
            os._exit(stop.status)  # a normal exit would wait for the step that still runs in another thread


if __name__ == "__main__":
    script.run(main)
