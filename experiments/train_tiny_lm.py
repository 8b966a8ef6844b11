"""Train the byte-level Mixture-of-Experts model of `make demo` on real text.

    python -m experiments.train_tiny_lm --config=configs/tiny_lm.py --output_dir=checkpoints/tiny_lm

Writes a Hugging Face style folder (config.json, model.safetensors in bfloat16), train_log.json and loss_curve.png. The
state of the run lives in --workdir; the same command continues an interrupted run, bit for bit on one machine.
"""

import json
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from flax import nnx
from ml_collections import ConfigDict, config_flags
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from experiments.corpus import Corpus, load_corpus, windows
from experiments.evaluation import cross_entropy, evaluate
from fp4jax.checkpoint import load_model, save_model
from fp4jax.layers import ExpertSettings
from fp4jax.models.qwen3_moe import Qwen3Moe, Qwen3MoeConfig

_CONFIG = config_flags.DEFINE_config_file("config", "configs/tiny_lm.py", "Model and training settings.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "checkpoints/tiny_lm", "Folder for the trained model, log and plot.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the resumable state; default: <output_dir>/state.")
_CORPUS = flags.DEFINE_string("corpus", None, "Folder of text to train on; default: Python's standard library.")
_RESUME = flags.DEFINE_enum(
    "resume", "auto", ["auto", "never", "always"], "Continue from the state in --workdir (auto: if there is one)."
)
_MAX_MINUTES = flags.DEFINE_float(
    "max_minutes", None, "Save the state and stop after this time; the same command continues.", lower_bound=0.0
)

_STATE_NAME = "state.safetensors"
_LOG_NAME = "train_log.json"


class TrainState(NamedTuple):
    """All that changes: parameters (float32), optimizer state, steps done. Randomness follows from seed and step."""

    params: Any
    opt_state: Any
    step: jax.Array


def check_config(train: ConfigDict) -> None:
    """Raise ValueError naming the setting, where saving or evaluating would fall between two jitted calls."""
    if train.steps_per_call < 1:
        raise ValueError(f"train.steps_per_call={train.steps_per_call} must be at least 1")
    for name in ("steps", "eval_every", "checkpoint_every"):
        if train[name] < 1 or train[name] % train.steps_per_call:
            raise ValueError(
                f"train.{name}={train[name]} must be a positive multiple of train.steps_per_call={train.steps_per_call}"
            )
    if train.compute_dtype not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"train.compute_dtype must be auto, bfloat16 or float32, got {train.compute_dtype!r}")


def compute_dtype(train: ConfigDict) -> str:
    """What activations are computed in: as set, or by device (CPUs emulate bfloat16 slowly)."""
    if train.compute_dtype != "auto":
        return train.compute_dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def make_optimizer(train: ConfigDict) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay; weight decay on matrices only."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, train.learning_rate, train.warmup_steps, train.steps, train.final_learning_rate
    )
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(
            schedule,
            b1=0.9,
            b2=0.95,
            weight_decay=train.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )


def sample_batch(data: jax.Array, seed: int, step: jax.Array, batch_size: int, length: int) -> jax.Array:
    """i32 [batch_size, length + 1]: windows at random places, a function of (seed, step) only."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    starts = jax.random.randint(key, (batch_size, 1), 0, data.shape[0] - length)
    return data[starts + jnp.arange(length + 1)].astype(jnp.int32)


def loss_fn(params: Any, graphdef: nnx.GraphDef, ids: jax.Array, balance_weight: float) -> tuple[jax.Array, Any]:
    """Cross-entropy in nats per byte plus the weighted balance loss (mean over layers); also both parts."""
    model = nnx.merge(graphdef, params)
    output = model.forward(ids[:, :-1])
    nats = jnp.mean(cross_entropy(output.logits, ids[:, 1:]))
    balance = output.aux.balance_loss / max(len(model.moe_blocks()), 1)
    return nats + balance_weight * balance, (nats, balance)


def make_train_call(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, train: ConfigDict):
    """Jitted (state, data) -> (state, (nats [steps_per_call], balance [steps_per_call])): several steps per call."""

    def one_step(state: TrainState, _: None, data: jax.Array) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
        ids = sample_batch(data, train.seed, state.step, train.batch_size, train.sequence_length)
        gradient = jax.grad(loss_fn, has_aux=True)
        grads, parts = gradient(state.params, graphdef, ids, train.balance_loss_weight)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), parts

    @partial(jax.jit, donate_argnums=0)
    def call(state: TrainState, data: jax.Array) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
        return jax.lax.scan(partial(one_step, data=data), state, length=train.steps_per_call)

    return call


def save_state(path: Path, state: TrainState, metadata: dict[str, Any]) -> None:
    """One safetensors file, replaced atomically; leaves are named by their path in the tree."""
    leaves = {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(state)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file(leaves, part, metadata={name: json.dumps(value) for name, value in metadata.items()})
    os.replace(part, path)


def restore_state(path: Path, like: TrainState, run: dict[str, Any]) -> tuple[TrainState, list[dict[str, Any]]]:
    """State and log entries of `path`.

    Raises:
      ValueError: naming the first setting in which the saved run differs from `run`.
    """
    with safe_open(path, framework="numpy") as file:
        metadata = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
        for name, value in run.items():
            if metadata.get(name) != value:
                raise ValueError(
                    f"{path} belongs to a run with {name}={metadata.get(name)!r}, this one has {value!r}; "
                    "use --resume=never to start over, or another --workdir"
                )
        leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
        values = [jnp.asarray(file.get_tensor(jax.tree_util.keystr(key))) for key, _ in leaves]
    return jax.tree.unflatten(treedef, values), metadata["log"]


def run_identity(config: ConfigDict, corpus: Corpus) -> dict[str, Any]:
    """Everything a resumed run must share, flat, JSON-ready."""
    flat = {f"{part}.{name}": value for part in ("model", "train") for name, value in config[part].items()}
    return json.loads(json.dumps({**flat, "corpus": corpus.digest}))


def write_log(folder: Path, log: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """train_log.json and loss_curve.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    (folder / _LOG_NAME).write_text(json.dumps({**summary, "log": log}, indent=1) + "\n")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([e["step"] for e in log], [e["train_bits_per_byte"] for e in log], label="training")
    held_out = [e for e in log if "held_out_bits_per_byte" in e]
    axes.plot(
        [e["step"] for e in held_out], [e["held_out_bits_per_byte"] for e in held_out], "o-", ms=3, label="held out"
    )
    axes.set(xlabel="step", ylabel="bits per byte", title="Tiny byte-level MoE language model")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(folder / "loss_curve.png", dpi=120)
    plt.close(figure)


def train(config: ConfigDict, corpus: Corpus, workdir: Path, output_dir: Path) -> Qwen3Moe | None:
    """Run (or continue) the training; the trained model, or None when --max_minutes ended it early."""
    began, settings = time.monotonic(), config.train
    model_config = Qwen3MoeConfig.from_hf({**config.model, "dtype": compute_dtype(settings)})
    model = Qwen3Moe(model_config, param_dtype=jnp.float32, rngs=nnx.Rngs(settings.seed))
    for block in model.moe_blocks():
        block.configure(ExpertSettings(differentiable=True))
    graphdef, params = nnx.split(model)
    optimizer = make_optimizer(settings)
    state = TrainState(params, jax.jit(optimizer.init)(params), jnp.int32(0))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    logging.info(
        "%d parameters, %d training bytes in %d files, %d held-out bytes in %d files, computing in %s on %s",
        *(parameters, len(corpus.train), len(corpus.train_files), len(corpus.held_out), len(corpus.held_out_files)),
        *(model_config.dtype, jax.devices()[0].device_kind),
    )
    run, log = run_identity(config, corpus), []
    state_path = workdir / _STATE_NAME
    if _RESUME.value == "always" and not state_path.exists():
        raise FileNotFoundError(f"--resume=always, but {state_path} does not exist")
    if _RESUME.value != "never" and state_path.exists():
        state, log = restore_state(state_path, state, run)
        logging.info("continuing %s at step %d", state_path, int(state.step))
    call = make_train_call(graphdef, optimizer, settings)
    data = jnp.asarray(corpus.train)
    held_out = windows(corpus.held_out, settings.sequence_length)
    summary = {"parameters": parameters, "corpus_digest": corpus.digest, "device": jax.devices()[0].device_kind}
    step = first = int(state.step)
    with tqdm(total=settings.steps, initial=step, unit="step", desc="training") as progress:
        while step < settings.steps:
            state, (nats, balance) = call(state, data)
            bits = float(jnp.mean(nats)) / math.log(2)
            step += settings.steps_per_call
            progress.update(settings.steps_per_call)
            if not math.isfinite(bits):
                raise FloatingPointError(f"the loss is {bits} after step {step}")
            entry = {"step": step, "train_bits_per_byte": bits, "balance_loss": float(jnp.mean(balance))}
            log.append(entry)
            if step % settings.eval_every == 0 or step == settings.steps:
                result = evaluate(nnx.merge(graphdef, state.params), held_out, settings.eval_batch_size)
                entry["held_out_bits_per_byte"] = result.bits_per_byte
                progress.write(
                    f"step {step}: training {bits:.4f}, held out {result.bits_per_byte:.4f} bits per byte, "
                    f"balance loss {entry['balance_loss']:.3f}, {time.monotonic() - began:.0f} s"
                )
            progress.set_postfix(bpb=f"{bits:.3f}")
            late = _MAX_MINUTES.value is not None and time.monotonic() - began > 60 * _MAX_MINUTES.value
            if step % settings.checkpoint_every == 0 or step == settings.steps or late:
                save_state(state_path, state, {**run, "log": log})
            if late and step < settings.steps:
                write_log(output_dir, log, summary)
                logging.info("--max_minutes reached at step %d of %d; the same command continues", step, settings.steps)
                return None
    logging.info("%d steps in %.0f s", step - first, time.monotonic() - began)
    write_log(output_dir, log, summary)
    return nnx.merge(graphdef, state.params)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    config = _CONFIG.value
    try:
        check_config(config.train)
        corpus = load_corpus(_CORPUS.value)
        for part in (corpus.train, corpus.held_out):
            windows(part, config.train.sequence_length)
    except ValueError as error:
        raise app.UsageError(f"--corpus={_CORPUS.value}, --config: {error}") from error
    output_dir = Path(_OUTPUT_DIR.value)
    workdir = Path(_WORKDIR.value) if _WORKDIR.value else output_dir / "state"
    model = train(config, corpus, workdir, output_dir)
    if model is None:
        return
    save_model(model, Qwen3MoeConfig.from_hf({**config.model, "dtype": "bfloat16"}), output_dir)
    size = sum(path.stat().st_size for path in output_dir.glob("*.safetensors"))
    served, _ = load_model(output_dir)
    held_out = windows(corpus.held_out, config.train.sequence_length)
    result = evaluate(served, held_out, config.train.eval_batch_size)
    print(f"{output_dir}: {size / 2**20:.2f} MiB, held out {result.bits_per_byte:.4f} bits per byte in bfloat16")


if __name__ == "__main__":
    app.run(main)
