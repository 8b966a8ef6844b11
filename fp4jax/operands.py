"""What a public op says to an argument of the wrong kind: what was given, and what to do.

Types are checked by hand, as users run without a type checker; shapes are left to the ops.
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
    """One line that fetches nothing from a device: dtype and shape of an array, length of a container, else the type.

    Of None and of a PartitionSpec it is the value itself.
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
    """Whether this has a dtype and a shape, as arrays, tracers and `jax.ShapeDtypeStruct` do."""
    return hasattr(value, "dtype") and isinstance(getattr(value, "shape", None), tuple)


def check_array(name: str, value: Any, kind: Any = None) -> None:
    """Raises TypeError unless `value` is an array: JAX's, numpy's or what JAX takes for one.

    kind: `jnp.floating` or `jnp.integer`, which the dtype must be then.
    """
    if not (isinstance(value, jax.Array | np.ndarray | np.generic) or hasattr(value, "__jax_array__")):
        raise TypeError(f"{name} must be an array, got {described(value)}{_REMEDIES.get(type(value).__name__, '')}")
    if kind is not None and not jnp.issubdtype(value.dtype, kind):
        wanted = "an integer" if kind is jnp.integer else "a floating-point"
        raise TypeError(f"{name} must be {wanted} array, got {described(value)}")


def check_type(name: str, value: Any, wanted: type, remedy: str) -> None:
    """Raises TypeError unless `value` is of the type; remedy: how one makes such a value."""
    if not isinstance(value, wanted):
        raise TypeError(f"{name} must be of type {wanted.__name__}, got {described(value)}; {remedy}")


def check_routes(op: str, tokens: int, topk_ids: Any, topk_weights: Any = None) -> None:
    """Raises TypeError or ValueError unless ids, and weights where there are any, are [T, k] for that many tokens."""
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
    """How many devices there are along a mesh axis of the surrounding `jax.shard_map`.

    Raises:
      ValueError: there is no such axis, or no shard_map; the message names the axes that there are.
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
    """Raises ValueError if an operand (pytrees of arrays) is sharded over Explicit mesh axes, outside of shard_map.

    For ops that move rows between experts: JAX asks for the sharding of every step of theirs then.
    """
    for leaf in jax.tree.leaves(operands):
        spec = jax.typeof(leaf).sharding.spec
        if any(axis is not None for axis in spec):
            raise ValueError(
                f"{op}: an array of shape {leaf.shape} is sharded as {spec} over a mesh of Explicit axes; call the op "
                "inside jax.shard_map, or make the mesh with axis_types=(jax.sharding.AxisType.Auto,)"
            )


def summary(tensor: Any, what: str, *shown: str) -> str:
    """`repr` of a dataclass of arrays in one line: shape, what it is, shapes of the fields `shown`, bytes.

    Nothing is fetched from a device. Where fields are not arrays (specs, None), each is described instead.
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
    """Bytes below 10 kB, else MB (10^6) or GB (10^9)."""
    if size < 10**4:
        return f"{size} bytes"
    return f"{size / 10**6:.2f} MB" if size < 10**9 else f"{size / 10**9:.2f} GB"
