"""What a user asks of the tokens of a request, and the arrays that a decode program takes for a batch of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fp4jax.engine.sampling import SamplingParams, check_sampling

MAX_STOP_IDS = 16


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are drawn, and where its answer ends. The default takes the likeliest token.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token, the lowest id among equals.
      top_k: keeps the k likeliest tokens; 0 keeps all.
      top_p: keeps the smallest set of likeliest tokens whose probabilities sum to this or more; 1 keeps all.
      min_p: keeps the tokens that are at least this many times as likely as the likeliest one; 0 keeps all.
      seed: the same seed draws the same tokens, whatever else is in the batch.
      stop_ids: the answer ends with the first of these tokens.

    Raises:
      ValueError: a value is out of range, there are more than 16 stop tokens, or one of them cannot be a token id.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p)
        if len(self.stop_ids) > MAX_STOP_IDS:
            raise ValueError(f"stop_ids: at most {MAX_STOP_IDS} stop tokens, got {len(self.stop_ids)}")
        if bad := [id for id in self.stop_ids if not 0 <= id < 2**31]:
            raise ValueError(f"stop_ids: {bad[0]} is no token id")


class Drawing(NamedTuple):
    """`Sampling` of the B requests of a batch, as arrays.

    Attributes:
      params: see `sampling.draw`.
      stop_ids: i32 [B, 16]; -1 stands for no token.
    """

    params: SamplingParams
    stop_ids: jax.Array


def drawing_of(requests: Sequence[Sampling], size: int, home: jax.sharding.Sharding | None = None) -> Drawing:
    """Returns arrays for a batch of `size` requests, of which the first are `requests`, on the devices of `home`."""
    return jax.device_put(drawing_on_host(requests, size), home)


def drawing_on_host(requests: Sequence[Sampling], size: int) -> Drawing:
    """Returns NumPy arrays for a batch of `size` requests, of which the first are `requests`."""
    every = [*requests, *[Sampling()] * (size - len(requests))]
    dtypes = dict(temperature=np.float32, top_k=np.int32, top_p=np.float32, min_p=np.float32, seed=np.uint32)
    columns = {
        name: np.asarray([getattr(s, name) % 2**32 if name == "seed" else getattr(s, name) for s in every], dtype)
        for name, dtype in dtypes.items()
    }
    stop_ids = np.full((size, MAX_STOP_IDS), -1, np.int32)
    for row, sampling in zip(stop_ids, every, strict=True):
        row[: len(sampling.stop_ids)] = sampling.stop_ids
    params: Any = SamplingParams(**columns)
    arrays: Any = stop_ids
    return Drawing(params, arrays)
