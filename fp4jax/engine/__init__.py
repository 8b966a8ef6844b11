"""Serving: language models that run prefill and decode in programs compiled ahead of time."""

from fp4jax.engine.bucketed_model import BucketedModel as BucketedModel, Prefilled as Prefilled
from fp4jax.engine.chat_template import ChatTemplate as ChatTemplate
from fp4jax.engine.drawing import Drawing as Drawing, Sampling as Sampling, drawing_of as drawing_of
from fp4jax.engine.engine import Engine as Engine, EngineReport as EngineReport
from fp4jax.engine.requests import Generated as Generated, QueueFull as QueueFull
from fp4jax.engine.text_stream import TextStream as TextStream
