"""Bucket plans: exact against trying every set, and what is read from flags and files."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from fp4jax.block_graph import (
    parse_buckets,
    plan_buckets,
    planner as bucket_planner,
    powers_of_two,
    read_trace,
    save_plan,
)


def rows_that_run(buckets, histogram):
    """By plain loops: one call after the other, chunk by chunk."""
    rows = 0
    for tokens, calls in histogram.items():
        left = tokens
        while left > 0:
            bucket = min((b for b in buckets if b >= left), default=max(buckets))
            rows, left = rows + calls * bucket, left - bucket
    return rows


@hypothesis.given(
    histogram=st.dictionaries(st.integers(1, 14), st.integers(1, 9), min_size=1, max_size=6),
    max_buckets=st.integers(1, 4),
    granularity=st.sampled_from([1, 2, 4]),
    largest=st.sampled_from([None, 6, 9, 16]),
)
@hypothesis.example(histogram={9: 1, 5: 1}, max_buckets=2, granularity=4, largest=9)  # 9 is no multiple of 4
def test_no_other_set_needs_fewer_rows(histogram, max_buckets, granularity, largest):
    plan = plan_buckets(histogram, max_buckets, granularity=granularity, largest=largest)
    top = largest or -(-max(histogram) // granularity) * granularity
    smaller = range(granularity, top, granularity)
    sets = [(*c, top) for n in range(max_buckets) for c in itertools.combinations(smaller, n)]
    assert plan.padded == rows_that_run(plan.buckets, histogram) == min(rows_that_run(s, histogram) for s in sets)
    assert len(plan.buckets) <= max_buckets and plan.buckets[-1] == top
    assert all(b % granularity == 0 for b in plan.buckets[:-1])
    assert plan.tokens == sum(n * c for n, c in histogram.items())
    assert bucket_planner.work(plan.buckets, histogram) == (plan.tokens, plan.padded)


def test_enough_buckets_leave_no_padding():
    plan = plan_buckets({3: 5, 70: 1, 9: 2}, 10)
    assert plan.buckets == (3, 9, 70) and plan.waste == 0


def test_a_sequence_is_a_histogram_too(rng):
    tokens = rng.integers(1, 300, 500)
    calls = dict(zip(*(a.tolist() for a in np.unique(tokens, return_counts=True)), strict=True))
    assert plan_buckets(np.bincount(tokens), 5) == plan_buckets(calls, 5)


def test_a_skewed_histogram_needs_a_fifth_less_padding_than_powers_of_two(rng):
    """Prompts of a chat and of documents: two humps."""
    tokens = np.concatenate([rng.normal(90, 25, 9000), rng.normal(1400, 120, 1000)]).astype(int).clip(1, 2048)
    calls = np.bincount(tokens)
    plan = plan_buckets(calls, 6, granularity=8)
    _, usual = bucket_planner.work(powers_of_two(plan.buckets[-1], 6), calls)
    assert plan.padded - plan.tokens <= 0.8 * (usual - plan.tokens)


def test_powers_of_two():
    assert powers_of_two(2048, 3) == (512, 1024, 2048)
    assert powers_of_two(1500, 2) == (1024, 2048)
    assert powers_of_two(3, 8) == (1, 2, 4)


def test_plans_and_traces_are_files(tmp_path):
    plan = plan_buckets({5: 1, 100: 3}, 2)
    save_plan(plan, tmp_path / "plan.json")
    assert parse_buckets(str(tmp_path / "plan.json")) == plan.buckets == parse_buckets("5, 100")
    (tmp_path / "trace.txt").write_text("5\n100\n\n 100\n5\n")
    assert read_trace(tmp_path / "trace.txt") == {5: 2, 100: 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("128,,256", "got ''"),
        ("128,2x6", "'2x6'"),
        ("", "got ''"),
        ("256,128", "ascending"),
        ("128,128", "ascending"),
        ("0,128", "positive"),
        ("-1,128", "'-1'"),
        ("1.5", "'1.5'"),
        ("/does/not/exist.json", "No such file"),
    ],
)
def test_bad_sizes_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_buckets(text)


@pytest.mark.parametrize(
    ("content", "message"), [("[1, 2]", "bucket plan"), ('{"buckets": [4, true]}', "whole numbers"), ("{", "json")]
)
def test_bad_plan_files_are_refused(tmp_path, content, message):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        parse_buckets(str(tmp_path / "plan.json"))


@pytest.mark.parametrize(
    ("histogram", "options", "message"),
    [
        ({}, {}, "no call"),
        ([5, 0, 0], {}, "no call"),
        ({3: -1}, {}, "-1 calls of 3"),
        (np.array([0, 0.5]), {}, "0.5"),
        ({3: 1}, {"max_buckets": 0}, "max_buckets must be a whole number from 1 up, got 0"),
        ({3: 1}, {"granularity": 0}, "granularity must be"),
        ({3: 1}, {"largest": 0}, "largest must be"),
        (np.array([0, np.inf]), {}, "inf"),
        ({1: 10**13, 500_000: 10**13, 1_000_000: 10**13}, {}, "too many to add up"),
    ],
)
def test_bad_histograms_are_refused(histogram, options, message):
    with pytest.raises(ValueError, match=message):
        plan_buckets(histogram, **{"max_buckets": 2, **options})


def test_a_bad_line_of_a_trace_is_named(tmp_path):
    (tmp_path / "trace.txt").write_text("5\nfive\n")
    with pytest.raises(ValueError, match=r"line 2.*'five'"):
        read_trace(tmp_path / "trace.txt")
