"""Read a Hugging Face folder into a model: every tensor checked by name, shape and type before any is read.

The tensors decide how a layer is stored (plain, NVFP4 of ModelOpt or compressed-tensors, block-wise FP8); the plan of
`quant_config` decides what plain layers become, and is compared with the tensors. Parameters are filled one at a time
from memory-mapped files, and with a mesh the experts go straight to the device that owns them, so that the host never
holds more than one parameter.
"""

import collections
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tqdm import tqdm

from fp4jax.block_fp8 import BlockFP8Weights
from fp4jax.checkpoint import stored
from fp4jax.checkpoint.names import (
    Path as ParamPath,
    expert_modules,
    find_prefix,
    module_name,
    stacked_name,
    tensor_name,
)
from fp4jax.checkpoint.reader import Reader, some
from fp4jax.checkpoint.save import CONFIG_NAME, model_params
from fp4jax.layers import EP_AXIS, BlockFP8Linear, ExpertSettings, Linear, MoEBlock, NVFP4Linear, expert_mesh
from fp4jax.models import (
    DeepseekV3,
    DeepseekV3Config,
    Ernie45Moe,
    Ernie45MoeConfig,
    Qwen3Moe,
    Qwen3MoeConfig,
    deepseek_v3,
    ernie45_moe,
    qwen3_moe,
)
from fp4jax.nvfp4 import BLOCK_SIZE, NVFP4Tensor
from fp4jax.quant_config import QuantizationPlan, plan_quantization
from fp4jax.quant_schemas import disagreements

QUANT_CONFIG_NAME = "hf_quant_config.json"
_MODELS: dict[str, tuple[Callable[..., Any], Any]] = {
    qwen3_moe.MODEL_TYPE: (Qwen3Moe, Qwen3MoeConfig),
    ernie45_moe.MODEL_TYPE: (Ernie45Moe, Ernie45MoeConfig),
    deepseek_v3.MODEL_TYPE: (DeepseekV3, DeepseekV3Config),
}
_PROGRESS_FROM = 1000  # tensors; smaller checkpoints load faster than a bar is read
_KV_SCALE = re.compile(r"layers\.(\d+)\.self_attn\.(?:[kv]_proj\.)?([kv]_scale)$")


def load_model(
    folder: str | os.PathLike,
    *,
    mesh: Mesh | None = None,
    quantization: Mapping[str, Any] | str | None = None,
    dtype: Any = None,
    input_scales: Literal["stored", "per_token"] = "stored",
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
    if input_scales not in ("stored", "per_token"):
        raise ValueError(f"input_scales must be 'stored' or 'per_token', got {input_scales!r}")
    folder = Path(folder)
    mesh = None if mesh is None else expert_mesh(mesh)
    values = _read_json(folder / CONFIG_NAME)
    model_class, config = _model_and_config(folder, values, None if dtype is None else jnp.dtype(dtype).name)
    plan = plan_quantization(_quantization_of(folder, values), quantization)
    reader = Reader(folder)
    prefix = find_prefix(reader.names())
    model = nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0)))
    params = model_params(model)
    sources = {path: _source(reader, model, path, param.get_value(), prefix) for path, param in params.items()}
    scales = _input_scales(reader, model, sources, plan, prefix, input_scales)
    kv_scales = {name: match for name in reader.names() if (match := _KV_SCALE.search(name))}
    _check_tensors(reader, config, sources, prefix, kv_scales)
    _check_plan(reader, plan, sources, prefix)

    count = sum(len(source.tensors) for source in sources.values())
    with tqdm(total=count, unit="tensor", desc="loading", disable=count < _PROGRESS_FROM) as progress:
        for path, source in sources.items():
            owner = _at(model, path[:-1])
            split = P(EP_AXIS) if isinstance(owner, MoEBlock) and path[-1] in ("w13", "w2") else P()
            sharding = None if mesh is None else NamedSharding(mesh, split)
            arrays = {field: _fill(leaf, sharding) for field, leaf in source.leaves.items()}
            _set(model, path, arrays, scales.get(path))
            _quantize_now(model, path, plan, source, prefix)
            progress.update(len(source.tensors))
    for block, path in _blocks(model):
        name, source = f"{module_name(path, prefix)}.experts", sources[(*path, "w13")]
        activations = _activations(plan, source, name)
        if mesh is not None or activations != "bf16":
            block.configure(ExpertSettings(mesh=mesh, activation_format=activations))
        if (largest := scales.get((*path, "w13"))) is not None:
            block.set_input_scales(jnp.float32(largest), jnp.asarray(scales[(*path, "w2")], jnp.float32))
        if plan.method(name).online and source.stored == "bf16":
            block.quantize_experts()
    for name, match in kv_scales.items():
        layer = model.layers[int(match[1])]
        setattr(layer.self_attn, match[2], nnx.Variable(jnp.float32(reader.read(name).astype(np.float32).reshape(()))))
    return model, config


# --- configs ---


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; load_model needs a folder in Hugging Face layout")
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    return values


def _model_and_config(folder: Path, values: dict[str, Any], dtype: str | None) -> tuple[Callable[..., Any], Any]:
    model_type = values.get("model_type")
    if model_type not in _MODELS:
        raise ValueError(
            f"{folder / CONFIG_NAME}: model_type {model_type!r} is not supported, only {', '.join(_MODELS)}"
        )
    model_class, config_class = _MODELS[model_type]
    return model_class, config_class.from_hf(values if dtype is None else {**values, "dtype": dtype})


def _quantization_of(folder: Path, values: dict[str, Any]) -> dict[str, Any] | None:
    """The section of config.json, else ModelOpt's file."""
    if values.get("quantization_config"):
        return values["quantization_config"]
    path = folder / QUANT_CONFIG_NAME
    return _read_json(path) if path.is_file() else None


# --- tensors ---


def _source(reader: Reader, model: Any, path: ParamPath, struct: Any, prefix: str) -> stored.Source:
    """Where a parameter comes from, by what the folder has."""
    owner, shape = _at(model, path[:-1]), struct.shape
    stacked = stacked_name(path, prefix)
    if stacked is not None and stacked in reader:
        whole = stored.Module(stacked, None, 0, shape[0]), stored.Tensor(stacked, shape, stored.FLOATS)
        return stored.plain_source(reader, [whole], shape, struct.dtype)
    if stacked is not None:
        modules = [stored.Module(*place) for place in expert_modules(path, shape, prefix)]
        kinds = collections.Counter(stored.stored_as(reader, module.name) for module in modules)
        usual = kinds.most_common(1)[0][0]  # an expert that is stored otherwise is refused by the names of its tensors
        return stored.weight_source(reader, usual, modules, shape, struct.dtype, decode=True)
    name = module_name(path[:-1], prefix)
    if isinstance(owner, Linear):
        whole = [stored.Module(name, None, 0, shape[0])]
        return stored.weight_source(reader, stored.stored_as(reader, name), whole, shape, struct.dtype, decode=False)
    full = tensor_name(path, model.TENSOR_NAMES, prefix)
    row = (1, *shape)  # some models keep their correction bias as one row
    tensor = stored.Tensor(full, row if full in reader and reader.shape(full) == row else shape, stored.FLOATS)
    return stored.plain_source(reader, [(stored.Module(name, None, 0, shape[0]), tensor)], shape, struct.dtype)


def _input_scales(reader, model, sources, plan, prefix, choice) -> dict[ParamPath, Any]:
    """Of parameters with NVFP4 activations: w13 the largest of all experts, w2 one per expert, linears theirs.

    None: per token.
    """
    found: dict[ParamPath, Any] = {}
    for path, source in sources.items():
        expert = stacked_name(path) is not None
        name = module_name(path[:-1], prefix)
        if _activations(plan, source, name if not expert else f"{name}.experts") != "nvfp4" or source.stored == "bf16":
            continue
        if choice == "per_token":
            found[path] = None
            continue
        shape = _at(model, path).get_value().shape
        modules = [place[0] for place in expert_modules(path, shape, prefix)] if expert else [name]
        scales = stored.input_scales(reader, source.stored, modules)
        values = []
        for module in modules:
            tensor, value = stored.input_scale_name(source.stored, module), scales.get(f"{module}.input_scale")
            if value is None:
                raise ValueError(
                    f"{reader.folder}: {tensor} is missing; layers with NVFP4 activations need it "
                    "(input_scales='per_token': not)"
                )
            if not (np.isfinite(value) and value > 0):
                raise ValueError(f"{reader.file_of(tensor)}: tensor {tensor} = {value} must be positive and finite")
            values.append(value)
        found[path] = values if path[-1] == "w2" and expert else max(values)
    return found


def _activations(plan: QuantizationPlan, source: stored.Source, module: str) -> Literal["nvfp4", "bf16"]:
    """Of a module that is stored, or becomes, NVFP4; where the config says that it is not, those of the others."""
    method = plan.method(module)
    if source.stored in ("modelopt", "compressed_tensors"):
        kinds = [kind.activations for kind in (method, plan.dense, plan.experts) if kind.format == "nvfp4"]
        return "bf16" if kinds[:1] == ["bf16"] else "nvfp4"
    return "nvfp4" if method.online and method.format == "nvfp4" else "bf16"


def _check_tensors(reader, config, sources, prefix, kv_scales):
    """Raises where the folder's tensors are not exactly the model's."""
    expected = {tensor.name: tensor for source in sources.values() for tensor in source.tensors}
    found = {name for name in reader.names() - kv_scales.keys() if not _is_redundant(name, config, prefix)}
    missing, unexpected = sorted(expected.keys() - reader.names()), sorted(found - expected.keys())
    if missing or unexpected:
        raise ValueError(f"{reader.folder}: {len(missing)} tensors missing: {some(missing)}; "
                         f"{len(unexpected)} unexpected: {some(unexpected)}")  # fmt: skip
    for tensor in expected.values():
        shape = tensor.shape
        if shape is None:
            shape = (1,) if reader.shape(tensor.name) == (1,) else ()
        reader.check(tensor.name, shape, tensor.dtypes)


def _is_redundant(name: str, config: Any, prefix: str) -> bool:
    """What is not a weight of the text model, or follows from others.

    A tied head, RoPE frequencies, activation scales (read apart), layers that predict further tokens, other models.
    """
    if name.endswith(("rotary_emb.inv_freq", ".input_scale", ".input_global_scale")):
        return True
    if name.endswith("lm_head.weight"):
        return config.tie_word_embeddings
    if not name.startswith(prefix):
        return prefix != "model." and "language_model" in prefix
    layer = re.match(r"layers\.(\d+)\.", name.removeprefix(prefix))
    return layer is not None and int(layer[1]) >= config.num_hidden_layers


def _check_plan(reader, plan, sources, prefix):
    """Warns where the tensors are not what the folder's config says; raises where a user says that they are."""
    kinds = {}
    for path, source in sources.items():
        if stacked_name(path) is not None:
            kinds[f"{module_name(path[:-1], prefix)}.experts"] = source.stored
        elif source.stored != "bf16" or (path[-1] == "weight" and plan.dense.stored != "bf16"):
            kinds[module_name(path[:-1], prefix)] = source.stored
    lines = [line for line in disagreements(plan, kinds) if "norm" not in line and "embed_tokens" not in line]
    if not lines:
        return
    if plan.source.startswith("--quantization"):
        for module, kind in kinds.items():
            if kind == "bf16" and plan.method(module).stored != "bf16":
                raise ValueError(
                    f"{reader.folder}: {module} is not quantized, although --quantization says that it is "
                    "(is_quantized, is_moe_quantized)"
                )
    warnings.warn(f"{reader.folder}: {len(lines)} modules are not as the config says: {some(lines)}", stacklevel=3)


# --- arrays ---


def _fill(leaf: stored.Leaf, sharding: NamedSharding | None) -> jax.Array:
    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
        """What one device owns: a range of leading rows (experts)."""
        first = leaf.parts[0]
        if first.expert is None:
            rows = index[0] if index else slice(None)
            whole = rows.indices(leaf.shape[0])[:2] == (0, leaf.shape[0]) if leaf.shape else True
            return np.asarray(first.load() if whole else first.load(rows)).reshape(
                leaf.shape if whole else (-1, *leaf.shape[1:])
            )
        start, stop, _ = (index[0] if index else slice(None)).indices(leaf.shape[0])
        out = np.empty((stop - start, *leaf.shape[1:]), leaf.dtype)
        for part in leaf.parts:
            if part.expert is not None and start <= part.expert < stop:
                out[part.expert - start, part.start : part.start + part.rows] = part.load()
        return out

    if sharding is None:
        return jnp.asarray(piece(None))
    return jax.make_array_from_callback(leaf.shape, sharding, piece)


def _set(model: Any, path: ParamPath, arrays: dict[str, jax.Array], input_scale: Any) -> None:
    """Gives a parameter its value; a linear layer that is stored quantized becomes one of another class."""
    owner = _at(model, path[:-1])
    if "" in arrays:
        getattr(owner, str(path[-1])).set_value(arrays[""])
    elif isinstance(owner, MoEBlock):
        getattr(owner, str(path[-1])).set_value(NVFP4Tensor(**arrays))
    elif "global_scale" in arrays:
        scale = None if input_scale is None else jnp.float32(input_scale)
        # Without an entry in the scales the activations are plain.
        made = NVFP4Linear(NVFP4Tensor(**arrays), dtype=owner.dtype, input_scale=scale)
        _replace(model, path[:-1], made)
    else:
        _replace(model, path[:-1], BlockFP8Linear(BlockFP8Weights(**arrays), dtype=owner.dtype))


def _quantize_now(model: Any, path: ParamPath, plan: QuantizationPlan, source: stored.Source, prefix: str) -> None:
    """Plain linear layers that the plan quantizes, once each; weights of other classes are what they are."""
    owner = _at(model, path[:-1])
    method = plan.method(module_name(path[:-1], prefix))
    if source.stored in ("modelopt", "compressed_tensors") and isinstance(owner, NVFP4Linear):
        owner.activation_format = _activations(plan, source, module_name(path[:-1], prefix))
    if not (isinstance(owner, Linear) and path[-1] == "weight" and method.online):
        return
    if method.format == "nvfp4" and owner.weight.shape[1] % BLOCK_SIZE:
        name = module_name(path[:-1], prefix)
        raise ValueError(f"{name}: K = {owner.weight.shape[1]} is no multiple of {BLOCK_SIZE}, as NVFP4 needs")
    make = BlockFP8Linear.from_linear if method.format == "block_wise_fp8" else NVFP4Linear.from_linear
    _replace(model, path[:-1], make(owner))


def _blocks(model: Any) -> list[tuple[MoEBlock, ParamPath]]:
    found: list[tuple[Any, Any]] = list(nnx.iter_graph(model))
    return [(node, path) for path, node in found if isinstance(node, MoEBlock)]


def _at(model: Any, path: ParamPath) -> Any:
    for key in path:
        model = model[key] if isinstance(key, int) else getattr(model, key)
    return model


def _replace(model: Any, path: ParamPath, module: Any) -> None:
    setattr(_at(model, path[:-1]), str(path[-1]), module)
