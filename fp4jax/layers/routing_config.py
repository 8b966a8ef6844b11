"""How a model routes its tokens."""

import dataclasses

from fp4jax import routing


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
