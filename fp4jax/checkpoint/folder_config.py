"""Reads the JSON files of a folder: which model it holds, how it is quantized, and which tokens end a text.

Some settings may stand in several files or keys. Only this module knows these places, so that all callers see the same
value.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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
from fp4jax.quant_config.plan import QuantizationPlan, plan_quantization
from fp4jax.quant_config.schemas import is_fp8_cache, own_config

CONFIG_NAME = "config.json"
QUANT_CONFIG_NAME = "hf_quant_config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
_MODELS: dict[str, tuple[Callable[..., Any], Any]] = {
    qwen3_moe.MODEL_TYPE: (Qwen3Moe, Qwen3MoeConfig),
    qwen3_moe.VL_MODEL_TYPE: (Qwen3Moe, Qwen3MoeConfig),
    ernie45_moe.MODEL_TYPE: (Ernie45Moe, Ernie45MoeConfig),
    deepseek_v3.MODEL_TYPE: (DeepseekV3, DeepseekV3Config),
}


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is no JSON, or no JSON object; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a model is a folder in Hugging Face layout")
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))  # some tools write a byte order mark
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    return values


def model_and_config(folder: Path, dtype: str | None = None) -> tuple[Callable[..., Any], Any]:
    """Returns (the class of the folder's model, the config that config.json describes).

    Args:
      folder: the folder of the model.
      dtype: the name of the compute type; None takes the type that config.json names.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: config.json does not describe a supported model.
    """
    values = read_json(folder / CONFIG_NAME)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in _MODELS:
        raise ValueError(
            f"{folder / CONFIG_NAME}: model_type {model_type!r} is not supported, only {', '.join(_MODELS)}"
        )
    model_class, config_class = _MODELS[model_type]
    return model_class, config_class.from_hf(values if dtype is None else {**values, "dtype": dtype})


def read_config(folder: Path, dtype: str | None = None) -> Any:
    """Returns the config of a folder's model from config.json; arguments and errors are those of `model_and_config`."""
    return model_and_config(folder, dtype)[1]


def quantization_plan(folder: Path, user: Mapping[str, Any] | str | None) -> QuantizationPlan:
    """Returns the quantization plan for a folder and the user's config; see `quant_config.plan_quantization`.

    The plan follows the quantization section of config.json (or of its text_config). If there is no section, or it says
    MIXED_PRECISION without naming layers, the plan follows hf_quant_config.json. If both configs exist and disagree
    about a layer, a note of the plan says so. The cache is FP8 if either of them asks for it.

    Args:
      folder: the folder of the model.
      user: the user's config, a dict or JSON text; None: the user has no wishes.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: a config is no JSON object, or `plan_quantization` refuses it.
    """
    values, file = read_json(folder / CONFIG_NAME), folder / QUANT_CONFIG_NAME
    try:
        section = own_config(values)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
    other = read_json(file) if file.is_file() else None
    names_layers = section is not None and (section.get("quantized_layers") or section.get("config_groups"))
    mixed = section is not None and section.get("quant_algo") == "MIXED_PRECISION"
    if section is None or (mixed and not names_layers and other is not None):  # hf_quant_config.json names the layers
        return plan_quantization(other, user)
    plan = plan_quantization(values, user)
    if other is None:
        return plan
    if is_fp8_cache((other.get("quantization") or {}).get("kv_cache_quant_algo")):  # the section may not mention it
        plan = dataclasses.replace(plan, fp8_cache=True)
    if _says_the_same(values, other):
        return plan
    note = f"{QUANT_CONFIG_NAME} says something else than {CONFIG_NAME}, which is followed"
    return dataclasses.replace(plan, notes=(*plan.notes, note))


def _says_the_same(values: dict[str, Any], other: dict[str, Any]) -> bool:
    try:
        first, second = plan_quantization(values, None), plan_quantization(other, None)
    except ValueError:
        return False
    return (first.dense, first.experts, dict(first.layers)) == (second.dense, second.experts, dict(second.layers))


def end_token_ids(folder: Path) -> set[int]:
    """Returns the ids of all tokens that end a text.

    These are the `eos_token_id` of config.json, of its text_config and of generation_config.json, taken together.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: an eos_token_id is neither a token id nor a list of token ids, or a file is no JSON object.
    """
    values, generation = read_json(folder / CONFIG_NAME), folder / GENERATION_CONFIG_NAME
    homes = {CONFIG_NAME: values, f"text_config of {CONFIG_NAME}": values.get("text_config")}
    if generation.is_file():
        homes[GENERATION_CONFIG_NAME] = read_json(generation)
    found: set[int] = set()
    for home, settings in homes.items():
        ids = settings.get("eos_token_id") if isinstance(settings, Mapping) else None
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        if bad := [token for token in ids if type(token) is not int or token < 0]:
            raise ValueError(f"{folder}: eos_token_id of {home} has {bad[0]!r}, which is no token id")
        found |= set(ids)
    return found
