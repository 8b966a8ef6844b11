"""The files of a training run: the state that a later run continues from, the log, and a plot of the log."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from experiments.text.corpora import Corpus
from fp4jax.checkpoint.storage.tensor_file import part_of, publish, write_text


class TrainState(NamedTuple):
    """Everything on the device that a training step changes.

    Attributes:
      params: the parameters, float32.
      opt_state: the state of the optimizer.
      step: i32 (), the number of steps that are done.
    """

    params: Any
    opt_state: Any
    step: jax.Array


class History(NamedTuple):
    """What the host knows about the steps that are done.

    Attributes:
      log: the entries of the log, oldest first.
      losses: [nats per byte, balance loss] of every step since the last entry.
    """

    log: list[dict[str, Any]]
    losses: list[list[float]]


def run_identity(config: ConfigDict, corpus: Corpus) -> dict[str, Any]:
    """The settings and the corpus' digest, as one flat dictionary for JSON. A resumed run must have equal ones."""
    flat = {f"{part}.{name}": value for part in ("model", "train") for name, value in config[part].items()}
    return json.loads(json.dumps({**flat, "corpus": corpus.digest}))


def save_state(path: Path, state: TrainState, history: History, run: dict[str, Any]) -> None:
    """Write a state as one safetensors file, with the history and the run's identity in its metadata.

    A tensor's name is the path of its leaf in `state`. The file replaces the previous one only when it is complete.
    """
    leaves = {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(state)}
    metadata = {name: json.dumps(value) for name, value in {**run, **history._asdict()}.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with part_of(path).open("wb") as content:
        content.write(save(leaves, metadata))
        publish(content, part_of(path), path)


def restore_state(path: Path, like: TrainState, run: dict[str, Any]) -> tuple[TrainState, History]:
    """Read what `save_state` wrote.

    Args:
      path: the file.
      like: a state with the same tree as the saved one.
      run: the identity of the run that continues, see `run_identity`.

    Raises:
      ValueError: the saved run has another setting, which the message names, or the file is not a saved state.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            _check_same_run(path, metadata, run)
            leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
            values = [jnp.asarray(file.get_tensor(jax.tree_util.keystr(key))) for key, _ in leaves]
            history = History(metadata["log"], metadata["losses"])
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is no state of this script ({error}); delete it or use another --workdir") from error
    return jax.tree.unflatten(treedef, values), history


def _check_same_run(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{path} belongs to a run with {name}={found.get(name)!r}, this one has {value!r}; "
                "use --resume=never to start over, or another --workdir"
            )


def write_log(folder: Path, log: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Write train_log.json and loss_curve.png into `folder`, which is made."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "train_log.json", json.dumps({**summary, "log": log}, indent=1) + "\n")
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
