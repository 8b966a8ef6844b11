"""Matches the tensors of a folder with the parameters of its model, and finds problems before parameters are filled."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fp4jax.checkpoint.folder_config import CONFIG_NAME, model_and_config, quantization_plan
from fp4jax.checkpoint.names import (
    Path as ParamPath,
    expert_modules,
    find_prefix,
    module_name,
    projections_of,
    stacked_name,
    tensor_name,
)
from fp4jax.checkpoint.run_as import activation_scales, method_of
from fp4jax.checkpoint.storage import stacked, stored
from fp4jax.checkpoint.storage.reader import Reader, some
from fp4jax.checkpoint.storage.scales import positive_scales
from fp4jax.layers import Linear
from fp4jax.quant_config.methods import Method, QuantizationPlan, disagreements

_KV_SCALE = re.compile(r"layers\.(\d+)\.self_attn\.(?:[kv]_proj\.)?([kv]_scale)$")


class Match(NamedTuple):
    """A folder, its model, and how the tensors of the one fill the parameters of the other.

    config: the config of the model.
    plan: the quantization plan of the folder and the user.
    reader: the tensors of the folder.
    prefix: what the folder puts before the names of modules, such as "model."; see `names.find_prefix`.
    model: the model, whose parameters hold ShapeDtypeStructs instead of arrays.
    sources: for every parameter, the tensors that it is read from.
    methods: for every parameter, how it is stored and runs; incomplete where `problems` says why.
    scales: the stored scales of NVFP4 activations by parameter, see `run_as.activation_scales`. A parameter with NVFP4
      activations and no entry gets a scale per token.
    kv_scales: {name of a tensor with a scale of the KV cache: (index of its layer, "k_scale" or "v_scale")}.
    disagreements: one line of text for each module that is not stored as the folder's config says.
    problems: reasons why the folder cannot be loaded although its tensors are those of the model; empty if it can.
    """

    config: Any
    plan: QuantizationPlan
    reader: Reader
    prefix: str
    model: Any
    sources: dict[ParamPath, stored.Source]
    methods: dict[ParamPath, Method]
    scales: dict[ParamPath, Any]
    kv_scales: dict[str, tuple[int, str]]
    disagreements: list[str]
    problems: list[str]


def match_folder(folder: Path, *arguments: Any, **options: Any) -> Match:
    """Examines a folder like `examine_folder`, with the same arguments, and raises if it cannot be loaded.

    Raises:
      FileNotFoundError, ValueError: as `examine_folder` does.
      ValueError: `examine_folder` finds problems; the message has the first of them and the number of the others.
    """
    match = examine_folder(folder, *arguments, **options)
    if match.problems:
        others = len(match.problems) - 1
        more = f" (and {others} more problem{'s' if others > 1 else ''}; the inspector lists them)" if others else ""
        raise ValueError(match.problems[0] + more)
    return match


def examine_folder(
    folder: Path,
    quantization: Mapping[str, Any] | str | None = None,
    dtype: Any = None,
    input_scales: str = "stored",
    devices: int = 1,
) -> Match:
    """Makes all checks that `load_model` makes before it fills parameters.

    Problems of single modules are collected in the result: `load_model` raises the first one, and the report of
    `inspect_folder` shows all of them.

    Args:
      folder, quantization, dtype, input_scales: as in `load_model`.
      devices: the number of devices that the experts are split over.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the folder holds no supported model, its tensors are not exactly those of the model, a tensor has a
        wrong shape or type, or an argument has a value that does not exist.
    """
    if input_scales not in ("stored", "per_token"):
        raise ValueError(f"input_scales must be 'stored' or 'per_token', got {input_scales!r}")
    try:
        dtype = None if dtype is None else jnp.dtype(dtype).name
    except TypeError as error:
        raise ValueError(f"dtype must be bfloat16 or float32, as a name or a type, got {dtype!r}") from error
    model_class, config = model_and_config(folder, dtype)
    plan = quantization_plan(folder, quantization)
    reader = Reader(folder)
    prefix = find_prefix(reader.names())
    model = nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0)))
    shapes = {path: param.get_value() for path, param in model_params(model).items()}
    sources = {path: _source(reader, model, path, struct, prefix) for path, struct in shapes.items()}
    found = {name: m for name in reader.names() if name.startswith(prefix) and (m := _KV_SCALE.search(name))}
    kv_scales = {name: (int(m[1]), m[2]) for name, m in found.items() if int(m[1]) < config.num_hidden_layers}
    _check_tensors(reader, config, sources, prefix, kv_scales)
    _check_head(reader, config, prefix)
    problems, methods, scales = [], {}, {}
    if config.num_experts % devices and model.moe_blocks():
        problems.append(f"{folder}: {config.num_experts} experts cannot be split over {devices} devices")
    for path, source in sources.items():
        shape = shapes[path].shape
        try:
            methods[path] = method = method_of(plan, source, path, shape)
            has_scales = method.activations == "nvfp4" and method.input_scales == "stored"
            if has_scales and input_scales == "stored":
                scales[path] = activation_scales(reader, source, path, prefix, shape)
        except ValueError as error:
            problems.append(str(error))
    for name in kv_scales:
        try:
            positive_scales(reader, name)
        except ValueError as error:
            problems.append(str(error))
    lines = [] if problems else _check_plan(reader, plan, sources, prefix)
    return Match(config, plan, reader, prefix, model, sources, methods, scales, kv_scales, lines, problems)


def model_params(model: nnx.Module) -> dict[Any, nnx.Param]:
    """Returns {path: parameter} of a model's weights; the activation scales of experts are left out."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {path: param for path, param in flat if not str(path[-1]).startswith("input_scale")}


def at(model: Any, path: ParamPath) -> Any:
    """Returns the module or parameter at a path of a model; path elements are attribute names and indices."""
    for key in path:
        model = model[key] if isinstance(key, int) else getattr(model, key)
    return model


# --- from parameters to tensors ---


def _source(reader: Reader, model: Any, path: ParamPath, struct: Any, prefix: str) -> stored.Source:
    """Returns the tensors that a parameter is read from: the folder decides how they are named and stored."""
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
        return stored.weight_source(reader, modules, shape, struct.dtype, decode=True)
    name = module_name(path[:-1], prefix)
    if isinstance(owner, Linear):
        whole = [stored.Module(name, None, 0, shape[0])]
        return stored.weight_source(reader, whole, shape, struct.dtype, decode=False)
    full = tensor_name(path, model.TENSOR_NAMES, prefix)
    row = (1, *shape)  # ERNIE checkpoints store the correction bias as [1, E]
    tensor = stored.Tensor(full, row if full in reader and reader.shape(full) == row else shape, stored.FLOATS)
    return stored.plain_source(reader, [(stored.Module(name, None, 0, shape[0]), tensor)], shape, struct.dtype)


def expert_places(
    reader: Reader, path: ParamPath, shape: tuple[int, ...], prefix: str
) -> Iterator[tuple[str, int, int, int]]:
    """Yields what `names.expert_modules` yields, with the module names that the folder uses.

    Some ModelOpt folders put the expert's index after the projection: `experts.down_proj.3` for `experts.3.down_proj`.
    """
    for module, expert, start, rows in expert_modules(path, shape, prefix):
        experts, _, projection = module.rsplit(".", 2)
        behind = any(f"{experts}.{projection}.0.{end}" in reader for end in ("weight", "weight_packed"))
        yield f"{experts}.{projection}.{expert}" if behind else module, expert, start, rows


def _check_tensors(reader, config, sources, prefix, kv_scales):
    """Raises ValueError unless the folder has exactly the tensors of the model, with the right shapes and types."""
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
    """Raises ValueError if the config ties the head to the embedding, but the folder has a different head."""
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
    """Whether the loader may skip a tensor, since it is no weight of the text model or follows from other tensors.

    Such tensors are: a tied head, RoPE frequencies, activation scales (`run_as` reads them), layers that predict
    further tokens, and the tensors of other models in the folder, such as an image encoder.
    """
    if name.endswith(("rotary_emb.inv_freq", ".input_scale", "_proj_input_scale", ".input_global_scale")):
        return True
    if name.endswith("lm_head.weight"):
        return config.tie_word_embeddings
    if not name.startswith(prefix):
        return prefix != "model." and "language_model" in prefix
    if re.match(r"mtp_\w+\.", name.removeprefix(prefix)):  # ERNIE's layers that predict further tokens
        return True
    layer = re.match(r"layers\.(\d+)\.", name.removeprefix(prefix))
    return layer is not None and int(layer[1]) >= config.num_hidden_layers


def _check_plan(reader, plan, sources, prefix) -> list[str]:
    """Returns one line of text for each module whose tensors are not what the config says.

    Raises:
      ValueError: the user's config says that a module is quantized in the folder, and its tensors are plain.
    """
    linears: dict[str, str] = {}
    blocks: dict[str, dict[str, str]] = {}
    for path, source in sources.items():
        if stacked_name(path) is not None:
            experts = f"{module_name(path[:-1], prefix)}.experts"
            blocks.setdefault(experts, {}).update(dict.fromkeys(projections_of(path), source.stored))
        elif source.modules:
            linears[source.modules[0]] = source.stored
    kinds = {}
    for experts, projections in blocks.items():
        alike = len(set(projections.values())) == 1
        kinds |= {experts if alike else f"{experts}.0.{name}": kind for name, kind in projections.items()}
    kinds |= linears
    lines = list(disagreements(plan, kinds))
    if lines and plan.source.startswith("--quantization"):
        for module, kind in kinds.items():
            if kind == "bf16" and plan.method(module).stored != "bf16":
                raise ValueError(
                    f"{reader.folder}: {module} is not quantized, although --quantization says that it is "
                    "(is_quantized, is_moe_quantized)"
                )
    return lines
