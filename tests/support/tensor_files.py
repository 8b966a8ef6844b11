"""Reading safetensors files with nothing but json and numpy: the library's numpy side does not know FP8."""

import json

import ml_dtypes
import numpy as np

DTYPES = {"F32": "f4", "F64": "f8", "F16": "f2", "U8": "u1", "I64": "i8", "BF16": ml_dtypes.bfloat16,
          "F8_E4M3": ml_dtypes.float8_e4m3fn}  # fmt: skip


def read_tensors(file):
    """{name: array} of a file; the arrays may be written to."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], DTYPES[entry["dtype"]]).reshape(entry["shape"]).copy()
        for name, entry in header.items()
    }
