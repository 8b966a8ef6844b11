"""The expert layer as a Flax NNX module: router, routed experts, shared experts and latent projections.

The experts are stored stacked: w13 [E, 2I, H] with gate rows first, and w2 [E, H, I]. They are plain arrays,
NVFP4Tensor, or PackedWeights where the kernel of the grouped GEMM runs (`MoEBlock.configure` packs them).
`RoutingConfig` holds what the model fixes, `MoEConfig` what its user chooses.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from fp4jax import routing
from fp4jax.expert_parallel.low_latency import ReceiveBuffers
from fp4jax.experts import MoEWeights, quantize_experts, quantize_gate_up, runs_on_kernel
from fp4jax.grouped_gemm.packed_weights import arrange_experts, is_nvfp4
from fp4jax.layers.calibration import ExpertAmax, check_input_scales, measure_experts
from fp4jax.layers.linear import Linear, normal_param
from fp4jax.layers.mlp import MLP
from fp4jax.layers.routing_config import RoutingConfig
from fp4jax.moe import MoEStats, moe_layer
from fp4jax.moe_config import MoEConfig
from fp4jax.operands import check_type
from fp4jax.sharded_moe import EP_AXIS, expert_mesh, sharded_moe_layer


class MoEAux(NamedTuple):
    """What a forward pass returns besides its result: of one block, or of a model, summed over its blocks.

    Attributes:
      dropped: i32 (), the number of routes lost to bad ids or capacities.
      balance_loss: f32 (), see `routing.load_balance_loss`.
      buffers: the receive buffers to pass to the program's next block; None if this block was given none.
    """

    dropped: Int[Array, ""]
    balance_loss: Float[Array, ""]
    buffers: ReceiveBuffers | None = None


class MoEBlock(nnx.Module):
    """Router and routed experts, and optionally shared experts, their gate, and latent projections.

        y = fc2_latent_proj(experts(fc1_latent_proj(x))) + sigmoid(shared_expert_gate(x)) * shared_experts(x)

    With a residual, the block returns residual + y. The router and the shared experts see the original x.

    Args:
      hidden_size: H.
      moe_intermediate_size: I of the routed experts.
      router: how tokens are routed.
      shared_intermediate_size: the intermediate size of the shared experts; None: there are none.
      shared_gate: whether the shared experts have a gate.
      latent_size: the width of the routed experts' inputs and outputs behind latent projections; None: H, without
        projections.
      dtype: dtype of the computation.
      param_dtype: dtype of new parameters.
      stddev: standard deviation of new parameters.
      path: the name of the block in errors and in the names of its tensors.
      rngs: random numbers for new parameters.

    Raises:
      ValueError: shared_gate=True without shared_intermediate_size.
    """

    def __init__(
        self,
        hidden_size: int,
        moe_intermediate_size: int,
        router: RoutingConfig,
        *,
        shared_intermediate_size: int | None = None,
        shared_gate: bool = False,
        latent_size: int | None = None,
        dtype: Any,
        param_dtype: Any,
        stddev: float = 0.02,
        path: str = "mlp",
        rngs: nnx.Rngs,
    ):
        linear = dict(dtype=dtype, param_dtype=param_dtype, stddev=stddev, rngs=rngs)
        self.dtype, self.path = jnp.dtype(dtype), path
        self.router_config = router
        self.mesh: Mesh | None = None
        self.config = MoEConfig(num_experts=router.num_experts)
        self.gate = Linear(hidden_size, router.num_experts, **{**linear, "dtype": jnp.float32})
        self.correction_bias = nnx.data(None)
        if router.correction_bias:
            self.correction_bias = nnx.Param(jnp.zeros(router.num_experts, jnp.float32))
        self.fc1_latent_proj = self.fc2_latent_proj = nnx.data(None)
        if latent_size is not None:
            self.fc1_latent_proj = Linear(hidden_size, latent_size, **linear)
            self.fc2_latent_proj = Linear(latent_size, hidden_size, **linear)
        self.intermediate_size = moe_intermediate_size
        width, experts = latent_size or hidden_size, router.num_experts
        self.w13 = normal_param(rngs, (experts, 2 * moe_intermediate_size, width), stddev, param_dtype)
        self.w2 = normal_param(rngs, (experts, width, moe_intermediate_size), stddev, param_dtype)
        self.input_scale_1: nnx.Param | None = nnx.data(None)
        self.input_scale_2: nnx.Param | None = nnx.data(None)
        self.shared_experts = self.shared_expert_gate = nnx.data(None)
        if shared_intermediate_size is not None:
            self.shared_experts = MLP(hidden_size, shared_intermediate_size, **linear)
        if shared_gate:
            if shared_intermediate_size is None:
                raise ValueError("shared_gate=True needs shared_intermediate_size")
            self.shared_expert_gate = Linear(hidden_size, 1, **linear)

    def __call__(
        self,
        x: Float[Array, "... H"],
        valid: Bool[Array, "..."] | None = None,
        buffers: ReceiveBuffers | None = None,
        residual: Float[Array, "... H"] | None = None,
    ) -> tuple[Float[Array, "... H"], MoEAux]:
        """Runs the layer on tokens x [..., H].

        Args:
          x: floating-point tokens [..., H].
          valid: bool [...], which tokens are valid; None: all. The others go to no routed expert and take no capacity,
            and their results mean nothing. They still count in the balance loss.
          buffers: receive buffers, `MoEAux.buffers` of the program's previous block; None: new buffers. See
            `expert_parallel.low_latency`.
          residual: [..., H] in the dtype of the block, added to the result; None: nothing is added.

        Returns:
          The result, of the shape of x, and `MoEAux` of this block.
        """
        rows = x.reshape(-1, x.shape[-1])
        route, balance_loss = self._route(rows, None if valid is None else valid.reshape(-1))
        hidden = rows if self.fc1_latent_proj is None else self.fc1_latent_proj(rows)
        rest = self._rest(rows, residual)
        # The sum over a token's experts can add the rest, unless that sum is projected or is brought to other devices.
        inside = self.mesh is None and self.fc2_latent_proj is None
        y, stats = self.experts(hidden.astype(self.dtype), route, buffers, rest if inside else None)
        y = y if inside else self._finish(y, rest)
        return y.reshape(x.shape), MoEAux(stats.dropped, balance_loss, stats.buffers)

    def _route(self, rows: jax.Array, valid: jax.Array | None = None) -> tuple[routing.Routing, jax.Array]:
        # On a mesh XLA splits the arrays over the devices, which it cannot do with a kernel.
        on_mesh = self.mesh is not None and self.mesh.size > 1
        implementation = "xla" if on_mesh or self.config.implementation == "xla" else None
        logits, bias = self.gate(rows), None if self.correction_bias is None else self.correction_bias[...]
        route = self.router_config.route(logits, bias, valid=valid, implementation=implementation)
        # The loss counts all tokens. Programs that do not use it compute neither it nor what only it needs.
        every = route if valid is None else self.router_config.route(logits, bias, implementation=implementation)
        return route, routing.load_balance_loss(logits, every.topk_ids, scoring=self.router_config.scoring)

    def _rest(self, rows: jax.Array, residual: jax.Array | None) -> jax.Array | None:
        """What is added to the routed experts' result [T, H]: the shared experts' result and the residual."""
        rest = None if residual is None else residual.reshape(rows.shape)
        if self.shared_experts is None:
            return rest
        shared = self.shared_experts(rows)
        if self.shared_expert_gate is not None:
            shared = jax.nn.sigmoid(self.shared_expert_gate(rows).astype(jnp.float32)) * shared
        return self._sum(shared, rest)

    def _finish(self, y: jax.Array, rest: jax.Array | None) -> jax.Array:
        """Projects the routed experts' result y up from the latent size, and adds `_rest`."""
        if self.fc2_latent_proj is not None:
            y = self.fc2_latent_proj(y)
        return self._sum(y, rest)

    def _sum(self, a: jax.Array, b: jax.Array | None) -> jax.Array:
        return (a if b is None else a.astype(jnp.float32) + b.astype(jnp.float32)).astype(self.dtype)

    def experts(
        self,
        x: jax.Array,
        route: routing.Routing,
        buffers: ReceiveBuffers | None = None,
        residual: jax.Array | None = None,
    ) -> tuple[jax.Array, MoEStats]:
        """Runs the routed experts alone, with a given routing.

        Args:
          x: rows [T, H], behind the latent projection if there is one.
          route: the experts and weights of the T rows.
          buffers: as in the call of the block.
          residual: [T, H] like x, added to the result; None: nothing is added. A block on a mesh takes none.

        Returns:
          The weighted sums [T, H], and the `MoEStats` of `moe_layer`.
        """
        w13, w2 = (w if is_nvfp4(w) else w.astype(self.dtype) for w in (self.w13.get_value(), self.w2.get_value()))
        if self.config.differentiable and (is_nvfp4(w13) or is_nvfp4(w2)):
            raise ValueError(f"{self.path}: differentiable=True needs plain expert weights; these are NVFP4")
        scales = (None if scale is None else scale[...] for scale in (self.input_scale_1, self.input_scale_2))
        weights = MoEWeights(w13, w2, *scales)
        if self.mesh is None:
            y, stats = moe_layer(x, *route, weights, self.config, buffers, residual)
        else:
            y, stats = sharded_moe_layer(x, *route, weights, self.config, self.mesh, buffers)
        return y.astype(self.dtype), stats

    def configure(self, config: MoEConfig, mesh: Mesh | None = None) -> None:
        """Sets how the experts run, and places their weights on the devices.

        NVFP4 weights are packed if the kernel of the grouped GEMM will run them, and else unpacked. Parameters other
        than the experts' are not moved; `models.configure_experts` moves those of a whole model.

        Args:
          config: the new settings. `num_experts` must be the block's. `axis_name` is set here, "ep" with a mesh and
            None without.
          mesh: a mesh with the one axis "ep", over which the experts are split; None: all go to the first device.

        Raises:
          TypeError, ValueError: the config or the mesh does not fit the block.
        """
        check_type(f"{self.path}: config", config, MoEConfig, "e.g. MoEConfig(num_experts=8)")
        experts, mesh = self.router_config.num_experts, None if mesh is None else expert_mesh(mesh)
        if config.num_experts != experts:
            raise ValueError(f"{self.path}: config.num_experts={config.num_experts} for a block of {experts} experts")
        if mesh is not None and experts % mesh.size:
            raise ValueError(f"{self.path}: {experts} experts cannot be split over {mesh.size} devices")
        self.config = dataclasses.replace(config, axis_name=None if mesh is None else EP_AXIS)
        self.mesh = mesh
        place = jax.local_devices()[0] if mesh is None else NamedSharding(mesh, P(EP_AXIS))
        for param in self.sharded_params():
            param.set_value(jax.device_put(param.get_value(), place))
        self._pack_or_unpack()

    def _pack_or_unpack(self) -> None:
        """Packs NVFP4 weights if the kernel of the grouped GEMM will run them, and else unpacks them."""
        on_kernel = runs_on_kernel(self.dtype, self.config.implementation)
        pair = arrange_experts(self.w13.get_value(), self.w2.get_value(), self.intermediate_size, packed=on_kernel)
        for param, value in zip((self.w13, self.w2), pair, strict=True):
            param.set_value(value)

    def sharded_params(self) -> list[nnx.Param]:
        """Returns the parameters with a leading axis of experts. All others are the same on every device."""
        return [param for param in (self.w13, self.w2, self.input_scale_2) if param is not None]

    def quantize_experts(self, *, four_over_six: bool = False) -> None:
        """Replaces plain expert weights by NVFP4 ones; gate, up and down of every expert get a global scale each.

        Args:
          four_over_six: choose the better of two scales for every block of weights, see `nvfp4.quantize`.

        Raises:
          ValueError: the weights of both GEMMs are NVFP4 already.
        """
        w13, w2 = self.w13.get_value(), self.w2.get_value()
        if is_nvfp4(w13) and is_nvfp4(w2):
            raise ValueError(f"{self.path}: the experts are quantized already")
        if not is_nvfp4(w13):
            half = w13.shape[1] // 2
            self.w13.set_value(quantize_gate_up(w13[:, :half], w13[:, half:], four_over_six=four_over_six))
        if not is_nvfp4(w2):
            self.w2.set_value(quantize_experts(w2, four_over_six=four_over_six))
        self._pack_or_unpack()

    def calibrate(
        self, x: Float[Array, "... H"], *, all_tokens: bool = False, residual: Float[Array, "... H"] | None = None
    ) -> tuple[Float[Array, "... H"], ExpertAmax]:
        """Runs the layer with plain weights, one expert at a time, and measures the inputs of both GEMMs.

        Args:
          x: tokens [..., H].
          all_tokens: measure an expert's GEMM 2 on all tokens, not only on those that are routed to it.
          residual: as in the call of the block.

        Returns:
          The result, of the shape of x, and the amax of the inputs of both GEMMs; NaN if an input is NaN.

        Raises:
          ValueError: the expert weights are NVFP4 already.
        """
        w13, w2 = self.w13.get_value(), self.w2.get_value()
        if is_nvfp4(w13) or is_nvfp4(w2):
            raise ValueError(f"{self.path}: calibrate before quantize_experts, with plain expert weights")
        rows = x.reshape(-1, x.shape[-1])
        route, _ = self._route(rows)
        hidden = (rows if self.fc1_latent_proj is None else self.fc1_latent_proj(rows)).astype(self.dtype)
        y, amax = measure_experts(hidden, route, w13, w2, all_tokens=all_tokens)
        return self._finish(y.astype(self.dtype), self._rest(rows, residual)).reshape(x.shape), amax

    def set_input_scales(self, input_scale_1: Float[Array, ""] | None, input_scale_2: Float[Array, "E"] | None) -> None:
        """Sets static scales of the activations, in decode direction (multiply).

        Args:
          input_scale_1: f32 (), the scale of the inputs of GEMM 1; None: no static scale.
          input_scale_2: f32 [E], the scales of the inputs of GEMM 2, one per expert; None: no static scales.

        Raises:
          ValueError: a scale is refused by `calibration.check_input_scales`; the message names the tensor.
        """
        quantized = [is_nvfp4(w.get_value()) for w in (self.w13, self.w2)]
        check_input_scales(self.path, (input_scale_1, input_scale_2), quantized, self.router_config.num_experts)
        self.input_scale_1 = self.input_scale_2 = nnx.data(None)
        if input_scale_1 is not None:
            self.input_scale_1 = nnx.Param(jnp.asarray(input_scale_1, jnp.float32))
        if input_scale_2 is not None:
            self.input_scale_2 = nnx.Param(jnp.asarray(input_scale_2, jnp.float32).reshape(-1, 1, 1))
        if input_scale_1 is not None or input_scale_2 is not None:
            self.configure(self.config, self.mesh)
