"""The time of every stage of a compiled program, from a profile of a run.

A stage is a `jax.named_scope`, such as those of `moe_layer`: quantize, dispatch, permute, ...
"""

import collections
import glob
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][a-z0-9\-]*)\(.*op_name=\"([^\"]*)\"", re.MULTILINE)
_CONTAINERS = ("while", "conditional", "call")  # their time is counted in the instructions inside
OTHER = "other"


def stage_times(
    compiled: jax.stages.Compiled, run: Callable[[], Any], stages: Sequence[str], repeats: int = 5
) -> dict[str, float]:
    """Measure microseconds per stage and call, averaged over calls and devices.

    On virtual CPU devices, which share the cores, the time of a collective includes waiting for the other devices.

    Args:
      compiled: the program. For a GPU it must be compiled with `compiler_options()`: the profiler cannot tell apart
        the kernels in a command buffer (CUDA graph).
      run: a function that calls `compiled` once.
      stages: the names of the scopes.
      repeats: the number of profiled calls, after one that is not profiled.

    Returns:
      {stage: microseconds}; instructions outside of all stages count as "other".
    """
    owner: dict[str, str | None] = {}
    for name, opcode, op_name in _INSTRUCTION.findall(compiled.as_text() or ""):
        scopes = op_name.split("/")
        owner[name] = None if opcode in _CONTAINERS else next((s for s in stages if s in scopes), OTHER)
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                jax.block_until_ready(run())
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        profile = jax.profiler.ProfileData.from_file(path)
    total = collections.Counter(dict.fromkeys([*stages, OTHER], 0.0))
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                stage = owner.get(_instruction_of(event))
                if stage is not None:
                    total[stage] += event.duration_ns / 1000
    devices = max(len(sharding.device_set) for sharding in jax.tree.leaves(compiled.input_shardings))
    return {stage: us / repeats / devices for stage, us in total.items()}


def compiler_options() -> dict[str, str]:
    """Options for `Lowered.compile` that let the profiler see every kernel."""
    return {"xla_gpu_enable_command_buffer": ""} if jax.default_backend() == "gpu" else {}


def _instruction_of(event) -> str:
    """The name of the HLO instruction that an event of a profile belongs to.

    On a CPU this is the event's name; on a GPU the event has the kernel's name, and the instruction is a statistic.
    """
    return next((str(value) for key, value in event.stats if key == "hlo_op"), event.name)
