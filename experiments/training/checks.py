"""Checks of training settings, made before anything is computed."""

import math

from ml_collections import ConfigDict

from experiments.text.corpora import Corpus, windows
from fp4jax.models.qwen3_moe import Qwen3MoeConfig

_COUNTS = ("steps", "steps_per_call", "eval_every", "checkpoint_every", "batch_size", "sequence_length")
_COUNTS += ("eval_batch_size",)
_POSITIVE = ("learning_rate", "clip_norm")
_NOT_NEGATIVE = ("final_learning_rate", "weight_decay", "balance_loss_weight", "warmup_steps")


def check_config(config: ConfigDict) -> None:
    """Check the settings that do not depend on the text; `check_lengths` checks the others.

    Raises:
      ValueError: a setting cannot work; the message names it and its value.
    """
    train = config.train
    for name in _COUNTS:
        if train[name] < 1:
            raise ValueError(f"train.{name}={train[name]} must be at least 1")
    for name in ("steps", "eval_every", "checkpoint_every"):
        if train[name] % train.steps_per_call:  # the log puts an evaluation beside the loss of the same steps
            raise ValueError(
                f"train.{name}={train[name]} must be a multiple of train.steps_per_call={train.steps_per_call}"
            )
    for name in _POSITIVE:
        if not 0 < train[name] < math.inf:
            raise ValueError(f"train.{name}={train[name]} must be a positive number")
    for name in _NOT_NEGATIVE:
        if not 0 <= train[name] < math.inf:
            raise ValueError(f"train.{name}={train[name]} must be a number that is not negative")
    if train.warmup_steps >= train.steps:
        raise ValueError(f"train.warmup_steps={train.warmup_steps} must be less than train.steps={train.steps}")
    if train.compute_dtype not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"train.compute_dtype must be auto, bfloat16 or float32, got {train.compute_dtype!r}")
    if config.model.vocab_size < 256:
        raise ValueError(f"model.vocab_size={config.model.vocab_size} must be at least 256, one token per byte")
    try:
        Qwen3MoeConfig.from_hf(config.model.to_dict())
    except ValueError as error:
        raise ValueError(f"model: {error}") from error


def check_lengths(config: ConfigDict, corpus: Corpus) -> None:
    """Check the length of a sequence.

    Raises:
      ValueError: it is longer than the training text, the held-out text, or the model's max_position_embeddings.
    """
    length, positions = config.train.sequence_length, config.model.max_position_embeddings
    for name, part in (("training", corpus.train), ("held-out", corpus.held_out)):
        try:
            windows(part, length)
        except ValueError as error:
            raise ValueError(f"train.sequence_length={length}, {name} text: {error}") from error
    if length > positions:
        raise ValueError(f"train.sequence_length={length} exceeds model.max_position_embeddings={positions}")
