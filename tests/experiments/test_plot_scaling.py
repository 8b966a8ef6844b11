"""plot_scaling: numbers per token and per link from rows made by hand, and what it refuses."""

import json

from python_runs import run_python
from refusals import check_refusals

from experiments.harness import scaling_report


def row(ranks, us, **other):
    given = {
        "op": "dispatch", "implementation": "mosaic_gpu", "wire_format": "nvfp4", "ranks": ranks, "T": 1000,
        "routing": "random", "form": "per_peer", "H": 7168, "us": us, "gbps_out": 90.0,
    }  # fmt: skip
    return given | other


def test_rows_per_token_and_per_link():
    rows = [
        row(8, 30.0, bytes_out=4_500_000, experts=256, top_k=8),
        row(4, 25.0, bytes_out=2_250_000, experts=256, top_k=8),
        row(4, 40.0, T=2000, bytes_out=0, experts=256, top_k=8),
        row(2, 20.0),  # of before: 64 experts, bytes from the rate
        row(8, 1.0, routing="even"),
    ]
    found = scaling_report.scaling_rows(
        [*rows, row(2, 10.0), row(4, 5.0, form="per_slot", H=512)], 450
    )  # the last counts
    few, many = "top 8 of 64, H=7168", "top 8 of 256, H=7168"
    assert [(r["case"], r["T"], r["ranks"]) for r in found] == [
        (many, 1000, 4), (many, 1000, 8), (many, 2000, 4), ("top 8 of 64, H=512, per_slot", 1000, 4), (few, 1000, 2)
    ]  # fmt: skip
    four, eight, other, _, two = found
    assert (two["us"], two["ns_per_token"], two["bytes_out_per_token"], two["percent_of_link"]) == (10, 10, 900, 20)
    assert (four["bytes_out_per_token"], four["percent_of_link"], four["times_fewer_ranks"]) == (2250, 20, None)
    assert (eight["ns_per_token"], eight["percent_of_link"], eight["times_fewer_ranks"]) == (30, 33.3, 1.2)
    assert other["times_fewer_ranks"] is two["times_fewer_ranks"] is None
    table = scaling_report.table(found).splitlines()
    assert table[0] == many and few in table and "1.20x" in table[3]


def test_it_writes_a_plot(tmp_path):
    path = tmp_path / "bench_dispatch.json"
    report = {"experiment": "bench_dispatch", "device": "test", "rows": [row(n, 10.0 * n) for n in (1, 2, 4, 8)]}
    path.write_text(json.dumps(report))
    result = run_python("experiments/plot_scaling.py", f"--results={path}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2.00x") == 2  # one rank exchanges nothing, two are not compared with it
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "scaling.json").read_text())["rows"]) == 4


def test_refusals(tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"experiment": "bench_moe", "rows": []}))
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({"experiment": "bench_dispatch", "device": "test", "rows": [row(2, 1.0)]}))
    text, sequence = tmp_path / "text.json", tmp_path / "list.json"
    text.write_text("no JSON")
    rowless = tmp_path / "rowless.json"
    rowless.write_text(json.dumps({"experiment": "bench_dispatch", "device": "test"}))
    sequence.write_text("[1]")
    check_refusals(
        "plot_scaling",
        {
            (f"--results={text}",): "text.json is no JSON",
            (f"--results={sequence}",): "holds no results of bench_dispatch.py",
            (f"--results={empty}", "--link_gbps=0"): "--link_gbps=0",
            (f"--results={empty}", "--link_gbps=inf"): "--link_gbps=inf must be finite",
            (f"--results={rowless}",): "rows are not as bench_dispatch.py writes them: KeyError('rows')",
            ("--results=",): "--results names no file",
            ("--results=/does/not/exist",): "there is no /does/not/exist",
            (f"--results={other}",): "holds no results of bench_dispatch.py",
            (f"--results={empty}", "--tokens=7"): "no rows of random routing with T in [7]",
            (f"--results={empty}", "--tokens=x"): "--tokens",
            ("stray",): "unexpected arguments",
        },
    )
