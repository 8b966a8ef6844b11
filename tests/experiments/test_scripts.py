"""What all scripts have in common: `--help`, short usage errors, no noise, nothing done before flags are parsed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from python_runs import ROOT, last_json, run_python

SCRIPTS = sorted(
    path.stem for path in (ROOT / "experiments").glob("*.py") if re.search(r"^def main\(", path.read_text(), re.M)
)
REQUIRED = {
    "generate": ["--model=a"], "inspect_checkpoint": ["--model=a"], "quantize_checkpoint": ["--model=a"],
    "serve": ["--model=a"], "serve_batch": ["--model=a", "--input=b"],
}  # fmt: skip
# What they write; others: a folder. serve writes nothing, and reads its file of keys as early.
OUTPUTS = {
    "generate": "json", "inspect_checkpoint": "json", "quantize_checkpoint": "output", "serve": "api_key_file",
    "serve_batch": "output",
}  # fmt: skip
# The two others have tests of their own for what they refuse.
CHECKED = [name for name in SCRIPTS if name != "readme_tables"]  # which writes to README.md and docs/ only
NOT_WRITABLE = "/dev/null/results"  # below a file: root may write everywhere else


def lines_of(name):
    """What a script is asked in turn: for help, with a flag that does not exist, both, an argument, a bad output."""
    required, rest = REQUIRED.get(name, []), ["--output=c"] if OUTPUTS.get(name) == "output" else []
    lines = [["--help"], ["--nonsense"], ["--help", "--nonsense"], [*required, *rest, "stray"]]
    if name in CHECKED:
        lines.append([*required, f"--{OUTPUTS.get(name, 'output_dir')}={NOT_WRITABLE}"])
    return lines


_RUN_LINES = """
import contextlib, importlib, io, json, os, sys
from absl.testing import flagsaver
from experiments.harness import script
from jax._src import xla_bridge

name, found = sys.argv[1], []
module = importlib.import_module(f"experiments.{name}")
for line in json.loads(sys.argv[2]):
    out, err, status = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), flagsaver.flagsaver():
        try:
            script.run(module.main, [f"experiments/{name}.py", *line])
        except SystemExit as stop:
            status = stop.code
    found.append((status, out.getvalue(), err.getvalue()))
print(json.dumps({
    "lines": found, "doc": module.__doc__, "devices": xla_bridge.backends_are_initialized(), "files": os.listdir(),
    "files_of_modules": [
        m.__file__ for n, m in sys.modules.items() if n.startswith("experiments.") and getattr(m, "__file__", None)
    ],
}))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Script -> what it said to its lines, run in an empty folder."""
    folder, found = tmp_path_factory.mktemp("empty"), {}
    for name in SCRIPTS:
        code = ("-c", _RUN_LINES, name, json.dumps(lines_of(name)))
        found[name] = last_json(run_python(*code, cwd=folder, warnings="ignore"))
    return found


def flags_in(file):
    """Names that a module's source defines flags under."""
    return set(re.findall(r"\bDEFINE_\w+\(\s*\"(\w+)\"", Path(file).read_text()))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_every_flag_and_default_and_exits_with_0(answers, name):
    status, out, err = answers[name]["lines"][0]
    assert (status, err) == (0, "") and out.startswith(answers[name]["doc"].rstrip())
    expected = set().union(*map(flags_in, answers[name]["files_of_modules"]))
    shown = re.findall(r"^  --(?:\[no\])?(\w+)$", out, re.M)
    assert len(shown) == len(set(shown)) and set(shown) == expected  # all of ours, and none of absl's
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_unknown_flag_is_a_message_and_a_line(answers, name):
    status, out, err = answers[name]["lines"][1]
    assert (status, out) == (1, "")
    assert err.splitlines() == [
        f"{name}.py: Unknown command line flag 'nonsense'",
        f"python experiments/{name}.py --help explains the flags",
    ]
    assert answers[name]["lines"][2][0] == 0  # asking for help wins


@pytest.mark.parametrize("name", CHECKED)
def test_stray_arguments_are_a_message_and_a_line(answers, name):
    status, out, err = answers[name]["lines"][3]
    assert (status, out) == (1, "") and len(err.splitlines()) == 2
    assert err.startswith(f"{name}.py: unexpected arguments") and "'stray'" in err.splitlines()[0]


@pytest.mark.parametrize("name", CHECKED)
def test_a_place_that_cannot_be_written_is_found_before_any_work(answers, name):
    status, out, err = answers[name]["lines"][4]
    assert (status, out) == (1, "") and len(err.splitlines()) == 2
    message = f"--{OUTPUTS.get(name, 'output_dir')}={NOT_WRITABLE}: "
    assert err.startswith(f"{name}.py: {message}") and "/dev/null" in err.removeprefix(message)
    assert not answers[name]["devices"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_is_written_or_started_before_the_flags_are_parsed(answers, name):
    assert answers[name]["files"] == [] and not answers[name]["devices"]


def test_defaults_are_shown(answers):
    shown = " ".join(answers["generate"]["lines"][0][1].split())
    assert "--max_new_tokens Tokens to generate. (a positive integer; default: 64)" in shown
    assert "FD_DISPATCH_USE_FP4, else nvfp4" in shown and "--coordinator_address" not in shown


def environment():
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


_TOO_LARGE = """
from experiments.harness import script
def main(argv):
    raise MemoryError("a cache takes 3 GB, and 2 GB are free")
script.run(main, ["x"])
"""


def test_what_does_not_fit_ends_without_a_traceback():
    done = run_python("-c", _TOO_LARGE)
    assert done.returncode == 1 and done.stderr.splitlines()[0] == "x: a cache takes 3 GB, and 2 GB are free"
    assert "Traceback" not in done.stderr


_TALK = """
import logging, os, sys, warnings
import jax, matplotlib.pyplot
from absl import logging as absl_logging
from experiments.harness import script
from jax._src import hardware_utils

def main(argv):
    jax.devices()
    logging.getLogger("matplotlib.font_manager").info("generated new fontManager")
    logging.getLogger("matplotlib.font_manager").warning("Matplotlib is building the font cache")
    logging.getLogger("jax._src.xla_bridge").warning("CUDA backend failed to initialize")
    absl_logging.info("step 1 of 2")
    warnings.warn("our own")

hardware_utils.has_visible_nvidia_gpu = lambda: True  # and no plugin for it
if sys.argv[1] == "script":
    script.run(main, ["x"])
else:
    from absl import app
    app.run(main, ["x"])
"""


@pytest.mark.parametrize("start", ["script", pytest.param("absl", marks=pytest.mark.slow)])
def test_libraries_do_not_talk_about_the_machine(tmp_path, start):
    """But real warnings, and ours, are printed; through absl alone, the noise is there to be heard."""
    env = {**environment(), "MPLCONFIGDIR": str(tmp_path)}
    for name in ("JAX_PLATFORMS", "TF_CPP_MIN_LOG_LEVEL", "JAX_LOGGING_LEVEL"):
        env.pop(name, None)
    command = [sys.executable, "-c", _TALK, start]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    for kept in ("CUDA backend failed to initialize", "step 1 of 2", "UserWarning: our own"):
        assert kept in done.stderr
    heard = [n for n in ("Unable to initialize", "may be present", "fontManager", "font cache") if n in done.stderr]
    # What JAX itself says depends on the plugins that are installed.
    assert heard == [] if start == "script" else heard[-2:] == ["fontManager", "font cache"], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_start_from_any_folder_and_as_modules(tmp_path, name):
    for start in (str(ROOT / "experiments" / f"{name}.py"), f"-mexperiments.{name}"):
        done = subprocess.run(
            [sys.executable, start, "--help"], env=environment(), cwd=tmp_path, capture_output=True, text=True,
            timeout=100, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert ("It has no flags." if name == "readme_tables" else "  --") in done.stdout
    assert list(tmp_path.iterdir()) == []
