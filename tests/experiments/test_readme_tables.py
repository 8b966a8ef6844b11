"""readme_tables: what it makes of the markers of a page, and cells of the summary computed anew from the results."""

import json
import re
from pathlib import Path

import pytest
from absl import app

from experiments import readme_tables
from experiments.harness.tables.markdown import table
from experiments.harness.tables.summary import summary_table

RESULTS = Path(__file__).parents[2] / "experiments" / "results"


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A project with README.md, a page in docs/ and one in a folder below; its two tables show a file of results."""
    results = tmp_path / "results"
    results.mkdir()
    for name in ("one", "two"):
        (results / f"{name}.json").write_text(json.dumps({"rows": [f"row of {name}"]}))
    tables = {
        name: lambda name=name: table(("column",), [[readme_tables.read(f"{name}.json")["rows"][0]]])
        for name in ("one", "two")
    }
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    monkeypatch.setattr(readme_tables, "RESULTS", results)
    monkeypatch.setattr(readme_tables, "TABLES", tables)
    (tmp_path / "docs" / "zh").mkdir(parents=True)
    (tmp_path / "README.md").write_text("# A\n<!-- one -->\nold\n<!-- end of one -->\nafter\n")
    (tmp_path / "docs" / "page.md").write_text("<!-- a comment of words -->\n<!-- two -->\n\n<!-- end of two -->")
    (tmp_path / "docs" / "zh" / "page.md").write_text("专家\n<!-- one -->\n<!-- end of one -->\n", encoding="utf-8")
    return tmp_path


def shown(name):
    return f"<!-- {name} -->\n\n| column |\n|---|\n| row of {name} |\n\n<!-- end of {name} -->"


def test_every_page_is_filled_and_the_rest_of_it_is_kept(planted, capsys):
    readme_tables.main(["readme_tables.py"])
    assert (planted / "README.md").read_text() == f"# A\n{shown('one')}\nafter\n"
    assert (planted / "docs" / "page.md").read_text() == f"<!-- a comment of words -->\n{shown('two')}"
    assert (planted / "docs" / "zh" / "page.md").read_text(encoding="utf-8") == f"专家\n{shown('one')}\n"
    assert "README.md, docs/page.md, docs/zh/page.md" in capsys.readouterr().out
    pages = readme_tables.rewrite_pages(planted)
    assert all(path.read_text(encoding="utf-8") == text for path, text in pages.items()) and len(pages) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- three -->\n<!-- end of three -->", "docs/page.md: no table is called 'three'"),
        ("<!-- end of three -->", "docs/page.md: <!-- end of three --> follows no beginning"),
        ("<!-- two -->\n", "docs/page.md: <!-- end of two --> is missing"),
        ("<!-- two -->\n<!-- end of one -->", "docs/page.md: <!-- end of one --> follows <!-- two -->"),
        ("<!-- two -->\n<!-- one -->", "docs/page.md: <!-- one --> follows <!-- two -->"),
        ("<!-- two -->\n<!-- two -->\n<!-- end of two -->", "docs/page.md: <!-- two --> follows <!-- two -->"),
        ("<!-- two -->\n<!-- end of two -->\n<!-- end of two -->", "<!-- end of two --> follows no beginning"),
        ("  <!--three-->", "docs/page.md: no table is called 'three'"),
        ("no table", "no page shows the table 'two'"),
    ],
)
def test_a_wrong_marker_is_named_and_nothing_is_written(planted, text, said):
    (planted / "docs" / "page.md").write_text(text)
    before = (planted / "README.md").read_text()
    with pytest.raises(app.UsageError, match=re.escape(said)):
        readme_tables.main(["readme_tables.py"])
    assert (planted / "README.md").read_text() == before and (planted / "docs" / "page.md").read_text() == text


@pytest.mark.parametrize("content", [None, "no JSON", "{}", '{"rows": []}', '{"rows": 1}'])
def test_a_table_without_result_is_named_with_its_page(planted, content):
    path = planted / "results" / "two.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=r"^docs/page\.md: the table 'two' has no result: "):
        readme_tables.rewrite_pages(planted)


def test_cells_that_would_break_a_table_are_refused():
    assert table(("a", "b"), [(1, "x")]) == "| a | b |\n|---|---|\n| 1 | x |"
    for row in ((1,), (1, 2, 3), (1, "a | b"), (1, "a\nb")):
        with pytest.raises(ValueError):
            table(("a", "b"), [row])


# --- the summary ---


def rows_of(name):
    return json.loads((RESULTS / name).read_text())["rows"]


@pytest.fixture(scope="module")
def summary():
    """Cells of the summary: a list per row, in the order of the table."""
    lines = summary_table(readme_tables.read).splitlines()
    assert (
        lines[0] == "| what | fp4jax | what people use instead | ratio | lowest to highest ratio | floor / time | GPU |"
    )
    return [line.strip("| ").split(" | ") for line in lines[2:] if line.startswith("|")]


def find(summary, start):
    (row,) = (row for row in summary if row[0].startswith(start))
    return row


def test_the_summary_has_eight_rows_that_say_where_they_ran(summary):
    assert [row[0].split(":")[0] for row in summary] == [
        "Grouped GEMM, decode", "Grouped GEMM, prefill", "Whole expert layer, exchange included",
        "Dispatch to 256 experts", "Memory of expert weights", "Quality",
        "Qwen3-30B in prefill, 2048 tokens", "Qwen3-30B in decode, 32 requests of 1024 tokens",
    ]  # fmt: skip
    assert [row[-1] for row in summary] == ["H100", "H100", "4 H200", "4 H200", "any", "CPU", "H200", "H200"]


@pytest.mark.parametrize(
    ("phase", "shown_m", "all_m"), [("decode", 16, (1, 4, 16, 64)), ("prefill", 1024, (256, 1024))]
)
def test_ratios_of_the_grouped_gemm_are_those_of_the_times(summary, phase, shown_m, all_m):
    """The ratios are made here from the times of our rows and of all rows in bf16, not from the stored ratios."""
    times = {}
    for r in rows_of("h100/bench_gemm.json"):
        s = r["shape"]
        if s["distribution"] == "multinomial" and s["m"] in all_m:
            kind = (
                "ours" if r["op"] == "masked_grouped_gemm" else "bf16" if r["implementation"].endswith("bf16") else ""
            )
            times.setdefault((s["K"], s["N"], s["m"]), {}).setdefault(kind, []).append(r["us"])
    ratios = {cell: min(kinds["bf16"]) / kinds["ours"][0] for cell, kinds in times.items()}
    assert len(ratios) == 4 * len(all_m)
    cells = find(summary, f"Grouped GEMM, {phase}")
    cell = (7168, 4096, shown_m)
    found = [float(number) for number in re.findall(r"([\d.]+)x", cells[3] + cells[4])]
    assert found == pytest.approx([ratios[cell], min(ratios.values()), max(ratios.values())], abs=0.0051)
    assert cells[1] == f"{times[cell]['ours'][0]:.0f} us" and cells[2].startswith(f"{min(times[cell]['bf16']):.0f} us")


def test_the_expert_layer_is_the_faster_of_ours_against_the_faster_in_bf16(summary):
    times = {(r["model"], r["tokens"], r["layer"]): r["us"] for r in rows_of("h200/bench_moe.json") if r["ranks"] == 4}
    ratios = {}
    for model, tokens in {key[:2] for key in times}:
        ours = min(times.get((model, tokens, name), 1e9) for name in ("nvfp4", "nvfp4 low latency"))
        ratios[model, tokens] = min(times[model, tokens, "bf16"], times[model, tokens, "bf16 jax"]) / ours
    cells = find(summary, "Whole expert layer")
    assert cells[3] == f"{ratios['deepseek-v3', 128]:.2f}x"
    assert cells[4] == f"{min(ratios.values()):.2f}x to {max(ratios.values()):.2f}x: all models, 16 to 4096 tokens"
    floor = next(
        r["floor_us"] / r["us"]
        for r in rows_of("h200/bench_moe.json")
        if (r["model"], r["tokens"], r["ranks"], r["layer"]) == ("deepseek-v3", 128, 4, "nvfp4 low latency")
    )
    assert cells[5] == f"{100 * floor:.0f}%"


def test_memory_quality_and_dispatch(summary):
    assert find(summary, "Memory")[1:4] == ["0.5625 bytes per weight", "2 bytes, bf16", "3.56x"]  # 4 bits + 8 per 16
    bits = {r["name"]: r["bits_per_byte"] for r in rows_of("cpu/demo.json")}
    worst = max(bits.values()) / bits["bf16"] - 1
    quality = find(summary, "Quality")
    assert quality[3] == f"{bits['W4A16'] / bits['bf16'] - 1:+.2%}" and quality[4].startswith(f"at worst {worst:+.2%}:")
    times = {
        (r["op"], r["implementation"]): r["us"]
        for r in rows_of("h200/dispatch_256_experts.json")
        if (r["ranks"], r["T"], r["routing"]) == (4, 1024, "random")
    }
    ratio = times["all_to_all", "xla"] / times["dispatch", "mosaic_gpu"]
    assert find(summary, "Dispatch")[3] == f"{ratio:.2f}x"


@pytest.mark.parametrize(("phase", "work"), [("prefill", ("tokens", 2048)), ("decode", ("requests", 32))])
def test_the_model_is_compared_with_the_faster_transformers(summary, phase, work):
    """Our time is that of all layers, also where a few layers were faster."""
    name, value = work
    (ours,) = (r for r in rows_of("h200/bench_model.json") if r["phase"] == phase and r[name] == value)
    others = [
        r["us_per_layer"]
        for r in rows_of("h200/bench_model_transformers.json")
        if r["phase"] == phase and r[name] == value and r["implementation"] != "fp4jax"
    ]
    assert len(others) == 2
    cells = find(summary, f"Qwen3-30B in {phase}")
    assert cells[1] == f"{ours['us_per_layer']:.0f} us" and cells[2].startswith(f"{min(others):.0f} us, transformers")
    assert cells[3] == f"{min(others) / ours['us_per_layer']:.2f}x"
    assert cells[5] == f"{100 * ours['floor_us_per_layer'] / ours['us_per_layer']:.0f}%"


def test_other_results_give_another_summary():
    """Halving our times in a copy of the results doubles the ratio that is shown; a missing row is an error."""

    def halved(name):
        report = readme_tables.read(name)
        for r in report["rows"] if name == "h200/bench_moe.json" else ():
            r["us"] /= 2 if r["layer"].startswith("nvfp4") else 1
        return report

    def lacking(name):
        report = readme_tables.read(name)
        if name == "h200/bench_model.json":
            report["rows"] = [r for r in report["rows"] if r["tokens"] != 2048]
        return report

    def ratio(read):
        return float(re.search(r"Whole expert layer.*?([\d.]+)x \|", summary_table(read))[1])

    assert ratio(halved) == pytest.approx(2 * ratio(readme_tables.read), abs=0.02)
    with pytest.raises(LookupError, match=r"no row of results has .*'prefill', 'tokens': 2048"):
        summary_table(lacking)
