"""The draw of next tokens, compared with an oracle in numpy float64 that sorts the vocabulary."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from experiments.harness.timing import count_compilations
from fp4jax.engine import sampling
from fp4jax.engine.sampling import SamplingParams, check_sampling

pytestmark = pytest.mark.usefixtures("quick_compile")

draw = jax.jit(sampling.draw)
log_weights = jax.jit(sampling.log_weights)
MANY = 10_000  # draws of one distribution; tests share the program
OFF = (1.0, 0, 1.0, 0.0)  # temperature, top_k, top_p, min_p
FLOAT32_MAX = float(np.finfo(np.float32).max)
SLACK = 2e-6  # of a sum of probabilities in float32


def make_params(requests, seeds=None):
    """The parameters of requests that are given as (temperature, top_k, top_p, min_p)."""
    temperature, top_k, top_p, min_p = zip(*requests, strict=True)
    return SamplingParams(
        temperature=np.asarray(temperature, np.float32),
        top_k=np.asarray(top_k, np.int32),
        top_p=np.asarray(top_p, np.float32),
        min_p=np.asarray(min_p, np.float32),
        seed=np.asarray(range(len(requests)) if seeds is None else seeds, np.uint32),
    )


def draw_rows(logits, requests, positions=None, seeds=None, draw=draw):
    positions = np.zeros(len(requests)) if positions is None else positions
    return np.asarray(draw(np.float32(logits), make_params(requests, seeds), np.int32(positions)))


def oracle(logits, temperature, top_k, top_p, min_p):
    """log(probability / largest) of one request: sort, cut after k, cut where the sum reaches p, cut below min_p."""
    logits = np.asarray(logits, np.float64)
    if np.isneginf(logits).all():
        logits = np.zeros_like(logits)
    order = np.argsort(-logits, kind="stable")
    ranked = logits[order]
    logs = (ranked - ranked[0]) / temperature
    weights = np.exp(logs)

    def with_ties(count):
        return int(np.sum(ranked >= ranked[count - 1]))

    number = len(ranked)
    if 0 < top_k < number:
        number = with_ties(top_k)
    if top_p < 1:
        reached = np.cumsum(weights[:number]) / weights[:number].sum() >= top_p
        if reached.any():
            number = min(number, with_ties(int(np.argmax(reached)) + 1))
    logs[number:] = -np.inf
    logs[weights < min(min_p, 1)] = -np.inf
    found = np.empty_like(logs)
    found[order] = logs
    return found


def softmax(logs):
    return np.exp(logs) / np.exp(logs).sum()


def check_row(found, logits, request):
    """What is kept lies between the oracle's sets for slightly stricter and slightly weaker thresholds.

    Returns whether these sets are equal, so that what is kept is known.
    """
    temperature, top_k, top_p, min_p = request
    top_p, min_p = float(np.float32(top_p)), float(np.float32(min_p))
    strict = oracle(logits, temperature, top_k, top_p - SLACK if top_p < 1 else 1, min_p * (1 + SLACK))
    weak = oracle(logits, temperature, top_k, top_p + SLACK if top_p < 1 else 1, min_p * (1 - SLACK))
    must, may, kept = strict > -np.inf, weak > -np.inf, found > -np.inf
    assert not (must & ~kept).any() and not (kept & ~may).any(), (request, np.sort(logits)[::-1])
    np.testing.assert_allclose(found[kept], weak[kept], rtol=1e-6, atol=1e-6)
    return (must == may).all()


def few_or_any_floats(extreme):
    """Logits that are often equal, among them both zeros and -inf, and logits that rarely are."""
    few = st.sampled_from([-np.inf, -2.0, -0.5, -0.0, 0.0, 0.25, 1.0, 3.0])
    return few | st.floats(-extreme, extreme, width=32, allow_subnormal=False)


REQUESTS = st.tuples(
    st.floats(0.0625, 8, width=32),
    st.sampled_from([0, 1, 2, 3, 6, 7, 8, 1000]),
    st.sampled_from([1e-30, 0.05, 0.3, 0.5, 0.75, 0.9, 0.99, 1.0]) | st.floats(0.0078125, 1, width=32),
    st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
)


ROWS = st.lists(few_or_any_floats(50.0), min_size=7, max_size=7)


@given(st.lists(ROWS, min_size=8, max_size=8), st.lists(REQUESTS, min_size=8, max_size=8))
def test_tokens_that_are_kept_are_those_of_an_oracle_that_sorts(rows, requests):
    logits = np.asarray(rows, np.float32)
    found = np.asarray(log_weights(logits, make_params(requests)))
    for row in zip(found, logits, requests, strict=True):
        check_row(*row)


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_a_large_vocabulary_keeps_the_tokens_of_the_oracle(rng, spread):
    """As many logits as a real model has, rounded to bf16 so that there are many ties."""
    requests = [OFF, (1.0, 50, 1.0, 0.0), (0.7, 0, 0.9, 0.0), (1.3, 4000, 0.99, 0.0), (1.0, 0, 1.0, 0.02)]
    logits = spread * rng.standard_normal((len(requests), 152_000))
    logits = np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float32)
    found = np.asarray(log_weights(logits, make_params(requests)))
    known = [check_row(*row) for row in zip(found, logits, requests, strict=True)]
    assert sum(known) >= 4


def test_thresholds_are_exact_where_float32_is():
    """Eight tokens of equal probability, in two groups that the last bit of their logits tells apart."""
    above, below = np.nextafter(np.float32(1), np.float32(2)), np.float32(1)
    logits = np.asarray([[below, above, below, above, below, above, below, above]], np.float32)
    every = [list(range(8)), [1, 3, 5, 7]]
    for request, expected in [
        ((1.0, 3, 1.0, 0.0), every[1]),  # the ties with the third are kept
        ((1.0, 4, 1.0, 0.0), every[1]),
        ((1.0, 5, 1.0, 0.0), every[0]),
        ((1.0, 0, 0.49, 0.0), every[1]),
        ((1.0, 0, 0.51, 0.0), every[0]),
        ((1.0, 4, 0.51, 0.0), every[1]),  # the sum is of what top-k left
    ]:
        found = np.asarray(log_weights(logits, make_params([request])))
        assert np.flatnonzero(found[0] > -np.inf).tolist() == expected, request


def test_top_p_sees_what_top_k_left_and_min_p_what_top_p_left():
    logits = np.log([[0.4, 0.3, 0.2, 0.1]])
    for request, expected in [
        ((1.0, 2, 0.6, 0.0), 2),  # 0.4 / 0.7 is less than 0.6
        ((1.0, 2, 0.55, 0.0), 1),
        ((1.0, 0, 0.6, 0.0), 2),
        ((1.0, 0, 0.75, 0.6), 2),  # top_p leaves three; 0.2 is less than 0.6 · 0.4
        ((0.5, 0, 0.6, 0.0), 2),  # 0.16 : 0.09 : 0.04 : 0.01
        ((0.5, 0, 0.5, 0.0), 1),
        ((2.0, 0, 0.6, 0.0), 2),
        ((2.0, 0, 0.65, 0.0), 3),
    ]:
        found = np.asarray(log_weights(np.float32(logits), make_params([request])))
        assert (found[0] > -np.inf).tolist() == [True] * expected + [False] * (4 - expected), request


@pytest.mark.parametrize("vary", ["seeds", "positions"])
@pytest.mark.parametrize("request_", [OFF, (0.6, 0, 1.0, 0.0), (1.5, 9, 0.9, 0.05)])
def test_tokens_are_drawn_as_often_as_the_oracle_says(rng, vary, request_):
    """The statistic of a chi-square test, bounded by its mean and six standard deviations."""
    number, logits = MANY, 1.5 * rng.standard_normal(12).astype(np.float32)
    numbers, same = np.arange(number), np.full(number, 7)
    seeds, positions = (numbers, same) if vary == "seeds" else (same, numbers)
    tokens = draw_rows(np.tile(logits, (number, 1)), [request_] * number, positions, seeds)
    counts, expected = np.bincount(tokens, minlength=12), number * softmax(oracle(logits, *request_))
    possible = expected > 0
    assert not counts[~possible].any()
    statistic = np.sum((counts - expected)[possible] ** 2 / expected[possible])
    freedom = possible.sum() - 1
    assert statistic < freedom + 6 * np.sqrt(2 * freedom)


def test_the_largest_noise_of_a_large_vocabulary_is_hardly_ever_equal():
    """Of equal sums, argmax would always take the lowest id."""
    noise = sampling.gumbel_noise(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32), 152_000)
    assert len(np.unique(np.sort(np.asarray(noise)[0])[-1000:])) >= 999


MIXED = [(0.0, 3, 0.5, 0.0), OFF, (0.8, 20, 0.9, 0.0), (1.2, 0, 0.7, 0.01), (0.7, 40, 1.0, 0.0)]


def test_a_request_does_not_depend_on_its_neighbours_nor_on_the_batch_size(rng):
    """Neighbours that are greedy, that switch searches on and off, and one whose logits are NaN."""
    logits = rng.standard_normal((5, 300)).astype(np.float32)
    logits[0] = np.nan
    seeds, answers = [3, 3, 0xFFFFFFFF, 5, 6], []
    for position in range(8):
        positions = position + np.asarray([0, 0, 100, 2**31 - 30, 7])
        together = draw_rows(logits, MIXED, positions, seeds)
        back = draw_rows(logits[::-1], MIXED[::-1], positions[::-1], seeds[::-1])[::-1]
        alone = [draw_rows(logits[i : i + 1], MIXED[i : i + 1], positions[i : i + 1], [seeds[i]])[0] for i in range(5)]
        np.testing.assert_array_equal(back, together)
        np.testing.assert_array_equal(alone, together)
        answers.append(together)
    assert (np.asarray(answers)[:, 0] == 0).all()  # the first NaN
    assert all(len(set(column)) > 3 for column in np.asarray(answers)[:, 1:].T.tolist())  # positions matter


def test_the_seed_decides():
    """Equal requests of equal seeds agree; int32 seeds with the same bits are the same seeds."""
    logits = np.zeros((5, 300), np.float32)
    params = make_params([OFF] * 5, [2**32 - 1, 2**32 - 1, 1, 2, 3])
    signed = params._replace(seed=np.int32([-1, -1, 1, 2, 3]))
    tokens = [draw(logits, params, np.full(5, position, np.int32)) for position in range(6)]
    answers = np.stack(tokens, axis=1).tolist()
    assert answers[0] == answers[1] and len(set(map(tuple, answers))) == 4
    np.testing.assert_array_equal(draw(logits, signed, np.full(5, 5, np.int32)), tokens[5])


@given(st.lists(few_or_any_floats(FLOAT32_MAX) | st.just(np.inf), min_size=7, max_size=7), REQUESTS)
def test_temperature_0_takes_the_lowest_id_among_the_largest(row, others):
    """Whatever the other parameters are, and also beside a request that is drawn."""
    greedy, logits = (0.0, *others[1:]), np.asarray([row, row], np.float32)
    for neighbour in (greedy, OFF):
        assert draw_rows(logits, [greedy, neighbour])[0] == np.flatnonzero(logits[0] == logits[0].max())[0]


def test_the_smallest_choices_leave_the_most_likely_token(rng):
    """A draw with a tiny temperature, k = 1, a tiny p or min_p = 1 has one result."""
    logits = rng.standard_normal((5, 300)).astype(np.float32)
    requests = [(1e-38, 0, 1.0, 0.0), (1e-3, 0, 0.5, 0.0), (9.0, 1, 1.0, 0.0), (9.0, 0, 1e-38, 0.0), (9.0, 0, 1.0, 1.0)]
    for position in range(5):
        np.testing.assert_array_equal(draw_rows(logits, requests, np.full(5, position)), logits.argmax(-1))


def test_infinite_logits():
    """-inf is drawn only where there is nothing else, and all that are +inf share the draws."""
    inf = np.inf
    rows = {(-inf, 0.0, -inf, -100.0): {1}, (-inf,) * 4: set(range(12)), (5.0, inf, -inf, inf): {1, 3}}
    for row, expected in rows.items():
        for request in (OFF, (0.5, 3, 0.999, 0.0)):
            tokens = draw_rows(np.tile(row + (-inf,) * 8, (MANY, 1)), [request] * MANY)
            assert set(tokens.tolist()) == expected, (row, request)


def test_what_is_off_keeps_every_finite_logit():
    """Also where the probability is 0 in float32, or equals the largest one there but not in its logit."""
    logits = [-200.0, 0.0, -1e30, -1e-9, -np.inf]
    for request, kept in [(OFF, [0, 1, 2, 3]), ((1.0, 5, 1.0, 0.0), [0, 1, 2, 3]), ((1.0, 0, 1.0, 1.0), [1, 3])]:
        found = np.asarray(log_weights(np.float32([logits]), make_params([request])))[0]
        np.testing.assert_array_equal(found, [np.float32(x) if i in kept else -np.inf for i, x in enumerate(logits)])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_first_nan_is_returned(temperature):
    logits = [[0.0, np.nan, np.inf, np.nan, 0, 0, 0], [0.0, 50.0, -np.inf, 0.0, 0, 0, 0]]
    assert draw_rows(logits, [(temperature, 2, 0.9, 0.1)] * 2).tolist() == [1, 1]


def test_a_vocabulary_of_one_token():
    assert draw_rows([[3.0], [-np.inf], [np.nan]], [(1.0, 5, 0.1, 0.5)] * 3).tolist() == [0, 0, 0]


def test_settings_of_jax_do_not_change_the_tokens(rng):
    """64-bit types, strict promotion of types, no promotion of ranks, and another random generator."""
    logits = rng.standard_normal((5, 300)).astype(np.float32)
    expected = draw_rows(logits, MIXED)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        found = draw_rows(logits, MIXED)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)
    with jax.default_prng_impl("rbg"):
        again = jax.jit(lambda *operands: sampling.draw(*operands))  # `draw` would not compile anew for this setting
        np.testing.assert_array_equal(draw_rows(logits, MIXED, draw=again), expected)


def test_all_values_share_one_program(rng):
    """In a loop of a compiled program too, which gives the tokens of single calls."""
    logits = np.float32(rng.standard_normal((4, 5, 300)))

    @jax.jit
    def loop(params):
        def step(position, row):
            return position + 1, sampling.draw(row, params, jnp.full(5, position))

        return jax.lax.scan(step, jnp.int32(0), logits)[1]

    tries = [make_params(MIXED), make_params(MIXED[:1] * 5), make_params([OFF] * 5)]
    loop(tries[0])
    with count_compilations() as compiled:
        found = [loop(params) for params in tries]
    assert not compiled
    for tokens, params in zip(found, tries, strict=True):
        expected = [draw(row, params, np.full(5, i, np.int32)) for i, row in enumerate(logits)]
        np.testing.assert_array_equal(tokens, np.stack(expected))


@pytest.mark.parametrize("name", [*SamplingParams._fields, "positions"])
def test_one_value_for_all_requests_is_refused(name):
    """Broadcasting would give every request the seed or the position of the first."""
    params, positions = make_params([OFF] * 2), jnp.zeros(2, jnp.int32)
    if name == "positions":
        positions = positions[:1]
    else:
        params = params._replace(**{name: getattr(params, name)[:1]})
    with pytest.raises(ValueError, match=rf"^{name} must have one entry per request, shape \(2,\), got \(1,\)"):
        # The type checker of the tests would refuse `positions` first.
        getattr(sampling.draw, "__wrapped__", sampling.draw)(jnp.zeros((2, 3), jnp.float32), params, positions)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-0.1, float("nan"), float("inf"), 1e39)),
        *(("top_k", value) for value in (-1, 2**31, 1.0, float("nan"))),
        *(("top_p", value) for value in (0.0, -0.5, 1.1, float("nan"))),
        *(("min_p", value) for value in (-0.1, 1.1, float("nan"))),
    ],
)
def test_values_of_users_are_refused_by_name(name, value):
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    check_sampling(**values)
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {re.escape(str(value))}$"):
        check_sampling(**{**values, name: value})


def test_the_limits_of_the_values_are_allowed():
    check_sampling(temperature=0, top_k=2**31 - 1, top_p=1, min_p=1)
    check_sampling(temperature=3e38, top_k=1, top_p=1e-9, min_p=0)
