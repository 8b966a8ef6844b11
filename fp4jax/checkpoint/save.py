"""Saves a model as a folder in Hugging Face layout: config.json, and safetensors with the usual tensor names."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fp4jax.attention import PageFormat
from fp4jax.attention.cache_formats import FP8
from fp4jax.checkpoint.folder_config import CONFIG_NAME, QUANT_CONFIG_NAME
from fp4jax.checkpoint.storage.kept_scales import KEY
from fp4jax.checkpoint.storage.layouts import Layout, describe_methods, with_fp8_cache
from fp4jax.checkpoint.storage.reader import INDEX_NAME, WEIGHTS_NAME
from fp4jax.checkpoint.storage.saved_tensors import SavedTensors
from fp4jax.checkpoint.storage.tensor_file import TensorFile, spec_of, write_text


def save_model(
    model: Any,
    config: Any,
    folder: str | os.PathLike,
    *,
    layout: Layout = "modelopt",
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Writes config.json and the weights of a model to a folder.

    Plain weights are written in `config.dtype`, NVFP4 and block-wise FP8 weights as they are. The config says so if the
    model caches keys and values in FP8. A model that is loaded
    from the folder computes the same bits. Existing files are replaced one by one, each atomically, and the config
    last.

    Args:
      model: a model of `fp4jax.models`.
      config: its config.
      folder: the path of the folder, which is created if it does not exist.
      layout: whose tensor names and configs NVFP4 layers get: those of ModelOpt or those of compressed-tensors.
      max_shard_bytes: the size in bytes above which the weights are split into several numbered files, with an index.

    Raises:
      ValueError: the layout is unknown; rows of one NVFP4 layer have different global scales; or the layout is
        compressed_tensors, and the model has FP8 layers beside NVFP4 ones. The message names the layer.
    """
    if layout not in ("modelopt", "compressed_tensors"):
        raise ValueError(f"layout must be 'modelopt' or 'compressed_tensors', got {layout!r}")
    folder = Path(folder)
    saved = SavedTensors(model, config.dtype, layout)
    described = describe_methods(layout, saved.methods)
    if any(isinstance(f, PageFormat) and f.dtype == FP8 for f in model.cache_formats):
        described = with_fp8_cache(described)
    folder.mkdir(parents=True, exist_ok=True)
    _write_shards(saved.tensors, saved.kept_scales, folder, max_shard_bytes)
    if described.file is None:  # a file of an earlier save describes other weights, and a loader would read it
        (folder / QUANT_CONFIG_NAME).unlink(missing_ok=True)
    else:
        write_text(folder / QUANT_CONFIG_NAME, json.dumps(described.file, indent=2) + "\n")
    section = {} if described.section is None else {"quantization_config": described.section}
    write_text(folder / CONFIG_NAME, json.dumps({**config.to_hf(), **section}, indent=2) + "\n")


def _write_shards(
    tensors: Mapping[str, np.ndarray], kept: Mapping[str, list[Any]], folder: Path, max_shard_bytes: int
) -> None:
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
        scales = {name: kept[name] for name in shard if name in kept}
        metadata = {KEY: json.dumps({"scales": scales})} if scales else {}
        with TensorFile(folder / file, {n: spec_of(v.dtype, v.shape) for n, v in shard.items()}, metadata) as out:
            for name, value in shard.items():
                out.write(name, value)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(value.nbytes for value in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    else:  # the index of an earlier save would send readers to its files
        (folder / INDEX_NAME).unlink(missing_ok=True)
