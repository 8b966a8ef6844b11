"""Reports what a checkpoint holds, and whether this library can load it.

    python experiments/inspect_checkpoint.py --model=DIR
    python experiments/inspect_checkpoint.py --model=DIR --ep=4 --json=report.json

It reads the headers and the scales, on the CPU, and none of the weights. The report holds the format of every module;
scales that are missing, zero or not finite; how far the scales of gate and up projections differ; whether the config's
exclude list is right; the memory per device if --ep devices share the experts; and how every layer will run under
--quantization. It prints the report, and writes it as JSON if --json names a file. The exit status is 1 if the
checkpoint would not load.
"""

import json
import sys

from absl import app, flags

from experiments.harness import model_flags, outputs, script
from fp4jax.checkpoint.inspect import as_text, inspect_folder

_MODEL = flags.DEFINE_string(
    "model", None, "Folder of the checkpoint, in Hugging Face layout; required.", required=True
)
_EP = flags.DEFINE_integer("ep", 1, "Number of devices that the experts are split over.", lower_bound=1)
_JSON = flags.DEFINE_string(
    "json", None, "File to write the report to, as JSON; -: print JSON instead of text; default: no file."
)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if _JSON.value not in (None, "-"):
        outputs.check_file("json", _JSON.value)
    try:
        report = inspect_folder(
            _MODEL.value, quantization=model_flags.QUANTIZATION.value, ep=_EP.value, dtype=model_flags.DTYPE.value,
            input_scales=model_flags.INPUT_SCALES.value,
        )  # fmt: skip
    except (ValueError, FileNotFoundError) as error:
        raise app.UsageError(str(error)) from error
    text = json.dumps(report, indent=1)
    print(text if _JSON.value == "-" else as_text(report))
    if _JSON.value not in (None, "-"):
        outputs.write_json("json", _JSON.value, report)
    sys.exit(0 if report["loads"] else 1)


if __name__ == "__main__":
    script.run(main)
