"""The bound on staleness and the book that keeps it, without Ray."""

import itertools
import random

import pytest

from optax_dcasgd.parameter_server import _bound
from optax_dcasgd.parameter_server._book import Book, Push
from optax_dcasgd.parameter_server._update import Version


def can_all_be_applied(staleness, max_staleness):
    """Whether there is an order that keeps the bound, by trying all."""
    return any(
        all(tau + earlier <= max_staleness for earlier, tau in enumerate(order))
        for order in itertools.permutations(staleness)
    )


def test_the_bound_allows_exactly_what_can_be_kept():
    for size in range(5):
        for staleness in itertools.product(range(4), repeat=size):
            for limit in range(5):
                pulled = can_all_be_applied([*staleness, 0], limit)
                assert _bound.may_pull(list(staleness), limit) == pulled
                for i, tau in enumerate(staleness):
                    rest = [other + 1 for j, other in enumerate(staleness) if j != i]
                    if tau <= limit:
                        applied = can_all_be_applied(rest, limit)
                        assert _bound.may_apply(list(staleness), i, limit) == applied


@pytest.mark.parametrize("limit", [0, 1, 2, 5])
def test_nobody_waits_for_ever(limit):
    """Workers of random speed: the bound is kept, and there is always something to do."""
    draw, book, version, idle = random.Random(limit), Book(limit), 0, set(range(6))
    for _ in range(2000):
        while idle and book.may_pull(version):
            book.pull(idle.pop(), Version(version, b"", None), is_alone=False)
        assert not book.is_empty()
        if book.computing() and draw.random() < 0.7:
            book.push(Push(book.answered(draw.choice(book.computing())), 0.0, 0.0, b""))
        while push := book.next_push(version):
            assert version - push.pull.version.number <= limit
            version += 1
            idle.add(push.pull.worker)
    assert version > 200
