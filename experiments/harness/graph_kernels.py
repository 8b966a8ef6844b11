"""A profile of the kernels that ran on a GPU, with the time of each and whether a CUDA graph launched it.

XLA calls its CUDA graphs command buffers.
"""

import glob
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# Options for `Lowered.compile`. Without them XLA launches kernels one by one, without graphs, while a profiler runs.
KEEP_GRAPHS = {"xla_enable_command_buffers_during_profiling": True}


class Kernel(NamedTuple):
    """One kernel or copy that ran on the device.

    Attributes:
      name: the name of the kernel.
      begin_us: when it began, in microseconds after the first kernel of the profile.
      us: how long it ran, in microseconds.
      in_graph: whether a CUDA graph launched it.
    """

    name: str
    begin_us: float
    us: float
    in_graph: bool


def profile_kernels(run: Callable[[], Any], device: int = 0) -> list[Kernel]:
    """Profile `run()` and return the kernels that ran on one GPU, in order of time.

    Args:
      run: a function that calls executables, which must have been compiled with `KEEP_GRAPHS`; otherwise the profiler
        makes XLA launch every kernel without graphs. It is called twice, and the second call is profiled.
      device: the number of the GPU.
    """
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        profile = jax.profiler.ProfileData.from_file(path)
    with warnings.catch_warnings():
        # Python warns that jaxlib's profile types have no __module__. Where warnings are errors, this ends the process.
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
    """Columns of a results row about the kernels of `calls` equal calls.

    They are, per call, the number of kernels inside and outside of CUDA graphs and the sum of all kernel times in
    microseconds; and the names of the kernels outside.
    """
    inside = sum(kernel.in_graph for kernel in kernels)
    return {
        "kernels_in_graphs": round(inside / calls, 2),
        "kernels_outside": round((len(kernels) - inside) / calls, 2),
        "kernel_us": round(sum(kernel.us for kernel in kernels) / calls, 2),
        "outside": sorted({kernel.name for kernel in kernels if not kernel.in_graph}),
    }
