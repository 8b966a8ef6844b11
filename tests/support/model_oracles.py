"""Layers and the Qwen3-MoE decoder in numpy float64, written from the formulas, one token or head at a time.

Weights come as a mapping from checkpoint names to arrays, so that the names are tested together with the numbers.
"""

from functools import partial

import numpy as np


def calc_diff(x, y):
    """1 - 2<x, y> / (<x, x> + <y, y>): 0 for equal tensors, about half the squared relative error for close ones."""
    x, y = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
    return 1 - 2 * (x @ y) / (x @ x + y @ y)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def silu(x):
    return x * sigmoid(x)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def swiglu(x, gate, up, down):
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def experts(x, topk_ids, topk_weights, w13, w2):
    """Routed experts, token by token. w13 [E, 2I, H], gate rows first; w2 [E, H, I]."""
    half = w13.shape[1] // 2
    y = np.zeros((x.shape[0], w2.shape[1]))
    for t in range(x.shape[0]):
        for expert, weight in zip(topk_ids[t], topk_weights[t], strict=True):
            if expert >= 0:
                y[t] += weight * swiglu(x[t], w13[expert, :half], w13[expert, half:], w2[expert])
    return y


def topk_softmax(logits, top_k, renormalize):
    scores = softmax(logits)
    ids = np.argsort(-scores, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, ids, axis=-1)
    return ids, weights / weights.sum(axis=-1, keepdims=True) if renormalize else weights


def rotate(vector, position, theta):
    """RoPE on one head: the pair (i, i + D/2) as a complex number, times exp(1j * position * theta^(-2i/D))."""
    half = len(vector) // 2
    pairs = vector[:half] + 1j * vector[half:]
    turned = pairs * np.exp(1j * position * theta ** (-2.0 * np.arange(half) / len(vector)))
    return np.concatenate([turned.real, turned.imag])


def rotate_neighbours(vector, position, theta):
    """RoPE on one head whose pairs are neighbours: (2i, 2i + 1)."""
    turned = rotate(np.concatenate([vector[::2], vector[1::2]]), position, theta)
    out = np.empty_like(vector)
    out[::2], out[1::2] = np.split(turned, 2)
    return out


def grouped_attention(config, w, p, h, turn):
    """What attention adds to the residual stream; norms on heads where the checkpoint has them."""
    heads, kv_heads, length = config["num_attention_heads"], config["num_key_value_heads"], len(h)
    dim, theta = config["head_dim"], config["rope_theta"]
    q = (h @ w[p + "q_proj.weight"].T).reshape(length, heads, dim)
    k = (h @ w[p + "k_proj.weight"].T).reshape(length, kv_heads, dim)
    v = (h @ w[p + "v_proj.weight"].T).reshape(length, kv_heads, dim)
    if p + "q_norm.weight" in w:
        eps = config["rms_norm_eps"]
        q, k = rms_norm(q, w[p + "q_norm.weight"], eps), rms_norm(k, w[p + "k_norm.weight"], eps)
    attended = np.zeros((length, heads, dim))
    for head in range(heads):
        group = head // (heads // kv_heads)
        keys = np.stack([turn(k[s, group], s, theta) for s in range(length)])
        for t in range(length):
            scores = keys[: t + 1] @ turn(q[t, head], t, theta) / np.sqrt(dim)
            attended[t, head] = softmax(scores) @ v[: t + 1, group]
    return attended.reshape(length, -1) @ w[p + "o_proj.weight"].T


def stacked_experts(w, p, number):
    one = lambda e, name: w[f"{p}experts.{e}.{name}_proj.weight"]  # noqa: E731
    w13 = np.stack([np.concatenate([one(e, "gate"), one(e, "up")]) for e in range(number)])
    return w13, np.stack([one(e, "down") for e in range(number)])


def mlp(w, p, h):
    return swiglu(h, *(w[f"{p}{name}_proj.weight"] for name in ("gate", "up", "down")))


def decoder(config, tensors, ids, attention_of, experts_of):
    """Logits [S, V] of one sequence; attention_of and experts_of(w, prefix, h) are what a layer adds."""
    w = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    x = w["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        h = rms_norm(x, w[p + "input_layernorm.weight"], config["rms_norm_eps"])
        x = x + attention_of(w, p + "self_attn.", h)
        h = rms_norm(x, w[p + "post_attention_layernorm.weight"], config["rms_norm_eps"])
        routed = p + "mlp.gate.weight" in w
        x = x + (experts_of(w, p + "mlp.", h) if routed else mlp(w, p + "mlp.", h))
    head = w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return rms_norm(x, w["model.norm.weight"], config["rms_norm_eps"]) @ head.T


def qwen3_moe(config, tensors, ids):
    """Logits [S, V] of one sequence."""

    def experts_of(w, p, h):
        logits = h @ w[p + "gate.weight"].T
        topk_ids, weights = topk_softmax(logits, config["num_experts_per_tok"], config["norm_topk_prob"])
        return experts(h, topk_ids, weights, *stacked_experts(w, p, config["num_experts"]))

    return decoder(config, tensors, ids, partial(grouped_attention, config, turn=rotate), experts_of)


def ernie45_moe(config, tensors, ids):
    """Logits [S, V] of one sequence; the bias chooses experts and does not weigh them."""

    def experts_of(w, p, h):
        scores = softmax(h @ w[p + "gate.weight"].T)
        bias = w[p + "moe_statics.e_score_correction_bias"][0]
        topk_ids = np.argsort(-(scores + bias), axis=-1, kind="stable")[:, : config["moe_k"]]
        weights = np.take_along_axis(scores, topk_ids, axis=-1)
        weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True), config["moe_norm_min"])
        y = experts(h, topk_ids, weights, *stacked_experts(w, p, config["moe_num_experts"]))
        return y + (mlp(w, p + "shared_experts.", h) if config["moe_num_shared_experts"] else 0)

    return decoder(config, tensors, ids, partial(grouped_attention, config, turn=rotate_neighbours), experts_of)


def yarn_turn(config):
    """(vector, position) -> it turned, neighbours as pairs; and what scores are multiplied by."""
    scaling, dim, theta = config.get("rope_scaling"), config["qk_rope_head_dim"], config["rope_theta"]
    speed = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    stretch = score = 1.0
    if scaling:
        factor, trained = scaling["factor"], scaling["original_max_position_embeddings"]
        turns = lambda i: trained * speed[i] / (2 * np.pi)  # noqa: E731
        # The paper's ramp, in the index of the pair: continuous index at which a pair turns `beta` times in training.
        index = lambda beta: dim * np.log(trained / (beta * 2 * np.pi)) / (2 * np.log(theta))  # noqa: E731
        low, high = max(np.floor(index(scaling["beta_fast"])), 0), min(np.ceil(index(scaling["beta_slow"])), dim - 1)
        for i in range(dim // 2):
            slow = min(max((i - low) / (high - low), 0), 1)
            if turns(i) > 2 * scaling["beta_fast"]:
                assert slow == 0  # far above: left alone
            speed[i] *= (1 - slow) + slow / factor
        grow = lambda m: 0.1 * m * np.log(factor) + 1  # noqa: E731
        stretch = grow(scaling["mscale"]) / grow(scaling["mscale_all_dim"])
        score = grow(scaling["mscale_all_dim"]) ** 2 if scaling["mscale_all_dim"] else 1.0

    def turn(vector, position):
        pairs = vector[::2] + 1j * vector[1::2] if config["rope_interleave"] else (
            vector[: dim // 2] + 1j * vector[dim // 2 :]
        )  # fmt: skip
        turned = pairs * np.exp(1j * position * np.array(speed)) * stretch
        return np.concatenate([turned.real, turned.imag])  # the same order for queries and keys: scores do not see it

    return turn, score


def latent_attention(config, w, p, h):
    """What DeepSeek's attention adds: one latent vector per token makes the keys and values of all heads."""
    heads, nope, rotated = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    rank, v_dim, length = config["kv_lora_rank"], config["v_head_dim"], len(h)
    turn, score = yarn_turn(config)
    if config["q_lora_rank"] is None:
        q = h @ w[p + "q_proj.weight"].T
    else:
        q = rms_norm(h @ w[p + "q_a_proj.weight"].T, w[p + "q_a_layernorm.weight"], 1e-6) @ w[p + "q_b_proj.weight"].T
    q = q.reshape(length, heads, nope + rotated)
    both = h @ w[p + "kv_a_proj_with_mqa.weight"].T
    latent = rms_norm(both[:, :rank], w[p + "kv_a_layernorm.weight"], 1e-6)
    kv = (latent @ w[p + "kv_b_proj.weight"].T).reshape(length, heads, nope + v_dim)
    shared = np.stack([turn(both[s, rank:], s) for s in range(length)])
    out = np.zeros((length, heads, v_dim))
    for head in range(heads):
        for t in range(length):
            scores = kv[: t + 1, head, :nope] @ q[t, head, :nope] + shared[: t + 1] @ turn(q[t, head, nope:], t)
            out[t, head] = softmax(scores / np.sqrt(nope + rotated) * score) @ kv[: t + 1, head, nope:]
    return out.reshape(length, -1) @ w[p + "o_proj.weight"].T


def deepseek_v3(config, tensors, ids):
    """Logits [S, V] of one sequence."""

    def experts_of(w, p, h):
        scores = sigmoid(h @ w[p + "gate.weight"].T)
        biased = scores + w[p + "gate.e_score_correction_bias"]
        number, groups = config["n_routed_experts"], config["n_group"]
        ids = np.zeros((len(h), config["num_experts_per_tok"]), int)
        for t in range(len(h)):
            per_group = biased[t].reshape(groups, -1)
            value = np.sort(per_group, axis=1)[:, -2:].sum(axis=1)
            kept = np.argsort(-value, kind="stable")[: config["topk_group"]]
            allowed = [e for e in range(number) if e // (number // groups) in kept]
            ids[t] = sorted(allowed, key=lambda e: -biased[t, e])[: config["num_experts_per_tok"]]
        weights = np.take_along_axis(scores, ids, axis=1)
        if config["norm_topk_prob"]:
            weights = weights / weights.sum(axis=1, keepdims=True)
        weights = weights * config["routed_scaling_factor"]
        y = experts(h, ids, weights, *stacked_experts(w, p, number))
        return y + mlp(w, p + "shared_experts.", h)

    return decoder(config, tensors, ids, partial(latent_attention, config), experts_of)
