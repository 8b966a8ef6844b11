"""Loads a model from a folder in Hugging Face layout.

Every tensor is checked by name, shape and type before any parameter is filled. How a layer is stored (plain, NVFP4 of
ModelOpt or compressed-tensors, block-wise FP8) follows from its tensors. What a plain layer becomes follows from the
plan of `quant_config`, which is also compared with the tensors. Parameters are filled one at a time from memory-mapped
files. With a mesh, each expert goes straight to the device that owns it, so that the host never holds more than one
parameter.
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
from fp4jax.checkpoint.storage.scales import positive_scales
from fp4jax.layers import BlockFP8Linear, MoEBlock, NVFP4Linear
from fp4jax.models.decoder import Decoder, DecoderConfig
from fp4jax.nvfp4 import NVFP4Tensor
from fp4jax.quant_config.methods import Method
from fp4jax.sharded_moe import EP_AXIS, expert_mesh

_PROGRESS_FROM = 1000  # tensors; a smaller checkpoint loads before a user can read the progress bar
_THREADS = min(8, os.cpu_count() or 1)  # threads that copy the tensors of one parameter from the files
_PARALLEL_FROM = 1 << 20  # bytes; smaller arrays are copied by one thread
_ALIGNMENT = 64  # bytes; JAX's CPU backend takes a NumPy array without a copy if its memory is aligned to this


def load_model(
    folder: str | os.PathLike,
    *,
    mesh: Mesh | None = None,
    quantization: Mapping[str, Any] | str | None = None,
    dtype: Any = None,
    input_scales: str = "stored",
    cache_format: str = "stored",
) -> tuple[Decoder, DecoderConfig]:
    """Loads the model of a folder that has config.json and safetensors (one file, or several with an index).

    Args:
      folder: the path of the folder.
      mesh: a mesh with the single axis "ep", over which the experts are split; None: one device. Tokens cross the mesh
        in bfloat16, also in a float32 model, unless `configure_experts` changes the wire format.
      quantization: the user's quantization config, a dict or JSON text as in `quant_config.plan_quantization`; None
        follows the folder.
      dtype: bfloat16 or float32, as a name or a type: the type that the model computes in and keeps plain weights in.
        None takes the type that config.json names.
      input_scales: where layers with NVFP4 activations get the activation scales from: "stored" reads them from the
        folder, "per_token" computes one for each token at run time, whether the folder has scales or not.
      cache_format: how the model keeps keys and values: "stored" in FP8 if the folder asks for it, "compute" always in
        the dtype that it computes in, "fp8" always in FP8 (e4m3). Latents of latent attention stay in the compute
        dtype.

    Returns:
      (model, config). `model_type` in config.json selects the class of both.

    Experts that are stored in FP8 are decoded to plain weights. The scales of an FP8 cache become `k_scale` and
    `v_scale` of a layer's attention; a layer without them uses 1. A warning names the modules whose tensors are not
    what the folder's config says.

    Raises:
      FileNotFoundError: a file is missing; the message names it.
      ValueError: the model or the quantization is not supported; a file cannot be read; a tensor is missing, unexpected
        or has a wrong shape or type; or a scale is missing, zero, negative or not finite. The message names the file,
        the tensor, what was expected and what was found, as far as they apply.
    """
    if cache_format not in ("stored", "compute", "fp8"):
        raise ValueError(f"cache_format must be 'stored', 'compute' or 'fp8', got {cache_format!r}")
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
    match.model.place_attention(mesh)
    for block, path in _blocks(match.model):
        _set_up_experts(match, block, path, mesh)
    for name, (layer, attribute) in match.kv_scales.items():
        scale = jnp.float32(positive_scales(match.reader, name).reshape(()))
        setattr(match.model.layers[layer].self_attn, attribute, nnx.Variable(scale))
    if cache_format == "fp8" or (cache_format == "stored" and match.plan.fp8_cache):
        match.model.set_cache_dtype(jnp.float8_e4m3fn)
    return match.model, match.config


# --- filling arrays and modules ---


def _fill(leaf: stored.Leaf, sharding: NamedSharding | None, pool: Executor) -> jax.Array:
    """Makes one array of a parameter from its parts; the threads of `pool` copy the parts of large arrays."""

    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
        """Returns what one device owns, a range of the leading axis (experts); index None: the whole array."""
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
    """Returns an uninitialized array whose memory JAX's CPU backend takes over without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _set(model: Any, path: ParamPath, arrays: dict[str, jax.Array], method: Method, input_scale: Any) -> None:
    """Sets the value of one parameter from its arrays.

    A Linear whose weights are quantized, in the folder or now by `method`, is replaced by an NVFP4Linear or a
    BlockFP8Linear.
    """
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
    """Finishes a block of experts whose weights are loaded.

    It applies the settings, sets the activation scales, and quantizes weights that the plan quantizes while loading.
    """
    of_1, of_2 = (match.methods[(*path, name)] for name in ("w13", "w2"))
    if mesh is not None or "nvfp4" in (of_1.format, of_2.format):  # `configure` also packs NVFP4 weights for the kernel
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
