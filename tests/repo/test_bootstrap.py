"""The search for an interpreter in .ci/bootstrap, with a PATH and a HOME made for each test. Nothing is installed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BOOTSTRAP = Path(__file__).parents[2] / ".ci" / "bootstrap"
SHELL = shutil.which("sh")
TOOLS = ("dirname", "sort")  # what the search itself runs

pytestmark = pytest.mark.skipif(SHELL is None, reason="needs a POSIX shell")


@pytest.fixture
def machine(tmp_path):
    """A machine without any Python: folders `bin` (all of its PATH) and `home`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "home").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    return tmp_path


def find(machine, *args, **env):
    environment = {"PATH": str(machine / "bin"), "HOME": str(machine / "home"), **env}
    command = [SHELL, str(BOOTSTRAP), *(args or ["find"])]
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


def script(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{SHELL}\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def working_python(path):
    """A Python at `path` that is the one running this test, virtual environment or not."""
    return script(path, f'exec "{sys.executable}" "$@"')


def answering(path, answer):
    """A Python that reports `answer` when it is examined."""
    return script(path, f'echo "{answer}"')


def test_nothing_found_lists_all_that_was_looked_for(machine):
    answering(machine / "bin" / "python3", "is Python 3.11.2")
    answering(machine / "pyenv" / "versions" / "3.9.18" / "bin" / "python", "is Python 3.9.18")
    result = find(machine, PYENV_ROOT=str(machine / "pyenv"))
    assert result.returncode != 0
    assert result.stdout == ""
    for line in (
        "no Python >= 3.12 was found",
        "python3.14 on PATH: not found",
        "python3.13 on PATH: not found",
        "python3.12 on PATH: not found",
        f"python3 on PATH ({machine}/bin/python3): is Python 3.11.2",
        "python on PATH: not found",
        f"{machine}/pyenv/versions/3.9.18/bin/python: is Python 3.9.18",
        f"{machine}/home/.pyenv/versions/*/bin/python: no such folder",
        "uv: not found",
        f"{machine}/home/.local/bin/uv: not found",
        "PYTHON=/path/to/python3.12",
    ):
        assert line in result.stderr


def test_a_broken_shim_is_skipped(machine):
    shim = script(machine / "bin" / "python3.14", "echo 'pyenv: python3.14: command not found' >&2; exit 127")
    python = working_python(machine / "bin" / "python3")
    assert find(machine).stdout == f"{python}\n"
    python.unlink()
    assert f"python3.14 on PATH ({shim}): does not run" in find(machine).stderr


def test_a_python_that_cannot_make_environments_is_skipped(machine):
    answering(machine / "bin" / "python3.13", "is Python 3.13.1 without ensurepip")
    python = working_python(machine / "bin" / "python")
    assert find(machine).stdout == f"{python}\n"


def test_path_comes_before_pyenv(machine):
    python = working_python(machine / "bin" / "python3.12")
    working_python(machine / "home" / ".pyenv" / "versions" / "3.13.0" / "bin" / "python")
    assert find(machine).stdout == f"{python}\n"


@pytest.mark.parametrize("place", ["home", "PYENV_ROOT"])
def test_the_newest_usable_pyenv_version_is_found(machine, place):
    root = machine / "home" / ".pyenv" if place == "home" else machine / "elsewhere with a space"
    for name in ("3.9.18", "3.12.1", "3.12.10", "pypy3.11-7.3"):
        working_python(root / "versions" / name / "bin" / "python")
    script(root / "versions" / "3.13.0" / "bin" / "python", "exit 1")
    env = {} if place == "home" else {"PYENV_ROOT": str(root)}
    assert find(machine, **env).stdout == f"{root}/versions/3.12.10/bin/python\n"


def test_uv_comes_last_and_downloads_only_when_it_knows_no_python(machine):
    python = working_python(machine / "downloaded" / "python3.12")
    knows = 'case "$1 $2" in "python find") [ -e {0} ] && echo {1};; "python install") : >{0}; echo downloading;; esac'
    script(machine / "bin" / "uv", knows.format(machine / "installed", python))
    result = find(machine)
    assert (result.stdout, result.stderr) == (f"{python}\n", "downloading\n")
    result = find(machine)
    assert (result.stdout, result.stderr) == (f"{python}\n", "")


def test_a_named_python_is_the_only_one_tried(machine):
    working_python(machine / "bin" / "python3")
    python = working_python(machine / "mine" / "python")
    assert find(machine, PYTHON=str(python)).stdout == f"{python}\n"
    result = find(machine, PYTHON=str(machine / "none"))
    assert result.returncode != 0
    assert f"PYTHON={machine}/none: does not run" in result.stderr
    assert "on PATH" not in result.stderr


def test_the_probe_judges_the_running_python_usable(machine):
    """The probe itself, unlike the stand-ins above, on a real interpreter."""
    assert find(machine, PYTHON=sys.executable).stdout == f"{sys.executable}\n"


def test_a_folder_that_is_no_environment_is_never_cleared(machine):
    precious = machine / "precious"
    precious.mkdir()
    (precious / "file").touch()
    result = find(machine, str(precious), PYTHON=sys.executable)
    assert result.returncode != 0
    assert "is not a virtual environment" in result.stderr
    assert (precious / "file").exists()


def test_an_environment_of_an_old_python_is_refused(machine):
    venv = machine / "venv"
    script(venv / "bin" / "python", 'case "$*" in "-c ") exit 0;; *) echo "Python 3.11.2"; exit 1;; esac')
    (venv / "pyvenv.cfg").touch()
    result = find(machine, str(venv), PYTHON=sys.executable)
    assert result.returncode != 0
    assert f"VENV={venv} holds Python 3.11.2, but 3.12 or newer is needed" in result.stderr
