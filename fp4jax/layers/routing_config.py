"""How a model routes its tokens."""

import dataclasses

import jax

from fp4jax import routing
from fp4jax.implementations import Implementation


@dataclasses.dataclass(frozen=True)
class RoutingConfig:
    """How a model routes its tokens. The fields are arguments of `routing.route`, which explains them, except for two:

    Attributes:
      num_experts: the number of experts (E).
      correction_bias: whether the block has a parameter `correction_bias` [E], which it passes to `route`.
    """

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

    def route(
        self,
        logits: jax.Array,
        correction_bias: jax.Array | None,
        *,
        valid: jax.Array | None = None,
        implementation: Implementation | None = None,
    ) -> routing.Routing:
        """Routes tokens by these fields; the arguments are those of `routing.route`."""
        return routing.route(
            logits,
            top_k=self.top_k,
            scoring=self.scoring,
            renormalize=self.renormalize,
            correction_bias=correction_bias,
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
            routed_scaling_factor=self.routed_scaling_factor,
            valid=valid,
            implementation=implementation,
        )
