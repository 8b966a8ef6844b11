"""Runs a command in fresh processes, without and with the programs that JAX compiled before, and asks for the platform.

The calling process does not start JAX, so that it holds no memory of the GPU.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

_ROOT = Path(__file__).resolve().parents[2]


def starts(*commands: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Run commands in processes, one after the other, that share a new folder as JAX's compilation cache.

    The first process finds the folder empty. Every program is stored in it, however small it is and however quickly it
    was compiled, so that a later process compiles nothing that an earlier one has compiled.

    Yields:
      The last line that each process prints, which must be a JSON object.

    Raises:
      RuntimeError: a process failed; it has said why on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        env = _environment() | {
            "JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }  # fmt: skip
        for number, command in enumerate(commands, 1):
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"start {number} ended with status {done.returncode}")
            yield json.loads(done.stdout.splitlines()[-1])


def will_run_on_gpu() -> bool:
    """Whether JAX's default device is a GPU, which another process finds out unless JAX was told to take the CPU."""
    return not _told_to_take_the_cpu() and _ask("jax.devices()[0].platform") == "gpu"


def device_count() -> int:
    """The number of devices that JAX sees, which another process finds out unless JAX was told to take the CPU."""
    return len(jax.devices()) if _told_to_take_the_cpu() else int(_ask("len(jax.devices())") or 0)


def _told_to_take_the_cpu() -> bool:
    return (jax.config.jax_platforms or "").split(",")[0] == "cpu"


def _ask(expression: str) -> str:
    command = [sys.executable, "-c", f"import jax; print({expression})"]
    done = subprocess.run(command, env=_environment(), stdout=subprocess.PIPE, text=True, check=False)
    return "".join(done.stdout.split()[-1:])


def _environment() -> dict[str, str]:
    paths = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # A process that calls this one may hold a part of the GPU's memory.
    return {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": paths}
