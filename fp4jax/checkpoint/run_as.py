"""Decides how each parameter of a folder runs, from its tensors and the plan, and reads its activation scales."""

import numpy as np

from fp4jax.checkpoint.names import Path as ParamPath, projections_of, stacked_name
from fp4jax.checkpoint.storage import stacked, stored
from fp4jax.checkpoint.storage.layouts import NAMES
from fp4jax.checkpoint.storage.reader import Reader
from fp4jax.checkpoint.storage.scales import decoded
from fp4jax.nvfp4 import BLOCK_SIZE, GLOBAL_SCALE_RANGE
from fp4jax.quant_config.methods import BF16, FP8_EXPERTS, FP8_STORED, Method, QuantizationPlan, shortened


def method_of(plan: QuantizationPlan, source: stored.Source, path: ParamPath, shape: tuple[int, ...]) -> Method:
    """Returns the method of a parameter: how its weights are stored, and in which format they run.

    How weights are stored follows from the tensors. What plain weights become, and which activations quantized weights
    get, follows from the plan. If the plan does not name an NVFP4 layer, the layer gets the activations of the plan's
    other NVFP4 layers. Parameters that are no weights of linear layers are plain.

    Args:
      plan: the plan of the folder and the user.
      source: the tensors of the parameter.
      path: the path of the parameter.
      shape: the shape of the parameter.

    Raises:
      ValueError: the plan says something that is not supported for the layer, or is ambiguous; K is no multiple of 16
        for a layer that is to be quantized to NVFP4. The message names the layer.
    """
    if not source.modules:
        return BF16
    name, experts = source.modules[0], stacked_name(path) is not None
    methods = list(dict.fromkeys(plan.method(module) for module in _asked_for(plan, source, experts)))
    if source.stored in NAMES:
        found = [method for method in methods if method.format == "nvfp4"]
        if len({(method.activations, method.input_scales) for method in found}) > 1:
            raise ValueError(
                f"{shortened(source.modules)}: the experts of a layer must have activations of one kind, the config "
                f"says {' and '.join(map(str, found))}"
            )
        chosen = found[0] if found else _of_the_others(plan, source)
        return Method("nvfp4", source.stored, chosen.activations, "stored" if chosen.online else chosen.input_scales)
    if source.stored == "block_wise_fp8":
        found = [method for method in (*methods, plan.dense) if method.format == "block_wise_fp8"]
        return FP8_EXPERTS if "" in source.leaves else found[0] if found and not found[0].online else FP8_STORED
    method = methods[0]
    if not method.online:
        return BF16
    if method.format == "nvfp4" and shape[-1] % BLOCK_SIZE:
        stored.check_nvfp4_width(name, shape[-1])
    return method


def _of_the_others(plan: QuantizationPlan, source: stored.Source) -> Method:
    """Returns a method of the plan's NVFP4 layers, for an NVFP4 layer that the plan does not describe as NVFP4.

    If the plan has no NVFP4 layers, the activations are NVFP4 with stored scales.

    Raises:
      ValueError: the plan's NVFP4 layers differ in their activations.
    """
    others = [plan.dense, plan.experts, *(method for _, method in plan.layers if isinstance(method, Method))]
    kinds = {(m.activations, m.input_scales): m for m in others if m.format == "nvfp4"}
    if len(kinds) > 1:
        raise ValueError(
            f"{shortened(source.modules)}: the tensors are NVFP4, and the config does not say what the activations "
            f"are: it names other layers only, with activations in {' and in '.join(sorted(kind for kind, _ in kinds))}"
        )
    return next(iter(kinds.values()), Method("nvfp4", source.stored, "nvfp4"))


def _asked_for(plan: QuantizationPlan, source: stored.Source, experts: bool) -> list[str]:
    """Returns the modules to ask the plan for: a single name for all experts if the plan has no entries for modules."""
    if not experts or plan.layers:
        return source.modules
    container = source.modules[0].split(".experts.")[0]
    return [f"{container}.experts"]


def activation_scales(
    reader: Reader, source: stored.Source, path: ParamPath, prefix: str, shape: tuple[int, ...]
) -> float | list[float]:
    """Reads the stored scales of a parameter's NVFP4 activations, in the decode direction (to multiply with).

    Args:
      reader: the folder.
      source: the tensors of the parameter.
      path: the path of the parameter.
      prefix: as in `names.find_prefix`.
      shape: the shape of the parameter.

    Returns:
      For w2 a list with one scale per expert; for w13 the largest scale of all experts, since a token is quantized once
      for all of its experts; for a linear layer its scale.

    Raises:
      ValueError: a scale is missing or cannot be used; the message names the file, the tensor and its value.
    """
    base = stacked_name(path, prefix)
    names = None if base is None else stacked.names_of(reader, base)
    if names is not None:
        _check_usable(reader, names.input_scale)
        each = stacked.input_scales(reader, names, shape[0], len(projections_of(path))).max(axis=1)
    else:
        each = np.array([_one_scale(reader, module) for module in source.modules])
    return each.tolist() if base is not None and path[-1] == "w2" else float(each.max())


def _one_scale(reader: Reader, module: str) -> np.float32:
    layout = stored.stored_as(reader, module) or "modelopt"
    name = f"{module}.{NAMES[layout].input_scale}"
    _check_usable(reader, name)
    reader.check(name, reader.shape(name) if reader.shape(name) in ((), (1,)) else (), ("F32",))
    return np.float32(decoded(reader, layout, name).reshape(()))


def _check_usable(reader: Reader, name: str) -> None:
    """Raises ValueError if activation scales are missing or outside of GLOBAL_SCALE_RANGE.

    The check also fits scales that are stored as reciprocals, since the range is the same for them.
    """
    if name not in reader:
        raise ValueError(
            f"{reader.folder}: {name} is missing; layers with NVFP4 activations need it (input_scales='per_token': not)"
        )
    values = reader.read(name).astype(np.float32)
    low, high = GLOBAL_SCALE_RANGE
    bad = values[~((values >= low) & (values <= high))]
    if bad.size:
        raise ValueError(
            f"{reader.file_of(name)}: tensor {name} = {bad.flat[0]} must be positive and finite, within [2^-100, 2^100]"
        )
