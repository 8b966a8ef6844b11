"""What a script says to command lines that it must refuse: all of them in one process, as importing JAX takes time."""

import json
from collections.abc import Sequence

from python_runs import ROOT, last_json, run_python

__all__ = ["ROOT", "check_refusals", "refusals"]

_RUN_ALL = """
import contextlib, importlib, io, json, sys
from absl.testing import flagsaver
from experiments.harness import script

module, found = importlib.import_module(sys.argv[1]), []
for line in json.loads(sys.argv[2]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), flagsaver.flagsaver():
        try:
            script.run(module.main, [sys.argv[1].replace(".", "/") + ".py", *line])
        except SystemExit as stop:
            status = stop.code
    found.append((status, said.getvalue()))
print(json.dumps(found))
"""


def refusals(script: str, lines: Sequence[Sequence[str]], devices: int = 1) -> list[tuple[int, str]]:
    """Exit status and everything printed, per command line of `experiments/<script>.py`, on CPU devices."""
    code = ("-c", _RUN_ALL, f"experiments.{script}", json.dumps(list(lines)))
    found = last_json(run_python(*code, settings={"jax_num_cpu_devices": devices}))
    assert len(found) == len(lines)
    return found


def check_refusals(script: str, expected: dict[tuple[str, ...], str], devices: int = 1) -> None:
    """Every command line ends with status 1, a message that contains this, and one line about help; no traceback."""
    for (line, message), (status, said) in zip(
        expected.items(), refusals(script, list(expected), devices), strict=True
    ):
        assert status == 1 and message in said and "Traceback" not in said, (line, said)
        assert said.splitlines()[-1] == f"python experiments/{script}.py --help explains the flags", (line, said)
        assert "\n  --" not in said, (line, said)  # no list of flags
