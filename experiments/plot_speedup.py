"""How many times as fast as bf16 the grouped GEMM is, over the rows per expert: from results of bench_gemm.py.

    python experiments/plot_speedup.py

Every shape is a line that has its name where it begins. bf16 is the fastest that the same run of bench_gemm.py found.
Rows are distributed over the experts at random (multinomial). Writes speedup.png, the picture of README.md.
"""

import json
from pathlib import Path

from absl import app, flags

from experiments.harness import outputs, script
from experiments.harness.speedup_report import plot, speedups

_RESULTS = flags.DEFINE_string("results", "experiments/results/h100/bench_gemm.json", "File of bench_gemm.py.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "docs/pictures", "Folder for the PNG.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    path = outputs.check_folder("output_dir", _OUTPUT_DIR.value, "speedup.png") / "speedup.png"
    name = _RESULTS.value
    if not Path(name).is_file():
        raise app.UsageError(f"--results: there is no {name}; bench_gemm.py writes such files")
    try:
        report = json.loads(Path(name).read_text())
    except ValueError as error:
        raise app.UsageError(f"--results: {name} is no JSON: {error}") from error
    if not isinstance(report, dict) or report.get("experiment") != "bench_gemm":
        raise app.UsageError(f"--results: {name} holds no results of bench_gemm.py")
    try:
        lines, device = speedups(report["rows"]), report["device"]
    except (KeyError, TypeError) as error:
        raise app.UsageError(f"--results: rows are not as bench_gemm.py writes them: {error!r}") from error
    if not lines:
        raise app.UsageError(f"--results: {name} compares no grouped GEMM with bf16")
    path.parent.mkdir(parents=True, exist_ok=True)
    plot(lines, path, device)
    for label, points in lines.items():
        print(f"{label:32}" + "".join(f"{m:>8} rows {ratio:.2f}x" for m, ratio in points))
    print(f"wrote {path}")


if __name__ == "__main__":
    script.run(main)
