"""Quantizes a checkpoint to NVFP4, or converts an NVFP4 checkpoint from one layout to another.

    python experiments/quantize_checkpoint.py --model=experiments/checkpoints/tiny_lm --output=/tmp/tiny_fp4
        --calibration=experiments/text/corpora.py --sequence_length=256
    python experiments/quantize_checkpoint.py --model=/tmp/tiny_fp4 --output=/tmp/tiny_ct --layout=compressed_tensors

A folder in bf16 or float32 is quantized: its experts, and with --quantize_dense also its linear layers. Activation
scales come from the text of --calibration, which is cut into sequences; every expert is calibrated on every token. The
text is tokenized by the folder's tokenizer.json, or by bytes. One decoder layer at a time is in memory, and becomes one
file. If a run was stopped, the same command continues it and writes the same bytes as one run would.

A folder that is NVFP4 already is converted to the other layout without loss: converting it back gives the same tensors.
Writes a folder in Hugging Face layout, --output.
"""

from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from experiments.harness import outputs, script
from experiments.text.files import read_text
from experiments.text.tokenizers import tokenizer_of
from fp4jax.checkpoint.match import match_folder
from fp4jax.checkpoint.quantizer.convert import convert_folder
from fp4jax.checkpoint.quantizer.quantize import Recipe, quantize_folder
from fp4jax.checkpoint.storage.layouts import NAMES, layout_of
from fp4jax.checkpoint.storage.reader import Reader

_MODEL = flags.DEFINE_string(
    "model", None, "Folder of the checkpoint, in Hugging Face layout; required.", required=True
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder to write: new, empty, or left by a stopped run; required.", required=True
)
_LAYOUT = flags.DEFINE_enum("layout", "modelopt", list(NAMES), "Layout of the folder to write.")
_CALIBRATION = flags.DEFINE_string("calibration", None, "File of text for activation scales; needed to quantize.")
_TOKENS = flags.DEFINE_integer(
    "calibration_tokens", 65536, "Largest number of tokens of the text that are used.", lower_bound=1
)
_LENGTH = flags.DEFINE_integer("sequence_length", 2048, "Tokens per sequence that the text is cut into.", lower_bound=1)
_SHARED = flags.DEFINE_bool(
    "shared_scales", True, "One global scale for gate and up, and for q, k and v, as many serving systems expect."
)
_FOUR_OVER_SIX = flags.DEFINE_bool("four_over_six", False, "Store each block of weights at the better of two scales.")
_DENSE = flags.DEFINE_bool("quantize_dense", False, "Also quantize attention, dense MLPs and shared experts.")

_CHARACTERS_PER_TOKEN = 8  # ordinary text has fewer, so this many are enough to read


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    output = outputs.check_folder("output", _OUTPUT.value)
    try:
        run(Path(_MODEL.value), output)
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from error
    print(f"{_OUTPUT.value} is complete")


def run(model: Path, output: Path) -> None:
    """Convert the folder if it is NVFP4 already, else quantize it.

    Raises:
      ValueError: --calibration is missing or not needed, or the folder or the text cannot be used.
    """
    layout: Any = _LAYOUT.value
    if layout_of(Reader(model)) is not None:
        if _CALIBRATION.value:
            raise ValueError(f"{model} is NVFP4 already and can only be converted, without --calibration")
        convert_folder(model, output, layout)
        return
    if not _CALIBRATION.value:
        raise ValueError("--calibration is missing: activation scales need a file of text")
    recipe = Recipe(
        layout=layout,
        shared_scales=_SHARED.value,
        four_over_six=_FOUR_OVER_SIX.value,
        quantize_dense=_DENSE.value,
    )
    ids = sample_ids(model, _CALIBRATION.value)
    print(f"calibrating on {ids.shape[0]} sequences of {ids.shape[1]} tokens")
    quantize_folder(model, output, ids, recipe)


def sample_ids(model: Path, file: str) -> np.ndarray:
    """The first tokens of a text, cut into sequences of one length: i32 [sequences, length].

    Tokens that do not fill a sequence are left out.

    Raises:
      ValueError: the text has no tokens, or tokens that the model does not know.
    """
    text = read_text("calibration", file, _CHARACTERS_PER_TOKEN * _TOKENS.value)
    config = match_folder(model).config
    ids = tokenizer_of(model, config).encode(text)[: _TOKENS.value]
    if not ids or max(ids) >= config.vocab_size:
        raise ValueError(f"--calibration={file} has {len(ids)} tokens, up to {max(ids, default=0)}; the model knows "
                         f"{config.vocab_size}")  # fmt: skip
    length = min(_LENGTH.value, config.max_position_embeddings, len(ids))
    return np.asarray(ids[: len(ids) // length * length], np.int32).reshape(-1, length)


if __name__ == "__main__":
    script.run(main)
