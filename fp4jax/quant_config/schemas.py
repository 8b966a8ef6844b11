"""Reads the quantization config of a checkpoint into a plan.

Three schemas are supported: ModelOpt's (in hf_quant_config.json or config.json), compressed-tensors' for NVFP4, and
DeepSeek's for block-wise FP8. A value that would change how a model is loaded or runs, and is not supported, is
refused. A note of the plan names the keys that are unknown.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fp4jax.quant_config.methods import (
    BF16,
    FP8_EXPERTS,
    FP8_STORED,
    FP8_STORED_UE8M0,
    Method,
    QuantizationPlan,
    Refusal,
)

BLOCK_SIZE = 16  # values per NVFP4 block scale
FP8_BLOCK = (128, 128)  # rows and columns of a weight that share one FP8 scale
_QUANT_ALGOS = {"NVFP4": "nvfp4", "W4A16_NVFP4": "bf16"}  # ModelOpt's name -> format of the activations
# FP8 algorithms that a mixed checkpoint may name for a single layer: ModelOpt's name -> supported group sizes. Whether
# the scales are per block or per tensor is read from the tensors, not from the name.
_FP8_ALGOS = {
    "FP8": (None,),
    "FP8_PB_WO": (None, *FP8_BLOCK[:1]),
    "FP8_PB_REAL_QUANT": (None, *FP8_BLOCK[:1]),
    "FP8_BLOCK_SCALES": (None, *FP8_BLOCK[:1]),
}
_CHECKPOINT_KEYS = {
    "modelopt_fp4": {"quant_method", "quant_algo", "kv_cache_quant_algo", "kv_cache_scheme", "group_size", "ignore",
                     "exclude_modules", "config_groups", "quantized_layers", "producer"},
    "compressed-tensors": {"quant_method", "format", "config_groups", "ignore", "kv_cache_scheme", "version",
                           "quantization_status", "global_compression_ratio", "sparsity_config", "transform_config"},
    "fp8": {"quant_method", "fmt", "activation_scheme", "weight_block_size", "modules_to_not_convert",
            "ignored_layers", "scale_fmt", "kv_cache_scheme"},
}  # fmt: skip
SECTIONS = ("quantization_config", "compression_config")  # older versions of compressed-tensors wrote the second key


def own_config(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Returns the quantization section of a checkpoint's config, or None if the config has none.

    Args:
      config: the contents of config.json (the section may also be inside its `text_config`), of hf_quant_config.json,
        or the section alone, which is returned as it is.

    Raises:
      ValueError: the section is no JSON object.
    """
    if not config:
        return None
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, Mapping) else {}):
        for key in SECTIONS:
            if section := _object(place, key):
                return section
    if isinstance(config.get("quantization"), Mapping):
        return {"quant_method": "modelopt", **config["quantization"]}
    whole = {"model_type", "architectures", *SECTIONS} & config.keys()
    return None if whole else config


def read_checkpoint_config(config: Mapping[str, Any]) -> tuple[str, QuantizationPlan]:
    """Reads a quantization section, and returns (the checkpoint's method, its plan).

    The method is "modelopt_fp4", "compressed-tensors" or "fp8".

    Raises:
      ValueError: a method, algorithm, format or value is unknown or not supported.
    """
    readers = {
        "modelopt": _read_modelopt, "modelopt_fp4": _read_modelopt,
        "compressed-tensors": _read_compressed_tensors, "fp8": _read_fp8,
    }  # fmt: skip
    if "quant_method" not in config and not {"quant_algo", "quantized_layers", "config_groups"} & config.keys():
        raise ValueError(
            f"the checkpoint's quantization section names no quant_method; it has the keys {sorted(config)}, "
            f"which no method is known by. Supported methods: {', '.join(readers)}"
        )
    method = config.get("quant_method", "modelopt")
    if not isinstance(method, str) or method not in readers:
        raise ValueError(f"quant_method={method!r} of the checkpoint is not supported; supported: {', '.join(readers)}")
    kind = "modelopt_fp4" if method == "modelopt" else method
    unknown = sorted(config.keys() - _CHECKPOINT_KEYS[kind])
    notes = (f"keys of the checkpoint's config that mean nothing here: {', '.join(unknown)}",) if unknown else ()
    plan = _with_cache(readers[method](config), _cache_scheme(config))
    return kind, dataclasses.replace(plan, source=f"the checkpoint ({kind})", notes=(*plan.notes, *notes))


def _cache_scheme(config: Mapping[str, Any]) -> Any:
    return config.get("kv_cache_quant_algo") or config.get("kv_cache_scheme")


# --- ModelOpt ---


def _read_modelopt(config: Mapping[str, Any]) -> QuantizationPlan:
    ignore = _patterns(config, "ignore", "exclude_modules")
    notes: tuple[str, ...] = ()
    algo = config.get("quant_algo")
    if algo == "MIXED_PRECISION":
        entries = _object(config, "quantized_layers")
        if not entries and (groups := _groups(config, "modelopt")):
            return _of_groups(groups, ignore, notes)
        if not entries:
            raise ValueError("quant_algo='MIXED_PRECISION' of the checkpoint names no layer in quantized_layers, and "
                             "has no config_groups; nothing says what the layers are")  # fmt: skip
        layers = {name: _modelopt_layer(name, entries[name]) for name in _expressions("quantized_layers", entries)}
        if any(method in (FP8_STORED, FP8_EXPERTS) for method in layers.values()):
            notes += ("layers in FP8 get activation scales per token and 128 values, whatever the checkpoint has",)
        return _of_layers(layers, ignore, notes)
    groups = _groups(config, "modelopt")
    if algo is None and groups:
        return _of_groups(groups, ignore, notes)
    if algo is None and _cache_scheme(config):  # the config quantizes the KV cache only
        return QuantizationPlan(ignore=ignore)
    if not isinstance(algo, str) or algo not in _QUANT_ALGOS:
        raise ValueError(f"quant_algo={algo!r} of the checkpoint is not supported; supported: MIXED_PRECISION, "
                         f"{', '.join(_QUANT_ALGOS)}")  # fmt: skip
    if (size := config.get("group_size")) not in (None, BLOCK_SIZE):
        raise ValueError(f"quant_algo={algo!r} of the checkpoint: group_size={size!r} is not supported, "
                         f"only {BLOCK_SIZE}")  # fmt: skip
    of_groups = [found for _, found in groups if isinstance(found, Method)]
    per_token = any(found.input_scales == "per_token" for found in of_groups)
    method = Method("nvfp4", "modelopt", _QUANT_ALGOS[algo], "per_token" if per_token else "stored")
    if said := {found.activations for found in of_groups} - {method.activations}:
        notes += (f"config_groups say activations in {said.pop()}; quant_algo={algo!r}, which is followed, says "
                  f"{method.activations}",)  # fmt: skip
    return QuantizationPlan(method, method, ignore=ignore, notes=notes)


def _modelopt_layer(name: str, entry: Any) -> Method | Refusal:
    """Reads one entry of quantized_layers.

    The keys `dynamic` (a scale per token) and `scale_fmt` are not ModelOpt's: `checkpoint.save_model` writes them.
    """
    entry = entry if isinstance(entry, Mapping) else {"quant_algo": entry}
    algo, size = entry.get("quant_algo"), entry.get("group_size")
    if not isinstance(algo, str) or algo not in (*_QUANT_ALGOS, *_FP8_ALGOS):
        supported = ", ".join((*_QUANT_ALGOS, *_FP8_ALGOS))
        return Refusal(f"quantized_layers: {name} has quant_algo={algo!r}; supported: {supported}")
    sizes = _FP8_ALGOS.get(algo, (None, BLOCK_SIZE))
    if size not in sizes:
        only = " or ".join(str(s) for s in sizes if s is not None) or "none"
        return Refusal(f"quantized_layers: {name} has quant_algo={algo!r} with group_size={size!r}; supported: {only}")
    for key, values in (("scale_fmt", (None, "ue8m0")), ("dynamic", (None, False, True))):
        if not any(entry.get(key) is value or entry.get(key) == value for value in values):
            return Refusal(f"quantized_layers: {name} has {key}={entry[key]!r}, which is not supported for {algo}")
    if algo in _FP8_ALGOS:
        stored = FP8_STORED_UE8M0 if entry.get("scale_fmt") == "ue8m0" else FP8_STORED
        return FP8_EXPERTS if ".experts" in name else stored
    return Method("nvfp4", "modelopt", _QUANT_ALGOS[algo], "per_token" if entry.get("dynamic") is True else "stored")


# --- compressed-tensors ---


def _read_compressed_tensors(config: Mapping[str, Any]) -> QuantizationPlan:
    for key, supported in (("format", "nvfp4-pack-quantized"), ("quantization_status", "compressed")):
        if (value := config.get(key, supported if key != "format" else None)) != supported:
            raise ValueError(f"compressed-tensors: {key}={value!r} is not supported, only {supported!r}")
    for key in ("sparsity_config", "transform_config"):
        if config.get(key):
            raise ValueError(f"compressed-tensors: {key}={config[key]!r} is not supported")
    groups = _groups(config, "compressed_tensors")
    if not groups:
        raise ValueError(f"compressed-tensors: config_groups must have groups, got {config.get('config_groups')!r}")
    return _of_groups(groups, _patterns(config, "ignore"), ())


# --- block-wise FP8 ---


def _read_fp8(config: Mapping[str, Any]) -> QuantizationPlan:
    block = config.get("weight_block_size")
    if not isinstance(block, list | tuple) or tuple(block) != FP8_BLOCK:
        raise ValueError(f"fp8: weight_block_size={block!r} is not supported, only {list(FP8_BLOCK)}")
    for key, supported in (("activation_scheme", "dynamic"), ("fmt", "e4m3")):
        if config.get(key, supported) != supported:
            raise ValueError(f"fp8: {key}={config[key]!r} is not supported, only {supported!r}")
    scale_formats = {None: FP8_STORED, "float32": FP8_STORED, "ue8m0": FP8_STORED_UE8M0}
    scale_format = config.get("scale_fmt")
    if not isinstance(scale_format, str | None) or scale_format not in scale_formats:
        raise ValueError(f"fp8: scale_fmt={scale_format!r} is not supported, only 'float32' and 'ue8m0'")
    ignore = _patterns(config, "modules_to_not_convert", "ignored_layers")
    note = "experts stored in block-wise FP8 are decoded to bf16 while loading"
    return QuantizationPlan(scale_formats[scale_format], FP8_EXPERTS, ignore=ignore, notes=(note,))


# --- config_groups, a key of both ModelOpt and compressed-tensors ---


def _groups(config: Mapping[str, Any], stored: str) -> list[tuple[list[str], Method | Refusal]]:
    """Returns (targets, method) of every group; an empty list of targets stands for all linear layers.

    An unsupported group raises at once if it is for all linear layers. Else it gives a Refusal, which raises when one
    of the group's targets is loaded.
    """
    found: list[tuple[list[str], Method | Refusal]] = []
    groups = _object(config, "config_groups")
    for name in groups:
        group = _object(groups, name)
        targets = _targets(name, group)
        try:
            found.append((targets, _method_of_group(name, group, stored)))
        except ValueError as error:
            if not targets:
                raise
            found.append((targets, Refusal(str(error))))
    return found


def _method_of_group(name: str, group: Mapping[str, Any], stored: str) -> Method:
    _check_scheme(f"config_groups: {name}.weights", group.get("weights"), dynamic=(None, False))
    if (output := group.get("output_activations")) is not None:
        raise ValueError(f"config_groups: {name}.output_activations is {output!r}; only null is supported")
    scheme = group.get("input_activations")
    if scheme is None:
        return Method("nvfp4", stored, "bf16")
    _check_scheme(f"config_groups: {name}.input_activations", scheme, dynamic=(None, False, "local", True))
    return Method("nvfp4", stored, "nvfp4", "per_token" if scheme.get("dynamic") is True else "stored")


def _check_scheme(where: str, scheme: Any, *, dynamic: tuple[Any, ...]) -> None:
    """Raises ValueError unless a scheme is NVFP4: 4-bit floats with a scale for every 16 values, in stored order."""
    if not isinstance(scheme, Mapping) or (scheme.get("num_bits"), scheme.get("type")) != (4, "float"):
        raise ValueError(f"{where} is {scheme!r}, supported are floats of 4 bits")
    accepted = {
        "group_size": (None, BLOCK_SIZE), "symmetric": (None, True), "strategy": (None, "tensor_group", "group"),
        "actorder": (None,), "block_structure": (None,), "dynamic": dynamic,
    }  # fmt: skip
    for key, values in accepted.items():
        if not any(scheme.get(key) is value or scheme.get(key) == value for value in values):
            raise ValueError(f"{where}: {key}={scheme[key]!r} is not supported, only "
                             f"{' or '.join(repr(v) for v in values if v is not None) or 'null'}")  # fmt: skip


def _targets(name: str, group: Mapping[str, Any]) -> list[str]:
    """Returns names and patterns of the modules of a group; an empty list stands for all linear layers."""
    targets = group.get("targets") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"config_groups: {name}.targets={targets!r} must be a list of names")
    if not targets or "Linear" in targets:
        return []
    classes = [target for target in targets if not target.startswith("re:") and "." not in target]
    if unknown := [target for target in classes if target[:1].isupper()]:
        raise ValueError(f"config_groups: {name}.targets has the class {unknown[0]!r}; supported are 'Linear', names "
                         "of modules, and regular expressions after 're:'")  # fmt: skip
    return list(_expressions("config_groups", targets))


def _of_groups(
    groups: list[tuple[list[str], Method | Refusal]], ignore: tuple[str, ...], notes: tuple[str, ...]
) -> QuantizationPlan:
    whole = {method for targets, method in groups if not targets and isinstance(method, Method)}
    if len(whole) > 1:
        raise ValueError("config_groups has groups for all linear layers that differ in their activations; they must "
                         f"agree, got {', '.join(sorted(method.activations for method in whole))}")  # fmt: skip
    layers: dict[str, Method | Refusal] = {target: method for targets, method in groups for target in targets}
    if not whole:
        return _of_layers(layers, ignore, notes)
    (method,) = whole
    return QuantizationPlan(method, method, ignore=ignore, layers=tuple(layers.items()), notes=notes)


def _of_layers(
    layers: Mapping[str, Method | Refusal], ignore: tuple[str, ...], notes: tuple[str, ...]
) -> QuantizationPlan:
    """Returns a plan in which each module of `layers` has a method of its own.

    Experts without an entry run like the experts with entries if all of those have one method, else they are bf16.
    Other modules without an entry are bf16.
    """
    experts = {method for name, method in layers.items() if ".experts" in name and isinstance(method, Method)}
    return QuantizationPlan(
        BF16, experts.pop() if len(experts) == 1 else BF16, ignore=ignore, layers=tuple(layers.items()), notes=notes
    )


# --- values ---


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{key}={value!r} of the checkpoint must be an object")
    return value


def _patterns(config: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    """Returns the module names and patterns that the config lists under any of the keys, without repetitions."""
    found: dict[str, None] = {}
    for key in keys:
        names = config.get(key) or []
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{key}={names!r} of the checkpoint must be a list of names")
        found |= dict.fromkeys(_expressions(key, names))
    return tuple(found)


def _expressions(key: str, names: Iterable[str]) -> tuple[str, ...]:
    """Returns the names as a tuple; raises ValueError if a name begins with "re:" and the rest is no expression."""
    names = tuple(names)
    for name in names:
        try:
            re.compile(name[3:] if name.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"{key} of the checkpoint: {name!r} is not a regular expression: {error}") from error
    return names


def _with_cache(plan: QuantizationPlan, scheme: Any) -> QuantizationPlan:
    """Returns the plan with the format of the cache that `kv_cache_quant_algo` or `kv_cache_scheme` asks for."""
    if not scheme:
        return plan
    if is_fp8_cache(scheme):
        return dataclasses.replace(plan, fp8_cache=True)
    note = f"the cache stays in the compute dtype; the checkpoint suggests {scheme!r}"
    return dataclasses.replace(plan, notes=(*plan.notes, note))


def is_fp8_cache(scheme: Any) -> bool:
    """Whether a cache scheme of a checkpoint is FP8 with one scale for all keys of a layer and one for all values."""
    if not isinstance(scheme, Mapping):
        return scheme == "FP8"
    known = (scheme.get("num_bits"), scheme.get("type")) == (8, "float")
    return known and scheme.get("strategy") in (None, "tensor") and not scheme.get("dynamic")
