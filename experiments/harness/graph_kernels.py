"""Which kernels of a call ran inside CUDA graphs (XLA's command buffers), and when: from a profile of it, on a GPU."""

import glob
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# For `Lowered.compile`: XLA takes graphs apart while a profiler runs, unless it is told not to.
KEEP_GRAPHS = {"xla_enable_command_buffers_during_profiling": True}


class Kernel(NamedTuple):
    """A kernel or copy on the device: its name, begin and duration in us, whether a graph launched it."""

    name: str
    begin_us: float
    us: float
    in_graph: bool


def profile_kernels(run: Callable[[], Any], device: int = 0) -> list[Kernel]:
    """What ran on a GPU during `run()`, in order of time, begins counted from the first.

    The executables must have been compiled with `KEEP_GRAPHS`, or no kernel is in a graph.
    """
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        profile = jax.profiler.ProfileData.from_file(path)
    with warnings.catch_warnings():
        # jaxlib's types of a profile have no __module__, of which Python warns; raised inside, it ends the process.
        warnings.simplefilter("ignore", DeprecationWarning)
        found = _kernels_of(profile, device)
    found.sort(key=lambda kernel: kernel.begin_us)
    return [k._replace(begin_us=k.begin_us - found[0].begin_us) for k in found]


def _kernels_of(profile: Any, device: int) -> list[Kernel]:
    found = []
    for plane in profile.planes:
        if not plane.name.endswith(f"GPU:{device}"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    graph = dict(event.stats).get("cuda_graph_id", 0)
                    found.append(Kernel(event.name, event.start_ns / 1e3, event.duration_ns / 1e3, bool(graph)))
    return found


def kernel_columns(kernels: list[Kernel], calls: int) -> dict[str, Any]:
    """Per call: kernels inside and outside of graphs, the sum of all their times in us; names of those outside."""
    inside = sum(kernel.in_graph for kernel in kernels)
    return {
        "kernels_in_graphs": round(inside / calls, 2),
        "kernels_outside": round((len(kernels) - inside) / calls, 2),
        "kernel_us": round(sum(kernel.us for kernel in kernels) / calls, 2),
        "outside": sorted({kernel.name for kernel in kernels if not kernel.in_graph}),
    }
