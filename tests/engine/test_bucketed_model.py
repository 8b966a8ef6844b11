"""A model served in buckets: the tokens of the plain model for any request, and no compilation after the warm-up."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from recurrent import Averaging
from small_models import forward

from experiments.harness.timing import count_compilations
from fp4jax import MoEConfig
from fp4jax.engine import BucketedModel, Sampling, blocks, cache, drawing_of
from fp4jax.engine.blocks import groups_of
from fp4jax.engine.sampling import gumbel_noise, log_weights
from fp4jax.layers import MoEBlock, RoutingConfig
from fp4jax.models import Qwen3Moe, Qwen3MoeConfig, configure_experts, generate, quantize_experts
from fp4jax.models.decoder import DecoderLayer

CONFIG = Qwen3MoeConfig(
    vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, intermediate_size=48, mlp_only_layers=(1,),
    initializer_range=0.15, max_position_embeddings=256, dtype="float32",
)  # fmt: skip
BUCKETS = (8, 16)

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def model():
    return Qwen3Moe(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def served(model, quick_compile):
    found = BucketedModel(model, buckets=BUCKETS, batch_buckets=(1, 3), max_length=70)
    found.warm_up(progress=False)
    return found


def logits_of(model, ids, length=70):
    """One program for all lengths: the tokens behind `ids` change nothing before them."""
    padded = jnp.asarray([ids + [0] * (length - len(ids))], jnp.int32)
    return np.asarray(forward(model, padded))[0, : len(ids)]


@pytest.mark.slow
def test_recurrent_layers_beside_pages(rng):
    """Layer 0 keeps a state per request. Prompts in one chunk and in several, and a slot that was used before."""
    model = Qwen3Moe(dataclasses.replace(CONFIG, num_hidden_layers=2), rngs=nnx.Rngs(1))
    model.layers[0].self_attn = Averaging(CONFIG.hidden_size, nnx.Rngs(2))
    served = BucketedModel(model, buckets=(8,), batch_buckets=(2,), max_length=32, decode_steps=3)
    a_page = 2 * 2 * 16 * 64 * 4  # keys and values of 2 heads, 64 places
    assert served.cache_bytes(2) == 2 * (CONFIG.hidden_size * 4 + a_page)
    for lengths in ((19, 3), (5, 8)):
        prompts = [rng.integers(0, 97, n).tolist() for n in lengths]
        for prompt, answer in zip(prompts, served.generate(prompts, 5), strict=True):
            rows = logits_of(model, prompt + answer[:-1], 32)[len(prompt) - 1 :]
            best = np.sort(rows, axis=-1)
            clear = best[:, -1] - best[:, -2] > 1e-4
            assert clear.sum() >= 3 and (np.asarray(answer)[clear] == rows.argmax(-1)[clear]).all()


@pytest.mark.slow
def test_a_cache_in_fp8_takes_a_quarter(model):
    """Of a float32 cache. Its answers are those of the plain forward pass with the same cache."""
    coded = nnx.merge(*nnx.split(model))
    coded.set_cache_dtype(jnp.float8_e4m3fn)
    served = BucketedModel(coded, buckets=(8,), batch_buckets=(1,), max_length=32, decode_steps=2)
    usual = BucketedModel(model, buckets=(8,), batch_buckets=(1,), max_length=32)
    assert 4 * served.cache_bytes(3) == usual.cache_bytes(3)
    prompt = list(range(11))
    found = served.generate([prompt], 6)[0]
    assert found == np.asarray(generate(coded, jnp.asarray([prompt], jnp.int32), max_new_tokens=6))[0, 11:].tolist()


def test_layers_of_one_kind_share_executables(served):
    """Layers 0 and 2 have experts, layer 1 is dense: two kinds, each compiled for every bucket."""
    assert len(served.layers.stats.seconds) == 2 * len(BUCKETS)
    assert len(served.embed.stats.seconds) == len(served.head.stats.seconds) == len(BUCKETS)


@pytest.mark.slow
def test_layers_in_groups(rng, monkeypatch):
    """Five equal layers behind a dense one, two in a program: each kind is traced once per program."""
    monkeypatch.setattr(blocks, "_LAYERS_PER_PROGRAM", 2)
    traced = []
    call = DecoderLayer.__call__
    monkeypatch.setattr(DecoderLayer, "__call__", lambda self, *args: traced.append(self) or call(self, *args))
    model = Qwen3Moe(dataclasses.replace(CONFIG, num_hidden_layers=6, mlp_only_layers=(0,)), rngs=nnx.Rngs(5))
    assert groups_of(model.layers) == [slice(0, 1), slice(1, 3), slice(3, 5), slice(5, 6)]
    several = BucketedModel(model, buckets=(5,), batch_buckets=(1,), max_length=20)
    ids = rng.integers(0, 97, 13).tolist()
    found = np.asarray(several.prefill(ids).logits)[0]
    assert len(several.layers.stats.seconds) == len(traced) == 3  # the dense layer; two with experts; one
    expected = logits_of(model, ids)[-1]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("tokens", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 8, 9, 41)), 66])
def test_prefill_gives_the_logits_of_the_whole_sequence(model, served, rng, tokens):
    """In one bucket, in a full one, and in chunks; padding and what a cache holds behind the tokens do not count.

    With 66 tokens the last chunk's pads reach beyond max_length.
    """
    ids = rng.integers(0, 97, tokens).tolist()
    found = served.prefill(ids)
    expected = logits_of(model, ids)[-1]
    assert found.length == tokens
    np.testing.assert_allclose(np.asarray(found.logits)[0], expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_a_cache_has_room_for_the_pads_of_the_largest_bucket(rng):
    """The last chunk has 3 tokens of 16: its pads end at 32, behind the 20 tokens that a request may have."""
    model = Qwen3Moe(dataclasses.replace(CONFIG, num_hidden_layers=1, mlp_only_layers=(0,)), rngs=nnx.Rngs(3))
    served = BucketedModel(model, buckets=(2, 16), batch_buckets=(1,), max_length=20)
    ids = rng.integers(0, 97, 19).tolist()
    expected = logits_of(model, ids)[-1]
    found = np.asarray(served.prefill(ids).logits)[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def check_greedy(model, prompt, answer, margin):
    """Every token is the most likely one, wherever the two most likely differ by more than `margin`."""
    logits = logits_of(model, prompt + answer[:-1])[len(prompt) - 1 :]
    best = np.sort(logits, axis=-1)
    clear = best[:, -1] - best[:, -2] > margin
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(np.asarray(answer)[clear], logits.argmax(-1)[clear])


@pytest.mark.parametrize("number", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 3])
def test_requests_of_different_lengths_are_decoded_together(model, served, rng, number):
    prompts = [rng.integers(0, 97, n).tolist() for n in (5, 23, 1)[:number]]
    for prompt, answer in zip(prompts, served.generate(prompts, 9), strict=True):
        assert len(answer) == 9
        check_greedy(model, prompt, answer, margin=1e-4)


def test_a_request_does_not_depend_on_its_neighbours(served, rng):
    """Same batch size, so the same bits; free places of the batch are neighbours too."""
    prompts = [rng.integers(0, 97, n).tolist() for n in (11, 30, 4)]
    together = served.generate(prompts, 6)
    assert served.generate([prompts[0], prompts[2]], 6) == [together[0], together[2]]


def test_stop_tokens_end_an_answer_and_no_other(served, rng):
    """The answer ends with the token; it may be the first one, and requests that end early cost the others nothing."""
    prompts = [rng.integers(0, 97, n).tolist() for n in (11, 30, 4)]
    whole = served.generate(prompts, 30)
    stops = [Sampling(stop_ids=(96, whole[0][0])), Sampling(stop_ids=(whole[1][10],)), Sampling()]
    found = served.generate(prompts, 30, stops)
    assert found[0] == whole[0][:1] and found[2] == whole[2]
    assert found[1] == whole[1][: whole[1].index(whole[1][10]) + 1]
    calls = sum(served.decoders[3].stats.calls.values())
    assert served.generate(prompts, 30, stops[:1] * 3)[0] == whole[0][:1]
    assert served.generate([prompts[0]] * 3, 30, stops[0]) == [whole[0][:1]] * 3
    assert sum(served.decoders[3].stats.calls.values()) - calls < 4 + 4  # the second one stopped early


@pytest.mark.slow
def test_drawn_tokens(rng):
    """Each token is the one that the request's logits, parameters, seed and position say, alone and among others."""
    model = Qwen3Moe(dataclasses.replace(CONFIG, num_hidden_layers=1, mlp_only_layers=(0,)), rngs=nnx.Rngs(4))
    drawing = BucketedModel(model, buckets=(32,), batch_buckets=(3,), max_length=70, draws=True)
    prompts = [rng.integers(0, 97, n).tolist() for n in (11, 30)]
    sampling = [Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=5), Sampling(1.3, seed=2**32 - 1)]
    found = drawing.generate(prompts, 12, sampling)
    for prompt, answer, one in zip(prompts, found, sampling, strict=True):
        logits = logits_of(model, prompt + answer[:-1])[len(prompt) - 1 :]
        params = drawing_of([one] * 12, 12).params
        positions = jnp.arange(len(prompt), len(prompt) + 12, dtype=jnp.int32)
        noisy = np.asarray(log_weights(jnp.asarray(logits), params) + gumbel_noise(params.seed, positions, 97))
        assert (noisy[np.arange(12), answer] >= noisy.max(axis=1) - 1e-3).all()
        assert drawing.generate([prompt], 12, [one]) == [answer]
    greedy = drawing.generate(prompts, 12)
    assert found != greedy
    check_greedy(model, prompts[0], greedy[0], margin=1e-4)
    shared = drawing.generate([prompts[0]] * 2, 12, Sampling(1.0, seed=7))
    assert shared[0] != shared[1]  # the seeds 7 and 8


@pytest.mark.parametrize("requests", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_requests_compile_nothing(served, requests):
    rng = np.random.default_rng(5)
    with count_compilations() as compiled:
        for _ in range(requests):
            served.prefill(rng.integers(0, 97, int(rng.integers(1, 40))).tolist())
        for number in (1, 2, 3):
            served.generate([rng.integers(0, 97, int(rng.integers(1, 40))).tolist() for _ in range(number)], 3)
    assert not compiled
    assert all(graph.stats.misses == 0 for graph in served.graphs)
    calls = served.layers.stats.calls
    assert min(calls.values()) > requests / 4  # every bucket was used


@pytest.mark.slow
@pytest.mark.parametrize("devices", [None, 1, 2])
def test_quantized_experts(rng, make_mesh, devices):
    """NVFP4 weights and activations per token, on one device (None: only the experts were put there) and on
    a mesh; rows for 6 tokens, none for padding."""
    model = Qwen3Moe(dataclasses.replace(CONFIG, num_hidden_layers=1), rngs=nnx.Rngs(1))
    quantize_experts(model)
    mesh = {} if devices is None else {"mesh": None if devices == 1 else make_mesh(devices)}
    configure_experts(
        model, activation_format_1="nvfp4", activation_format_2="nvfp4", layout="contiguous", capacity=12, **mesh
    )
    served = BucketedModel(model, buckets=(8,), batch_buckets=(2,), max_length=40)
    served.warm_up(progress=False)
    ids = rng.integers(0, 97, 6).tolist()
    # Without padding, whose tokens would take rows from the others.
    expected = np.asarray(forward(model, jnp.asarray([ids], jnp.int32)))[0, -1]
    with count_compilations() as compiled:
        found = np.asarray(served.prefill(ids).logits)[0]
        served.generate([ids, ids + ids], 3)
    assert not compiled and all(graph.stats.misses == 0 for graph in served.graphs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_free_places_of_a_batch_take_no_capacity(rng):
    """Rows for one token, two places of which one is free."""
    model = Qwen3Moe(dataclasses.replace(CONFIG, num_hidden_layers=1, mlp_only_layers=()), rngs=nnx.Rngs(2))
    prompt = [int(rng.integers(97))]
    answer = np.asarray(generate(model, jnp.asarray([prompt], jnp.int32), max_new_tokens=8))[0, 1:].tolist()
    configure_experts(model, layout="contiguous", capacity=2)
    served = BucketedModel(model, buckets=(1,), batch_buckets=(2,), max_length=40)
    assert served.generate([prompt], 8) == [answer]
    assert served.generate([prompt, prompt], 8)[0] != answer  # here there is no room


@pytest.mark.slow
def test_tokens_that_are_not_valid_take_no_capacity(rng):
    block = MoEBlock(32, 16, RoutingConfig(4, 2), dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    block.configure(MoEConfig(4, layout="contiguous", capacity=4))  # of two tokens
    x = jnp.asarray(rng.standard_normal((6, 32)), jnp.float32)
    run = nnx.jit(lambda block, *operands: block(*operands))
    few, aux = run(block, x[4:])
    assert int(aux.dropped) == 0
    _, aux = run(block, x)
    assert int(aux.dropped) == 8
    y, aux = run(block, x.at[:4].set(jnp.nan), jnp.arange(6, dtype=jnp.int32) >= 4)
    assert int(aux.dropped) == 0
    np.testing.assert_array_equal(np.asarray(y)[4:], np.asarray(few))
    np.testing.assert_array_equal(np.asarray(y)[:4], 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.prefill([]), "prompt of 0 tokens"),
        (lambda s: s.prefill([1] * 70), r"prompt of 70 tokens; 1..69"),
        (lambda s: s.prefill([1, 97]), r"from 0 to 96, got \[ *1 97\]"),
        (lambda s: s.prefill([-1]), "from 0 to 96"),
        (lambda s: s.generate([], 1), "1 to 3 prompts, got 0"),
        (lambda s: s.generate([[1]] * 4, 1), "1 to 3 prompts, got 4"),
        (lambda s: s.generate([[1] * 60], 11), "71 tokens with 11 new ones"),
        (lambda s: s.generate([[1]], 0), "0 new ones"),
        (lambda s: s.generate([[1]], 1, [Sampling()] * 2), "2 sampling settings for 1 prompts"),
        (lambda s: s.generate([[1]], 1, Sampling(0.5)), "a temperature above 0 needs BucketedModel"),
        (lambda s: Sampling(stop_ids=tuple(range(17))), "at most 16 stop tokens, got 17"),
        (lambda s: Sampling(top_p=0.0), "top_p must be above 0"),
    ],
)
def test_refusals(served, call, message):
    with pytest.raises(ValueError, match=message):
        call(served)


def test_more_positions_than_the_model_has_are_refused(model):
    with pytest.raises(ValueError, match=r"max_length must be 1\.\.256, got 257"):
        BucketedModel(model, buckets=BUCKETS, max_length=257)
    for setting in ("page_size", "decode_steps"):
        with pytest.raises(ValueError, match=f"{setting} must be at least 1, got 0"):
            BucketedModel(model, buckets=BUCKETS, max_length=60, **{setting: 0})


def test_a_cache_that_does_not_fit_is_refused(served, monkeypatch):
    """3 layers of 2 x 2 heads of 16 floats, for 70 positions in pages of 64."""
    assert served.cache_bytes(2) == 2 * 128 * 3 * 2 * 2 * 16 * 4
    monkeypatch.setattr(cache, "_free_bytes", lambda device: 1e5)
    with pytest.raises(MemoryError, match=r"2 requests of 70 positions takes 0\.00 GB, and 0\.00 GB are free"):
        served.empty_cache(2)
