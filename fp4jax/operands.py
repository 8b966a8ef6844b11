"""Checks of the arguments of public ops. Their errors say what was given and what to do instead.

Types are checked at run time because most users run no type checker. Most shapes are checked by the ops themselves.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

_REMEDIES = {
    "NVFP4Tensor": "; `fp4jax.dequantize` makes one",
    "PackedWeights": "; `fp4jax.unpack_weights` and `fp4jax.dequantize` make one",
    "BlockFP8Weights": "; `fp4jax.block_fp8.dequantize_blocks` makes one",
    "list": "; `jax.numpy.asarray` makes one",
    "int": "; `jax.numpy.asarray` makes one",
    "float": "; `jax.numpy.asarray` makes one",
}


def described(value: Any) -> str:
    """Describes a value in one line, for errors, without fetching anything from a device.

    The line shows dtype and shape of an array, type and length of a list, tuple or dict, the `repr` of None, of a
    PartitionSpec and of this library's tensors, and the type of everything else.
    """
    if value is None or isinstance(value, PartitionSpec):
        return repr(value)
    kind = type(value).__name__
    if dataclasses.is_dataclass(value) and kind in _REMEDIES:
        return repr(value)
    if is_array(value):
        return f"{value.dtype} {value.shape}"
    article = "an" if kind[0].lower() in "aeiou" else "a"
    return f"{article} {kind}" + (f" of {len(value)}" if isinstance(value, list | tuple | dict) else "")


def is_array(value: Any) -> bool:
    """Whether the value has a dtype and a shape, as arrays, tracers and `jax.ShapeDtypeStruct` do."""
    return hasattr(value, "dtype") and isinstance(getattr(value, "shape", None), tuple)


def check_array(name: str, value: Any, kind: Any = None) -> None:
    """Raises TypeError unless `value` is an array of JAX or numpy, or has `__jax_array__`.

    Args:
      name: the name of the argument, for the error.
      value: the argument.
      kind: `jnp.floating` or `jnp.integer`, the kind that the dtype must be of; None: any.
    """
    if not (isinstance(value, jax.Array | np.ndarray | np.generic) or hasattr(value, "__jax_array__")):
        raise TypeError(f"{name} must be an array, got {described(value)}{_REMEDIES.get(type(value).__name__, '')}")
    if kind is not None and not jnp.issubdtype(value.dtype, kind):
        wanted = "an integer" if kind is jnp.integer else "a floating-point"
        raise TypeError(f"{name} must be {wanted} array, got {described(value)}")


def check_type(name: str, value: Any, wanted: type, remedy: str) -> None:
    """Raises TypeError unless `value` is of type `wanted`; `remedy` tells the user how to make such a value."""
    if not isinstance(value, wanted):
        raise TypeError(f"{name} must be of type {wanted.__name__}, got {described(value)}; {remedy}")


def check_routes(op: str, tokens: int, topk_ids: Any, topk_weights: Any = None) -> None:
    """Raises TypeError or ValueError unless topk_ids, and topk_weights if given, are [T, k] with T = `tokens`."""
    check_array(f"{op}: topk_ids", topk_ids)
    if topk_ids.ndim != 2 or topk_ids.shape[0] != tokens or topk_ids.shape[1] < 1:
        raise ValueError(f"{op}: topk_ids must be [T, k] with T = {tokens} and k >= 1, got {topk_ids.shape}")
    if topk_ids.dtype not in (jnp.int32, jnp.int64):
        raise TypeError(f"{op}: topk_ids must be int32 or int64, got {topk_ids.dtype}")
    if topk_weights is None:
        return
    check_array(f"{op}: topk_weights", topk_weights, jnp.floating)
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"{op}: topk_weights must be [T, k] = {topk_ids.shape}, as topk_ids are, got {topk_weights.shape}"
        )


def axis_size(op: str, axis_name: Any) -> int:
    """Returns the number of devices along a mesh axis of the surrounding `jax.shard_map`.

    Raises:
      ValueError: there is no shard_map, or it has no such axis; the message then names its axes.
    """
    try:
        return lax.axis_size(axis_name)
    except (NameError, ValueError):
        axes = jax.sharding.get_abstract_mesh().manual_axes
    if axes:
        raise ValueError(f"{op}: axis_name={axis_name!r} is no axis of the surrounding jax.shard_map, which has {axes}")
    raise ValueError(
        f"{op}: axis_name={axis_name!r} is an axis of a mesh, and there is no surrounding jax.shard_map; "
        "call the op inside one over a mesh with this axis"
    )


def check_unsharded(op: str, *operands: Any) -> None:
    """Raises ValueError if an array in `operands` (pytrees) is sharded over Explicit mesh axes outside shard_map.

    Ops that move rows between experts call it: for Explicit axes JAX would ask for a sharding of each of their steps.
    """
    for leaf in jax.tree.leaves(operands):
        spec = jax.typeof(leaf).sharding.spec
        if any(axis is not None for axis in spec):
            raise ValueError(
                f"{op}: an array of shape {leaf.shape} is sharded as {spec} over a mesh of Explicit axes; call the op "
                "inside jax.shard_map, or make the mesh with axis_types=(jax.sharding.AxisType.Auto,)"
            )


def summary(tensor: Any, what: str, *shown: str) -> str:
    """Returns the `repr` of a dataclass of arrays in one line, without fetching anything from a device.

    The line shows the shape, `what` the tensor is, the shapes of the fields named in `shown`, and the size in memory.
    If a field is no array (a spec or None), the line describes every field instead.
    """
    fields = {field.name: getattr(tensor, field.name) for field in dataclasses.fields(tensor)}
    name = type(tensor).__name__
    try:
        shape = tensor.shape
        size = sum(math.prod(a.shape) * a.dtype.itemsize for a in fields.values())
        parts = [f"shape={shape}", what, *(f"{field} {fields[field].shape}" for field in shown), size_text(size)]
    except (AttributeError, TypeError, ValueError, IndexError):
        parts = [f"{field}={described(value)}" for field, value in fields.items()]
    return f"{name}({', '.join(parts)})"


def size_text(size: int) -> str:
    """Formats a size: in bytes below 10^4, in MB (10^6) below 10^9, else in GB (10^9)."""
    if size < 10**4:
        return f"{size} bytes"
    return f"{size / 10**6:.2f} MB" if size < 10**9 else f"{size / 10**9:.2f} GB"
