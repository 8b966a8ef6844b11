"""Setup of all experts of a model: how they run, on which devices, quantization in memory, and activation scales."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from fp4jax.layers import ExpertAmax, MoEBlock
from fp4jax.operands import check_array
from fp4jax.sharded_moe import EP_AXIS, expert_mesh
from pallas_kernels.simt.formats import AMAX_DIVISOR

_AMAX_PER_SCALE = np.float32(AMAX_DIVISOR)  # amax / scale: code 6 with block scale 448 decodes to this


@runtime_checkable
class MoEModel(Protocol):
    """What this module needs of a model: its expert layers, where attention runs, and the amax of activations."""

    def moe_blocks(self) -> list[MoEBlock]: ...

    def calibrate(self, ids: Any) -> list[ExpertAmax]: ...

    def place_attention(self, mesh: Mesh | None) -> None: ...


def configure_experts(model: MoEModel, **changes: Any) -> None:
    """Changes how all experts of a model run, in place. The values of weights do not change.

    Args:
      model: the model.
      changes: fields of `MoEConfig` with new values; the other fields stay as they are. Also `mesh`: with a mesh whose
        one axis is "ep", the weights of the experts are split over it, and everything else is copied to all its
        devices; with None, everything goes to the first device.

    Raises:
      TypeError, ValueError: a field or the mesh does not exist or does not fit the model.
    """
    new_mesh = "mesh" in changes
    mesh = changes.pop("mesh", None)
    mesh = None if mesh is None else expert_mesh(mesh)
    for block in model.moe_blocks():
        at = mesh if new_mesh else block.mesh
        fields: dict[str, Any] = {"axis_name": None if at is None else EP_AXIS, **changes}
        block.configure(dataclasses.replace(block.config, **fields), at)
    if new_mesh:
        model.place_attention(mesh)
        place = jax.local_devices()[0] if mesh is None else NamedSharding(mesh, PartitionSpec())
        sharded = {id(param) for block in model.moe_blocks() for param in block.sharded_params()}
        for _, param in nnx.iter_graph(model):
            if isinstance(param, nnx.Variable) and id(param) not in sharded:
                param.set_value(jax.device_put(param.get_value(), place))


def quantize_experts(
    model: MoEModel, sample_ids: Int[Array, "B S"] | None = None, *, four_over_six: bool = False
) -> None:
    """Quantizes all expert weights of a model to NVFP4, in place, and calibrates activation scales on a sample.

    An activation scale is amax / 2688 over the sample: one per layer for GEMM 1, and one per expert for GEMM 2. An
    expert that no token of the sample visits gets the largest scale in its layer.

    Args:
      model: a model with plain expert weights.
      sample_ids: token ids [B, S] to calibrate on. None: the layers get no activation scales.
      four_over_six: choose the better of two scales for every block of weights, see `nvfp4.quantize`.

    Raises:
      TypeError, ValueError: the sample is not an integer array [B, S], or the weights are quantized already.
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
    """Returns the activation scales of one block, amax / 2688: f32 () for GEMM 1 and f32 [E] for GEMM 2.

    An expert with amax 0 was not visited, or saw only zeros. It gets the largest scale of the block.
    """
    amax_1, amax_2 = np.asarray(amax.input_1, np.float32), np.asarray(amax.input_2, np.float32)
    amax_2 = np.where(amax_2 > 0, amax_2, amax_2.max())
    return jnp.asarray(amax_1 / _AMAX_PER_SCALE), jnp.asarray(amax_2 / _AMAX_PER_SCALE)


def set_input_scales(model: MoEModel, scales: Mapping[str, float]) -> None:
    """Sets static activation scales for all experts of a model, in place.

    GEMM 1 of a layer gets the largest gate or up scale of all its experts, so that every device quantizes alike. GEMM 2
    gets one scale per expert, that of its down projection.

    Args:
      model: the model.
      scales: decode scales (amax / 2688) by the names that checkpoints give them,
        `<path of the block>.experts.<e>.{gate,up,down}_proj.input_scale`.

    Raises:
      ValueError: a scale is missing, zero, negative or not finite; the message names the first one, and no block is
        changed.
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
