"""Which tensors of a folder fill which parameters of which model, before any is read: what fits and what does not."""

import collections
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fp4jax.checkpoint import stacked, stored
from fp4jax.checkpoint.names import (
    Path as ParamPath,
    expert_modules,
    find_prefix,
    module_name,
    projections_of,
    stacked_name,
    tensor_name,
)
from fp4jax.checkpoint.reader import Reader, some
from fp4jax.checkpoint.save import CONFIG_NAME, model_params
from fp4jax.layers import Linear
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
from fp4jax.nvfp4 import GLOBAL_SCALE_RANGE
from fp4jax.quant_config import QuantizationPlan, plan_quantization
from fp4jax.quant_schemas import disagreements

QUANT_CONFIG_NAME = "hf_quant_config.json"
_MODELS: dict[str, tuple[Callable[..., Any], Any]] = {
    qwen3_moe.MODEL_TYPE: (Qwen3Moe, Qwen3MoeConfig),
    qwen3_moe.VL_MODEL_TYPE: (Qwen3Moe, Qwen3MoeConfig),
    ernie45_moe.MODEL_TYPE: (Ernie45Moe, Ernie45MoeConfig),
    deepseek_v3.MODEL_TYPE: (DeepseekV3, DeepseekV3Config),
}
_KV_SCALE = re.compile(r"layers\.(\d+)\.self_attn\.(?:[kv]_proj\.)?([kv]_scale)$")


class Match(NamedTuple):
    """A folder that can be loaded.

    model: of structs, no arrays yet. sources: where every parameter comes from. scales: of activations, see
    `_input_scales`. kv_scales: tensor -> (layer, "k_scale" or "v_scale"). disagreements: lines about modules that are
    not stored as the folder's config says.
    """

    config: Any
    plan: QuantizationPlan
    reader: Reader
    prefix: str
    model: Any
    sources: dict[ParamPath, stored.Source]
    scales: dict[ParamPath, Any]
    kv_scales: dict[str, tuple[int, str]]
    disagreements: list[str]


def match_folder(
    folder: Path,
    quantization: Mapping[str, Any] | str | None = None,
    dtype: Any = None,
    input_scales: str = "stored",
) -> Match:
    """Everything that `load_model` checks before it reads; arguments and errors are its own."""
    values = _read_json(folder / CONFIG_NAME)
    model_class, config = _model_and_config(folder, values, None if dtype is None else jnp.dtype(dtype).name)
    plan = plan_quantization(_quantization_of(folder, values), quantization)
    reader = Reader(folder)
    prefix = find_prefix(reader.names())
    model = nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0)))
    params = model_params(model)
    sources = {path: _source(reader, model, path, param.get_value(), prefix) for path, param in params.items()}
    found = {name: m for name in reader.names() if name.startswith(prefix) and (m := _KV_SCALE.search(name))}
    kv_scales = {name: (int(m[1]), m[2]) for name, m in found.items() if int(m[1]) < config.num_hidden_layers}
    _check_tensors(reader, config, sources, prefix, kv_scales)
    _check_head(reader, config, prefix)
    for name in kv_scales:
        stored.positive_scales(reader, name)
    scales = _input_scales(reader, model, sources, plan, prefix, input_scales)
    lines = _check_plan(reader, plan, sources, prefix)
    return Match(config, plan, reader, prefix, model, sources, scales, kv_scales, lines)


def at(model: Any, path: ParamPath) -> Any:
    """The module or parameter at a path."""
    for key in path:
        model = model[key] if isinstance(key, int) else getattr(model, key)
    return model


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
    if (section := values.get("quantization_config")) is not None:
        if not isinstance(section, dict):
            raise ValueError(f"{folder / CONFIG_NAME}: quantization_config must be an object, got {section!r}")
        if section:
            return section
    path = folder / QUANT_CONFIG_NAME
    return _read_json(path) if path.is_file() else None


# --- tensors ---


def _source(reader: Reader, model: Any, path: ParamPath, struct: Any, prefix: str) -> stored.Source:
    """Where a parameter comes from, by what the folder has."""
    owner, shape = at(model, path[:-1]), struct.shape
    base = stacked_name(path, prefix)
    if base is not None and (names := stacked.names_of(reader, base)) is not None:
        both = [(*path[:-1], name) for name in ("w13", "w2")]
        shapes = {str(stacked_name(one, prefix)): at(model, one).get_value().shape for one in both}
        transposed = stacked.is_transposed(reader, shapes)
        halves = len(projections_of(path))
        return stacked.source(reader, names, shape, struct.dtype, halves=halves, transposed=transposed)
    if base is not None:
        modules = [stored.Module(*place) for place in expert_places(reader, path, shape, prefix)]
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


def expert_places(
    reader: Reader, path: ParamPath, shape: tuple[int, ...], prefix: str
) -> Iterator[tuple[str, int, int, int]]:
    """`expert_modules` under the names that the folder has: some of ModelOpt's put the expert behind the projection."""
    for module, expert, start, rows in expert_modules(path, shape, prefix):
        experts, _, projection = module.rsplit(".", 2)
        behind = any(f"{experts}.{projection}.0.{end}" in reader for end in ("weight", "weight_packed"))
        yield f"{experts}.{projection}.{expert}" if behind else module, expert, start, rows


def _input_scales(reader, model, sources, plan, prefix, choice) -> dict[ParamPath, Any]:
    """Of parameters with NVFP4 activations: w13 the largest of all experts, w2 one per expert, linears theirs.

    None: per token.
    """
    found: dict[ParamPath, Any] = {}
    for path, source in sources.items():
        expert = stacked_name(path) is not None
        name = module_name(path[:-1], prefix)
        if (
            activations_of(plan, source, name if not expert else f"{name}.experts") != "nvfp4"
            or source.stored == "bf16"
        ):
            continue
        if choice == "per_token":
            found[path] = None
            continue
        shape = at(model, path).get_value().shape
        names = stacked.names_of(reader, str(stacked_name(path, prefix))) if expert else None
        if names is not None:
            of_experts = stacked.input_scales(reader, names, shape[0], len(projections_of(path)))
            values = [_usable(reader, names.input_scale, value) for value in of_experts]
        else:
            modules = [place[0] for place in expert_places(reader, path, shape, prefix)] if expert else [name]
            scales = stored.input_scales(reader, source.stored, modules)
            values = [
                _usable(reader, stored.input_scale_name(source.stored, m), scales.get(f"{m}.input_scale"))
                for m in modules
            ]
        found[path] = values if path[-1] == "w2" and expert else max(values)
    return found


def _usable(reader: Reader, tensor: str, scale: float | None) -> float:
    """A scale of activations that is there, positive and finite."""
    if scale is None:
        raise ValueError(
            f"{reader.folder}: {tensor} is missing; layers with NVFP4 activations need it "
            "(input_scales='per_token': not)"
        )
    if not GLOBAL_SCALE_RANGE[0] <= scale <= GLOBAL_SCALE_RANGE[1]:
        raise ValueError(
            f"{reader.file_of(tensor)}: tensor {tensor} = {scale} must be positive and finite, within [2^-100, 2^100]"
        )
    return float(scale)


def activations_of(plan: QuantizationPlan, source: stored.Source, module: str) -> Literal["nvfp4", "bf16"]:
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
    expected |= {name: stored.Tensor(name, None, stored.FLOATS) for name in kv_scales}
    for tensor in expected.values():
        shape = tensor.shape
        if shape is None:
            shape = (1,) if reader.shape(tensor.name) == (1,) else ()
        reader.check(tensor.name, shape, tensor.dtypes)


def _check_head(reader, config, prefix):
    """Raises for a head of its own in a folder whose config says that it has none."""
    head, embedding = tensor_name(("lm_head", "weight"), {}, prefix), f"{prefix}embed_tokens.weight"
    if not config.tie_word_embeddings or head not in reader:
        return
    reader.check(head, reader.shape(embedding), (reader.dtype(embedding),))
    if not np.array_equal(*(reader.read(name).view(np.uint8) for name in (head, embedding))):
        raise ValueError(
            f"{reader.file_of(head)}: tensor {head} differs from {embedding}, although {CONFIG_NAME} says that they "
            "are the same (tie_word_embeddings)"
        )


def _is_redundant(name: str, config: Any, prefix: str) -> bool:
    """What is not a weight of the text model, or follows from others.

    A tied head, RoPE frequencies, activation scales (read apart), layers that predict further tokens, other models.
    """
    if name.endswith(("rotary_emb.inv_freq", ".input_scale", "_proj_input_scale", ".input_global_scale")):
        return True
    if name.endswith("lm_head.weight"):
        return config.tie_word_embeddings
    if not name.startswith(prefix):
        return prefix != "model." and "language_model" in prefix
    if re.match(r"mtp_\w+\.", name.removeprefix(prefix)):  # ERNIE's name for them
        return True
    layer = re.match(r"layers\.(\d+)\.", name.removeprefix(prefix))
    return layer is not None and int(layer[1]) >= config.num_hidden_layers


def _check_plan(reader, plan, sources, prefix) -> list[str]:
    """Lines where the tensors are not what the folder's config says; raises where a user says that they are."""
    kinds = {}
    for path, source in sources.items():
        if stacked_name(path) is not None:
            kinds[f"{module_name(path[:-1], prefix)}.experts"] = source.stored
        elif source.stored != "bf16" or (path[-1] == "weight" and plan.dense.stored != "bf16"):
            kinds[module_name(path[:-1], prefix)] = source.stored
    lines = [line for line in disagreements(plan, kinds) if "norm" not in line and "embed_tokens" not in line]
    if lines and plan.source.startswith("--quantization"):
        for module, kind in kinds.items():
            if kind == "bf16" and plan.method(module).stored != "bf16":
                raise ValueError(
                    f"{reader.folder}: {module} is not quantized, although --quantization says that it is "
                    "(is_quantized, is_moe_quantized)"
                )
    return lines
