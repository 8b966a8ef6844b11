"""The flag --cache_format, for scripts that run the model of a folder."""

from absl import flags

CACHE_FORMAT = flags.DEFINE_enum(
    "cache_format",
    "stored",
    ["stored", "compute", "fp8"],
    "How keys and values are kept: in FP8 if the folder asks for it, always in the compute dtype, or always in FP8.",
)
