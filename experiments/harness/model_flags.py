"""The flags that say how the model of a folder is loaded, for scripts that run it."""

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
CACHE_FORMAT = flags.DEFINE_enum(
    "cache_format",
    "stored",
    ["stored", "compute", "fp8"],
    "How keys and values are kept: in FP8 if the folder asks for it, always in the compute dtype, or always in FP8.",
)
