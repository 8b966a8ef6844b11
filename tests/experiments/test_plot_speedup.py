"""plot_speedup: its lines from rows made by hand, the committed picture, and what the script refuses."""

import json
from pathlib import Path

import pytest
from PIL import Image
from refusals import ROOT, check_refusals

from experiments.harness.speedup_report import plot, speedups

PICTURE = ROOT / "docs" / "pictures" / "speedup.png"
RESULTS = ROOT / "experiments" / "results" / "h100" / "bench_gemm.json"


def row(m, speedup, shape=(32, 7168, 4096), op="masked_grouped_gemm", distribution="multinomial"):
    sizes = dict(zip("EKN", shape, strict=True))
    return {"op": op, "shape": {**sizes, "m": m, "distribution": distribution}, "speedup": speedup}


def test_a_line_per_shape_in_rising_order():
    rows = [
        row(16, 2.0), row(4, 3.0), row(8, 9.0, distribution="uniform"), row(8, 9.0, op="contiguous_grouped_gemm"),
        row(8, None), row(1, 5.0, shape=(8, 64, 128)),
    ]  # fmt: skip
    expected = {"DeepSeek-V3 gate and up": [(4, 3.0), (16, 2.0)], "8 experts, K=64, N=128": [(1, 5.0)]}
    assert speedups(rows) == expected


def test_the_committed_picture_shows_the_committed_results():
    """The points in the picture's file, against times: bf16's fastest over ours."""
    with Image.open(PICTURE) as image:
        assert image.width >= 1000 and PICTURE.stat().st_size < 120_000
        drawn = json.loads(image.text["Description"])
    names = {4096: "DeepSeek-V3 gate and up", 7168: "DeepSeek-V3 down", 1536: "Qwen3-30B gate and up"}
    names[2048] = "Qwen3-30B down"
    ours, bf16 = {}, {}
    for r in json.loads(RESULTS.read_text())["rows"]:
        s = r["shape"]
        point = (names[s["N"]], s["m"])
        if s["distribution"] == "multinomial" and r["op"] == "masked_grouped_gemm":
            ours[point] = r["us"]
        elif s["distribution"] == "multinomial" and r["implementation"].endswith("bf16"):
            bf16[point] = min(r["us"], bf16.get(point, r["us"]))
    points = {(name, m): ratio for name, some in drawn.items() for m, ratio in some}
    assert points == pytest.approx({point: bf16[point] / us for point, us in ours.items()}, abs=0.0051)
    assert len(points) == 24


def test_names_and_points_lie_in_the_picture_and_names_apart(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    lines = speedups(json.loads(RESULTS.read_text())["rows"])
    lines["DeepSeek-V3 down, too"] = lines["DeepSeek-V3 down"]
    plot(lines, tmp_path / "plot.png", "NVIDIA H100 80GB HBM3")
    figure = plt.gcf()
    monkeypatch.undo()
    figure.canvas.draw()
    (axis,) = figure.axes
    texts = [t for t in (*axis.texts, *axis.get_xticklabels(), *axis.get_yticklabels(), axis.title) if t.get_text()]
    assert min(t.get_fontsize() for t in [*texts, axis.xaxis.label]) >= 9
    boxes = [t.get_window_extent() for t in texts]
    assert all(b.x0 >= 0 and b.x1 <= figure.bbox.x1 and b.y0 >= 0 and b.y1 <= figure.bbox.y1 for b in boxes)
    assert all(t.get_window_extent().x0 >= axis.bbox.x0 for t in axis.texts)
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[:i]), texts[i].get_text()
    assert {tuple(line.get_ydata()) for line in axis.lines} >= {(1, 1)} and len(axis.lines) == 6
    assert axis.get_xscale() == "log" and axis.get_legend() is None
    plt.close(figure)


def test_one_number_of_rows_is_enough(tmp_path):
    plot(speedups([row(4, 0.5)]), tmp_path / "plot.png", "cpu")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_refusals(tmp_path):
    def file(name, content):
        path = Path(tmp_path / name)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return f"--results={path}"

    empty = {"experiment": "bench_gemm", "device": "test", "rows": []}
    check_refusals(
        "plot_speedup",
        {
            (file("text.json", "no JSON"),): "text.json is no JSON",
            (file("list.json", [1]),): "holds no results of bench_gemm.py",
            (file("other.json", {"experiment": "bench_moe"}),): "holds no results of bench_gemm.py",
            (file("rowless.json", {"experiment": "bench_gemm"}),): "rows are not as bench_gemm.py writes them",
            (file("empty.json", empty),): "compares no grouped GEMM with bf16",
            ("--results=/does/not/exist",): "there is no /does/not/exist",
            ("stray",): "unexpected arguments",
        },
    )
