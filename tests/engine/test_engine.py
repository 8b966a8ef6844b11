"""Continuous batching: every request gets the answer that it gets alone, whatever runs beside it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from recurrent import Averaging
from small_models import forward

from experiments.harness.timing import count_compilations
from fp4jax.engine import Engine, QueueFull, cache
from fp4jax.models import Qwen3Moe, Qwen3MoeConfig, configure_experts

CONFIG = Qwen3MoeConfig(
    vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, intermediate_size=48, mlp_only_layers=(1,),
    initializer_range=0.15, max_position_embeddings=256, dtype="float32",
)  # fmt: skip
SIZES = dict(max_requests=4, max_length=48, page_size=4, prefill_buckets=(8,), decode_steps=3)

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def model():
    return Qwen3Moe(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def engine(model, quick_compile):
    """An engine with pages for two long requests, where four may run."""
    found = Engine(model, num_pages=26, max_waiting=1000, **SIZES)
    found.warm_up()
    return found


def random_requests(rng, count):
    """(prompt, options): half of the prompts begin alike, a third of the requests draw their tokens."""
    common, found = rng.integers(0, 97, 17).tolist(), []
    for i in range(count):
        prompt = common[: rng.integers(1, 18)] * (i % 2) + rng.integers(0, 97, rng.integers(1, 20)).tolist()
        options = dict(max_new_tokens=int(rng.integers(1, 48 - len(prompt) + 1)), seed=i, logprobs=i % 4 == 0)
        options |= dict(temperature=0.8, top_p=0.9, top_k=20) if i % 3 == 0 else {}
        options |= dict(stop_ids=rng.integers(0, 97, 8).tolist()) if i % 2 else {}
        found.append((prompt, options))
    return found


def drained(engine, cancel_at=lambda step: ()):
    """{id: (tokens, logprobs, reason)} of everything that the engine says until it is idle."""
    found, step = {}, 0
    while not engine.is_idle:
        for id in cancel_at(step):
            engine.cancel(id)
        for event in engine.step():
            tokens, logprobs, reason = found.get(event.id, ([], [], None))
            assert reason is None, "an event behind the last one"
            found[event.id] = tokens + event.tokens, logprobs + (event.logprobs or []), event.finish_reason
        step += 1
    return found


def check_against_alone(engine, requests, rng, cancelled=0.1):
    """Runs all requests together, some of them cancelled in the middle, and each one alone."""
    before = engine.report()
    ids = [engine.submit(prompt, **options) for prompt, options in requests]
    doomed = {id: int(rng.integers(0, 3 * len(ids) // 4 + 1)) for id in ids if rng.random() < cancelled}
    together = drained(engine, lambda step: [id for id, at in doomed.items() if at == step])
    report = engine.report()
    assert report.pages_in_use == 0 and report.programs == before.programs
    assert together.keys() == set(ids)
    for id, (prompt, options) in zip(ids, requests, strict=True):
        tokens, logprobs, reason = together[id]
        again = engine.submit(prompt, **options)
        alone = drained(engine)[again]
        if reason == "cancelled":
            assert id in doomed and tokens == alone[0][: len(tokens)]
            continue
        assert (tokens, reason) == (alone[0], alone[2]), (id, prompt, options)
        assert len(logprobs) == (len(tokens) if options["logprobs"] else 0)
        np.testing.assert_allclose(logprobs, alone[1], rtol=0, atol=1e-4)
        stops = options.get("stop_ids", ())
        assert reason == ("stop" if tokens[-1] in stops else "length")
        assert not set(tokens[:-1]) & set(stops) and len(tokens) <= options["max_new_tokens"]
        assert reason == "stop" or len(tokens) == options["max_new_tokens"]
    return report


def test_requests_among_others_and_alone(engine, rng):
    """Too few pages, so that requests are preempted; shared prefixes; cancellations; nothing compiles."""
    with count_compilations() as compilations:
        report = check_against_alone(engine, random_requests(rng, 40), rng)
    assert not compilations
    assert report.preemptions > 0 and report.shared_tokens > 0


@pytest.mark.slow
def test_a_thousand_requests(engine, rng):
    check_against_alone(engine, random_requests(rng, 1000), rng)


def test_greedy_answers_are_those_of_the_model(model, engine, rng):
    """Also their log-probabilities; prompts of one token, of a full page and of several chunks."""
    prompts = [rng.integers(0, 97, n).tolist() for n in (1, 4, 8, 9, 30)]
    ids = [engine.submit(prompt, 10, logprobs=True) for prompt in prompts]
    found = drained(engine)
    for id, prompt in zip(ids, prompts, strict=True):
        tokens, logprobs, _ = found[id]
        padded = jnp.asarray([prompt + tokens + [0] * (48 - len(prompt) - len(tokens))], jnp.int32)
        logits = np.asarray(forward(model, padded), np.float64)[0, len(prompt) - 1 :][: len(tokens)]
        expected = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        expected -= logits.max(-1, keepdims=True)
        np.testing.assert_allclose(logprobs, expected[np.arange(len(tokens)), tokens], rtol=0, atol=1e-4)
        best = np.sort(logits, axis=-1)
        clear = best[:, -1] - best[:, -2] > 1e-4
        assert clear.sum() > 7 and (logits.argmax(-1) == tokens)[clear].all()


def test_an_equal_prompt_takes_the_pages_of_the_first(engine, rng):
    prompt = rng.integers(0, 97, 21).tolist()
    answers = []
    for _ in range(2):
        before, id = engine.report().shared_tokens, engine.submit(prompt, 5)
        answers.append(drained(engine)[id][0])
    assert engine.report().shared_tokens - before == 20 and answers[0] == answers[1]


def test_a_step_computes_as_many_chunks_as_its_budget_has_tokens(engine, rng, monkeypatch):
    """Chunks of 8: prompts of 8, 4 (a chunk too), 20 and 8 tokens begin to decode one after the other."""

    def answers(prompts, budget):
        monkeypatch.setattr(engine, "_prefill_tokens", budget)
        ids, decoding = [engine.submit(prompt, 9) for prompt in prompts], []
        tokens = {id: [] for id in ids}
        while not engine.is_idle:
            for event in engine.step():
                tokens[event.id] += event.tokens
            decoding.append(engine.report().decoding)
        return decoding, list(tokens.values())

    first, second = ([rng.integers(0, 97, n).tolist() for n in (8, 4, 20, 8)] for _ in range(2))
    assert answers(first, 8)[0][:3] == [1, 2, 2]
    decoding, tokens = answers(second, 30)
    assert decoding[:2] == [2, 4]  # 8, 8 and 8 of 20; then 8, 8 and 8
    assert tokens == answers(second, 8)[1]


def test_timing_the_decode_program_changes_nothing(engine, rng):
    prompt = rng.integers(0, 97, 9).tolist()
    id = engine.submit(prompt, 20)
    (expected,) = engine.run().values()
    again = engine.submit(prompt, 20)
    found, seconds = [], []
    while not engine.is_idle:
        found += [t for event in engine.step() for t in event.tokens]
        if engine.report().decoding:
            seconds.append(engine.time_decode(2))
    assert found == expected and len(expected) == 20 and again == id + 1
    assert len(seconds) > 1 and min(seconds) > 0


def test_cancelling(engine, rng):
    """While it waits, in the middle of its prompt, while it decodes, and twice."""
    ids = [engine.submit(rng.integers(0, 97, 30).tolist(), 18) for _ in range(9)]
    assert not engine.step()
    engine.cancel(ids[8])  # waits
    engine.cancel(ids[0])  # the first chunk of its prompt is computed
    events = {event.id: event.finish_reason for event in engine.step()}
    assert events == {ids[8]: "cancelled", ids[0]: "cancelled"}
    for _ in range(8):
        engine.step()
    engine.cancel(ids[1])
    engine.cancel(ids[1])
    found = drained(engine)
    assert found[ids[1]][2] == "cancelled" and len(found[ids[1]][0]) < 18
    assert all(found[id][2] == "length" for id in ids[2:8]) and engine.report().pages_in_use == 0
    with pytest.raises(KeyError, match="there is no request"):
        engine.cancel(10**6)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], 1), {}, "at least one token id"),
        (([97], 1), {}, "from 0 to 96"),
        (([1], 0), {}, "at least one new token"),
        (([1] * 40, 9), {}, "at most max_length=48"),
        (([1], 1), dict(temperature=-1.0), "temperature"),
        (([1], 1), dict(stop_ids=range(17)), "at most 16 stop tokens"),
        (([1], 1), dict(stop_ids=[2**31]), "2147483648 is no token id"),
    ],
)
def test_requests_that_are_refused(engine, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(*arguments, **options)
    assert engine.is_idle


def test_a_full_queue_says_so(model):
    engine = Engine(model, max_waiting=3, **SIZES)
    for _ in range(3):
        engine.submit([1], 1)
    with pytest.raises(QueueFull, match="3 requests wait already"):
        engine.submit([1], 1)
    engine.cancel(0)
    assert engine.submit([1], 1) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_length=300), "max_length must be 1..256"),
        (dict(num_pages=11), "num_pages=11 are too few"),
        (dict(decode_buckets=(2,)), "the largest of decode_buckets"),
        (dict(page_size=0), "must be positive"),
        (dict(prefill_tokens=0), "prefill_tokens must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit(model, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(model, **{**SIZES, **options})


def test_a_cache_that_does_not_fit_is_refused(model, monkeypatch):
    """2 layers of 2 x 2 heads of 16 floats, in 12 pages of 4."""
    layers, heads, size = CONFIG.num_hidden_layers, CONFIG.num_key_value_heads, CONFIG.head_dim
    assert Engine(model, num_pages=12, **SIZES).cache_bytes == layers * 2 * heads * size * 12 * 4 * 4
    monkeypatch.setattr(cache, "_free_bytes", lambda device: 1e4)
    with pytest.raises(MemoryError, match=r"4 requests and 12 pages of 4 positions takes 0\.00 GB, and 0\.00 GB are"):
        Engine(model, num_pages=12, **SIZES)


def test_experts_must_be_on_the_mesh(model):
    with pytest.raises(ValueError, match="the experts are not on this mesh"):
        Engine(model, mesh=jax.make_mesh((2,), ("ep",), devices=jax.devices()[:2]), **SIZES)


@pytest.mark.slow
def test_recurrent_layers(rng):
    """States are kept per slot and start anew with every request; pages are not shared."""
    model = Qwen3Moe(CONFIG, rngs=nnx.Rngs(1))
    model.layers[0].self_attn = Averaging(CONFIG.hidden_size, nnx.Rngs(2))
    engine = Engine(model, num_pages=26, draws=False, **{**SIZES, "max_requests": 2})
    requests = [(prompt, dict(max_new_tokens=options["max_new_tokens"])) for prompt, options in random_requests(rng, 7)]
    for (prompt, _), (tokens, _, _) in zip(requests, served(engine, requests), strict=True):
        padded = jnp.asarray([prompt + tokens + [0] * (48 - len(prompt) - len(tokens))], jnp.int32)
        logits = np.asarray(forward(model, padded))[0, len(prompt) - 1 :][: len(tokens)]
        best = np.sort(logits, axis=-1)
        clear = best[:, -1] - best[:, -2] > 1e-4
        assert (logits.argmax(-1) == tokens)[clear].all() and clear.any()
    assert engine.report().shared_tokens == 0


def served(engine, requests):
    """(tokens, logprobs, reason) of every request."""
    ids = [engine.submit(prompt, **options) for prompt, options in requests]
    found = drained(engine)
    return [found[id] for id in ids]


@pytest.mark.parametrize(
    ("devices", "wire_format"),
    [((1, 2), "bf16"), *(pytest.param((1, 2, 4), wire, marks=pytest.mark.slow) for wire in ("bf16", "nvfp4", "fp8"))],
)
def test_several_devices(rng, devices, wire_format):
    """The same tokens for every request, wherever it ran: per_slot dispatch sums in the order of the slots."""
    requests, answers = random_requests(rng, 12), []
    for ranks in devices:
        mesh = jax.make_mesh((ranks,), ("ep",), devices=jax.devices()[:ranks])
        model = Qwen3Moe(dataclasses.replace(CONFIG, num_hidden_layers=1, mlp_only_layers=()), rngs=nnx.Rngs(0))
        configure_experts(model, mesh=mesh, wire_format=wire_format, form="per_slot")
        engine = Engine(model, mesh=mesh, **{**SIZES, "max_requests": 3})
        answers.append([(tokens, reason) for tokens, _, reason in served(engine, requests)])
        assert engine.report().pages_in_use == 0
    assert all(answer == answers[0] for answer in answers)
