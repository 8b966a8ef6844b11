"""`run_python(...)` runs a Python command line in a fork of a process that has imported JAX and the like already.

A fresh interpreter takes seconds to import what every script imports. One server per test process does so once; it
forks for every command line. The fork has the arguments, folder, environment and output files of a process of its own.
Variables that JAX reads while it is imported come too late for a fork: `settings` changes them by `jax.config`.
"""

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# The server answers a line of JSON with the exit status of the fork. A fork ends as the interpreter does, but for the
# memory, which takes longer to free than most scripts run.
_SERVER = """
import atexit, gc, json, os, runpy, sys, threading, types, warnings
import absl.app, absl.testing.flagsaver, flax.nnx, matplotlib.pyplot, ml_collections.config_flags, optax, safetensors
import jax, jax.experimental.pallas.mosaic_gpu, tqdm
import fp4jax.block_fp8, fp4jax.checkpoint, fp4jax.engine, fp4jax.models
from jax._src import xla_bridge


def prepare(job):
    for number, name in enumerate((os.devnull, job["stdout"], job["stderr"])):
        os.dup2(os.open(name, os.O_RDWR), number)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    for name, value in job["settings"].items():
        jax.config.update(name, value)
    if job["warnings"]:
        warnings.simplefilter(job["warnings"])


def run(first, *rest):
    sys.path.remove("")
    if first == "-c":
        code, *sys.argv[1:] = rest
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(main))
    elif first == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv[:] = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.realpath(first)))
        sys.argv[:] = first, *rest
        runpy.run_path(first, run_name="__main__")


def run_and_exit(job):
    status = 1
    try:
        prepare(job)
        run(*job["arguments"])
        status = 0
    except SystemExit as stop:
        status = 0 if stop.code is None else stop.code
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 255)


assert not xla_bridge.backends_are_initialized()
gc.freeze()
replies = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    with warnings.catch_warnings(action="ignore"):
        child = os.fork()
    if not child:
        run_and_exit(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=replies, flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER], env=env, cwd=ROOT, text=True, start_new_session=True, **pipes
    )
    atexit.register(_stop, server)
    return server


def _stop(server: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)  # with the fork that runs
    server.communicate()


def run_python(
    *arguments: str | Path,
    cwd: str | Path = ROOT,
    environment: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    warnings: str | None = None,
    timeout: float = 200,
) -> subprocess.CompletedProcess[str]:
    """`python script ...`, `python -m module ...` or `python -c code ...` on the CPU: exit status, stdout, stderr.

    Args:
      arguments: what follows `python`.
      cwd: the folder that it runs in.
      environment: variables beside those of this process; XLA's flags count, those of JAX's settings do not.
      settings: values of `jax.config`.
      warnings: the action of all warnings, as after `python -W`.
      timeout: seconds after which the run is killed and `subprocess.TimeoutExpired` raised.
    """
    server = _server()
    fixed = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [str(argument) for argument in arguments]
    with tempfile.NamedTemporaryFile("r") as stdout, tempfile.NamedTemporaryFile("r") as stderr:
        job = {
            "arguments": command, "cwd": str(cwd), "environment": {**os.environ, **fixed, **(environment or {})},
            "settings": dict(settings or {}), "warnings": warnings, "stdout": stdout.name, "stderr": stderr.name,
        }  # fmt: skip
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], timeout)[0]:
            _stop(server)
            _server.cache_clear()
            raise subprocess.TimeoutExpired(command, timeout, stdout.read(), stderr.read())
        status = server.stdout.readline()
        assert status, "the process that forks has ended"
        return subprocess.CompletedProcess(command, int(status), stdout.read(), stderr.read())


def last_json(done: subprocess.CompletedProcess[str]) -> Any:
    """What the last line printed by a run that succeeded says."""
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])
