"""Flags of scripts that serve a checkpoint with an `Engine`: the model, how it is loaded, and the engine's sizes.

--prefill_buckets wins over the environment variable FD_BLOCK_WISE_CUDA_GRAPH_SIZES, and the variable over the default.
FD_USE_BLOCK_WISE_CUDA_GRAPH=0 is refused, as an engine always runs programs that are compiled ahead of time.
"""

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags

from experiments.harness import cache_flag, model_flags, store_flag, wire_flag
from experiments.harness.flag_values import integers, switch
from fp4jax.block_graph import check_buckets, parse_buckets
from fp4jax.checkpoint import load_model
from fp4jax.checkpoint.folder_config import end_token_ids, read_config
from fp4jax.engine import Engine, Sampling
from fp4jax.models import configure_experts

_USE_GRAPH, _SIZES = "FD_USE_BLOCK_WISE_CUDA_GRAPH", "FD_BLOCK_WISE_CUDA_GRAPH_SIZES"
_DEFAULT_PREFILL = (128, 512, 2048)
_MOST_LENGTH = 4096  # the default of --max_length for models that could read more

_MODEL = flags.DEFINE_string(
    "model", None, "Folder of the checkpoint, in Hugging Face layout; required.", required=True
)
_MAX_REQUESTS = flags.DEFINE_integer("max_requests", 16, "Requests that a device runs at a time.", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length",
    None,
    f"Most tokens of a request, prompt and answer together; default: what the model allows, up to {_MOST_LENGTH}.",
    lower_bound=2,
)
_NUM_PAGES = flags.DEFINE_integer(
    "num_pages",
    None,
    "Pages of keys and values on a device; default: enough for --max_requests of --max_length.",
    lower_bound=1,
)
_PAGE_SIZE = flags.DEFINE_integer("page_size", 64, "Tokens of a page.", lower_bound=1)
_PREFILL_BUCKETS = flags.DEFINE_list(
    "prefill_buckets",
    None,
    f"Token counts that prefill is compiled for; longer prompts run in chunks. Default: {_SIZES}, else "
    f"{','.join(map(str, _DEFAULT_PREFILL))}.",
)
_PREFILL_TOKENS = flags.DEFINE_integer(
    "prefill_tokens",
    None,
    "Most tokens of prompts that a step computes on each device, pads included; default: the largest of "
    "--prefill_buckets.",
    lower_bound=1,
)
_DECODE_BUCKETS = flags.DEFINE_list(
    "decode_buckets", None, "Numbers of requests that decoding is compiled for; default: --max_requests."
)
_EP = flags.DEFINE_integer(
    "ep", 1, "Devices. The experts are split over them, and each has requests of its own.", lower_bound=1
)


class EngineOptions(NamedTuple):
    """What the flags say about the model and its engine, checked before any weight is read.

    Attributes:
      folder: the checkpoint.
      config: its config.
      stop_ids: the tokens that end a text.
      max_length: the most tokens of a request.
      capacity: requests that run at a time, over all devices.
      wire_format: the format of tokens that cross devices; None: there is one device.
      sizes: the other arguments of `Engine`.
    """

    folder: Path
    config: Any
    stop_ids: tuple[int, ...]
    max_length: int
    capacity: int
    wire_format: Any
    sizes: dict[str, Any]


def engine_options() -> EngineOptions:
    """The options from the flags and the small files of the folder.

    Raises:
      app.UsageError: a flag would fail after the weights are loaded, or would have no effect.
    """
    ep, folder = _EP.value, Path(_MODEL.value)
    if ep == 1 and wire_flag.WIRE_FORMAT.value is not None:
        raise app.UsageError("--wire_format says how tokens cross between devices: with --ep")
    wire_format = wire_flag.wire_format("nvfp4") if ep > 1 else None
    prefill = _prefill_buckets()
    decode = _buckets("decode_buckets", _DECODE_BUCKETS.value or [_MAX_REQUESTS.value])
    if decode[-1] != _MAX_REQUESTS.value:
        raise app.UsageError(f"--decode_buckets: the largest is {decode[-1]}, not --max_requests={_MAX_REQUESTS.value}")
    try:
        config, stop_ids = read_config(folder, model_flags.DTYPE.value), tuple(sorted(end_token_ids(folder)))
        Sampling(stop_ids=stop_ids)
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from error
    most = config.max_position_embeddings
    max_length = min(most, _MOST_LENGTH) if _MAX_LENGTH.value is None else _MAX_LENGTH.value
    if max_length > most:
        raise app.UsageError(f"--max_length={max_length} exceeds max_position_embeddings={most}")
    pages = -(-max_length // _PAGE_SIZE.value)
    if _NUM_PAGES.value is not None and _NUM_PAGES.value < pages:
        raise app.UsageError(f"--num_pages={_NUM_PAGES.value}: a request of --max_length={max_length} takes {pages}")
    if config.num_experts % ep:
        raise app.UsageError(f"--ep={ep} does not divide the model's {config.num_experts} experts")
    sizes = dict(
        max_requests=_MAX_REQUESTS.value, num_pages=_NUM_PAGES.value, page_size=_PAGE_SIZE.value,
        prefill_buckets=prefill, prefill_tokens=_PREFILL_TOKENS.value, decode_buckets=decode,
        store=store_flag.program_store(),
    )  # fmt: skip
    return EngineOptions(folder, config, stop_ids, max_length, ep * _MAX_REQUESTS.value, wire_format, sizes)


def load_engine(options: EngineOptions, **more: Any) -> Engine:
    """Load the model, over --ep devices, and compile its engine; print how long both took.

    Args:
      options: the options.
      more: further arguments of `Engine`.

    Raises:
      app.UsageError: there are not enough devices, or the folder does not load.
      MemoryError: the cache does not fit.
    """
    ep, start = _EP.value, time.perf_counter()
    if ep > len(jax.devices()):
        raise app.UsageError(f"--ep={ep}: JAX sees {len(jax.devices())} devices")
    mesh = jax.make_mesh((ep,), ("ep",), devices=jax.devices()[:ep]) if ep > 1 else None
    try:
        model, config = load_model(
            options.folder, mesh=mesh, quantization=model_flags.QUANTIZATION.value, dtype=model_flags.DTYPE.value,
            input_scales=model_flags.INPUT_SCALES.value, cache_format=cache_flag.CACHE_FORMAT.value,
        )  # fmt: skip
    except (ValueError, FileNotFoundError) as error:
        raise app.UsageError(str(error)) from error
    if mesh is not None:
        configure_experts(model, wire_format=options.wire_format)
    loaded = time.perf_counter()
    engine = Engine(model, max_length=options.max_length, mesh=mesh, **options.sizes, **more)
    print(f"{config.to_hf()['model_type']}: cache of {engine.cache_bytes / 1e9:.2f} GB per device", flush=True)
    engine.warm_up(workers=os.cpu_count() or 1, progress=True)
    compiled = time.perf_counter() - loaded
    print(f"loaded in {loaded - start:.1f} s, compiled in {compiled:.1f} s", flush=True)
    return engine


def _prefill_buckets() -> tuple[int, ...]:
    if switch(_USE_GRAPH, True) is False:
        raise app.UsageError(f"{_USE_GRAPH}: an engine always runs programs that are compiled ahead of time")
    if _PREFILL_BUCKETS.value is not None:
        return _buckets("prefill_buckets", _PREFILL_BUCKETS.value)
    text = os.environ.get(_SIZES)
    try:
        return _DEFAULT_PREFILL if text is None else parse_buckets(text)
    except ValueError as error:
        raise app.UsageError(f"{_SIZES}: {error}") from error


def _buckets(flag: str, values: list[str] | list[int]) -> tuple[int, ...]:
    try:
        return tuple(check_buckets(integers(flag, values)))
    except ValueError as error:
        raise app.UsageError(f"--{flag}: {error}") from error
