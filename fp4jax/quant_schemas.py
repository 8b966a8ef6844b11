"""How modules of a checkpoint are stored and what they run as, and what a checkpoint's own config says about it.

Three kinds of configs: ModelOpt's (hf_quant_config.json, or inside config.json), compressed-tensors' NVFP4, and
block-wise FP8 as DeepSeek stores it.
"""

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

BLOCK_SIZE = 16  # values per NVFP4 block scale
FP8_BLOCK = (128, 128)
_QUANT_ALGOS = {"NVFP4": "nvfp4", "W4A16_NVFP4": "bf16"}  # ModelOpt's name: what the activations are
# Of single layers in a mixed checkpoint; scales per block or per tensor, as the tensors say.
_FP8_ALGOS = ("FP8", "FP8_PB_WO", "FP8_PB_REAL_QUANT", "FP8_BLOCK_SCALES")
_CHECKPOINT_KEYS = {
    "modelopt_fp4": {"quant_method", "quant_algo", "kv_cache_quant_algo", "kv_cache_scheme", "group_size", "ignore",
                     "exclude_modules", "config_groups", "quantized_layers", "producer"},
    "compressed-tensors": {"quant_method", "format", "config_groups", "ignore", "kv_cache_scheme", "version",
                           "quantization_status", "global_compression_ratio", "sparsity_config", "transform_config"},
    "fp8": {"quant_method", "fmt", "activation_scheme", "weight_block_size", "modules_to_not_convert",
            "ignored_layers", "scale_fmt"},
}  # fmt: skip


class Method(NamedTuple):
    """What a module runs as, and how its weights are stored.

    format: "bf16", "block_wise_fp8" or "nvfp4". stored: "bf16", "block_wise_fp8", "modelopt" or "compressed_tensors".
    activations: of nvfp4 "nvfp4" (W4A4) or "bf16" (W4A16); of block_wise_fp8 "fp8"; else "bf16".
    """

    format: str
    stored: str
    activations: str

    @property
    def online(self) -> bool:
        """Whether weights are quantized while they are loaded."""
        return self.stored == "bf16" != self.format

    def __str__(self) -> str:
        if self.format == "bf16":
            return "bf16" if self.stored == "bf16" else f"bf16, stored as {self.stored}"
        how = "quantized while loading" if self.online else f"stored as {self.stored}"
        return f"{self.format}, {how}, activations {self.activations}"


BF16 = Method("bf16", "bf16", "bf16")
FP8_STORED = Method("block_wise_fp8", "block_wise_fp8", "fp8")
_FP8_EXPERTS = Method("bf16", "block_wise_fp8", "bf16")
FP8_ONLINE = Method("block_wise_fp8", "bf16", "fp8")
NVFP4_ONLINE = Method("nvfp4", "bf16", "nvfp4")


@dataclasses.dataclass(frozen=True)
class QuantizationPlan:
    """A method for every linear layer (`dense`) and every expert layer (`experts`) of a model.

    source: which config decided. ignore: patterns of modules that stay as they are. layers: methods of single modules
    (mixed precision), which go before all others. notes: what a user should know about the decision.
    """

    dense: Method = BF16
    experts: Method = BF16
    source: str = "none"
    ignore: tuple[str, ...] = ()
    layers: tuple[tuple[str, Method], ...] = ()
    notes: tuple[str, ...] = ()

    def method(self, module: str) -> Method:
        """Of a module by its name in the checkpoint, such as model.layers.3.self_attn.q_proj or .mlp.experts."""
        for name, method in self.layers:
            if _matches(name, module) or name.startswith(module + "."):
                return method
        expert = module.endswith(".experts") or ".experts." in module
        if self.ignored_by(module) is not None or (self.dense.online and not expert and _stays_plain(module)):
            return BF16
        return self.experts if expert else self.dense

    def ignored_by(self, module: str) -> str | None:
        """The first pattern that excludes a module or one that contains it."""
        return next((pattern for pattern in self.ignore if _matches(pattern, module)), None)

    def __str__(self) -> str:
        lines = [
            f"quantization by: {self.source}",
            f"linear layers:   {self.dense}",
            f"experts:         {self.experts}",
        ]
        lines += [f"{name}: {method}" for name, method in self.layers]
        lines += [f"as they are:     {', '.join(self.ignore)}"] if self.ignore else []
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


# --- the checkpoint's config ---


def own_config(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The quantization dict inside a config.json or hf_quant_config.json, or the dict itself."""
    if not config:
        return None
    if "quantization_config" in config:
        return config["quantization_config"] or None
    if "quantization" in config and isinstance(config["quantization"], Mapping):
        return {"quant_method": "modelopt", **config["quantization"]}
    return config if {"quant_method", "quant_algo"} & config.keys() else None


def read_checkpoint_config(config: Mapping[str, Any]) -> tuple[str, QuantizationPlan]:
    """-> ("modelopt_fp4", "compressed-tensors" or "fp8", what the config says).

    Raises:
      ValueError: for methods, algorithms, formats and values that are unknown or not supported.
    """
    readers = {
        "modelopt": _read_modelopt, "modelopt_fp4": _read_modelopt,
        "compressed-tensors": _read_compressed_tensors, "fp8": _read_fp8,
    }  # fmt: skip
    method = config.get("quant_method", "modelopt")
    if not isinstance(method, str) or method not in readers:
        raise ValueError(f"quant_method={method!r} of the checkpoint is not supported; supported: {', '.join(readers)}")
    kind = "modelopt_fp4" if method == "modelopt" else method
    unknown = sorted(config.keys() - _CHECKPOINT_KEYS[kind])
    notes = (f"keys of the checkpoint's config that mean nothing here: {', '.join(unknown)}",) if unknown else ()
    plan = readers[method](config)
    return kind, dataclasses.replace(plan, source=f"the checkpoint ({kind})", notes=(*plan.notes, *notes))


def _read_modelopt(config: Mapping[str, Any]) -> QuantizationPlan:
    ignore = _patterns(config, "ignore", "exclude_modules")
    _check_group_size(config.get("group_size"))
    notes = _kv_note(config.get("kv_cache_quant_algo") or config.get("kv_cache_scheme"))
    algo = config.get("quant_algo")
    if algo == "MIXED_PRECISION":
        layers = tuple(
            (name, _modelopt_layer(name, entry)) for name, entry in _object(config, "quantized_layers").items()
        )
        experts = next((method for name, method in layers if ".experts" in name), BF16)
        return QuantizationPlan(BF16, experts, ignore=ignore, layers=layers, notes=notes)
    if algo is None and config.get("config_groups"):
        activations = _activations_of_groups(_object(config, "config_groups"))
    elif isinstance(algo, str) and algo in _QUANT_ALGOS:
        activations = _QUANT_ALGOS[algo]
    else:
        raise ValueError(f"quant_algo={algo!r} of the checkpoint is not supported; supported: MIXED_PRECISION, "
                         f"{', '.join(_QUANT_ALGOS)}")  # fmt: skip
    method = Method("nvfp4", "modelopt", activations)
    return QuantizationPlan(method, method, ignore=ignore, notes=notes)


def _modelopt_layer(name: str, entry: Any) -> Method:
    algo = entry.get("quant_algo") if isinstance(entry, Mapping) else entry
    if isinstance(entry, Mapping):
        _check_group_size(entry.get("group_size"))
    if isinstance(algo, str) and algo in _FP8_ALGOS:
        return _FP8_EXPERTS if ".experts" in name else FP8_STORED
    if not isinstance(algo, str) or algo not in _QUANT_ALGOS:
        supported = ", ".join((*_QUANT_ALGOS, *_FP8_ALGOS))
        raise ValueError(f"quantized_layers: {name} has quant_algo={algo!r}; supported: {supported}")
    return Method("nvfp4", "modelopt", _QUANT_ALGOS[algo])


def _read_compressed_tensors(config: Mapping[str, Any]) -> QuantizationPlan:
    if config.get("format") != "nvfp4-pack-quantized":
        raise ValueError(
            f"compressed-tensors: format={config.get('format')!r} is not supported, only 'nvfp4-pack-quantized'"
        )
    for key in ("sparsity_config", "transform_config"):
        if config.get(key):
            raise ValueError(f"compressed-tensors: {key}={config[key]!r} is not supported")
    method = Method("nvfp4", "compressed_tensors", _activations_of_groups(_object(config, "config_groups")))
    notes = _kv_note(config.get("kv_cache_scheme"))
    return QuantizationPlan(method, method, ignore=_patterns(config, "ignore"), notes=notes)


def _read_fp8(config: Mapping[str, Any]) -> QuantizationPlan:
    block = config.get("weight_block_size")
    if not isinstance(block, list | tuple) or tuple(block) != FP8_BLOCK:
        raise ValueError(f"fp8: weight_block_size={block!r} is not supported, only {list(FP8_BLOCK)}")
    for key, supported in (("activation_scheme", "dynamic"), ("fmt", "e4m3")):
        if config.get(key, supported) != supported:
            raise ValueError(f"fp8: {key}={config[key]!r} is not supported, only {supported!r}")
    ignore = _patterns(config, "modules_to_not_convert", "ignored_layers")
    note = "experts stored in block-wise FP8 are decoded to bf16 while loading"
    return QuantizationPlan(FP8_STORED, _FP8_EXPERTS, ignore=ignore, notes=(note,))


def _activations_of_groups(groups: Mapping[str, Any]) -> str:
    """What the activations of all `config_groups` are, nvfp4 or bf16; the groups must agree."""
    found = set()
    for name in groups:
        group = _object(groups, name)
        for part in ("weights", "input_activations"):
            scheme = group.get(part)
            if scheme is None and part == "input_activations":
                continue
            if not isinstance(scheme, Mapping) or (scheme.get("num_bits"), scheme.get("type")) != (4, "float"):
                raise ValueError(f"config_groups: {name}.{part} is {scheme!r}, supported are floats of 4 bits")
            _check_group_size(scheme.get("group_size"))
        found.add("bf16" if group.get("input_activations") is None else "nvfp4")
    if len(found) != 1:
        raise ValueError(f"config_groups must have groups that agree on their activations, got {sorted(groups)}")
    return found.pop()


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{key}={value!r} of the checkpoint must be an object")
    return value


def _patterns(config: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    """The list of module names and patterns under the first of the keys that has one."""
    key = next((key for key in keys if config.get(key)), keys[0])
    names = config.get(key) or []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{key}={names!r} of the checkpoint must be a list of names")
    for name in names:
        try:
            re.compile(name[3:] if name.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"{key} of the checkpoint: {name!r} is not a regular expression: {error}") from error
    return tuple(names)


def _check_group_size(size: Any) -> None:
    if size not in (None, BLOCK_SIZE):
        raise ValueError(f"group_size={size!r} is not supported, only {BLOCK_SIZE}")


def _kv_note(scheme: Any) -> tuple[str, ...]:
    return (f"the cache stays in the compute dtype; the checkpoint suggests {scheme!r}",) if scheme else ()


# --- names ---


def _stays_plain(module: str) -> bool:
    """Modules that are never quantized on the way: heads, embeddings, routers and the gates of shared experts."""
    return module.rsplit(".", 1)[-1] in ("lm_head", "embed_tokens", "gate", "shared_expert_gate", "correction_bias")


def _matches(pattern: str, module: str) -> bool:
    """A pattern with wildcards, or a regular expression after "re:", for a module or one that it is part of."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    parts = module.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:n]), pattern) for n in range(len(parts), 0, -1))


def disagreements(plan: QuantizationPlan, stored: Mapping[str, str]) -> Iterable[str]:
    """Lines about modules whose tensors ({module: how it is stored}) are not what the checkpoint's config says."""
    for module, found in stored.items():
        expected = plan.method(module).stored
        if found != expected:
            pattern = plan.ignored_by(module)
            why = f" (ignored as {pattern!r})" if pattern is not None else ""
            yield f"{module}: the config says {expected}{why}, the tensors are {found}"
