"""A model that serves a stream of requests."""

from fp4jax.engine.bucketed_model import BucketedModel as BucketedModel, Prefilled as Prefilled
