"""Write a model as a Hugging Face folder: config.json and safetensors with the names other tools expect."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from fp4jax.checkpoint.folder_config import CONFIG_NAME
from fp4jax.checkpoint.names import tensor_slots
from fp4jax.checkpoint.reader import INDEX_NAME, WEIGHTS_NAME
from fp4jax.nvfp4 import NVFP4Tensor
from fp4jax.packed_weights import PackedWeights


def model_params(model: nnx.Module) -> dict[Any, nnx.Param]:
    """Path -> parameter of a model; the experts' activation scales, which are not weights, left out."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {path: param for path, param in flat if not str(path[-1]).startswith("input_scale")}


def save_model(model: nnx.Module, config: Any, folder: str | os.PathLike, *, max_shard_bytes: int = 5 << 30) -> None:
    """Write `config.json` and the weights in `config.dtype`; more than `max_shard_bytes` become numbered shards.

    Files are replaced one by one, each atomically, the config last.

    Raises:
      ValueError: naming the parameter, for experts that are quantized in memory.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    params = {path: param.get_value() for path, param in model_params(model).items()}
    for path, value in params.items():
        if isinstance(value, NVFP4Tensor | PackedWeights):
            raise ValueError(f"{'.'.join(map(str, path))} is NVFP4: save the model before quantize_experts")
    host = {path: np.asarray(jax.device_get(value)) for path, value in params.items()}
    host = {
        path: value if path[-1] == "correction_bias" else value.astype(config.dtype) for path, value in host.items()
    }
    tensors = {}
    shapes = {path: value.shape for path, value in host.items()}
    for name, slot in tensor_slots(shapes, getattr(model, "TENSOR_NAMES", {})).items():
        value = host[slot.path]
        if slot.expert is not None:
            value = value[slot.expert, slot.start : slot.start + slot.shape[0]]
        # ERNIE's one group of experts is an axis of its bias.
        tensors[name] = np.ascontiguousarray(value[None] if ".moe_statics." in name else value)
    _write_shards(tensors, folder, max_shard_bytes)
    _write_text(folder / CONFIG_NAME, json.dumps(config.to_hf(), indent=2) + "\n")


def _write_shards(tensors: dict[str, np.ndarray], folder: Path, max_shard_bytes: int) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name in sorted(tensors):
        if shards[-1] and size + tensors[name].nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensors[name]
        size += tensors[name].nbytes
    files = [WEIGHTS_NAME]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        part = folder / (file + ".part")
        save_file(shard, part, metadata={"format": "pt"})
        part.chmod(0o644)  # safetensors makes files only their owner can read
        os.replace(part, folder / file)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(value.nbytes for value in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    else:  # an index of an earlier save would send readers to its shards
        (folder / INDEX_NAME).unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
