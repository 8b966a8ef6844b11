"""Read a Hugging Face folder into a model: every tensor checked by name, shape and type before any is read.

Parameters are filled one at a time, and with a mesh the experts go straight to the device that owns them, so that the
host never holds more than one parameter.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from fp4jax.checkpoint.names import Path as ParamPath, Slot, stacked_name, tensor_slots
from fp4jax.checkpoint.save import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, model_params
from fp4jax.layers import EP_AXIS, ExpertSettings, expert_mesh
from fp4jax.models.qwen3_moe import MODEL_TYPE, Qwen3Moe, Qwen3MoeConfig

_MODELS: dict[str, tuple[Callable[..., Any], Any]] = {MODEL_TYPE: (Qwen3Moe, Qwen3MoeConfig)}
_FLOAT_TYPES = ("BF16", "F16", "F32")
_PROGRESS_FROM = 1000  # tensors; smaller checkpoints load faster than a bar is read
_NAMES_IN_ERROR = 8


def load_model(
    folder: str | os.PathLike, *, mesh: Mesh | None = None, quantization: Any = None, dtype: Any = None
) -> tuple[Any, Any]:
    """Model and config of a folder with `config.json` and safetensors (one file, or shards with an index).

    `dtype`: bfloat16 or float32, as a name or a type, what the model computes in and stores; None is the config's.
    `mesh`: one with the one axis "ep", over which the experts are split; tokens then cross it in bfloat16 unless
    `configure_experts` says otherwise, in a float32 model too. `quantization`: None, the only choice yet. The model
    class follows from `model_type`.

    Raises:
      FileNotFoundError: for a missing file, by name.
      ValueError: for an unsupported model or quantization, unreadable files, and missing, unexpected or misshapen
        tensors; with file, tensor, expected and found.
    """
    if quantization is not None:
        raise NotImplementedError(f"quantization={quantization!r}: only unquantized checkpoints can be loaded yet")
    folder = Path(folder)
    mesh = None if mesh is None else expert_mesh(mesh)
    model_class, config = _read_config(folder, None if dtype is None else jnp.dtype(dtype).name)
    model = nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0)))
    params = model_params(model)
    reader = _Reader(folder)
    slots = _match(reader, {path: param.get_value().shape for path, param in params.items()}, config)
    count = sum(len(group) for group in slots.values())
    with tqdm(total=count, unit="tensor", desc="loading", disable=count < _PROGRESS_FROM) as progress:
        for path, param in params.items():
            struct = param.get_value()
            split = P(EP_AXIS) if slots[path][0][1].expert is not None or stacked_name(path) else P()
            sharding = None if mesh is None else NamedSharding(mesh, split)
            param.set_value(_fill(reader, slots[path], struct.shape, struct.dtype, sharding))
            progress.update(len(slots[path]))
    if mesh is not None:
        for block in model.moe_blocks():
            block.configure(ExpertSettings(mesh=mesh))
    return model, config


def _read_config(folder: Path, dtype: str | None) -> tuple[Callable[..., Any], Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; load_model needs a folder in Hugging Face layout")
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    model_type = values.get("model_type")
    if model_type not in _MODELS:
        raise ValueError(f"{path}: model_type {model_type!r} is not supported, only {', '.join(_MODELS)}")
    quantization = values.get("quantization_config")
    if quantization:
        raise ValueError(
            f"{path}: quantization_config with quant_method={quantization.get('quant_method')!r}; "
            "only unquantized checkpoints can be loaded"
        )
    model_class, config_class = _MODELS[model_type]
    return model_class, config_class.from_hf(values if dtype is None else {**values, "dtype": dtype})


class _Reader:
    """All tensors of a folder by name; a file is opened when it is first needed and stays open (memory-mapped)."""

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / INDEX_NAME
        if index.is_file():
            weight_map = _read_weight_map(index)
            files = [folder / file for file in sorted(set(weight_map.values()))]
        else:
            weight_map, files = None, [folder / WEIGHTS_NAME]
        self.file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file} does not exist" + (f", but {INDEX_NAME} names it" if weight_map else "")
                )
            try:
                self._open[file] = safe_open(file, framework="numpy")
            except SafetensorError as error:
                raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
            self.file_of.update(dict.fromkeys(self._open[file].keys(), file))
        for name, file in (weight_map or {}).items():  # a tensor in several files is read where the index says
            if name in self.file_of and name in self._open[folder / file].keys():  # noqa: SIM118
                self.file_of[name] = folder / file
        absent = sorted(set(weight_map or ()) - self.file_of.keys())
        if absent:
            raise ValueError(f"{index} lists tensors that are in no file: {_some(absent)}")

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors type name, from the header."""
        part = self._open[self.file_of[name]].get_slice(name)
        return tuple(part.get_shape()), part.get_dtype()

    def read(self, name: str) -> np.ndarray:
        return self._open[self.file_of[name]].get_tensor(name)

    def read_rows(self, name: str, rows: slice) -> np.ndarray:
        """Leading rows of one tensor, without touching the others."""
        return self._open[self.file_of[name]].get_slice(name)[rows]


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {error!r}") from error


def _match(
    reader: _Reader, shapes: Mapping[ParamPath, tuple[int, ...]], config: Any
) -> dict[ParamPath, list[tuple[str, Slot]]]:
    """Tensors for every parameter path; raises where the folder's tensors are not exactly the model's."""
    slots: dict[str, Slot] = {}
    for path, shape in shapes.items():
        stacked = stacked_name(path)
        if stacked is not None and stacked in reader.file_of:
            slots[stacked] = Slot(path, shape)
        else:
            slots.update(tensor_slots({path: shape}))
    found = {name for name in reader.file_of if not _is_redundant(name, config)}
    missing, unexpected = sorted(slots.keys() - found), sorted(found - slots.keys())
    if missing or unexpected:
        raise ValueError(f"{reader.folder}: {len(missing)} tensors missing: {_some(missing)}; "
                         f"{len(unexpected)} unexpected: {_some(unexpected)}")  # fmt: skip
    grouped: dict[ParamPath, list[tuple[str, Slot]]] = {path: [] for path in shapes}
    for name, slot in slots.items():
        shape, dtype = reader.describe(name)
        if shape != tuple(slot.shape) or dtype not in _FLOAT_TYPES:
            raise ValueError(
                f"{reader.file_of[name]}: tensor {name} has shape {shape} and type {dtype}, "
                f"expected {tuple(slot.shape)} and one of {', '.join(_FLOAT_TYPES)}"
            )
        grouped[slot.path].append((name, slot))
    return grouped


def _is_redundant(name: str, config: Any) -> bool:
    """Tensors some tools write although they follow from others: a tied output projection, RoPE frequencies."""
    return (name == "lm_head.weight" and config.tie_word_embeddings) or name.endswith("rotary_emb.inv_freq")


def _fill(
    reader: _Reader,
    slots: list[tuple[str, Slot]],
    shape: tuple[int, ...],
    dtype: Any,
    sharding: NamedSharding | None,
) -> jax.Array:
    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        """The piece of the parameter one device owns: a range of leading rows (experts)."""
        start, stop, _ = (index[0] if index else slice(None)).indices(shape[0])
        name, slot = slots[0]
        if slot.expert is None:
            return reader.read_rows(name, slice(start, stop)).astype(dtype)
        out = np.empty((stop - start, *shape[1:]), dtype)
        for name, slot in slots:
            if slot.expert is not None and start <= slot.expert < stop:
                out[slot.expert - start, slot.start : slot.start + slot.shape[0]] = reader.read(name)
        return out

    if sharding is None:
        return jnp.asarray(part(None))
    return jax.make_array_from_callback(shape, sharding, part)


def _some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - _NAMES_IN_ERROR} more" if len(names) > _NAMES_IN_ERROR else ""
    return (", ".join(names[:_NAMES_IN_ERROR]) or "none") + more
