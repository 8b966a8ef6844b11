"""README.md and docs/: their tables are those of the committed results; the examples of README.md run."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from experiments.readme_tables import rewrite_pages

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_tables_of_every_page_are_generated_from_the_results():
    pages = rewrite_pages(ROOT)
    assert pages.keys() == {ROOT / "README.md", *(ROOT / "docs").rglob("*.md")}
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, f"run experiments/readme_tables.py: {path} is old"


def test_readme_shows_the_summary_and_the_picture_exists():
    assert "<!-- summary -->" in README
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).is_file(), picture


@pytest.mark.parametrize(("argument", "said"), [("--help", "Rewrite the tables"), ("stray", "unexpected arguments")])
def test_pages_are_written_only_when_nothing_else_is_asked(tmp_path, argument, said):
    (tmp_path / "experiments").mkdir()
    script = shutil.copy(ROOT / "experiments" / "readme_tables.py", tmp_path / "experiments")
    (tmp_path / "docs").mkdir()
    for page in ("README.md", "docs/page.md"):
        (tmp_path / page).write_text("no tables")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script, argument], env=env, capture_output=True, text=True, timeout=60)
    assert said in done.stdout + done.stderr and "Traceback" not in done.stderr
    for page in ("README.md", "docs/page.md"):
        assert (tmp_path / page).read_text() == "no tables"


def test_examples_run(capsys):
    printed = []
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(code, "README.md", "exec"), {})
        printed.append(capsys.readouterr().out)
    blocks, layer = printed
    assert layer == "(64, 256) 0\n"
    assert blocks.splitlines() == [
        "(3, 64) {128: 1, 512: 0} 0", "(200, 64) {128: 1, 512: 1} 0", "(1000, 64) {128: 1, 512: 3} 0",
    ]  # fmt: skip


def test_named_files_and_targets_exist():
    for path in re.findall(r"`([\w/]+\.py|[\w]+/)`", README):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
