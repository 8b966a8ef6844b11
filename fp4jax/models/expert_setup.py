"""How the experts of a model are served: quantized in memory, calibrated, spread over devices."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from fp4jax.layers.moe_block import ExpertAmax, MoEBlock, expert_mesh
from fp4jax.operands import check_array
from pallas_kernels.simt.formats import AMAX_DIVISOR

_AMAX_PER_SCALE = np.float32(AMAX_DIVISOR)  # the value that code 6 with block scale 448 stands for


@runtime_checkable
class MoEModel(Protocol):
    """What this module needs of a model."""

    def moe_blocks(self) -> list[MoEBlock]: ...

    def calibrate(self, ids: Any) -> list[ExpertAmax]: ...


def configure_experts(model: MoEModel, **changes: Any) -> None:
    """Change fields of every block's `ExpertSettings`, in place: formats, wire, mesh. Weights keep their values.

    With a `mesh` (or None) everything but the experts is copied to all its devices (or to the first one).
    """
    if changes.get("mesh") is not None:
        changes["mesh"] = expert_mesh(changes["mesh"])
    for block in model.moe_blocks():
        block.configure(dataclasses.replace(block.settings, **changes))
    if "mesh" in changes:
        mesh = changes["mesh"]
        place = jax.devices()[0] if mesh is None else NamedSharding(mesh, PartitionSpec())
        sharded = {id(param) for block in model.moe_blocks() for param in block.sharded_params()}
        for _, param in nnx.iter_graph(model):
            if isinstance(param, nnx.Variable) and id(param) not in sharded:
                param.set_value(jax.device_put(param.get_value(), place))


def quantize_experts(
    model: MoEModel, sample_ids: Int[Array, "B S"] | None = None, *, four_over_six: bool = False
) -> None:
    """Quantize all expert weights to NVFP4 in memory, in place; with `sample_ids` first calibrate activation scales.

    Calibrated: amax / 2688 over the sample, one scale per layer for GEMM 1 and one per expert for GEMM 2; an expert
    that no token of the sample visits takes its layer's largest. Without a sample each token gets its own scale when it
    comes.

    Raises:
      TypeError, ValueError: a sample that is not an integer array [B, S].
    """
    if sample_ids is not None:
        check_array("quantize_experts: sample_ids", sample_ids, jnp.integer)
        if sample_ids.ndim != 2:
            raise ValueError(f"quantize_experts: sample_ids must be [B, S], got {sample_ids.shape}")
    calibration = None if sample_ids is None else _calibrate(*nnx.split(model), sample_ids)
    for index, block in enumerate(model.moe_blocks()):
        block.quantize_experts(four_over_six=four_over_six)
        if calibration is not None:
            block.set_input_scales(*scales_from_amax(calibration[index]))


@partial(jax.jit, static_argnums=0)
def _calibrate(graphdef: Any, state: Any, ids: jax.Array) -> list[ExpertAmax]:
    return nnx.merge(graphdef, state).calibrate(ids)


def scales_from_amax(amax: ExpertAmax) -> tuple[jax.Array, jax.Array]:
    """Activation scales of one block; experts with amax 0 were not hit (or saw zeros only) and take the largest."""
    amax_1, amax_2 = np.asarray(amax.input_1, np.float32), np.asarray(amax.input_2, np.float32)
    amax_2 = np.where(amax_2 > 0, amax_2, amax_2.max())
    return jnp.asarray(amax_1 / _AMAX_PER_SCALE), jnp.asarray(amax_2 / _AMAX_PER_SCALE)


def set_input_scales(model: MoEModel, scales: Mapping[str, float]) -> None:
    """Use static activation scales given under checkpoint names, `<block>.experts.E.{gate,up,down}_proj.input_scale`.

    Decode direction (amax / 2688). GEMM 1 of a layer takes the largest of all its experts' gate and up scales, so that
    every device quantizes alike; GEMM 2 takes each expert's own.

    Raises:
      ValueError: naming the first tensor that is missing, zero, negative or not finite; no block is changed then.
    """

    def checked(name: str) -> float:
        if name not in scales:
            raise ValueError(f"{name} is missing; static activation scales need one for every expert and projection")
        value = float(np.asarray(scales[name]).reshape(()))
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} = {value} must be positive and finite")
        return value

    found = []
    for block in model.moe_blocks():
        gate, up, down = (
            [
                checked(f"{block.path}.experts.{e}.{projection}.input_scale")
                for e in range(block.router_config.num_experts)
            ]
            for projection in ("gate_proj", "up_proj", "down_proj")
        )
        found.append((max(gate + up), down))
    for block, (scale_1, scale_2) in zip(model.moe_blocks(), found, strict=True):
        block.set_input_scales(jnp.float32(scale_1), jnp.asarray(scale_2, jnp.float32))
