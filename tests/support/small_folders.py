"""A small checkpoint, and changes to its files."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from tensor_files import read_tensors

from fp4jax.checkpoint import load_model
from fp4jax.checkpoint.match import model_params
from fp4jax.models import Qwen3Moe, Qwen3MoeConfig

CONFIG = Qwen3MoeConfig(
    vocab_size=32,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    intermediate_size=24,
    mlp_only_layers=(1,),
)
WORDS = {f"w{i}": i for i in range(32)}  # the vocabulary of `add_tokenizer`


def make_model(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    return Qwen3Moe(config, rngs=nnx.Rngs(0)), config


def params(model):
    return {path: np.asarray(param.get_value()) for path, param in model_params(model).items()}


def assert_same_params(first, second):
    first, second = params(first), params(second)
    assert first.keys() == second.keys()
    for path, value in first.items():
        assert value.dtype == second[path].dtype and value.tobytes() == second[path].tobytes(), path


def edit(folder, change):
    """Rewrite the weights after `change(tensors)`."""
    file = folder / "model.safetensors"
    tensors = read_tensors(file)
    change(tensors)
    save_file(tensors, file)


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def add_tokenizer(folder):
    """Writes a tokenizer of whole words."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def loaded_bytes(folder, **options):
    model, _ = load_model(folder, **options)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
