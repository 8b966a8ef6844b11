"""Layers and the Qwen3-MoE decoder in numpy float64, written from the formulas, one token or head at a time.

Weights come as a mapping from checkpoint names to arrays, so that the names are tested together with the numbers.
"""

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


def qwen3_moe(config, tensors, ids):
    """Logits [S, V] of one sequence."""
    w = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    eps, heads, kv_heads = config["rms_norm_eps"], config["num_attention_heads"], config["num_key_value_heads"]
    dim, length = config["head_dim"], len(ids)
    x = w["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        h = rms_norm(x, w[p + "input_layernorm.weight"], eps)
        q = (h @ w[p + "self_attn.q_proj.weight"].T).reshape(length, heads, dim)
        k = (h @ w[p + "self_attn.k_proj.weight"].T).reshape(length, kv_heads, dim)
        v = (h @ w[p + "self_attn.v_proj.weight"].T).reshape(length, kv_heads, dim)
        q, k = rms_norm(q, w[p + "self_attn.q_norm.weight"], eps), rms_norm(k, w[p + "self_attn.k_norm.weight"], eps)
        attended = np.zeros((length, heads, dim))
        for head in range(heads):
            group = head // (heads // kv_heads)
            keys = np.stack([rotate(k[s, group], s, config["rope_theta"]) for s in range(length)])
            for t in range(length):
                scores = keys[: t + 1] @ rotate(q[t, head], t, config["rope_theta"]) / np.sqrt(dim)
                attended[t, head] = softmax(scores) @ v[: t + 1, group]
        x = x + attended.reshape(length, -1) @ w[p + "self_attn.o_proj.weight"].T
        h = rms_norm(x, w[p + "post_attention_layernorm.weight"], eps)
        if p + "mlp.gate.weight" in w:
            logits = h @ w[p + "mlp.gate.weight"].T
            topk_ids, weights = topk_softmax(logits, config["num_experts_per_tok"], config["norm_topk_prob"])
            one = lambda e, name: w[f"{p}mlp.experts.{e}.{name}_proj.weight"]  # noqa: B023, E731
            w13 = np.stack([np.concatenate([one(e, "gate"), one(e, "up")]) for e in range(config["num_experts"])])
            w2 = np.stack([one(e, "down") for e in range(config["num_experts"])])
            x = x + experts(h, topk_ids, weights, w13, w2)
        else:
            x = x + swiglu(h, *(w[f"{p}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
    head = w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return rms_norm(x, w["model.norm.weight"], eps) @ head.T
