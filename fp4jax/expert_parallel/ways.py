"""Decides in which way a dispatch or a combine moves its rows. Nothing below this module decides again.

Ways of a dispatch, fastest first:

* "kept_buffers": kernels store rows into receive buffers that the program keeps (see `low_latency`).
* "direct_stores": kernels store rows into new buffers of the receivers, after a barrier between all devices.
* "packed_all_to_all": a kernel packs the rows, and an all_to_all moves them.
* "xla": XLA packs the rows, and an all_to_all moves them.

Ways of a combine:

* "direct_reads": a kernel at home reads the rows from the memory of the devices that made them.
* "all_to_all": an all_to_all moves the rows.
"""

from typing import Any, Literal

import jax

from fp4jax.implementations import Implementation, has_hopper_gpu, peers_problem, resolve_implementation
from pallas_kernels.exchange import combine as combine_kernels, dispatch as dispatch_kernels, push_combine
from pallas_kernels.exchange.plan import Routes

DispatchWay = Literal["kept_buffers", "direct_stores", "packed_all_to_all", "xla"]
CombineWay = Literal["direct_reads", "all_to_all"]


def dispatch_way(
    parts: list[Any],
    routes: Routes,
    *,
    encode: Any,
    axis_name: str,
    keeps_buffers: bool,
    implementation: Implementation | None,
) -> DispatchWay:
    """Chooses the way of one dispatch.

    Args:
      parts: as `pallas_kernels.exchange.dispatch` takes them.
      routes: likewise.
      encode: likewise.
      axis_name: the mesh axis that the tokens cross.
      keeps_buffers: whether the caller gave `ReceiveBuffers`; only "kept_buffers" serves them.
      implementation: "xla"; "mosaic_gpu": "direct_stores" or an error; None: the fastest way that can serve the call.
        With buffers, "mosaic_gpu" and None both mean "kept_buffers" or an error.

    Raises:
      ValueError: the implementation is unknown.
      NotImplementedError: the call cannot be served as asked; the message says why.
    """
    if implementation is not None:
        resolve_implementation("dispatch", implementation, ("xla", "mosaic_gpu"))
    problem = (
        peers_problem(axis_name) or dispatch_kernels.check_config(parts, routes, encode=encode) or _hopper_problem()
    )
    if keeps_buffers:
        if problem or implementation == "xla":
            why = problem or "kept buffers need the kernels"
            raise NotImplementedError(f"dispatch: buffers, implementation={implementation!r}: {why}")
        return "kept_buffers"
    if implementation == "xla":
        return "xla"
    if problem is None:
        return "direct_stores"
    if implementation == "mosaic_gpu":
        raise NotImplementedError(f"dispatch: implementation='mosaic_gpu': {problem}")
    can_pack = has_hopper_gpu() and dispatch_kernels.check_pack(parts, routes, encode=encode) is None
    return "packed_all_to_all" if can_pack else "xla"


def combine_way(
    y: Any, send_map: Any, *, devices: int, axis_name: str, implementation: Implementation | None
) -> CombineWay:
    """Chooses the way of one combine.

    Args:
      y: floating-point [R*C, H], an array or struct.
      send_map: i32 [T, S], an array or struct.
      devices: R.
      axis_name: the mesh axis that the rows cross.
      implementation: "xla"; "mosaic_gpu": "direct_reads" or an error; None: the fastest way that can serve the call.

    Raises:
      ValueError: the implementation is unknown.
      NotImplementedError: "mosaic_gpu" was named and cannot serve the call; the message says why.
    """
    if implementation is not None:
        resolve_implementation("combine", implementation, ("xla", "mosaic_gpu"))
    if implementation == "xla":
        return "all_to_all"
    problem = peers_problem(axis_name) or combine_kernels.check_config(y, send_map, devices) or _hopper_problem()
    if problem and implementation == "mosaic_gpu":
        raise NotImplementedError(f"combine: implementation='mosaic_gpu': {problem}")
    return "all_to_all" if problem else "direct_reads"


def check_combine_into_buffers(y: Any, row_map: Any, send_map: Any, *, devices: int, axis_name: str, config: Any):
    """Raises NotImplementedError, with the reason, if the kernel of `combine_into_buffers` cannot serve the call."""
    problem = peers_problem(axis_name) or push_combine.check_config(y, row_map, send_map, devices, config)
    if problem:
        raise NotImplementedError(f"combine_into_buffers: {problem}")


def _hopper_problem() -> str | None:
    return None if has_hopper_gpu() else f"needs a GPU of compute capability 9.0; JAX sees {jax.devices()}"
