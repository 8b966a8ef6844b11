"""README.md: its tables are those of the committed results, and its example runs."""

import pathlib
import re

from experiments.readme_tables import rewrite

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_tables_are_generated_from_the_results():
    assert rewrite(README) == README


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
