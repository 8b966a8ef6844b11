"""Routing: from router logits to the experts that a token visits, and their weights.

    scores = softmax(logits) or sigmoid(logits);  ids = top_k(scores + bias);  weights = scores[ids] (/ sum) * factor

All arithmetic is float32. Ties go to the lower expert index, so that routing is the same on every device.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fp4jax.implementations import Call, Implementation, run_implementation
from fp4jax.operands import check_array
from pallas_kernels.rows import router as kernel
from pallas_kernels.rows.router import MIN_WEIGHT_SUM, SCORES_PER_GROUP

Scoring = Literal["softmax", "sigmoid"]


class Routing(NamedTuple):
    """The k experts of every token, best first.

    Attributes:
      topk_ids: i32 [T, k], experts.
      topk_weights: f32 [T, k], their weights.
    """

    topk_ids: Int[Array, "T k"]
    topk_weights: Float[Array, "T k"]


def check_routing(
    num_experts: int, *, top_k: int, scoring: str = "softmax", num_groups: int = 1, topk_groups: int = 1
) -> None:
    """Raises ValueError, with the offending values, if `route` cannot serve these arguments."""
    if scoring not in get_args(Scoring):
        raise ValueError(f"scoring must be one of {get_args(Scoring)}, got {scoring!r}")
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups={num_groups} must be positive and divide num_experts={num_experts}")
    if not 1 <= topk_groups <= num_groups:
        raise ValueError(f"topk_groups={topk_groups} must be between 1 and num_groups={num_groups}")
    reachable = topk_groups * (num_experts // num_groups)
    if not 1 <= top_k <= reachable:
        raise ValueError(
            f"top_k={top_k} must be between 1 and the {reachable} experts that "
            f"topk_groups={topk_groups} of num_groups={num_groups} leave of num_experts={num_experts}"
        )


def route(
    logits: Float[Array, "T E"],
    *,
    top_k: int,
    scoring: Scoring = "softmax",
    renormalize: bool = True,
    correction_bias: Float[Array, "E"] | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    routed_scaling_factor: float = 1.0,
    valid: Bool[Array, "T"] | None = None,
    implementation: Implementation | None = None,
) -> Routing:
    """Chooses `top_k` experts per token by score plus bias; the weights come from the scores without the bias.

    Qwen3 uses softmax, with `renormalize` = its `norm_topk_prob`. ERNIE-4.5 uses softmax with a correction bias.
    DeepSeek-V3 uses sigmoid with a correction bias, groups and a scaling factor.

    If a score of a token is NaN, the token goes to the first experts that can be chosen, with weights NaN.

    The implementations compute the same formulas but not the same bits: for logits up to 32 below a token's largest
    one, scores and weights differ by a relative error of at most 4e-6. They choose different experts only where two
    candidates are as close as that.

    Args:
      logits: floating-point [T, E].
      top_k: experts per token (k).
      scoring: how logits become scores: "softmax" over the experts, or "sigmoid".
      renormalize: divide the chosen weights of a token by their sum.
      correction_bias: [E], added to the scores for the choice only; None: no bias.
      num_groups: cut the experts into this many groups of neighbours, and rank a group by the sum of its two best
        biased scores. 1: no groups.
      topk_groups: only experts of this many best groups can be chosen.
      routed_scaling_factor: factor on the weights, applied after `renormalize`.
      valid: bool [T], which tokens are valid; the others get the id -1 in all k places. None: all.
      implementation: "xla", "mosaic_gpu", or None for the best one (`implementations.run_implementation`). In a jitted
        function whose arrays XLA splits over the devices of an Auto mesh, name "xla": a kernel is not split.

    Raises:
      TypeError, ValueError: impossible counts, an unknown scoring, or arrays that do not fit.
      NotImplementedError: implementation "mosaic_gpu" was named and cannot serve the call.
    """
    check_array("route: logits", logits, jnp.floating)
    if logits.ndim != 2:
        raise ValueError(f"route: logits must be [T, E], got {logits.shape}")
    if correction_bias is not None:
        check_array("route: correction_bias", correction_bias)
    num_experts = logits.shape[1]
    check_routing(num_experts, top_k=top_k, scoring=scoring, num_groups=num_groups, topk_groups=topk_groups)
    if correction_bias is not None and correction_bias.shape != (num_experts,):
        raise ValueError(f"correction_bias has shape {correction_bias.shape}, expected ({num_experts},)")
    if valid is not None and valid.shape != logits.shape[:1]:
        raise ValueError(f"route: valid has shape {valid.shape}, expected {logits.shape[:1]}")
    config = kernel.Config(top_k, scoring, renormalize, num_groups, topk_groups, float(routed_scaling_factor))
    logits = jnp.asarray(logits).astype(jnp.float32)
    bias = None if correction_bias is None else jnp.asarray(correction_bias).astype(jnp.float32)
    return run_implementation(
        "route", implementation, (logits, bias, valid), problem=kernel.check_config(logits, config),
        xla=Call.of(_xla, config=config), mosaic_gpu=Call.of(_mosaic_gpu, config=config),
    )  # fmt: skip


def _mosaic_gpu(logits, bias, valid, *, config):
    return Routing(*kernel.route(logits, bias, valid, config=config))


def _xla(logits, bias, valid, *, config):
    scores = jax.nn.softmax(logits, axis=-1) if config.scoring == "softmax" else jax.nn.sigmoid(logits)
    choice = scores if bias is None else scores + bias[None, :]
    # How NaN compares depends on the device. A token with a NaN therefore chooses among equal values and gets the first
    # experts, and all its weights become NaN below, so that its finite scores do not hide the NaN.
    spoiled = jnp.any(jnp.isnan(scores), axis=1, keepdims=True)
    choice = jnp.where(spoiled, jnp.zeros_like(choice), choice)
    if config.num_groups > 1:
        choice = _mask_groups(choice, config.num_groups, config.topk_groups)
    _, topk_ids = jax.lax.top_k(choice, config.top_k)
    weights = jnp.take_along_axis(scores, topk_ids, axis=1)
    if config.renormalize:
        weights = weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), MIN_WEIGHT_SUM)
    weights = jnp.where(spoiled, np.float32(np.nan), weights * config.routed_scaling_factor)
    if valid is not None:
        topk_ids = jnp.where(valid[:, None], topk_ids, -1)
    return Routing(topk_ids, weights)


def _mask_groups(choice: jax.Array, num_groups: int, topk_groups: int) -> jax.Array:
    """Sets every expert outside the best groups to -inf; 0 would not do, as a biased score may be negative."""
    tokens, num_experts = choice.shape
    grouped = choice.reshape(tokens, num_groups, num_experts // num_groups)
    best, _ = jax.lax.top_k(grouped, min(SCORES_PER_GROUP, grouped.shape[-1]))
    _, group_ids = jax.lax.top_k(jnp.sum(best, axis=-1), topk_groups)
    kept = jnp.any(jax.nn.one_hot(group_ids, num_groups, dtype=jnp.bool_), axis=1)
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(tokens, num_experts)


def load_balance_loss(
    logits: Float[Array, "T E"], topk_ids: Int[Array, "T k"], *, scoring: Scoring = "softmax"
) -> Float[Array, ""]:
    """Returns E * sum over experts e of (share of routes to e) * (mean score of e), f32 ().

    The loss is 1 when all experts are used evenly, and E when one expert takes every route with score 1. It is the
    auxiliary loss of Switch Transformers (arXiv:2101.03961, eq. 4) for k routes per token. Gradients flow through the
    scores; the shares are constants.

    Args:
      logits: floating-point [T, E].
      topk_ids: integer [T, k], the experts that `route` chose.
      scoring: as in `route`; sigmoid scores are first divided by their sum over the experts.
    """
    num_experts = logits.shape[1]
    logits = logits.astype(jnp.float32)
    if scoring == "softmax":
        scores = jax.nn.softmax(logits, axis=-1)
    else:
        scores = jax.nn.sigmoid(logits)
        scores = scores / jnp.maximum(jnp.sum(scores, axis=-1, keepdims=True), MIN_WEIGHT_SUM)
    share = jnp.mean(jax.nn.one_hot(topk_ids, num_experts, dtype=jnp.float32), axis=(0, 1))
    return num_experts * jnp.sum(jax.lax.stop_gradient(share) * jnp.mean(scores, axis=0))
