"""The expert layer as a Flax NNX module: router, routed experts, shared experts, latent projections.

Experts are stored stacked, w13 [E, 2I, H] (gate rows first) and w2 [E, H, I], plain, as NVFP4Tensor, or as
PackedWeights where the grouped GEMM's kernel runs (`configure` packs them). What the model fixes is in `RoutingConfig`,
what its user chooses in `MoEConfig`.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from fp4jax import routing
from fp4jax.expert_parallel.low_latency import ReceiveBuffers
from fp4jax.experts import MoEWeights, quantize_experts, quantize_gate_up, runs_on_kernel
from fp4jax.grouped_gemm.packed_weights import arrange_experts, is_nvfp4
from fp4jax.layers.linear import MLP, Linear, exact_precision, largest, normal_param
from fp4jax.moe import MoEStats, moe_layer
from fp4jax.moe_config import MoEConfig
from fp4jax.operands import check_type
from fp4jax.sharded_moe import EP_AXIS, expert_mesh, sharded_moe_layer


@dataclasses.dataclass(frozen=True)
class RoutingConfig:
    """Arguments of `routing.route` that belong to the model; `correction_bias=True` makes it a parameter."""

    num_experts: int
    top_k: int
    scoring: routing.Scoring = "softmax"
    renormalize: bool = True
    correction_bias: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    routed_scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        routing.check_routing(
            self.num_experts,
            top_k=self.top_k,
            scoring=self.scoring,
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
        )


class MoEAux(NamedTuple):
    """What a forward pass reports besides its result, summed over MoE layers; buffers: of one block, see its call."""

    dropped: Int[Array, ""]
    balance_loss: Float[Array, ""]
    buffers: ReceiveBuffers | None = None


class ExpertAmax(NamedTuple):
    """Largest absolute values seen by one block: inputs of GEMM 1, and per expert inputs of GEMM 2 (0: never hit)."""

    input_1: Float[Array, ""]
    input_2: Float[Array, "E"]


class MoEBlock(nnx.Module):
    """Router and routed experts, plus optional shared experts and latent projections.

    y = fc2_latent_proj(experts(fc1_latent_proj(x))) + sigmoid(shared_gate(x)) * shared(x); each optional part only when
    its size is given. The router and the shared experts see the original x. `path` is the block's name in errors.
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
    ) -> tuple[Float[Array, "... H"], MoEAux]:
        """Tokens that are not `valid` go to no routed expert (and take no capacity); what they become means nothing.

        The balance loss is that of all tokens, valid or not. buffers: what the program's block before reported, to
        receive into; None: into new arrays.
        """
        rows = x.reshape(-1, x.shape[-1])
        route, balance_loss = self._route(rows)
        if valid is not None:
            route = route._replace(topk_ids=jnp.where(valid.reshape(-1, 1), route.topk_ids, -1))
        hidden = rows if self.fc1_latent_proj is None else self.fc1_latent_proj(rows)
        y, stats = self.experts(hidden.astype(self.dtype), route, buffers)
        y = self._finish(y, rows)
        return y.reshape(x.shape), MoEAux(stats.dropped, balance_loss, stats.buffers)

    def _route(self, rows: jax.Array) -> tuple[routing.Routing, jax.Array]:
        config = self.router_config
        logits = self.gate(rows)
        route = routing.route(
            logits,
            top_k=config.top_k,
            scoring=config.scoring,
            renormalize=config.renormalize,
            correction_bias=None if self.correction_bias is None else self.correction_bias[...],
            num_groups=config.num_groups,
            topk_groups=config.topk_groups,
            routed_scaling_factor=config.routed_scaling_factor,
        )
        return route, routing.load_balance_loss(logits, route.topk_ids, scoring=config.scoring)

    def _finish(self, y: jax.Array, rows: jax.Array) -> jax.Array:
        """Latent projection up, then shared experts on the original rows."""
        if self.fc2_latent_proj is not None:
            y = self.fc2_latent_proj(y)
        if self.shared_experts is None:
            return y
        shared = self.shared_experts(rows)
        if self.shared_expert_gate is not None:
            shared = jax.nn.sigmoid(self.shared_expert_gate(rows).astype(jnp.float32)) * shared
        return (y.astype(jnp.float32) + shared.astype(jnp.float32)).astype(self.dtype)

    def experts(
        self, x: jax.Array, route: routing.Routing, buffers: ReceiveBuffers | None = None
    ) -> tuple[jax.Array, MoEStats]:
        """Routed experts on rows x [T, H] with a given routing: weighted sums [T, H], and what `moe_layer` reports."""
        w13, w2 = (w if is_nvfp4(w) else w.astype(self.dtype) for w in (self.w13.get_value(), self.w2.get_value()))
        if self.config.differentiable and (is_nvfp4(w13) or is_nvfp4(w2)):
            raise ValueError(f"{self.path}: differentiable=True needs plain expert weights; these are NVFP4")
        scales = (None if scale is None else scale[...] for scale in (self.input_scale_1, self.input_scale_2))
        weights = MoEWeights(w13, w2, *scales)
        if self.mesh is None:
            y, stats = moe_layer(x, *route, weights, self.config)
        else:
            y, stats = sharded_moe_layer(x, *route, weights, self.config, self.mesh, buffers)
        return y.astype(self.dtype), stats

    def configure(self, config: MoEConfig, mesh: Mesh | None = None) -> None:
        """Sets how the experts run and places their weights: split over "ep" of a mesh, or all on one device.

        NVFP4 weights are packed where the kernel of the grouped GEMM will run, and unpacked where not. The other
        parameters are not moved; `models.configure_experts` does that for a whole model.

        Args:
          config: `config.num_experts` is the block's. `config.axis_name` may be left out.
          mesh: has the one axis "ep"; None: one device.

        Raises:
          TypeError, ValueError: a config or mesh that does not fit the block.
        """
        check_type(f"{self.path}: config", config, MoEConfig, "e.g. MoEConfig(num_experts=8)")
        experts, mesh = self.router_config.num_experts, None if mesh is None else expert_mesh(mesh)
        if config.num_experts != experts:
            raise ValueError(f"{self.path}: config.num_experts={config.num_experts} for a block of {experts} experts")
        if mesh is not None and experts % mesh.size:
            raise ValueError(f"{self.path}: {experts} experts cannot be split over {mesh.size} devices")
        self.config = dataclasses.replace(config, axis_name=None if mesh is None else EP_AXIS)
        self.mesh = mesh
        place = jax.devices()[0] if mesh is None else NamedSharding(mesh, P(EP_AXIS))
        for param in self.sharded_params():
            param.set_value(jax.device_put(param.get_value(), place))
        self._pack_or_unpack()

    def _pack_or_unpack(self) -> None:
        """Kernel layout for NVFP4 weights if and only if the config leads to the kernel."""
        on_kernel = runs_on_kernel(self.dtype, self.config.implementation)
        pair = arrange_experts(self.w13.get_value(), self.w2.get_value(), self.intermediate_size, packed=on_kernel)
        for param, value in zip((self.w13, self.w2), pair, strict=True):
            param.set_value(value)

    def sharded_params(self) -> list[nnx.Param]:
        """Parameters with a leading expert axis; all others are the same on every device."""
        return [param for param in (self.w13, self.w2, self.input_scale_2) if param is not None]

    def quantize_experts(self, *, four_over_six: bool = False) -> None:
        """Replace plain expert weights by NVFP4 with one global scale per expert and projection (gate and up apart).

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
        self, x: Float[Array, "... H"], *, all_tokens: bool = False
    ) -> tuple[Float[Array, "... H"], ExpertAmax]:
        """Forward pass with plain weights that also reports the amax of both GEMMs' inputs (one expert at a time).

        all_tokens: an expert's amax is over every token, routed to it or not; a NaN is reported as such.
        """
        w13, w2 = self.w13.get_value(), self.w2.get_value()
        if is_nvfp4(w13) or is_nvfp4(w2):
            raise ValueError(f"{self.path}: calibrate before quantize_experts, with plain expert weights")
        rows = x.reshape(-1, x.shape[-1])
        route, _ = self._route(rows)
        hidden = (rows if self.fc1_latent_proj is None else self.fc1_latent_proj(rows)).astype(self.dtype)

        def add_expert(y: jax.Array, expert_and_weights: Any) -> tuple[jax.Array, jax.Array]:
            expert, *weights = expert_and_weights
            product = partial(jnp.einsum, "tk,nk->tn", precision=exact_precision(self.dtype))
            gate_up = product(hidden, weights[0].astype(self.dtype))
            gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=1)
            act = jax.nn.silu(gate) * up
            chosen = route.topk_ids == expert
            hit = jnp.any(chosen, axis=1, keepdims=True)
            amax = largest(act, where=hit | all_tokens)
            out = product(act.astype(self.dtype), weights[1].astype(self.dtype)).astype(jnp.float32)
            weight = jnp.sum(jnp.where(chosen, route.topk_weights, 0), axis=1, keepdims=True)
            return y + jnp.where(hit, weight * out, 0), amax

        zeros = jnp.zeros((rows.shape[0], w2.shape[1]), jnp.float32)
        y, amax_2 = jax.lax.scan(add_expert, zeros, (jnp.arange(w13.shape[0], dtype=jnp.int32), w13, w2))
        return self._finish(y.astype(self.dtype), rows).reshape(x.shape), ExpertAmax(largest(hidden), amax_2)

    def set_input_scales(self, input_scale_1: Float[Array, ""] | None, input_scale_2: Float[Array, "E"] | None) -> None:
        """Static activation scales (decode direction): one for GEMM 1, one per expert for GEMM 2; None: per token.

        Raises:
          ValueError: naming the tensor, when one of the two is missing (unless only the other GEMM's weights are
            NVFP4), or a scale is zero, negative or not finite.
        """
        given = {"input_scale_1": input_scale_1, "input_scale_2": input_scale_2}
        quantized = [is_nvfp4(w.get_value()) for w in (self.w13, self.w2)]
        needed = dict(zip(given, quantized if any(quantized) else (True, True), strict=True))
        missing = [name for name, value in given.items() if value is None and needed[name]]
        if missing and any(value is not None for value in given.values()):
            raise ValueError(f"{self.path}.experts.{missing[0]} is missing while the other input scale is given")
        for name, value in given.items():
            if value is None:
                continue
            flat = np.atleast_1d(np.asarray(value, np.float32))
            bad = np.flatnonzero(~(np.isfinite(flat) & (flat > 0)))
            if bad.size:
                where = f"[{bad[0]}]" if flat.size > 1 else ""
                raise ValueError(f"{self.path}.experts.{name}{where} = {flat[bad[0]]} must be positive and finite")
        if input_scale_2 is not None and input_scale_2.shape != (self.router_config.num_experts,):
            raise ValueError(
                f"{self.path}.experts.input_scale_2 has shape {input_scale_2.shape}, "
                f"expected ({self.router_config.num_experts},)"
            )
        self.input_scale_1 = self.input_scale_2 = nnx.data(None)
        if input_scale_1 is not None:
            self.input_scale_1 = nnx.Param(jnp.asarray(input_scale_1, jnp.float32))
        if input_scale_2 is not None:
            self.input_scale_2 = nnx.Param(jnp.asarray(input_scale_2, jnp.float32).reshape(-1, 1, 1))
        if input_scale_1 is not None or input_scale_2 is not None:
            self.configure(self.config, self.mesh)
