"""Read a Hugging Face folder into a model: every tensor checked by name, shape and type before any is read.

The tensors decide how a layer is stored (plain, NVFP4 of ModelOpt or compressed-tensors, block-wise FP8); the plan of
`quant_config` decides what plain layers become, and is compared with the tensors. Parameters are filled one at a time
from memory-mapped files, and with a mesh the experts go straight to the device that owns them, so that the host never
holds more than one parameter.
"""

import math
import os
import warnings
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tqdm import tqdm

from fp4jax.block_fp8 import BlockFP8Weights
from fp4jax.checkpoint.match import Match, at, match_folder
from fp4jax.checkpoint.names import Path as ParamPath
from fp4jax.checkpoint.storage import stored
from fp4jax.checkpoint.storage.reader import some
from fp4jax.layers import BlockFP8Linear, MoEBlock, NVFP4Linear
from fp4jax.nvfp4 import NVFP4Tensor
from fp4jax.quant_config.methods import Method
from fp4jax.sharded_moe import EP_AXIS, expert_mesh

_PROGRESS_FROM = 1000  # tensors; smaller checkpoints load faster than a bar is read
_THREADS = min(8, os.cpu_count() or 1)  # that copy tensors of a parameter from the files
_PARALLEL_FROM = 1 << 20  # bytes
_ALIGNMENT = 64


def load_model(
    folder: str | os.PathLike,
    *,
    mesh: Mesh | None = None,
    quantization: Mapping[str, Any] | str | None = None,
    dtype: Any = None,
    input_scales: str = "stored",
) -> tuple[Any, Any]:
    """Model and config of a folder with `config.json` and safetensors (one file, or shards with an index).

    Args:
      dtype: bfloat16 or float32, as a name or a type, what the model computes in and keeps plain weights in; None is
        the config's.
      mesh: one with the one axis "ep", over which the experts are split; tokens then cross it in bfloat16 unless
        `configure_experts` says otherwise, in a float32 model too.
      quantization: the user's wishes, see `quant_config.plan_quantization`; None: as the folder is.
      input_scales: of layers that run with NVFP4 activations; "per_token" replaces what the folder has, or lacks.

    The model class follows from `model_type`. Experts in FP8 become plain. Scales of a KV cache become `k_scale` and
    `v_scale` of a layer's attention, which does not use them. A warning tells where tensors are not what the folder's
    own config says.

    Raises:
      FileNotFoundError: for a missing file, by name.
      ValueError: for an unsupported model or quantization, unreadable files, missing, unexpected or misshapen tensors,
        and scales that are missing, zero, negative or not finite; with file, tensor, expected and found.
    """
    folder = Path(folder)
    mesh = None if mesh is None else expert_mesh(mesh)
    match = match_folder(folder, quantization, dtype, input_scales, 1 if mesh is None else mesh.size)
    if lines := match.disagreements:
        warnings.warn(f"{folder}: {len(lines)} modules are not as the config says: {some(lines)}", stacklevel=2)

    count = sum(len(source.tensors) for source in match.sources.values())
    with (
        tqdm(total=count, unit="tensor", desc="loading", disable=count < _PROGRESS_FROM) as progress,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        for path, source in match.sources.items():
            owner = at(match.model, path[:-1])
            split = P(EP_AXIS) if isinstance(owner, MoEBlock) and path[-1] in ("w13", "w2") else P()
            sharding = None if mesh is None else NamedSharding(mesh, split)
            arrays = {field: _fill(leaf, sharding, pool) for field, leaf in source.leaves.items()}
            _set(match.model, path, arrays, match.methods[path], match.scales.get(path))
            match.reader.forget_pages()
            progress.update(len(source.tensors))
    for block, path in _blocks(match.model):
        _set_up_experts(match, block, path, mesh)
    for name, (layer, attribute) in match.kv_scales.items():
        scale = jnp.float32(stored.positive_scales(match.reader, name).reshape(()))
        setattr(match.model.layers[layer].self_attn, attribute, nnx.Variable(scale))
    return match.model, match.config


# --- arrays ---


def _fill(leaf: stored.Leaf, sharding: NamedSharding | None, pool: Executor) -> jax.Array:
    """An array from its parts, which the threads of a pool copy where that is worth it."""

    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
        """What one device owns: a range of leading rows (experts)."""
        rows = index[0] if index else slice(None)
        start, stop, _ = rows.indices(leaf.shape[0]) if leaf.shape else (0, 1, 1)
        out = _aligned((stop - start, *leaf.shape[1:]) if leaf.shape else (), leaf.dtype)

        def place(part: stored.Part) -> None:
            if part.expert is not None:
                out[part.expert - start, part.start : part.start + part.rows] = part.load()
            elif (start, stop) == (0, leaf.shape[0] if leaf.shape else 1):
                out[...] = part.load().reshape(out.shape)
            else:
                out[...] = part.load(rows).reshape(out.shape)

        parts = [part for part in leaf.parts if part.expert is None or start <= part.expert < stop]
        list((pool.map if out.nbytes > _PARALLEL_FROM else map)(place, parts))
        return out

    if sharding is None:
        return jax.device_put(piece(None))
    return jax.make_array_from_callback(leaf.shape, sharding, piece)


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Uninitialized memory that a CPU device takes as it is, without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _set(model: Any, path: ParamPath, arrays: dict[str, jax.Array], method: Method, input_scale: Any) -> None:
    """Gives a parameter its value; a linear layer that is quantized, or is to be, becomes one of another class."""
    owner = at(model, path[:-1])
    if isinstance(owner, MoEBlock):
        getattr(owner, str(path[-1])).set_value(NVFP4Tensor(**arrays) if "global_scale" in arrays else arrays[""])
        return
    if "" in arrays:
        getattr(owner, str(path[-1])).set_value(arrays[""])
        if not method.online:
            return
        make = BlockFP8Linear.from_linear if method.format == "block_wise_fp8" else NVFP4Linear.from_linear
        made = make(owner)
    elif method.format == "nvfp4":
        scale = None if input_scale is None else jnp.float32(input_scale)
        options: dict[str, Any] = dict(activation_format=method.activations, input_scale=scale)
        made = NVFP4Linear(NVFP4Tensor(**arrays), dtype=owner.dtype, **options)
    else:
        powers = method.activations == "fp8_ue8m0"
        made = BlockFP8Linear(BlockFP8Weights(**arrays), dtype=owner.dtype, power_of_two_scales=powers)
    setattr(at(model, path[:-2]), str(path[-2]), made)


def _set_up_experts(match: Match, block: MoEBlock, path: ParamPath, mesh: Mesh | None) -> None:
    """Settings, activation scales and weights that are quantized now, of a block whose parameters have their values."""
    of_1, of_2 = (match.methods[(*path, name)] for name in ("w13", "w2"))
    if mesh is not None or "nvfp4" in (of_1.format, of_2.format):  # packs what is NVFP4
        formats: dict[str, Any] = dict(activation_format_1=of_1.activations, activation_format_2=of_2.activations)
        block.configure(replace(block.config, **formats), mesh)
    scale_1, scale_2 = (match.scales.get((*path, name)) for name in ("w13", "w2"))
    if scale_1 is not None or scale_2 is not None:
        block.set_input_scales(
            None if scale_1 is None else jnp.float32(scale_1),
            None if scale_2 is None else jnp.asarray(scale_2, jnp.float32),
        )
    if of_1.online or of_2.online:
        block.quantize_experts()


def _blocks(model: Any) -> list[tuple[MoEBlock, ParamPath]]:
    found: list[tuple[Any, Any]] = list(nnx.iter_graph(model))
    return [(node, path) for path, node in found if isinstance(node, MoEBlock)]
