"""`MoEConfig`, the settings of how experts run, for the op `moe_layer`, the Flax block and whole models."""

import dataclasses
from typing import Any, Literal, get_args

import numpy as np

from fp4jax.expert_parallel.checks import FORMS, Form
from fp4jax.expert_parallel.wire_formats import WIRE_FORMATS, WireFormat
from fp4jax.grouped_gemm.packed_weights import is_nvfp4
from fp4jax.implementations import IMPLEMENTATIONS, Implementation
from fp4jax.operands import described

Layout = Literal["masked", "contiguous"]
ActivationFormat = Literal["nvfp4", "bf16"]
LAYOUTS: tuple[str, ...] = get_args(Layout)
ACTIVATION_FORMATS: tuple[str, ...] = get_args(ActivationFormat)
# With `layout=None`, the masked layout serves calls with up to this many rows per device, where it is up to 9% faster
# (experiments/results/h200/moe_layouts.json). Each expert has room for all rows: 0.3 GB of pads with 256 rows and 128
# experts of Qwen3-30B, gigabytes in a prefill.
MASKED_ROWS = 256


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Static settings of an expert layer.

    They change numerics, traffic and speed, never the values of the weights. The mesh is not a field: functions that
    need it take it as an argument.

    Attributes:
      num_experts: the number of experts on all devices together (E).
      activation_format_1: the format of the activations in GEMM 1. "nvfp4": W4A4. "bf16": W4A16. None: "nvfp4" if the
        weights are NVFP4 and come with an input scale, else "bf16". Tokens that crossed the network in NVFP4 stay in
        NVFP4 whatever this says.
      activation_format_2: the same for GEMM 2.
      wire_format: the format in which tokens cross the network: "nvfp4", "fp8" or "bf16".
      form: "per_peer" or "per_slot", explained in `expert_parallel.exchange`.
      layout: "masked" [L, M, ...] or "contiguous" [rows, ...]. None: masked if there are at most 256 rows on a device
        (decode steps) or a capacity is given, else contiguous.
      capacity: rows per local expert (M) in the masked layout, rows of all local experts in the contiguous layout.
        Routes beyond it are dropped and counted. None: enough for tokens that name an expert at most once.
      pair_capacity: rows per sender and receiver (C) of a dispatch. None: the worst case.
      axis_name: the mesh axis over which experts and tokens are split. None: one device.
      low_latency: let a program of many layers keep its receive buffers, so that devices need not meet before they
        send (`expert_parallel.low_latency`). `engine.BucketedModel` then does so in decode steps.
      differentiable: run every expert on every token, unquantized (`moe.dense_moe`), for training on one device.
      implementation: the implementation of every op of the layer. None: the best one for the device and the shapes.

    Raises:
      TypeError, ValueError: a field has an unknown value or does not fit the others; the message names it.
    """

    num_experts: int
    activation_format_1: ActivationFormat | None = None
    activation_format_2: ActivationFormat | None = None
    wire_format: WireFormat = "bf16"
    form: Form = "per_peer"
    layout: Layout | None = None
    capacity: int | None = None
    pair_capacity: int | None = None
    axis_name: str | None = None
    low_latency: bool = False
    differentiable: bool = False
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("activation_format_1", (None, *ACTIVATION_FORMATS)),
            ("activation_format_2", (None, *ACTIVATION_FORMATS)),
            ("wire_format", WIRE_FORMATS),
            ("form", FORMS),
            ("layout", (None, *LAYOUTS)),
            ("implementation", (None, *IMPLEMENTATIONS)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"MoEConfig: {name}={getattr(self, name)!r} is unknown; choose one of {choices}")
        if not isinstance(self.axis_name, str | None):
            raise TypeError(f"MoEConfig: axis_name must be the name of one mesh axis or None, got {self.axis_name!r}")
        for name in ("num_experts", "capacity", "pair_capacity"):
            value = getattr(self, name)
            if name != "num_experts" and value is None:
                continue
            if not isinstance(value, int | np.integer):
                raise TypeError(f"MoEConfig: {name} must be an int, got {described(value)}")
            if value < 1:
                raise ValueError(f"MoEConfig: {name} must be at least 1, got {value}")
        if self.low_latency and self.axis_name is None:
            raise ValueError("MoEConfig: low_latency=True is about tokens that cross a mesh, and axis_name is None")
        formats = self.activation_format_1, self.activation_format_2
        if self.differentiable and (self.axis_name is not None or "nvfp4" in formats):
            raise ValueError(
                "MoEConfig: differentiable=True runs on one device with activations in bf16, "
                f"got axis_name={self.axis_name!r} and activation formats {formats}"
            )

    def resolved(self, weights: Any, rows: int) -> "MoEConfig":
        """Returns a copy in which activation formats and layout are no longer None.

        Args:
          weights: the `experts.MoEWeights` that the layer runs with.
          rows: the number of rows that enter the permutation on one device.
        """
        scales = weights.input_scale_1, weights.input_scale_2
        formats = [
            given or ("nvfp4" if is_nvfp4(w) and scale is not None else "bf16")
            for given, w, scale in zip(
                (self.activation_format_1, self.activation_format_2), (weights.w13, weights.w2), scales, strict=True
            )
        ]
        few = rows <= MASKED_ROWS or self.capacity is not None
        layout = self.layout or ("masked" if few else "contiguous")
        return dataclasses.replace(self, activation_format_1=formats[0], activation_format_2=formats[1], layout=layout)
