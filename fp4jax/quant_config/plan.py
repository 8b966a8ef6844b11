"""Makes the quantization plan of a model from two configs: the checkpoint's own, and the user's.

The checkpoint's own config is the `quantization_config` of config.json, or hf_quant_config.json. The user's config is
the `--quantization` flag, the JSON of the serving system that this project re-implements. `plan_quantization` decides
which of the two wins. It reads no files and no tensors; the loader later compares the plan with the tensors, and where
they differ it follows the tensors.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from fp4jax.quant_config.methods import BF16, FP8_ONLINE, FP8_STORED, NVFP4_ONLINE, Method, QuantizationPlan
from fp4jax.quant_config.schemas import own_config, read_checkpoint_config

_USER_DEFAULTS: dict[str, Any] = {
    "dense_quant_type": None, "moe_quant_type": None, "image_moe_quant_type": None, "kv_cache_quant_type": None,
    "is_channel_wise": False, "has_zero_point": False, "is_permuted": True, "is_quantized": False,
    "is_moe_quantized": False, "moe_quant_config": {}, "hadamard_block_size": 128, "moe_dynamic_quant": False,
}  # fmt: skip
# Keys that the serving system lets the user choose, but this project does not: only the default value is accepted.
_FIXED = ("kv_cache_quant_type", "is_channel_wise", "has_zero_point", "is_permuted", "hadamard_block_size",
          "moe_dynamic_quant")  # fmt: skip
_USER_METHODS = ("block_wise_fp8", "modelopt_fp4")


def plan_quantization(
    checkpoint_config: Mapping[str, Any] | None, user_config: Mapping[str, Any] | str | None
) -> QuantizationPlan:
    """Returns the plan for a checkpoint and the wishes of the user.

    Args:
      checkpoint_config: the contents of config.json (with or without a quantization section), of hf_quant_config.json,
        or the quantization section alone; None: the checkpoint has no config.
      user_config: a dict, or its JSON text, with the key "quantization", which is "mix_quant" or one method for the
        whole model, and the further keys of mix_quant. The bare name of a method is accepted too. None or "": the user
        has no wishes.

    If both configs ask for quantization, the checkpoint's wins, and a note of the plan says so. There is one exception:
    the user's mix_quant wins over a checkpoint that says modelopt_fp4. Then the checkpoint's config serves as the
    `moe_quant_config` if the user gives none. A checkpoint may also say "quantization": "mix_quant" itself, as
    checkpoints of the serving system do; its keys are read like the user's.

    Raises:
      ValueError: the user's config has an unknown key; the checkpoint's section names no method; or either config has
        a method, algorithm, format or value that is unknown or not supported. The message has the key and the value. A
        problem with a single module does not raise here, but when `QuantizationPlan.method` is asked for the module.
    """
    own, user = own_config(checkpoint_config), _read_user(user_config, "--quantization")
    kind, stored = ("", None) if own is None else _read_own(own)
    if user is None:
        return QuantizationPlan() if stored is None else stored
    if stored is not None and not (user["quantization"] == "mix_quant" and kind == "modelopt_fp4"):
        note = f"--quantization asks for {user['quantization']}; the checkpoint's own config wins"
        return dataclasses.replace(stored, notes=(*stored.notes, note))
    return _plan_of(user, stored, "--quantization")


def _read_own(own: Mapping[str, Any]) -> tuple[str, QuantizationPlan]:
    """Returns (the checkpoint's quantization method, its plan)."""
    if "quant_method" in own or not isinstance(own.get("quantization"), str):
        return read_checkpoint_config(own)
    found = _read_user(own, "the checkpoint's quantization section")
    assert found is not None
    return found["quantization"], _plan_of(found, None, f"the checkpoint ({found['quantization']})")


def _plan_of(user: Mapping[str, Any], stored: QuantizationPlan | None, source: str) -> QuantizationPlan:
    if user["quantization"] == "mix_quant":
        return _mixed(user, stored, source)
    if user["quantization"] == "modelopt_fp4":
        return QuantizationPlan(NVFP4_ONLINE, NVFP4_ONLINE, source)
    note = "experts have no block-wise FP8 here: they stay bf16 (mix_quant with moe_quant_type quantizes them to NVFP4)"
    return QuantizationPlan(FP8_ONLINE, BF16, source, notes=(note,))


def _mixed(user: Mapping[str, Any], stored: QuantizationPlan | None, source: str) -> QuantizationPlan:
    given, notes = user["moe_quant_config"], ()
    config = None if not given else read_checkpoint_config(own_config(given) or given)[1]
    if config is None and stored is not None:
        config, source = stored, f"{source} over the checkpoint's modelopt_fp4, which is the moe_quant_config"
    if config is not None:
        notes = config.notes
    fp8_cache = config is not None and config.fp8_cache

    def method(kind: str, flag: str) -> Method:
        name = user[kind]
        if name is None:
            if user[flag]:
                raise ValueError(f"{flag}=true says that weights are quantized, but {kind} does not say how")
            return BF16
        if kind == "moe_quant_type" and name == "block_wise_fp8":
            raise ValueError(
                "moe_quant_type='block_wise_fp8' is not supported: experts run in modelopt_fp4 or unquantized"
            )
        if name == "block_wise_fp8":
            return FP8_STORED if user[flag] else FP8_ONLINE
        if not user[flag]:
            return NVFP4_ONLINE
        if config is None or config.experts.format != "nvfp4":
            raise ValueError(
                f"{kind}='modelopt_fp4' with {flag}=true needs a quantization config: the checkpoint has none, and "
                "moe_quant_config does not describe one"
            )
        return config.experts

    dense, experts = method("dense_quant_type", "is_quantized"), method("moe_quant_type", "is_moe_quantized")
    # The checkpoint's ignore list says which layers its own quantization left plain. It is not meant for dense layers
    # that are quantized now, while they are loaded.
    ignore = config.ignore if config is not None and not dense.online else ()
    return QuantizationPlan(dense, experts, source, ignore, fp8_cache=fp8_cache, notes=notes)


# --- the user's config ---


def _read_user(config: Mapping[str, Any] | str | None, where: str) -> dict[str, Any] | None:
    """Checks a config in the user's form and fills in the defaults of mix_quant; None if there is no config.

    where: what error messages call the config.
    """
    if config is None or config == "":
        return None
    if isinstance(config, str) and not config.lstrip().startswith(("{", "[", '"')):
        config = {"quantization": config}
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        config = {"quantization": config} if isinstance(config, str) else config
    if not isinstance(config, Mapping):
        raise ValueError(f"{where} must be a JSON object or the name of a method, got {config!r}")
    if "quantization" not in config:
        raise ValueError(f"{where} lacks the key 'quantization'; it has {sorted(config)}")
    kind = config["quantization"]
    if kind not in ("mix_quant", *_USER_METHODS):
        raise ValueError(f"{where}: quantization={kind!r} is not supported; choose mix_quant or one of {_USER_METHODS}")
    allowed = {"quantization", *(_USER_DEFAULTS if kind == "mix_quant" else ())}
    if unknown := sorted(set(config) - allowed):
        raise ValueError(f"{kind}: unknown key {unknown[0]!r}={config[unknown[0]]!r}; it takes {sorted(allowed)}")
    if kind != "mix_quant":
        return dict(config)
    return _check_mix_quant({**_USER_DEFAULTS, **config})


def _check_mix_quant(user: dict[str, Any]) -> dict[str, Any]:
    for key, default in _USER_DEFAULTS.items():
        value = user[key]
        kind = type(default) if default is not None else str
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise ValueError(f"mix_quant: {key}={value!r} must be of type {kind.__name__}")
        if value is None:
            user[key] = default
    for key in _FIXED:
        if user[key] != _USER_DEFAULTS[key]:
            raise ValueError(f"mix_quant: {key}={user[key]!r} is not supported, only {_USER_DEFAULTS[key]!r}")
    for key in ("dense_quant_type", "moe_quant_type"):
        if user[key] == "none":
            user[key] = None
        if user[key] not in (None, *_USER_METHODS):
            raise ValueError(f"mix_quant: {key}={user[key]!r} is not supported; choose one of {_USER_METHODS}")
    image = user["image_moe_quant_type"]
    if image not in (None, user["moe_quant_type"] or "none"):
        raise ValueError(
            f"mix_quant: image_moe_quant_type={image!r} differs from moe_quant_type; only the same is supported"
        )
    return user
