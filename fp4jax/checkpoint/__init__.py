"""Checkpoints: Hugging Face folders in and out."""

from fp4jax.checkpoint.load import load_model as load_model
from fp4jax.checkpoint.save import save_model as save_model
