"""The two layouts of NVFP4 folders: names of tensors, direction of scales, and what their configs say.

ModelOpt keeps scales to multiply with, shape [], and describes the folder in config.json and hf_quant_config.json;
compressed-tensors keeps their reciprocals, shape [1], and describes it in config.json.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from fp4jax.checkpoint.reader import Reader
from fp4jax.quant_schemas import BLOCK_SIZE, own_config, read_checkpoint_config

Layout = Literal["modelopt", "compressed_tensors"]


class Names(NamedTuple):
    """Ends of the names of a layer's tensors."""

    codes: str
    block_scale: str
    global_scale: str
    input_scale: str


NAMES: dict[str, Names] = {
    "modelopt": Names("weight", "weight_scale", "weight_scale_2", "input_scale"),
    "compressed_tensors": Names("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
}
SCALE_SHAPES: dict[Layout, tuple[int, ...]] = {"modelopt": (), "compressed_tensors": (1,)}
_PRODUCER = {"name": "fp4jax"}
_FLOAT4 = {"num_bits": 4, "type": "float", "group_size": BLOCK_SIZE, "dynamic": False}
_FLOAT8 = {"num_bits": 8, "type": "float", "dynamic": False}


class Described(NamedTuple):
    """What a folder says of its quantization: `quantization_config` of config.json, and hf_quant_config.json."""

    section: dict[str, Any] | None
    file: dict[str, Any] | None


class Traits(NamedTuple):
    """activations: of all NVFP4 layers, "nvfp4" or "bf16". fp8_cache: whether an FP8 cache is suggested."""

    activations: str
    fp8_cache: bool


def layout_of(reader: Reader) -> Layout | None:
    """Of a folder's NVFP4 layers; None where it has none.

    Raises:
      ValueError: both layouts in one folder.
    """
    ends: dict[Layout, str] = {"modelopt": NAMES["modelopt"].global_scale, "compressed_tensors": "weight_packed"}
    found = {layout: [n for n in reader.names() if n.endswith(f".{end}")] for layout, end in ends.items()}
    if all(found.values()):
        raise ValueError(f"{reader.folder} has both layouts: {' and '.join(min(names) for names in found.values())}")
    return next((layout for layout, names in found.items() if names), None)


def plain_modules(shapes: Mapping[str, tuple[int, ...]], quantized: Iterable[str]) -> list[str]:
    """Linear layers that stay plain, of {tensor: shape}: what a config must exclude. The head always is one."""
    matrices = (name.removesuffix(".weight") for name, s in shapes.items() if name.endswith(".weight") and len(s) == 2)
    found = {name for name in matrices if "embed" not in name.rsplit(".", 1)[-1]} - set(quantized)
    return sorted(found if any(name.endswith("lm_head") for name in found) else {*found, "lm_head"})


def describe(layout: Layout, plain: list[str], traits: Traits) -> Described:
    """The configs of a folder whose linear layers are NVFP4 except for `plain`."""
    quantized_inputs = traits.activations == "nvfp4"
    if layout == "compressed_tensors":
        kind = {**_FLOAT4, "strategy": "tensor_group", "symmetric": True}
        group = {
            "targets": ["Linear"],
            "weights": kind,
            "input_activations": {**kind, "dynamic": "local"} if quantized_inputs else None,
            "output_activations": None,
        }
        section = {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": plain,
            "kv_cache_scheme": {**_FLOAT8, "strategy": "tensor", "symmetric": True} if traits.fp8_cache else None,
        }
        return Described(section, None)
    algo = "NVFP4" if quantized_inputs else "W4A16_NVFP4"
    group = {
        "targets": ["Linear"],
        "weights": _FLOAT4,
        "input_activations": _FLOAT4 if quantized_inputs else None,
    }
    section: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": algo,
        "config_groups": {"group_0": group},
        "ignore": plain,
        "producer": _PRODUCER,
    }
    quantization = {
        "quant_algo": algo,
        "kv_cache_quant_algo": "FP8" if traits.fp8_cache else None,
        "group_size": BLOCK_SIZE,
        "exclude_modules": plain,
    }
    if traits.fp8_cache:
        section["kv_cache_scheme"] = _FLOAT8
    return Described(section, {"producer": _PRODUCER, "quantization": quantization})


def traits_of(described: Described) -> Traits:
    """What must be said in the other layout too.

    Raises:
      ValueError: no config, one that cannot be read, layers that differ in their activations, other caches than FP8.
    """
    whole = own_config({"quantization_config": described.section}) or own_config(described.file)
    if whole is None:
        raise ValueError("neither config.json nor hf_quant_config.json says how the folder is quantized")
    _, plan = read_checkpoint_config(whole)
    methods = [plan.dense, plan.experts, *(method for _, method in plan.layers)]
    activations = {method.activations for method in methods if method.format == "nvfp4"}
    if len(activations) != 1:
        raise ValueError(f"the config's layers have activations {sorted(activations)}; only one kind can be converted")
    caches = [whole.get("kv_cache_quant_algo"), whole.get("kv_cache_scheme")]
    caches.append(((described.file or {}).get("quantization") or {}).get("kv_cache_quant_algo"))
    for cache in filter(None, caches):
        scheme = (cache.get("num_bits"), cache.get("type")) if isinstance(cache, dict) else cache
        if scheme not in ("FP8", (8, "float")):
            raise ValueError(f"a cache in {cache!r} cannot be converted, only FP8")
    return Traits(activations.pop(), any(caches))
