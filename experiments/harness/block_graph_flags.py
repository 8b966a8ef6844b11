"""Flags about blocks compiled ahead of time, and environment switches: flags win over these, and these over configs.

    FD_USE_BLOCK_WISE_CUDA_GRAPH=1            blocks compiled ahead of time for a few token counts; --block_graph
    FD_BLOCK_WISE_CUDA_GRAPH_SIZES=128,256    those counts, or a planner's JSON file; --block_graph_sizes
    FD_BLOCK_WISE_DEBUG=1                     a line per compilation, a summary at the end; --block_graph_debug

The names are those of the serving system whose deployments this library is compared with.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

from absl import app, flags

from experiments.harness.flag_values import switch
from fp4jax.block_graph import REFERENCE_BUCKETS, parse_buckets

_USE_GRAPH, _SIZES = "FD_USE_BLOCK_WISE_CUDA_GRAPH", "FD_BLOCK_WISE_CUDA_GRAPH_SIZES"
_DEBUG = "FD_BLOCK_WISE_DEBUG"

_BLOCK_GRAPH = flags.DEFINE_bool("block_graph", None, f"Compile blocks ahead of time; default: {_USE_GRAPH}, else yes.")
_BLOCK_SIZES = flags.DEFINE_string(
    "block_graph_sizes",
    None,
    f"Token counts to compile for, '128,256', or a plan's JSON file; default: {_SIZES}, else the script's own.",
)
_BLOCK_DEBUG = flags.DEFINE_bool(
    "block_graph_debug", None, f"Print each compilation, and a summary at the end; default: {_DEBUG}, else no."
)


class BlockGraphOptions(NamedTuple):
    """enabled: compile ahead of time at all. buckets: token counts. debug: report compilations and calls."""

    enabled: bool
    buckets: tuple[int, ...]
    debug: bool


def flags_about_blocks() -> list[str]:
    """Those of the command line that ask for something that only blocks compiled ahead of time do."""
    return [f"--{flag.name}" for flag in (_BLOCK_GRAPH, _BLOCK_SIZES, _BLOCK_DEBUG) if flag.value]


def block_graph_options(enabled: bool = True, buckets: Sequence[int] = REFERENCE_BUCKETS) -> BlockGraphOptions:
    """What the flags say, else the environment, else the arguments (the script's own or its config's); debug: else off.

    Raises:
      app.UsageError: a variable that is no boolean, sizes that are not positive numbers in ascending order, or flags
        about blocks beside --noblock_graph.
    """
    use = _BLOCK_GRAPH.value if _BLOCK_GRAPH.value is not None else switch(_USE_GRAPH, enabled)
    debug = _BLOCK_DEBUG.value if _BLOCK_DEBUG.value is not None else switch(_DEBUG, False)
    if _BLOCK_GRAPH.value is False and (asked := flags_about_blocks()):
        raise app.UsageError(f"{' and '.join(asked)} and --noblock_graph contradict each other")
    text, source = _BLOCK_SIZES.value, "--block_graph_sizes"
    if text is None:
        text, source = os.environ.get(_SIZES), _SIZES
    try:
        sizes = tuple(buckets) if text is None else parse_buckets(text)
    except ValueError as error:
        raise app.UsageError(f"{source}: {error}") from error
    return BlockGraphOptions(bool(use), sizes, bool(debug))
