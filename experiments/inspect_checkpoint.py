"""What a checkpoint holds and whether it loads: python experiments/inspect_checkpoint.py --model=DIR

Reads headers and scales on the CPU, no weights: formats per module, scales that are missing, zero or not finite, how
far the scales of gate and up projections differ, whether the exclude list of the config is right, memory per device for
--ep devices, and what each layer will run as under --quantization. Exit status 1 where it would not load.
"""

import json
import sys

from absl import app, flags

from experiments.harness import outputs, script
from fp4jax.checkpoint.inspect import as_text, inspect_folder

_MODEL = flags.DEFINE_string("model", None, "Folder in Hugging Face layout; required.", required=True)
_QUANTIZATION = flags.DEFINE_string("quantization", None, "JSON, as for generate.py; default: as the folder is.")
_EP = flags.DEFINE_integer("ep", 1, "Devices that the experts are split over.", lower_bound=1)
_INPUT_SCALES = flags.DEFINE_enum(
    "input_scales", "stored", ["stored", "per_token"], "Of layers with NVFP4 activations."
)
_DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "As for generate.py; default: its config's.")
_JSON = flags.DEFINE_string("json", None, "File for the report; -: print it instead of text; default: none is written.")


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
