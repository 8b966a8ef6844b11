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

from experiments.harness import outputs, script
from fp4jax.checkpoint.inspect import as_text, inspect_folder

_MODEL = flags.DEFINE_string(
    "model", None, "Folder of the checkpoint, in Hugging Face layout; required.", required=True
)
_QUANTIZATION = flags.DEFINE_string(
    "quantization", None, "How to quantize, as JSON or a method's name, as for generate.py; default: as the folder is."
)
_EP = flags.DEFINE_integer("ep", 1, "Number of devices that the experts are split over.", lower_bound=1)
_INPUT_SCALES = flags.DEFINE_enum(
    "input_scales",
    "stored",
    ["stored", "per_token"],
    "Activation scales of layers with NVFP4 activations: those of the folder, or one per token.",
)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["bfloat16", "float32"], "Dtype that the model computes in; default: the one in its config."
)
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
            _MODEL.value, quantization=_QUANTIZATION.value, ep=_EP.value, dtype=_DTYPE.value,
            input_scales=_INPUT_SCALES.value,
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
