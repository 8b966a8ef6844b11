"""The flags that say how the model of a folder is loaded, for scripts that run or inspect it."""

from absl import flags

QUANTIZATION = flags.DEFINE_string(
    "quantization", None, "How to quantize, as JSON or a method's name; default: as the folder is."
)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["bfloat16", "float32"], "Dtype that the model computes in; default: the one in its config."
)
INPUT_SCALES = flags.DEFINE_enum(
    "input_scales",
    "stored",
    ["stored", "per_token"],
    "Activation scales of layers with NVFP4 activations: those of the folder, or one per token.",
)
