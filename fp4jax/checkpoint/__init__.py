"""Checkpoints: `load_model` reads a model from a folder in Hugging Face layout, `save_model` writes one."""

from fp4jax.checkpoint.load import load_model as load_model
from fp4jax.checkpoint.save import save_model as save_model
