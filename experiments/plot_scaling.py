"""How dispatch and the way back scale with the number of GPUs: from results of bench_dispatch.py.

    python experiments/bench_dispatch.py --ranks=1,2,4,8 --experts=256 --wire_formats=nvfp4 --routings=random
    python experiments/plot_scaling.py

Every rank has the same number of tokens T at every number of ranks. Prints and plots the time per token, the bytes that
leave a GPU per token, and the percentage of its NVLink (--link_gbps, one direction) that this is; and how much longer
every number of ranks takes than the one before. Writes scaling.json and scaling.png.
"""

import json
from pathlib import Path

from absl import app, flags

from experiments.harness import outputs, script
from experiments.harness.flag_values import finite, integers
from experiments.harness.scaling_report import plot, scaling_rows, table

_RESULTS = flags.DEFINE_list(
    "results", ["output/bench_dispatch/bench_dispatch.json"], "Files of bench_dispatch.py; later ones replace rows."
)
_TOKENS = flags.DEFINE_list("tokens", None, "Tokens per rank; default: all in the files.")
_LINK_GBPS = flags.DEFINE_float(
    "link_gbps", 450, "GB/s of a GPU's NVLink, one direction; 450 on Hopper.", lower_bound=1
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for JSON and PNG; default: that of the first file.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    link_gbps = finite("link_gbps", _LINK_GBPS.value)
    if not _RESULTS.value:
        raise app.UsageError("--results names no file")
    folder = str(Path(_RESULTS.value[0]).parent) if _OUTPUT_DIR.value is None else _OUTPUT_DIR.value
    folder = outputs.check_folder("output_dir", folder, "scaling.json", "scaling.png")
    reports = []
    for name in _RESULTS.value:
        if not Path(name).is_file():
            raise app.UsageError(f"--results: there is no {name}; bench_dispatch.py writes such files")
        try:
            report = json.loads(Path(name).read_text())
        except ValueError as error:
            raise app.UsageError(f"--results: {name} is no JSON: {error}") from error
        if not isinstance(report, dict) or report.get("experiment") != "bench_dispatch":
            raise app.UsageError(f"--results: {name} holds no results of bench_dispatch.py")
        reports.append(report)
    try:
        rows = scaling_rows([r for report in reports for r in report["rows"]], link_gbps)
    except (KeyError, TypeError) as error:
        raise app.UsageError(f"--results: rows are not as bench_dispatch.py writes them: {error!r}") from error
    if tokens := integers("tokens", _TOKENS.value or []):
        rows = [r for r in rows if r["T"] in tokens]
    if not rows:
        raise app.UsageError("--results: no rows of random routing" + (f" with T in {tokens}" if tokens else ""))
    folder.mkdir(parents=True, exist_ok=True)
    devices = sorted({str(report["device"]) for report in reports})
    report = {"experiment": "plot_scaling", "devices": devices, "rows": rows}
    (folder / "scaling.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows))
    plot(rows, folder / "scaling.png", " and ".join(devices))
    print(f"wrote {folder}/scaling.json and scaling.png")


if __name__ == "__main__":
    script.run(main)
