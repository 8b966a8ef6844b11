"""The kernel layout of stacked weights: the documented masks decode it, its inverse is exact, the GEMM takes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import oracles
from fp4jax.grouped_gemm import (
    PackedWeights,
    contiguous_grouped_gemm,
    masked_grouped_gemm,
    pack_weights,
    unpack_weights,
)
from fp4jax.moe import MoEConfig, MoEWeights, moe_layer
from fp4jax.nvfp4 import NVFP4Tensor, quantize
from oracles import ALL_NVFP4
from pallas_kernels.gemm import fragments

pytestmark = pytest.mark.usefixtures("quick_compile")

E, N, K = 2, 128, 192


def _weights(rng, shape=(E, N, K), low=0, high=127):
    """Random codes (all sixteen) and scale bytes in [low, high) -> NVFP4Tensor and its bytes."""
    experts, n, k = shape
    qdata = rng.integers(0, 256, (experts, n, k // 2)).astype(np.uint8)
    scales = rng.integers(low, high, (experts, n, k // 16)).astype(np.uint8)
    g = rng.uniform(1e-3, 1e-2, (experts, n, 1)).astype(np.float32)
    w = NVFP4Tensor(jnp.asarray(qdata), jnp.asarray(scales).view(jnp.float8_e4m3fn), jnp.asarray(g))
    return w, qdata, scales


def _bf16(bits):
    """16-bit patterns -> float64, exactly (no flush of subnormals)."""
    bits = np.asarray(bits, np.int64)
    exponent, mantissa = bits >> 7 & 0xFF, bits & 0x7F
    magnitude = np.where(exponent > 0, (1 + mantissa / 128) * 2.0 ** (exponent - 127), mantissa / 128 * 2.0**-126)
    return np.where(bits >> 15, -magnitude, magnitude)


def _decode_like_the_kernel(tile):
    """[9, 64] u32 -> [64, 64] code * scale, thread by thread with the masks of weight_layout's docstring."""
    out = np.full((64, 64), np.nan)
    flat = tile[:8].ravel()
    for thread in range(128):
        warp, g, q = thread // 32, thread % 32 // 4, thread % 4
        for i in range(4):
            w = int(flat[4 * thread + i])
            registers = (
                w & 0x81C081C0,
                (w << 3) & 0x81C081C0,
                (w << 6 & 0x01C001C0) | (w << 2 & 0x80008000),
                (w >> 3 & 0x01C001C0) | (w << 1 & 0x80008000),
            )
            for r, register in enumerate(registers):
                h, j = r % 2, r // 2
                n = 16 * warp + g + 8 * h
                scale = _bf16(16 * (int(tile[8, n]) >> 8 * i & 0xFF) + 0x7600)
                for b in range(2):
                    code = _bf16(register >> 16 * b & 0xFFFF)
                    out[n, 16 * i + 8 * j + 2 * q + b] = code * scale * 2.0**7
    return out


def test_the_documented_masks_decode_every_code_and_scale(rng):
    w, qdata, scales = _weights(rng)
    assert len(np.unique(scales)) == 127  # every finite scale, zero and subnormals included
    packed = pack_weights(w)
    expected = oracles.dequantize(qdata, scales)
    for e, n, k in np.ndindex(E, N // 64, K // 64):
        found = _decode_like_the_kernel(np.asarray(packed.words[e, n, k]))
        np.testing.assert_array_equal(found, expected[e, 64 * n : 64 * n + 64, 64 * k : 64 * k + 64])


def _products(a, b):
    """mul.bf16x2 on words of two bf16, whose products need no rounding: float64 [.., 2]."""
    return np.stack([_bf16(a >> 16 * half & 0xFFFF) * _bf16(b >> 16 * half & 0xFFFF) for half in (0, 1)], -1)


_PTX = {
    "prmt.b32": lambda a, b, selector: sum(
        ((b << 32 | a) >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4)
    ),
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": lambda a, b, c, table: (a & b) | c,  # of table 0xEA
    "mul.bf16x2": _products,
}


def _run_ptx(text, registers):
    """Instructions on registers {name: int64 array}, in the order in which they stand."""
    for line in text.strip("{} \n").replace("\n", " ").split(";"):
        name, _, arguments = line.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        target, *operands = (a.strip() for a in arguments.split(","))
        if name == "lop3.b32":
            assert operands[-1] == "0xEA"
        values = [registers[o] if o in registers else np.int64(int(o, 0)) for o in operands]
        found = _PTX[name](*values)
        registers[target] = found if found.dtype.kind == "f" else found & 0xFFFFFFFF
    return registers


def test_the_instructions_of_the_kernel_decode_every_code_and_scale(rng):
    """What the GPU runs, instruction by instruction, for all threads of a warpgroup at once."""
    w, qdata, scales = _weights(rng, (1, 64, 64))
    assert set(oracles.unpack(qdata).ravel().tolist()) == set(range(16)) and len(np.unique(scales)) > 100
    tile = np.asarray(pack_weights(w).words[0, 0, 0]).astype(np.int64)
    thread = np.arange(128)
    row, q = 16 * (thread // 32) + thread % 32 // 4, thread % 4
    found = np.full((64, 64), np.nan)
    for i in range(4):
        codes = tile[:8].ravel()[4 * thread + i]
        inputs = {"$4": codes, "$5": tile[8, row], "$6": tile[8, row + 8]}
        results = _run_ptx(fragments._DECODE_SLICE.format(i=i), inputs)
        for r, b in np.ndindex(4, 2):
            found[row + 8 * (r % 2), 16 * i + 8 * (r // 2) + 2 * q + b] = results[f"${r}"][:, b]
    np.testing.assert_array_equal(found * fragments.DECODE_FACTOR, oracles.dequantize(qdata, scales)[0])


def test_products_are_exact_in_bf16(rng):
    """code * 2^-126 times scale * 2^119 needs 6 bits and no exponent outside bf16's normal range."""
    products = np.outer(oracles.E2M1[1:], oracles.E4M3[1:]) * 2.0**-7
    rounded = oracles.round_bf16(products.astype(np.float32))
    np.testing.assert_array_equal(rounded, products)
    assert products.min() >= 2.0**-126


def test_unpack_gives_the_bytes_back(rng):
    w, qdata, scales = _weights(rng, low=1)
    back = jax.jit(lambda w: unpack_weights(pack_weights(w)))(w)
    np.testing.assert_array_equal(back.qdata, qdata)  # codes of -0 included
    np.testing.assert_array_equal(np.asarray(back.block_scale).view(np.uint8), scales)
    np.testing.assert_array_equal(back.global_scale, w.global_scale)


def test_what_unpack_does_not_give_back_has_the_same_values(rng):
    w, qdata, scales = _weights(rng)
    scales[0, 0, :4] = 0  # zero scale: codes become +0
    scales[1] |= 0x80  # negative scales: the sign moves to the codes
    w = NVFP4Tensor(w.qdata, jnp.asarray(scales).view(jnp.float8_e4m3fn), w.global_scale)
    back = unpack_weights(pack_weights(w))
    found = oracles.dequantize(np.asarray(back.qdata), np.asarray(back.block_scale).view(np.uint8))
    np.testing.assert_array_equal(found, oracles.dequantize(qdata, scales))
    assert not np.asarray(back.qdata)[0, 0, :32].any()
    assert (np.asarray(back.block_scale).view(np.uint8) < 128).all()


def test_nan_scales_stay_nan():
    w = NVFP4Tensor(
        jnp.full((1, 64, 32), 0x22, jnp.uint8),
        jnp.full((1, 64, 4), jnp.nan, jnp.float8_e4m3fn),
        jnp.ones((1, 1, 1), jnp.float32),
    )
    packed = pack_weights(w)
    stored = int(packed.words[0, 0, 0, 8, 0]) & 0xFF
    bits = 16 * stored + 0x7600
    assert bits >> 7 & 0xFF == 255 and bits & 0x7F  # a bf16 NaN in the kernel's decoding
    assert np.isnan(np.asarray(unpack_weights(packed).block_scale, np.float32)).all()


def test_the_gemm_takes_packed_weights(rng):
    w, _, _ = _weights(rng, low=40, high=100)
    packed = pack_weights(w)
    x = jnp.asarray(rng.standard_normal((E, 40, K)), jnp.bfloat16)
    counts = jnp.array([40, 7], jnp.int32)
    for gemm, rows in ((masked_grouped_gemm, x), (contiguous_grouped_gemm, x.reshape(-1, K))):
        same, found = gemm(rows, w, counts), gemm(rows, packed, counts)
        valid = np.arange(40) < np.asarray(counts)[:, None] if rows.ndim == 3 else np.arange(80) < 47
        np.testing.assert_array_equal(np.asarray(same)[valid].view(np.uint16), np.asarray(found)[valid].view(np.uint16))


@pytest.mark.slow
def test_the_layer_takes_packed_weights_sharded_over_ep(rng, make_mesh):
    experts, hidden, intermediate, tokens = 4, 64, 64, 16
    w13 = quantize(
        jnp.asarray(rng.standard_normal((experts, 2 * intermediate, hidden)), jnp.float32), global_scale="per_expert"
    )
    w2 = quantize(
        jnp.asarray(rng.standard_normal((experts, hidden, intermediate)), jnp.float32), global_scale="per_expert"
    )
    x = jnp.asarray(rng.standard_normal((tokens, hidden)), jnp.bfloat16)
    ids = jnp.asarray(rng.integers(0, experts, (tokens, 2)), jnp.int32)
    args = x, ids, jnp.asarray(rng.random((tokens, 2)), jnp.float32)
    config = MoEConfig(num_experts=experts, axis_name="ep", **ALL_NVFP4)

    def run(weights):
        layer = jax.shard_map(
            lambda *a: moe_layer(*a, config)[0], mesh=make_mesh(2), in_specs=P("ep"), out_specs=P("ep")
        )
        return np.asarray(jax.jit(layer)(*args, weights))

    plain, packed = run(MoEWeights(w13, w2)), run(MoEWeights(pack_weights(w13), pack_weights(w2)))
    np.testing.assert_array_equal(plain.view(np.uint16), packed.view(np.uint16))


@pytest.mark.parametrize(
    "shape, g, message",
    [
        ((1, 96, 64), (1, 1, 1), r"\(1, 96, 64\)"),
        ((1, 64, 96), (1, 1, 1), r"\(1, 64, 96\)"),
        ((2, 64, 64), (), r"got \(\)"),
    ],
)
def test_pack_refuses(shape, g, message):
    experts, n, k = shape
    w = NVFP4Tensor(
        jnp.zeros((experts, n, k // 2), jnp.uint8),
        jnp.ones((experts, n, k // 16), jnp.float8_e4m3fn),
        jnp.ones(g, jnp.float32),
    )
    with pytest.raises(ValueError, match=message):
        pack_weights(w)


def test_validate_names_the_leaf(rng):
    packed = pack_weights(_weights(rng)[0])
    assert packed.validate() is packed and packed.shape == (E, N, K) and packed.ndim == 3
    with pytest.raises(TypeError, match="words"):
        PackedWeights(packed.words.astype(jnp.int32), packed.global_scale).validate()
    with pytest.raises(ValueError, match="global_scale"):
        PackedWeights(packed.words, jnp.ones((E, 3, 1), jnp.float32)).validate()
    with pytest.raises(ValueError, match="words"):
        PackedWeights(packed.words[:, 0], packed.global_scale).validate()
