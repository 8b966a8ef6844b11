"""Time per stage of a compiled program, from a profile of its run. Stages are the `jax.named_scope`s of `moe_layer`."""

import collections
import glob
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][a-z0-9\-]*)\(.*op_name=\"([^\"]*)\"", re.MULTILINE)
_CONTAINERS = ("while", "conditional", "call")  # their time is that of the instructions inside
OTHER = "other"


def stage_times(
    compiled: jax.stages.Compiled, run: Callable[[], Any], stages: Sequence[str], repeats: int = 5
) -> dict[str, float]:
    """Microseconds per stage and call, averaged over calls and devices; what belongs to no stage is "other".

    `run` calls `compiled` once. On virtual CPU devices the cores are shared, and collectives include waiting. On GPUs,
    compile with `compiler_options()`: kernels inside a command buffer (CUDA graph) cannot be told apart.
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
    """Options for `Lowered.compile` that keep every kernel visible to the profiler."""
    return {"xla_gpu_enable_command_buffer": ""} if jax.default_backend() == "gpu" else {}


def _instruction_of(event) -> str:
    """CPU events carry the instruction's name; GPU events a kernel's, and the instruction in a statistic."""
    return next((str(value) for key, value in event.stats if key == "hlo_op"), event.name)
