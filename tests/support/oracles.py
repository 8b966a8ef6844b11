"""Independent references in plain numpy: written from the contract, never from the library (it is not imported here).

What decides a stored bit is explicit float32, one rounding per operation; what is judged by error is float64 on
dequantized operands. Block scales are e4m3 *bytes* (uint8) and codes are packed uint8 throughout.
"""

import numpy as np

F32 = np.float32
BLOCK = 16
F32_MAX = np.finfo(F32).max
F32_TINY = np.finfo(F32).tiny  # 2^-126; smaller magnitudes count as signed zero everywhere
# e2m1: magnitudes of codes 0..7. e4m3fn: byte b = 0 eeee mmm; bytes 0..126 are finite, 127 is NaN, 128 is the sign.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array([(m / 8 + (e > 0)) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)][:127])

# Settings of an expert layer in which everything is NVFP4: tokens on the wire, and the operands of both GEMMs.
W4A4 = dict(activation_format_1="nvfp4", activation_format_2="nvfp4")
ALL_NVFP4 = dict(**W4A4, wire_format="nvfp4")


def calc_diff(x, y) -> float:
    """1 - 2<x,y>/(<x,x>+<y,y>) in float64: 0 for equal arrays, about half the squared relative error for near ones."""
    x, y = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
    energy = x @ x + y @ y
    return 0.0 if energy == 0 else float(1 - 2 * (x @ y) / energy)


# --- rounding and packing ---


def round_to_table(magnitude, table):
    """Index of the nearest table entry (ascending), ties to the even index, saturating at the last one."""
    a = np.asarray(magnitude, np.float64)
    upper = np.clip(np.searchsorted(table, a), 1, len(table) - 1)
    lower = upper - 1
    with np.errstate(invalid="ignore"):
        below, above = a - table[lower], table[upper] - a
    take_upper = (above < below) | ((above == below) & (upper % 2 == 0))
    return np.where(take_upper, upper, lower).astype(np.uint8)


def round_e2m1(x):
    """f32 -> code 0..15; the sign of zero is kept (-0 is code 8)."""
    return round_to_table(np.abs(x), E2M1) | (np.signbit(x).astype(np.uint8) << 3)


def round_e4m3(x):
    """Non-negative f32 -> e4m3 byte; anything above 448 gives 448 (0x7E)."""
    return round_to_table(np.minimum(x, 448), E4M3)


def decode_e4m3(bytes_):
    """e4m3 byte -> float64."""
    b = np.asarray(bytes_).astype(np.int64)
    magnitude = np.append(E4M3, np.nan)[b & 127]
    return np.where(b & 128, -magnitude, magnitude)


def pack(codes):
    """Codes [..., K] -> u8 [..., K/2], the even element in the low nibble."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)


def unpack(qdata):
    """u8 [..., K/2] -> codes [..., K]."""
    return np.stack([qdata & 15, qdata >> 4], axis=-1).reshape(*qdata.shape[:-1], -1)


def decode_codes(codes):
    """Codes -> float64 values, -0 included."""
    return np.where(codes & 8, -E2M1[codes & 7], E2M1[codes & 7])


def dequantize(qdata, scale_bytes, global_scale=1.0):
    """code x block scale x global scale in float64."""
    blocks = decode_codes(unpack(qdata)).reshape(*scale_bytes.shape, BLOCK) * decode_e4m3(scale_bytes)[..., None]
    return blocks.reshape(*qdata.shape[:-1], -1) * np.asarray(global_scale, np.float64)


def round_bf16(x):
    """float64 or f32 -> nearest bf16 value (ties to even), returned as f32; x must be finite."""
    bits = np.asarray(x, F32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(F32)


def all_bf16():
    """Every bf16 bit pattern, as f32 [65536]."""
    return (np.arange(1 << 16, dtype=np.uint32) << 16).view(F32)


# --- quantize ---


def _blocks(x):
    """-> x as f32 blocks [..., Kb, 16] without subnormals, and the amax of each block."""
    x = np.array(x, F32)
    x = np.where(np.abs(x) < F32_TINY, np.copysign(F32(0), x), x)
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    return blocks, np.abs(blocks).max(-1)


def _packed(blocks, codes, scale_bytes):
    """-> (packed codes, scale bytes); a block with a NaN or Inf has the scale NaN, 0x7F, and codes of zero."""
    finite = np.isfinite(blocks).all(-1)
    codes = np.where(finite[..., None], codes, 0)
    return pack(codes.reshape(*codes.shape[:-2], -1)), np.where(finite, scale_bytes, 0x7F).astype(np.uint8)


def _row_scales(global_scale, x_shape):
    """Global scale () or [..., 1] -> f32 [..., Kb] (one per block)."""
    return np.broadcast_to(np.asarray(global_scale, F32), (*x_shape[:-1], x_shape[-1] // BLOCK))


def _exact_candidate(blocks, amax, g, factor):
    gs = F32(1) / g
    raw = amax * (gs * F32(factor))
    scale_bytes = round_e4m3(raw)
    sf = decode_e4m3(scale_bytes).astype(F32)
    multiplier = np.minimum(F32(1) / (sf * (F32(1) / gs)), F32_MAX)
    multiplier = np.where(amax == 0, F32(0), multiplier)
    return round_e2m1(blocks * multiplier[..., None]), scale_bytes, raw


def quantize_exact(x, global_scale):
    """-> (packed codes, scale bytes)."""
    with np.errstate(all="ignore"):
        blocks, amax = _blocks(x)
        codes, scale_bytes, _ = _exact_candidate(blocks, amax, _row_scales(global_scale, np.shape(x)), 1 / 6)
    return _packed(blocks, codes, scale_bytes)


def quantize_stats(x, global_scale, valid=True):
    """(saturated scales, zero scales, non-finite elements) of the exact form, as flags; valid: bool [..., 1]."""
    with np.errstate(all="ignore"):
        blocks, amax = _blocks(x)
        _, scale_bytes, raw = _exact_candidate(blocks, amax, _row_scales(global_scale, np.shape(x)), 1 / 6)
        finite = np.isfinite(blocks).all(-1)  # other blocks neither saturate nor underflow
        saturated, zero = finite & (raw > 464), finite & (amax > 0) & (scale_bytes == 0)
        nonfinite = ~np.isfinite(np.asarray(x, F32))
    return tuple(np.where(valid, flags, False) for flags in (saturated, zero, nonfinite))


def quantize_four_over_six(x, global_scale):
    """The better of scale amax/6 and amax/4 by squared error of each block, 6 on a tie."""
    with np.errstate(all="ignore"):
        blocks, amax = _blocks(x)
        g = _row_scales(global_scale, np.shape(x))
        six, four = (_exact_candidate(blocks, amax, g, factor) for factor in (1 / 6, 1 / 4))
        wins = _squared_error(blocks, *four[:2], g) < _squared_error(blocks, *six[:2], g)
    return _packed(blocks, np.where(wins[..., None], four[0], six[0]), np.where(wins, four[1], six[1]))


def _squared_error(blocks, codes, scale_bytes, g):
    value = (decode_codes(codes) * decode_e4m3(scale_bytes)[..., None]).astype(F32)  # exact: 6 significant bits
    error = blocks - value * g[..., None]
    total = error * error
    total = np.where(total < F32_TINY, F32(0), total)  # CPUs flush these; the contract's zero is the common ground
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0]


def _round_e2m1_signed_by(x, quotient):
    """Both tools take the sign from x < 0: an input of -0 gives code 0, a negative that rounds to zero code 8."""
    return round_to_table(np.abs(quotient), E2M1) | ((x < 0).astype(np.uint8) << 3)


def quantize_modelopt(x, s2):
    """s2: decode-direction global scale, amax/2688 in the tool."""
    with np.errstate(all="ignore"):
        blocks, amax = _blocks(x)
        s2 = _row_scales(s2, np.shape(x))
        scale_bytes = round_e4m3(np.clip(amax / (F32(6) * s2), F32(2.0**-9), F32(448)))
        scale_bytes = np.where(amax == 0, np.uint8(0x38), scale_bytes)  # 0x38 = 1.0
        divisor = decode_e4m3(scale_bytes).astype(F32) * s2
        codes = _round_e2m1_signed_by(blocks, blocks / divisor[..., None])
    return _packed(blocks, codes, scale_bytes)


def quantize_compressed_tensors(x, gs):
    """gs: encode-direction global scale, 2688/amax in the tool."""
    with np.errstate(all="ignore"):
        blocks, amax = _blocks(x)
        gs = _row_scales(gs, np.shape(x))
        scale_bytes = round_e4m3(np.minimum(gs * (amax / F32(6)), F32(448)))
        scale_bytes = np.where(scale_bytes == 0, np.uint8(0x20), scale_bytes)  # 0x20 = 0.125
        divisor = decode_e4m3(scale_bytes).astype(F32) / gs
        codes = _round_e2m1_signed_by(blocks, blocks / divisor[..., None])
    return _packed(blocks, codes, scale_bytes)


def computed_scale(x, axis=None, divisor=2688.0, valid=True):
    """amax / divisor over the finite valid values, 1 where amax is 0, within [2^-100, 2^100]; keepdims with an axis."""
    x = np.asarray(x, F32)
    a = np.where(np.isfinite(x) & np.asarray(valid), np.abs(x), F32(0))
    a = np.where(a < F32_TINY, F32(0), a)
    amax = a.max(axis=axis, keepdims=axis is not None, initial=0)
    return np.where(amax == 0, F32(1), np.clip(amax / F32(divisor), F32(2.0**-100), F32(2.0**100))).astype(F32)


# --- scale layout ---


def swizzle(scales):
    """u8 [E, M, S] -> bytes of the 128x4 layout (flat), pads zero, by the byte-offset formula of the contract."""
    experts, m_rows, s_cols = scales.shape
    m_pad, k_pad = -(-m_rows // 128) * 128, -(-s_cols // 4) * 4
    out = np.zeros(experts * m_pad * k_pad, np.uint8)
    for e in range(experts):
        for m in range(m_rows):
            for s in range(s_cols):
                tile = (e * (m_pad // 128) + m // 128) * (k_pad // 4) + s // 4
                out[((tile * 32 + m % 32) * 4 + (m % 128) // 32) * 4 + s % 4] = scales[e, m, s]
    return out


# --- permute, depermute: plain loops ---


def permute_masked(ids, num_experts, capacity):
    """-> row_map [T, k], masked_m [E], dropped, source token of each valid row {(e, row): t}."""
    row_map, counts, dropped, source = np.full(ids.shape, -1, np.int64), [0] * num_experts, 0, {}
    for t, token in enumerate(ids):
        for j, e in enumerate(token):
            if e == -1:
                continue
            if not 0 <= e < num_experts or counts[e] >= capacity:
                dropped += 1
                continue
            row_map[t, j] = e * capacity + counts[e]
            source[int(e), counts[e]] = t
            counts[e] += 1
    return row_map, np.array(counts, np.int64), dropped, source


def permute_contiguous(ids, num_experts, num_rows):
    """-> row_map [T, k], group_sizes [E], dropped, source token of each row."""
    routes = [(int(e), t, j) for t, token in enumerate(ids) for j, e in enumerate(token) if 0 <= e < num_experts]
    routes.sort(key=lambda r: r[0])  # stable: token order, then slot order
    kept = routes[:num_rows]
    row_map = np.full(ids.shape, -1, np.int64)
    for row, (_, t, j) in enumerate(kept):
        row_map[t, j] = row
    sizes = np.bincount([e for e, _, _ in kept], minlength=num_experts)
    dropped = int((ids != -1).sum()) - len(kept)
    return row_map, sizes, dropped, [t for _, t, _ in kept]


def depermute(y, row_map, weights, residual=None):
    """f32 [T, H] before the cast: products rounded to f32, added in slot order, residual last; -1 adds nothing."""
    rows = np.asarray(y, F32).reshape(-1, y.shape[-1])
    out = np.zeros((row_map.shape[0], rows.shape[1]), F32)
    for t, slots in enumerate(row_map):
        for j, row in enumerate(slots):
            if row >= 0:
                out[t] = out[t] + rows[row] * F32(weights[t, j])
    return out if residual is None else out + np.asarray(residual, F32)


# --- float64 arithmetic on dequantized operands ---


def silu(x):
    """x * sigmoid(x) in float64 without overflow."""
    x = np.asarray(x, np.float64)
    e = np.exp(-np.abs(x))
    return x * np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def swiglu(gate_up):
    """[..., 2I] -> silu(gate) * up [..., I]."""
    gate, up = np.split(np.asarray(gate_up, np.float64), 2, axis=-1)
    return silu(gate) * up


def grouped_gemm(x, w, counts):
    """x [E, M, K], w [E, N, K] (both dequantized) -> float64 [E, M, N]; rows beyond counts are zero."""
    out = np.zeros((*x.shape[:2], w.shape[1]))
    for e, n in enumerate(counts):
        out[e, :n] = np.asarray(x[e, :n], np.float64) @ np.asarray(w[e], np.float64).T
    return out


def moe(x, ids, weights, w13, w2, *, x_scale=None, act_scale=None, quantized=(False, False), bf16=True):
    """The MoE layer, token by token: x [T, H], w13 [E, 2I, H], w2 [E, H, I] dequantized -> float64 [T, H].

    quantized: whether the inputs of GEMM 1 and GEMM 2 pass through the exact NVFP4 quantizer; its global scales are
    x_scale () or None (per token) and act_scale [E] or None (per row). bf16: GEMM outputs are rounded to bf16.
    """

    def requantize(row, scale):
        g = computed_scale(row[None], axis=-1) if scale is None else np.asarray(scale, F32)
        return dequantize(*quantize_exact(row[None], g), g)[0]

    rounded = round_bf16 if bf16 else np.float64
    out = np.zeros(x.shape)
    for t, token in enumerate(np.asarray(x, F32)):
        row = requantize(token, x_scale) if quantized[0] else token.astype(np.float64)
        for e, weight in zip(ids[t], weights[t], strict=True):
            if e < 0:
                continue
            act = swiglu(rounded(w13[e] @ row))
            if quantized[1]:
                act = requantize(act.astype(F32), None if act_scale is None else act_scale[e])
            else:
                act = rounded(act).astype(np.float64)
            out[t] += rounded(w2[e] @ act).astype(np.float64) * float(weight)
    return out


def reference_dispatch(ids, devices, num_experts, form, capacity):
    """Plain loops, ids [R, T, k] -> per receiver {row: (sender, token, slots)}, send_map [R, T, S], dropped [R]."""
    local = num_experts // devices
    _, tokens, k = ids.shape
    received = [{} for _ in range(devices)]
    send_map = np.full((devices, tokens, devices if form == "per_peer" else k), -1)
    dropped = np.zeros(devices, int)
    for sender in range(devices):
        used = [0] * devices
        for t in range(tokens):
            slots_of = {}
            for j, e in enumerate(ids[sender, t]):
                if 0 <= e < num_experts:
                    slots_of.setdefault((e // local,) if form == "per_peer" else (e // local, j), []).append(j)
                elif e != -1:
                    dropped[sender] += 1
            for key in sorted(slots_of) if form == "per_peer" else sorted(slots_of, key=lambda key: key[1]):
                peer, slots = key[0], slots_of[key]
                if used[peer] == capacity:
                    dropped[sender] += len(slots)
                    continue
                received[peer][sender * capacity + used[peer]] = (sender, t, slots)
                send_map[sender, t, peer if form == "per_peer" else slots[0]] = peer * capacity + used[peer]
                used[peer] += 1
    return received, send_map, dropped
