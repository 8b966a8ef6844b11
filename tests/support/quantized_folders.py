"""Small checkpoints whose layers were quantized by hand, and what their tensors decode to."""

import shutil

import ml_dtypes
import numpy as np
import pytest
from quantization_sections import COMPRESSED, FP8, MODELOPT
from small_folders import edit, edit_config, make_model

from fp4jax.checkpoint import save_model

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
VALUES = np.concatenate([E2M1, -E2M1])
NAMES = {
    "modelopt": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
    "compressed": ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
}
CONFIGS = {"modelopt": MODELOPT, "compressed": COMPRESSED, "fp8": FP8}
EXPERTS = "model.layers.0.mlp.experts."
WEIGHT_ONLY = {
    "modelopt": {**MODELOPT, "quant_algo": "W4A16_NVFP4"},
    "compressed": {
        **COMPRESSED, "config_groups": {"g": {**COMPRESSED["config_groups"]["group_0"], "input_activations": None}},
    },
}  # fmt: skip
UP = EXPERTS + "2.up_proj."


def nvfp4(tensors, module, kind, rng):
    """Replaces a plain weight by random codes and scales; returns what they decode to, in float64."""
    n, k = tensors.pop(f"{module}.weight").shape
    codes = rng.integers(0, 16, (n, k)).astype(np.uint8)
    block = rng.integers(30, 60, (n, k // 16)).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    scale = np.float32(rng.uniform(0.005, 0.02))
    packed, block_name, scale_name, input_name = (f"{module}.{suffix}" for suffix in NAMES[kind])
    tensors[packed] = codes[:, ::2] | codes[:, 1::2] << 4
    tensors[block_name] = block
    decode = kind == "modelopt"
    tensors[scale_name] = np.array(scale) if decode else np.array([1 / scale], np.float32)
    given = np.float32(rng.uniform(0.5, 1.5))
    tensors[input_name] = np.array(given) if decode else np.array([1 / given], np.float32)
    used = np.float64(scale if decode else np.float32(1) / tensors[scale_name][0])
    return VALUES[codes] * np.repeat(block.astype(np.float64), 16, 1) * used


def fp8(tensors, module, rng):
    n, k = tensors.pop(f"{module}.weight").shape
    codes = rng.integers(0, 0x58, (n, k)).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.001, 0.01, (-(-n // 128), -(-k // 128))).astype(np.float32)
    tensors[f"{module}.weight"], tensors[f"{module}.weight_scale_inv"] = codes, scale
    wide = np.repeat(np.repeat(scale, 128, 0), 128, 1)[:n, :k]
    return codes.astype(np.float64) * wide


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    save_model(*make_model(), folder)
    return folder


@pytest.fixture
def make_folder(tmp_path, plain_folder):
    """(kind, which modules) -> a folder, and {module: decoded weight} of what was quantized in it."""

    def make(kind, chosen=lambda name: ".experts." in name, config=None):
        shutil.copytree(plain_folder, tmp_path, dirs_exist_ok=True)
        rng, decoded = np.random.default_rng(7), {}

        def change(tensors):
            for name in sorted(tensors):
                module = name.removesuffix(".weight")
                if name.endswith("_proj.weight") and chosen(name) and tensors[name].shape[1] % 16 == 0:
                    decoded[module] = fp8(tensors, module, rng) if kind == "fp8" else nvfp4(tensors, module, kind, rng)

        edit(tmp_path, change)
        edit_config(tmp_path, quantization_config=config or CONFIGS[kind])
        return tmp_path, decoded

    return make


def everything(name):
    return name.endswith("_proj.weight")


def put(name, value):
    return lambda t: t.update({name: np.asarray(value)})


def spoil(name, index, byte):
    def change(tensors):
        values = tensors[name].copy()
        values.view(np.uint8)[index] = byte
        tensors[name] = values

    return change
