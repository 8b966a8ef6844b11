"""What a router may choose: the scores in float64, and a check of a choice up to the rounding of float32."""

import numpy as np

# Settings of `routing.route`: what Qwen3-30B, ERNIE-4.5-21B and DeepSeek-V3 use, with their numbers of experts.
MODELS = {
    "qwen3": (128, dict(top_k=8), False),
    "ernie45": (64, dict(top_k=6), True),
    "deepseek_v3": (
        256,
        dict(top_k=8, scoring="sigmoid", num_groups=8, topk_groups=4, routed_scaling_factor=2.5),
        True,
    ),
}


def scores_of(logits, scoring="softmax"):
    """Scores in float64 of f32 logits [T, E]."""
    logits = np.asarray(logits, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        if scoring == "sigmoid":
            return 1 / (1 + np.exp(-logits))
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)


def weights_of(ids, logits, scoring="softmax", renormalize=True, routed_scaling_factor=1.0, **_):
    """The weights in float64 of experts [T, k]."""
    weights = np.take_along_axis(scores_of(logits, scoring), np.asarray(ids), axis=1)
    if renormalize:
        weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-20)
    return weights * routed_scaling_factor


def excess_of(ids, logits, bias, *, top_k, scoring="softmax", num_groups=1, topk_groups=1, **_):
    """By how much a choice of experts is worse than the best one, per token, relative to what is compared.

    It is 0 for the best choice in float64, and about the rounding error of f32 for a choice that rounding decided. A
    choice among groups that are as close as that counts as the larger of both differences.

    Args:
      ids: [T, k], best first, different in every row.
      logits: f32 [T, E], finite.
      bias: f32 [E] or None.
      top_k, scoring, num_groups, topk_groups: as in `routing.route`.
    """
    ids = np.asarray(ids)
    assert ids.shape == (len(logits), top_k) and (np.diff(np.sort(ids, axis=1), axis=1) > 0).all()
    choice = scores_of(logits, scoring) + (0 if bias is None else np.asarray(bias, np.float64))
    magnitude = np.abs(choice).max(axis=1)
    tokens, experts = choice.shape
    size = experts // num_groups
    excess = np.zeros(tokens)
    if topk_groups < num_groups:
        by_group = np.sort(choice.reshape(tokens, num_groups, size), axis=-1)[..., -2:].sum(-1)
        ranked = np.argsort(-by_group, axis=1, kind="stable")
        sure, border = ranked[:, :topk_groups].copy(), np.sort(-by_group, axis=1)
        used = np.zeros((tokens, num_groups), bool)
        np.put_along_axis(used, ids // size, True, axis=1)
        kept = np.zeros((tokens, num_groups), bool)
        np.put_along_axis(kept, sure, True, axis=1)
        swapped = (used & ~kept).any(axis=1)  # then the groups at the border changed places
        excess = np.where(swapped, border[:, topk_groups] - border[:, topk_groups - 1], 0)
        last, first = ranked[:, topk_groups - 1, None], ranked[:, topk_groups, None]
        np.put_along_axis(kept, last, ~swapped[:, None], axis=1)
        np.put_along_axis(kept, first, swapped[:, None], axis=1)
        choice = np.where(np.repeat(kept, size, axis=1), choice, -np.inf)
    best = -np.sort(-choice, axis=1)[:, :top_k]
    with np.errstate(invalid="ignore"):
        behind = np.abs(np.take_along_axis(choice, ids, axis=1) - best)
    relative = behind / (np.abs(best) if bias is None else magnitude[:, None])
    return np.maximum(np.where(best == 0, behind, relative).max(axis=1), excess / magnitude)
