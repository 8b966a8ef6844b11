"""Flags about blocks that are compiled ahead of time, and the environment variables that stand for them.

A flag wins over its variable, and a variable wins over the script's own default:

    --block_graph          FD_USE_BLOCK_WISE_CUDA_GRAPH=1            compile blocks ahead of time for a few token counts
    --block_graph_sizes    FD_BLOCK_WISE_CUDA_GRAPH_SIZES=128,256    the token counts, or the JSON file of a plan
    --block_graph_debug    FD_BLOCK_WISE_DEBUG=1                     print each compilation, and a summary at the end

The variables have the names that they have in the serving system whose deployments this library is compared with.
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
    """How blocks are compiled ahead of time.

    Attributes:
      enabled: whether they are.
      buckets: the token counts to compile for, ascending.
      debug: whether compilations and calls are reported.
    """

    enabled: bool
    buckets: tuple[int, ...]
    debug: bool


def flags_about_blocks() -> list[str]:
    """The flags of the command line that only make sense with blocks compiled ahead of time, as --name."""
    return [f"--{flag.name}" for flag in (_BLOCK_GRAPH, _BLOCK_SIZES, _BLOCK_DEBUG) if flag.value]


def block_graph_options(enabled: bool = True, buckets: Sequence[int] = REFERENCE_BUCKETS) -> BlockGraphOptions:
    """The options from the flags, else from the environment, else from the arguments.

    Args:
      enabled: the default of --block_graph.
      buckets: the default of --block_graph_sizes.

    Raises:
      app.UsageError: a variable is not a boolean, the sizes are not positive and ascending, or --noblock_graph is given
        together with a flag about blocks.
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
