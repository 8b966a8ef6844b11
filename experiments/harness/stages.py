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

_NAME = re.compile(r"[\w.\-]+")
_MODULE = re.compile(rf"^HloModule ({_NAME.pattern})")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][a-z0-9\-]*)\(.*op_name=\"([^\"]*)\"", re.MULTILINE)
_CONTAINERS = ("while", "conditional", "call")  # their time is counted in the instructions inside
OTHER = "other"


def stage_times(
    compiled: jax.stages.Compiled | Sequence[jax.stages.Compiled],
    run: Callable[[], Any],
    stages: Sequence[str],
    repeats: int = 5,
) -> dict[str, float]:
    """Measure microseconds per stage and call, averaged over calls and devices.

    On virtual CPU devices, which share the cores, the time of a collective includes waiting for the other devices.

    Args:
      compiled: the program, or all programs that `run` calls. For a GPU it must be compiled with `compiler_options()`:
        the profiler cannot tell apart the kernels in a command buffer (CUDA graph).
      run: a function that calls `compiled` once.
      stages: the names of the scopes. An instruction in several of them belongs to the first in this list.
      repeats: the number of profiled calls, after one that is not profiled.

    Returns:
      {stage: microseconds}; instructions outside of all stages count as "other".
    """
    programs = [compiled] if isinstance(compiled, jax.stages.Compiled) else list(compiled)
    owner: dict[tuple[str | None, str], str | None] = {}  # by module and instruction, and by instruction alone
    for text in (program.as_text() or "" for program in programs):
        module = _MODULE.match(text)
        for name, opcode, op_name in _INSTRUCTION.findall(text):
            scopes = op_name.split("/")
            stage = None if opcode in _CONTAINERS else next((s for s in stages if s in scopes), OTHER)
            owner[None if module is None else module[1], name] = owner[None, name] = stage
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                jax.block_until_ready(run())
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        profile = jax.profiler.ProfileData.from_file(path)
    events = [
        (*_instruction_of(event), event.duration_ns / 1000) for line in _lines_of(profile) for event in line.events
    ]
    # Where the profile names modules, an instruction of another program must not pass for one of the same name.
    by_module = any((module, instruction) in owner for module, instruction, _ in events if module is not None)
    total = collections.Counter(dict.fromkeys([*stages, OTHER], 0.0))
    for module, instruction, us in events:
        stage = owner.get((module if by_module else None, instruction))
        if stage is not None:
            total[stage] += us
    shardings = jax.tree.leaves([program.input_shardings for program in programs])
    devices = max(len(sharding.device_set) for sharding in shardings)
    return {stage: us / repeats / devices for stage, us in total.items()}


def compiler_options() -> dict[str, str]:
    """Options for `Lowered.compile` that let the profiler see every kernel."""
    return {"xla_gpu_enable_command_buffer": ""} if jax.default_backend() == "gpu" else {}


def _lines_of(profile: Any) -> list[Any]:
    """The lines of a profile that hold instructions: on a GPU the streams, else all.

    With a GPU the host has events of the same instructions, which say how long it took to launch them.
    """
    streams = [
        line
        for plane in profile.planes
        if "GPU" in plane.name
        for line in plane.lines
        if line.name.startswith("Stream")
    ]
    return streams or [line for plane in profile.planes for line in plane.lines]


def _instruction_of(event) -> tuple[str | None, str]:
    """The names of the HLO module (None: not known) and instruction that an event of a profile belongs to.

    On a CPU the instruction is the event's name; on a GPU the event has the kernel's name, and the instruction is a
    statistic.
    """
    stats = dict(event.stats)
    module = _NAME.match(str(stats.get("hlo_module", "")))
    return None if module is None else module[0], str(stats.get("hlo_op", event.name))
