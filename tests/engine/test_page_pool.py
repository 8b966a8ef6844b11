"""Pages of a device: no page has two owners, none is lost, and equal prefixes are found as long as pages hold them."""

from collections import Counter

import numpy as np
from hypothesis import given, settings, strategies as st

from fp4jax.engine.page_pool import ROOT, PagePool


def remembered(pool, pages, tokens):
    """Remembers all full pages of `tokens`."""
    chain, size = ROOT, pool.page_size
    for i, page in enumerate(pages[: len(tokens) // size]):
        chain = pool.remember(page, chain, tokens[i * size : (i + 1) * size])
    return chain


def test_prefixes():
    pool = PagePool(8, 2)
    first = pool.take(3)
    assert remembered(pool, first, [1, 2, 3, 4, 5, 6]) != ROOT
    assert pool.share([1, 2, 3, 4, 9, 9])[0] == first[:2]  # used by two now
    assert pool.share([3, 4])[0] == [] and pool.share([1])[0] == []
    pool.release(first)
    assert pool.available == 6  # the third page can be had again
    pool.release(first[:2])
    assert pool.available == 8
    assert pool.share([1, 2, 3, 4, 5, 6, 7])[0] == first  # they still hold what they held
    pool.release(first)


def test_the_end_of_a_chain_is_forgotten_first():
    pool = PagePool(4, 1)
    pages = pool.take(3)
    remembered(pool, pages, [7, 8, 9])
    pool.release(pages)
    taken = pool.take(2)  # the free page, then the last one of the chain
    assert pages[2] in taken and pool.share([7, 8, 9])[0] == pages[:2]
    assert pool.take(1) is None and pool.available == 0


def test_equal_pages_are_remembered_once():
    pool = PagePool(4, 1)
    one, two = pool.take(1), pool.take(2)
    assert remembered(pool, one, [5]) == remembered(pool, two, [5])
    assert pool.share([5])[0] == one
    pool.release(two)
    assert pool.available == 3  # the second page of the same tokens is free at once


def test_without_sharing():
    pool = PagePool(2, 1, shares=False)
    pages = pool.take(1)
    assert remembered(pool, pages, [5]) == ROOT and pool.share([5]) == ([], ROOT)


@given(seed=st.integers(0, 2**32 - 1), num_pages=st.integers(1, 12))
@settings(max_examples=60)
def test_no_page_is_lost_or_given_twice(seed, num_pages):
    """Requests of random tokens of a small alphabet come and go; a model of the contents checks what is shared."""
    rng = np.random.default_rng(seed)
    pool, requests, content = PagePool(num_pages, 2), [], {}
    for _ in range(80):
        if rng.random() < 0.6:
            tokens = rng.integers(0, 2, rng.integers(1, 9)).tolist()
            shared, chain = pool.share(tokens)
            for i, page in enumerate(shared):
                assert content[page] == tuple(tokens[: 2 * i + 2])
            new = pool.take(-(-len(tokens) // 2) - len(shared))
            if new is None:
                pool.release(shared)
                continue
            pages = shared + new
            for i in range(len(shared), len(pages)):
                content[pages[i]] = tuple(tokens[: 2 * i + 2])
            for i in range(len(shared), len(tokens) // 2):
                chain = pool.remember(pages[i], chain, tokens[2 * i : 2 * i + 2])
            requests.append(pages)
        elif requests:
            pool.release(requests.pop(rng.integers(len(requests))))
        users = Counter(page for pages in requests for page in pages)
        assert all(len(set(pages)) == len(pages) for pages in requests)
        assert pool.available == num_pages - len(users)
    for pages in requests:
        pool.release(pages)
    assert pool.available == num_pages and sorted(pool.take(num_pages)) == list(range(num_pages))
