"""README.md and docs/: tables are those of the committed results, examples run, and what is named or linked exists."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments.readme_tables import rewrite_pages

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
# A Python block, a comment in front of it that says that it does not run, and the output that is shown behind it.
BLOCK = re.compile(r"(<!-- not run -->\n+)?```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
SHOWN = re.compile(r"^ *print\(.*\)  # (.*)$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# What a page names between backticks: a file with one of these endings, or a folder with a slash at its end.
NAMED = re.compile(r"`([\w./-]+\.(?:py|md|json|png|toml|yml)|[\w./-]+/)`")
WRITTEN_BY_USERS = {
    "config.json", "hf_quant_config.json", "tokenizer.json", "demo.json", "demo.png", "plan.json", "site/",
    "configs/NAME.py", "experiments/bench_NAME.py",
}  # fmt: skip


@functools.cache
def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def examples():
    """Code and shown output of every block that runs, under its page and line."""
    found = []
    for page in PAGES:
        for block in BLOCK.finditer(text_of(page)):
            skipped, code, output = block.groups()
            if not skipped:
                line = text_of(page).count("\n", 0, block.start(2)) + 1
                shown = output or "".join(f"{said}\n" for said in SHOWN.findall(code))
                found.append(pytest.param(code, shown, id=f"{page}:{line}"))
    return found


def test_tables_of_every_page_are_generated_from_the_results():
    pages = rewrite_pages(ROOT)
    assert pages.keys() == {ROOT / "README.md", *(ROOT / "docs").rglob("*.md")}
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, f"run experiments/readme_tables.py: {path} is old"


def test_readme_is_short_and_shows_the_summary():
    assert README.count("\n") <= 130
    assert "<!-- summary -->" in README


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


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(("code", "shown"), examples())
def test_examples_run_and_print_what_the_page_shows(code, shown, capsys, monkeypatch):
    if "make_mesh" in code and jax.device_count() < 4:
        pytest.skip("the example has a mesh of four devices")
    monkeypatch.chdir(ROOT)
    exec(compile(code, "example", "exec"), {})
    assert capsys.readouterr().out.splitlines() == shown.splitlines()


def test_readme_has_examples_of_the_layer_and_of_a_model():
    assert sum("README.md" in example.id for example in examples()) == 2


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    for link in LINK.findall(FENCED.sub("", text_of(page))):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = folder / path if path else ROOT / page
        assert target.resolve().is_relative_to(ROOT) and target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(page):
    """What links can jump to in a page: headings in lower case, without punctuation, a dash for each space."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_named_files_and_targets_exist(page):
    for name in set(NAMED.findall(text_of(page))) - WRITTEN_BY_USERS:
        assert (ROOT / name).exists(), name
    makefile = (ROOT / "Makefile").read_text()
    inside_code = "\n".join([*FENCED.findall(text_of(page)), *re.findall(r"`[^`\n]+`", text_of(page))])
    for target in re.findall(r"(?:^|`|; )make ([a-z-]+)", inside_code, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_scripts_in_shell_blocks_exist():
    found = re.findall(r"python (experiments/\w+\.py)", "\n".join(text_of(page) for page in PAGES))
    assert found
    for script in found:
        assert (ROOT / script).is_file(), script


def test_every_page_is_in_the_navigation_and_builds_strictly():
    config = text_of("mkdocs.yml")
    shown = re.findall(r"^  - [^:\n]+: ([\w-]+\.md)$", config, re.MULTILINE)
    assert sorted(shown) == sorted(path.name for path in (ROOT / "docs").rglob("*.md"))
    assert len(shown) == len(set(shown))
    assert re.search(r"^strict: true$", config, re.MULTILINE)


def test_the_api_page_names_what_exists():
    names = re.findall(r"^::: (\S+)$", text_of("docs/api.md"), re.MULTILINE)
    assert len(names) == len(set(names)) > 40
    for name in names:
        module, _, last = name.rpartition(".")
        assert hasattr(__import__(module, fromlist=[last]), last), name
