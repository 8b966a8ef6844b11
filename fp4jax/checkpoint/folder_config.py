"""The JSON files of a folder: which model it is, how it says that it is quantized, and which tokens end a text.

A setting may stand in several places; each is read here, once, for everybody.
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
from fp4jax.quant_config.schemas import own_config

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
    """The object in a JSON file.

    Raises:
      FileNotFoundError, ValueError: naming the file, if it does not exist or is no JSON object.
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
    """The class of the folder's model and its config; dtype: instead of the config's.

    Raises:
      FileNotFoundError, ValueError: no config.json, or one that is not of a supported model.
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
    """The config of a folder's model, without a look at its tensors; arguments and errors as in `model_and_config`."""
    return model_and_config(folder, dtype)[1]


def quantization_plan(folder: Path, user: Mapping[str, Any] | str | None) -> QuantizationPlan:
    """The plan for a folder and a user's wishes, see `quant_config.plan_quantization`.

    The section of config.json is followed, or of its text_config, else ModelOpt's own file. Where both are there and do
    not say the same of all layers, a note of the plan says so.
    """
    values, file = read_json(folder / CONFIG_NAME), folder / QUANT_CONFIG_NAME
    try:
        section = own_config(values)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
    other = read_json(file) if file.is_file() else None
    names_layers = section is not None and (section.get("quantized_layers") or section.get("config_groups"))
    mixed = section is not None and section.get("quant_algo") == "MIXED_PRECISION"
    if section is None or (mixed and not names_layers and other is not None):  # then the layers stand in the file
        return plan_quantization(other, user)
    plan = plan_quantization(values, user)
    if other is None or _says_the_same(values, other):
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
    """Every token that ends a text: `eos_token_id` of config.json, of its text_config and of generation_config.json.

    Raises:
      FileNotFoundError, ValueError: no config.json, or an eos_token_id that is no token id and no list of them.
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
