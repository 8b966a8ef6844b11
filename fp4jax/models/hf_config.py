"""Reading and writing Hugging Face's `config.json`: the part that is the same for the configs of all models.

Files of both generations are read: RoPE settings in `rope_scaling` and at the top level, or in `rope_parameters`; the
dtype in `torch_dtype` or in `dtype`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

DTYPES = ("bfloat16", "float32")
# Keys with the only value that the models here support; a key that is absent or null means that value.
_SUPPORTED = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_bias": False, "use_sliding_window": False,
    "partial_rotary_factor": 1.0, "compression_ratio": 1.0,
}  # fmt: skip


def read_hf(
    config_class: Any,
    config: Mapping[str, Any],
    *,
    model_type: str,
    absent: Mapping[str, Any],
    renamed: Mapping[str, str] | None = None,
    rope_types: Sequence[str] = ("default",),
) -> Any:
    """Make a model's config object from a parsed `config.json`.

    Keys that only matter for training or serving are ignored. `rope_theta` may stand at the top level, in
    `rope_parameters` or in `rope_scaling`. The dtype is read from `dtype` or `torch_dtype`; without both it is
    bfloat16. A missing `head_dim` is hidden_size / num_attention_heads.

    Args:
      config_class: the dataclass to make, such as `Qwen3MoeConfig`.
      config: the parsed file.
      model_type: the `model_type` that the file must have.
      absent: values of fields whose key the file lacks, where Hugging Face's default is not that of the dataclass.
      renamed: the key in the file for each field that has another name there.
      rope_types: the kinds of RoPE that the model supports.

    Returns:
      An object of `config_class`.

    Raises:
      ValueError: a key is missing or has a wrong type, or its value asks for something that the model does not
        support. The message names the key.
    """
    _refuse_unsupported(config, model_type, rope_types)
    values: dict[str, Any] = {}
    for field in fields(config_class):
        for key in (field.name, (renamed or {}).get(field.name)):
            if key is not None and field.name not in values and config.get(key) is not None:
                values[field.name] = config[key]
    names = {field.name for field in fields(config_class)}
    if "head_dim" in names - values.keys() and {"hidden_size", "num_attention_heads"} <= values.keys():
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    for rope in (config.get("rope_scaling") or {}, config.get("rope_parameters") or {}):
        if rope.get("rope_theta") is not None:
            values["rope_theta"] = rope["rope_theta"]
    values["dtype"] = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    for key, value in absent.items():
        values.setdefault(key, value)
    missing = [f.name for f in fields(config_class) if f.default is MISSING and f.name not in values]
    if missing:
        raise ValueError(f"config.json of {model_type} lacks {', '.join(missing)}")
    check_types(config_class, values, model_type)
    return config_class(**as_fields(config_class, values))


def check_types(config_class: Any, values: Mapping[str, Any], model_type: str) -> None:
    """Check that every value read from a file has the type of its field.

    Raises:
      ValueError: a field of type int, float or bool got another type, or a tuple field got something else than a list
        of whole numbers. The message names the field and the value.
    """
    accepted = {"int": (int,), "float": (int, float), "bool": (bool,)}
    for field in fields(config_class):
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
        value = values.get(field.name)
        if value is not None and kind in accepted and type(value) not in accepted[kind]:
            raise ValueError(f"config.json of {model_type}: {field.name}={value!r} must be of type {kind}")
        whole = isinstance(value, list | tuple) and all(type(item) is int for item in value)
        if value is not None and kind.startswith("tuple") and not whole:
            raise ValueError(f"config.json of {model_type}: {field.name}={value!r} must be a list of whole numbers")


def as_fields(config_class: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values as JSON has them to the types of a dataclass.

    Lists become tuples, and whole numbers become floats where the field is a float.
    """
    floats = {field.name for field in fields(config_class) if field.type in (float, "float")}
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return {key: float(v) if key in floats and type(v) is int else v for key, v in found.items()}


def write_hf(
    config: Any, *, model_type: str, architecture: str, renamed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The contents of a `config.json` that `read_hf` reads back to an equal config.

    Args:
      config: the config to write, a dataclass.
      model_type: the `model_type` of the file.
      architecture: the name of Hugging Face's model class, for the key `architectures`.
      renamed: the key in the file for each field that has another name there.
    """
    values = {(renamed or {}).get(f.name, f.name): getattr(config, f.name) for f in fields(config)}
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    values["torch_dtype"] = values.pop("dtype")
    head = {"architectures": [architecture], "model_type": model_type, "hidden_act": "silu", "attention_bias": False}
    return {**head, **values}


def check_shapes(config: Any) -> None:
    """Check the sizes and constants that the configs of all models share.

    Raises:
      ValueError: a size is less than 1, sizes do not fit each other, a constant is not positive, or the dtype is none
        of `DTYPES`.
    """
    for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "moe_intermediate_size", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings",
    ):  # fmt: skip
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads={config.num_attention_heads} must be a multiple of "
            f"num_key_value_heads={config.num_key_value_heads}"
        )
    if config.head_dim < 2 or config.head_dim % 2:
        raise ValueError(f"head_dim must be even (RoPE rotates pairs), got {config.head_dim}")
    if config.dtype not in DTYPES:
        raise ValueError(
            f"dtype must be one of {DTYPES}, got {config.dtype!r}; `load_model(dtype=..)` takes another "
            "one than that of the config, and so does generate.py --dtype"
        )
    for name in ("rms_norm_eps", "rope_theta"):
        if not 0 < getattr(config, name) < float("inf"):
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")
    if config.intermediate_size < 1 and not all(map(config.is_moe_layer, range(config.num_hidden_layers))):
        raise ValueError(f"dense layers need a positive intermediate_size, got {config.intermediate_size}")


def _refuse_unsupported(config: Mapping[str, Any], model_type: str, rope_types: Sequence[str]) -> None:
    """Raise ValueError for the first key whose value asks for something that the model does not support."""
    if config.get("model_type") != model_type:
        raise ValueError(f"model_type {config.get('model_type')!r} is not supported, expected {model_type!r}")
    ropes = {key: config.get(key) or {} for key in ("rope_parameters", "rope_scaling")}
    for key, rope in ropes.items():
        if not isinstance(rope, Mapping):
            raise ValueError(f"config.json of {model_type}: {key}={rope!r} must be an object")
        if (kind := rope.get("rope_type", rope.get("type", "default"))) not in rope_types:
            raise ValueError(
                f"rope_type={kind!r} is not supported by {model_type}, only {', '.join(map(repr, rope_types))}"
            )
        if nested := [name for name, value in rope.items() if isinstance(value, Mapping)]:
            raise ValueError(f"{key} of single kinds of layers ({', '.join(nested)}) is not supported by {model_type}")
    for key, supported in _SUPPORTED.items():
        for place in (config, *ropes.values()):
            if place.get(key) not in (None, supported):
                raise ValueError(f"{key}={place[key]!r} is not supported by {model_type}, only {supported!r}")
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list | tuple):
        raise ValueError(f"config.json of {model_type}: layer_types={kinds!r} must be a list")
    if others := [kind for kind in kinds if kind != "full_attention"]:
        raise ValueError(f"layer_types with {others[0]!r} is not supported by {model_type}, only 'full_attention'")
