"""Flags that several experiments share, and the environment switches they mirror: flag over environment over config.

    FD_DISPATCH_USE_FP4=1                     tokens cross the network in NVFP4 (0: in bf16); --wire_format wins over it
    FD_USE_BLOCK_WISE_CUDA_GRAPH=1            blocks compiled ahead of time for a few token counts; --block_graph
    FD_BLOCK_WISE_CUDA_GRAPH_SIZES=128,256    those counts, or a planner's JSON file; --block_graph_sizes
    FD_BLOCK_WISE_DEBUG=1                     a line per compilation, a summary at the end; --block_graph_debug

The names are those of the serving system whose deployments this library is compared with.
"""

import os
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
from absl import app, flags

from fp4jax.bucket_planner import REFERENCE_BUCKETS, parse_buckets
from fp4jax.wire_formats import WIRE_FORMATS

_USE_FP4, _STALE = "FD_DISPATCH_USE_FP4", "FD_USE_NVFP4_COMM_QUANT"
_USE_GRAPH, _SIZES = "FD_USE_BLOCK_WISE_CUDA_GRAPH", "FD_BLOCK_WISE_CUDA_GRAPH_SIZES"
_DEBUG = "FD_BLOCK_WISE_DEBUG"
_BOOLEANS = {"1": True, "true": True, "0": False, "false": False}

_WIRE_FORMAT = flags.DEFINE_enum(
    "wire_format", None, WIRE_FORMATS, f"How tokens cross the network; default: {_USE_FP4}, else the script's own."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, the same for all: several processes or hosts become one."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator_address: how many.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator_address: which one this is.", lower_bound=0)
_BLOCK_GRAPH = flags.DEFINE_bool("block_graph", None, f"Compile blocks ahead of time; default: {_USE_GRAPH}.")
_BLOCK_SIZES = flags.DEFINE_string(
    "block_graph_sizes", None, f"Token counts to compile for, '128,256', or a plan's JSON file; default: {_SIZES}."
)
_BLOCK_DEBUG = flags.DEFINE_bool(
    "block_graph_debug", None, f"Print each compilation, and a summary at the end; default: {_DEBUG}."
)


class BlockGraphOptions(NamedTuple):
    """enabled: compile ahead of time at all. buckets: token counts. debug: report compilations and calls."""

    enabled: bool
    buckets: tuple[int, ...]
    debug: bool


def wire_format(config_value: str) -> str:
    """The wire format: of the flag, else of the environment, else of the script or its config.

    Raises:
      app.UsageError: the variable has a value that is no boolean.
    """
    if _STALE in os.environ:
        warnings.warn(f"{_STALE} is not read any more; set {_USE_FP4}", stacklevel=2)
    if _WIRE_FORMAT.value is not None:
        return _WIRE_FORMAT.value
    use_fp4 = _boolean(_USE_FP4, None)
    return config_value if use_fp4 is None else "nvfp4" if use_fp4 else "bf16"


def block_graph_options(enabled: bool = True, buckets: Sequence[int] = REFERENCE_BUCKETS) -> BlockGraphOptions:
    """Of the flags, else of the environment, else the arguments (the script's own or its config's); debug: else off.

    Raises:
      app.UsageError: a variable that is no boolean, or sizes that are not positive numbers in ascending order.
    """
    use = _BLOCK_GRAPH.value if _BLOCK_GRAPH.value is not None else _boolean(_USE_GRAPH, enabled)
    debug = _BLOCK_DEBUG.value if _BLOCK_DEBUG.value is not None else _boolean(_DEBUG, False)
    text, source = _BLOCK_SIZES.value, "--block_graph_sizes"
    if text is None:
        text, source = os.environ.get(_SIZES), _SIZES
    try:
        sizes = tuple(buckets) if text is None else parse_buckets(text)
    except ValueError as error:
        raise app.UsageError(f"{source}: {error}") from error
    return BlockGraphOptions(bool(use), sizes, bool(debug))


def _boolean(variable: str, default: bool | None) -> bool | None:
    """Of an environment variable."""
    value = os.environ.get(variable)
    if value is None:
        return default
    if value.strip().lower() not in _BOOLEANS:
        raise app.UsageError(f"{variable}={value!r} is not one of {sorted(_BOOLEANS)}")
    return _BOOLEANS[value.strip().lower()]


def join_processes() -> None:
    """Before the first use of a device: joins the processes that the coordinator flags name, if they are set.

    Raises:
      app.UsageError: some of the three flags are missing.
    """
    given = [f.value is not None for f in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)]
    if not any(given):
        return
    if not all(given):
        raise app.UsageError("--coordinator_address, --num_processes and --process_id go together")
    jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
