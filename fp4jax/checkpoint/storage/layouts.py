"""The two layouts of NVFP4 checkpoints, ModelOpt's and compressed-tensors': tensor names, scales and configs.

ModelOpt stores global scales to multiply with (decode direction), of shape [], and describes the folder in config.json
and hf_quant_config.json. compressed-tensors stores the reciprocals, of shape [1], and describes the folder in
config.json only.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from fp4jax.checkpoint.storage.reader import Reader
from fp4jax.quant_config.methods import FP8_STORED, FP8_STORED_UE8M0, Method
from fp4jax.quant_config.schemas import BLOCK_SIZE, FP8_BLOCK, own_config, read_checkpoint_config

Layout = Literal["modelopt", "compressed_tensors"]


class Names(NamedTuple):
    """The last parts of the names of an NVFP4 linear layer's tensors; the layer's name and a dot come before them."""

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
    """The quantization configs of a folder.

    section: the `quantization_config` in config.json, None if there is none. file: the contents of
    hf_quant_config.json, None if there is no such file.
    """

    section: dict[str, Any] | None
    file: dict[str, Any] | None


class Traits(NamedTuple):
    """What the config of a folder says beyond the names of its layers, and both layouts can express.

    activations: the format of the inputs of all NVFP4 layers, "nvfp4" or "bf16". fp8_cache: whether the config suggests
    a KV cache in FP8. per_token: whether each token's NVFP4 activations get a scale of their own at run time, rather
    than the scale that the folder stores.
    """

    activations: str
    fp8_cache: bool
    per_token: bool = False


def layout_of(reader: Reader) -> Layout | None:
    """Returns the layout of a folder's NVFP4 layers, or None if the folder has no NVFP4 layers.

    Raises:
      ValueError: the folder has layers in both layouts, or it stacks all experts of a layer in one tensor, which
        `convert_folder` does not support.
    """
    if stacked := [name for name in reader.names() if name.endswith("_proj_weight_scale_2")]:
        raise ValueError(f"{reader.folder} has stacked NVFP4 experts ({min(stacked)}), which are loaded but not "
                         "converted: load_model and save_model write them apart, in either layout")  # fmt: skip
    ends: dict[Layout, str] = {"modelopt": NAMES["modelopt"].global_scale, "compressed_tensors": "weight_packed"}
    found = {layout: [n for n in reader.names() if n.endswith(f".{end}")] for layout, end in ends.items()}
    if all(found.values()):
        raise ValueError(f"{reader.folder} has both layouts: {' and '.join(min(names) for names in found.values())}")
    return next((layout for layout, names in found.items() if names), None)


def plain_modules(shapes: Mapping[str, tuple[int, ...]], quantized: Iterable[str]) -> list[str]:
    """Returns the names of the linear layers that are not quantized, sorted: a config lists them as ignored.

    Args:
      shapes: {tensor name: shape} of a folder. A linear layer is a matrix whose name ends with ".weight" and whose
        module is no embedding.
      quantized: names of the quantized linear layers.

    The head is always in the result, even if it has no tensor because it is tied to the embedding.
    """
    matrices = (name.removesuffix(".weight") for name, s in shapes.items() if name.endswith(".weight") and len(s) == 2)
    found = {name for name in matrices if "embed" not in name.rsplit(".", 1)[-1]} - set(quantized)
    return sorted(found if any(name.endswith("lm_head") for name in found) else {*found, "lm_head"})


def describe(layout: Layout, plain: list[str], traits: Traits) -> Described:
    """Returns the configs of a folder whose linear layers are all NVFP4, except for those named in `plain`."""
    quantized_inputs = traits.activations == "nvfp4"
    if layout == "compressed_tensors":
        kind = {**_FLOAT4, "strategy": "tensor_group", "symmetric": True}
        group = {
            "targets": ["Linear"],
            "weights": kind,
            "input_activations": {**kind, "dynamic": traits.per_token or "local"} if quantized_inputs else None,
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
        "input_activations": {**_FLOAT4, "dynamic": traits.per_token} if quantized_inputs else None,
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
    if traits.per_token:  # hf_quant_config.json has no other key that says so
        quantization["config_groups"] = section["config_groups"]
    return Described(section, {"producer": _PRODUCER, "quantization": quantization})


def traits_of(described: Described) -> Traits:
    """Reads from the configs of a folder what the configs of the other layout must say too.

    Raises:
      ValueError: there is no config, or it cannot be read; NVFP4 layers differ in their activations; or the config
        suggests a KV cache in another format than FP8.
    """
    whole = own_config({"quantization_config": described.section}) or own_config(described.file)
    if whole is None:
        raise ValueError("neither config.json nor hf_quant_config.json says how the folder is quantized")
    _, plan = read_checkpoint_config(whole)
    methods = [plan.dense, plan.experts, *(method for _, method in plan.layers if isinstance(method, Method))]
    kinds = {(method.activations, method.input_scales) for method in methods if method.format == "nvfp4"}
    if len(kinds) != 1:
        found = sorted(" ".join(kind) for kind in kinds)
        raise ValueError(f"the config's layers have activations {found}; only one kind can be converted")
    ((activations, input_scales),) = kinds
    caches = [whole.get("kv_cache_quant_algo"), whole.get("kv_cache_scheme")]
    caches.append(((described.file or {}).get("quantization") or {}).get("kv_cache_quant_algo"))
    for cache in filter(None, caches):
        scheme = (cache.get("num_bits"), cache.get("type")) if isinstance(cache, dict) else cache
        if scheme not in ("FP8", (8, "float")):
            raise ValueError(f"a cache in {cache!r} cannot be converted, only FP8")
    return Traits(activations, any(caches), input_scales == "per_token")


# --- configs of folders whose layers have different formats ---


def with_fp8_cache(described: Described) -> Described:
    """Returns the configs with keys that say that keys and values are cached in FP8."""
    section = {"quant_method": "modelopt"} if described.section is None else described.section
    section = {**section, "kv_cache_scheme": _FLOAT8}
    if described.file is None:
        return Described(section, None)
    quantization = {**described.file["quantization"], "kv_cache_quant_algo": "FP8"}
    return Described(section, {**described.file, "quantization": quantization})


def describe_methods(layout: Layout, methods: Mapping[str, Method]) -> Described:
    """Returns the configs of a folder whose linear layers have different formats.

    Args:
      layout: the layout of the NVFP4 layers.
      methods: {name of a linear layer: its method}, for all linear layers of the model.

    If all quantized layers share one NVFP4 method, the result is that of `describe`. Experts of a layer that share a
    method get one entry together.

    Raises:
      ValueError: the layout is compressed_tensors, and the folder has FP8 layers beside quantized layers of another
        kind, which the NVFP4 format of compressed-tensors cannot express.
    """
    methods = _with_experts_as_one(methods)
    plain = sorted(name for name, method in methods.items() if method.format == "bf16")
    quantized = {name: method for name, method in methods.items() if method.format != "bf16"}
    kinds = set(quantized.values())
    if not kinds:
        return Described(None, None)
    if len(kinds) == 1:
        (method,) = kinds
        if method.format == "nvfp4":
            return describe(layout, plain, Traits(method.activations, False, method.input_scales == "per_token"))
        section = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                   "weight_block_size": list(FP8_BLOCK), "modules_to_not_convert": plain}  # fmt: skip
        return Described({**section, "scale_fmt": "ue8m0"} if method == FP8_STORED_UE8M0 else section, None)
    if layout == "compressed_tensors":
        return Described(_groups_by_target(quantized, plain), None)
    layers = {name: _ALGORITHMS[method] for name, method in quantized.items()}
    mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    section = {"quant_method": "modelopt", **mixed, "ignore": plain, "producer": _PRODUCER}
    file = {**mixed, "kv_cache_quant_algo": None, "exclude_modules": plain}
    return Described(section, {"producer": _PRODUCER, "quantization": file})


# Method of a layer -> its entry in quantized_layers of ModelOpt's MIXED_PRECISION.
_ALGORITHMS = {
    Method("nvfp4", "modelopt", "nvfp4"): {"quant_algo": "NVFP4", "group_size": BLOCK_SIZE},
    Method("nvfp4", "modelopt", "nvfp4", "per_token"): {
        "quant_algo": "NVFP4", "group_size": BLOCK_SIZE, "dynamic": True,
    },
    Method("nvfp4", "modelopt", "bf16"): {"quant_algo": "W4A16_NVFP4", "group_size": BLOCK_SIZE},
    FP8_STORED: {"quant_algo": "FP8_PB_WO", "group_size": FP8_BLOCK[0]},
    FP8_STORED_UE8M0: {"quant_algo": "FP8_PB_WO", "group_size": FP8_BLOCK[0], "scale_fmt": "ue8m0"},
}  # fmt: skip


# Replaces the entries of a block's experts by one entry "<block>.experts" where all of them share a method.
def _with_experts_as_one(methods: Mapping[str, Method]) -> dict[str, Method]:
    blocks: dict[str, set[Method]] = {}
    for name, method in methods.items():
        if ".experts." in name:
            blocks.setdefault(name.split(".experts.")[0] + ".experts", set()).add(method)
    alike = {block: found.pop() for block, found in blocks.items() if len(found) == 1}
    apart = {
        name: method
        for name, method in methods.items()
        if ".experts." not in name or name.split(".experts.")[0] + ".experts" not in alike
    }
    return {**apart, **alike}


def _groups_by_target(quantized: Mapping[str, Method], plain: list[str]) -> dict[str, Any]:
    """Returns the section of compressed-tensors, with one group per method; a regular expression names each layer.

    Raises:
      ValueError: a layer is not NVFP4.
    """
    kinds = sorted(set(quantized.values()))
    if any(method.format != "nvfp4" for method in kinds):
        name = next(name for name, method in quantized.items() if method.format != "nvfp4")
        raise ValueError(
            f"{name} is {quantized[name].format}, which the layout compressed_tensors does not have beside NVFP4; save "
            "with layout='modelopt'"
        )
    section: dict[str, Any] = {}
    groups = {}
    for index, method in enumerate(kinds):
        traits = Traits(method.activations, False, method.input_scales == "per_token")
        section = describe("compressed_tensors", plain, traits).section or {}
        targets = [f"re:^{re.escape(name)}($|\\.)" for name, found in quantized.items() if found == method]
        groups[f"group_{index}"] = {**section["config_groups"]["group_0"], "targets": targets}
    return {**section, "config_groups": groups}
