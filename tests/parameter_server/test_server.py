"""The server's loop, with workers that exist only here."""

import re
import time
from unittest import mock

import jax
import numpy as np
import optax
import pytest
from parameter_server_cases import PARTS_PARAMS as PARAMS

from optax_dcasgd.parameter_server import _calls, _record, _server, _worker
from optax_dcasgd.parameter_server._local_steps import LocalSteps
from optax_dcasgd.parameter_server._options import Options
from optax_dcasgd.parameter_server._transport import Layout

LAYOUT = Layout(PARAMS)


@pytest.fixture
def server(request, monkeypatch):
    """Of two workers; a test's parameters may be options."""
    monkeypatch.setattr(_record, "Metrics", mock.Mock)
    options = {
        **{"mode": "async", "num_workers": 2, "num_updates": 10, "max_staleness": None},
        **{"on_stale": "wait", "checkpoint_dir": None, "checkpoint_every": 100},
        **{"compensation_every": None, "max_bad_pushes": 3, "name": None, "signature": []},
        **getattr(request, "param", {}),
    }
    return _server.Server(optax.sgd(0.1), PARAMS, (LAYOUT, LAYOUT, LAYOUT), Options(**options), {})


def test_who_is_missing_is_said_while_nothing_happens(server, monkeypatch):
    server._roster.members = {0, 1}
    server._roster.ready(1, is_idle=False)
    assert not server.advance(0.2).events  # not yet
    monkeypatch.setattr(_server, "_PATIENCE", 0.0)
    event, *_ = server.advance(0.2).events
    assert event.kind == "waiting"
    assert "not started: [0]; that are computing: none" in event.message


class Calls:
    """In the place of Ray's: workers that answer at once, and some that never do."""

    def __init__(self, hanging):
        self.hanging, self.sent = hanging, []

    def send(self, index, batch, message):
        self.sent.append(index)

    def wait(self, seconds):
        answering = [index for index in self.sent if index not in self.hanging]
        self.sent = [index for index in self.sent if index in self.hanging]
        if not answering:
            time.sleep(min(seconds, 0.01))
        packed = LAYOUT.pack(jax.tree.leaves(PARAMS))
        return [(index, _worker.Computed(0.0, 0.0, packed)) for index in answering]


@pytest.mark.parametrize(
    ("server", "done"),
    [({}, 10), ({"mode": "sync"}, 0), ({"max_staleness": 3}, 3)],
    ids=["async", "sync", "with a bound"],
    indirect=["server"],
)
def test_a_worker_that_hangs(server, done, monkeypatch):
    """The other one goes on as long as it may, and then it is said for whom it waits."""
    monkeypatch.setattr(server, "_calls", Calls(hanging={0}))
    for index in (0, 1):
        server._roster.members.add(index)
        server._roster.ready(index, is_idle=True)
    status = server.advance(1.0 if done < 10 else 20.0)
    assert (status.version, status.events) == (done, [])
    monkeypatch.setattr(_server, "_PATIENCE", 0.0)
    events = server.advance(0.2).events
    assert bool(events) == (done < 10)
    for event in events:
        assert event.kind == "waiting"
        assert "that are computing: [0]" in event.message


@pytest.mark.parametrize(
    ("params", "not_finite", "refused", "failure"),
    [
        ([np.nan, 0.0], True, 1, r"Not finite after 0 updates: params\['b'\]\. There is no ch"),
        (
            [1e30, -1e31],
            True,
            4,
            r"No gradient is finite .*\(params\['w'\]: 1e\+31\).* 4 gradients",
        ),
        ([1e30, -1e31], False, 4, "^4 gradients were refused.* of worker 1: bad$"),  # but raised
    ],
)
def test_divergence_is_not_blamed_on_a_gradient(server, params, not_finite, refused, failure):
    leaves = zip(jax.tree.leaves(PARAMS), params, strict=True)
    server._update.restore([np.full_like(leaf, value) for leaf, value in leaves], [])
    for _ in range(refused):
        assert server._failure is None
        server._book.pull(1, None, is_alone=True)
        server._receive(1, _worker.Refused("bad", not_finite))
    assert re.search(failure, server._failure)


def lose(server, index):
    """As `Calls` tells of a worker that will not come back."""
    server._calls.stop(index)
    server._receive(index, _calls.Gone("no such module"))


@pytest.fixture
def two(server):
    """The server, with two workers of which one is idle."""
    server.attach({0: mock.Mock(), 1: mock.Mock()}, 2)
    server._receive(1, _calls.Ready())
    return server


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_that_is_gone_can_be_replaced(num_workers, two):
    """The one that is left may have to leave; the driver, which makes the other, hears of both."""
    lose(two, 0)
    assert not two.resize(num_workers, "mine")
    status = two.advance(0.0)
    left = [1] if num_workers == 1 else []
    assert (status.gone, status.retired, status.num_workers) == ([0], left, num_workers)
    assert (status.wish, status.failure) == ("mine", None)
    assert not two.resize(num_workers, "mine")
    two.attach({0: mock.Mock()}, num_workers, "mine")
    assert two.resize(num_workers, "mine")
    status = two.advance(0.0)
    assert (status.gone, status.starting, status.wish, status.failure) == ([], [0], None, None)


def test_of_several_wishes_the_last_counts(two):
    """Whoever asks again for the first one, or has the driver fulfil it, undoes nothing."""
    assert not two.resize(4, "first")
    assert not two.resize(3, "second")
    two.attach({2: mock.Mock(), 3: mock.Mock()}, 4, "first")  # which the driver had heard of
    assert two.resize(4, "first")
    status = two.advance(0.0)
    assert (status.num_workers, status.wish) == (3, "second")
    two.attach({}, 3, "second")
    assert two.resize(3, "second")
    assert two.resize(4, "first")
    status = two.advance(0.0)
    assert (status.num_workers, status.wish) == (3, None)


@pytest.mark.parametrize(
    "server", [{"local_steps": LocalSteps(lambda i: [4, 1][i])}], indirect=True
)
def test_steps_that_are_known_of_no_worker_more(two):
    two.attach({2: mock.Mock()}, 3)
    two._receive(2, _calls.Ready())
    two._roster.occupy(1)
    two._send_out()
    assert re.fullmatch(r"local_steps\(2\) failed: IndexError: .*", two._failure)
    assert two._roster.idle() == [2]


@pytest.mark.parametrize("first", ["gone", "retired"])
def test_a_run_without_workers_ends(two, first):
    """Whoever is the last, one that is gone or one that the driver knows has to leave."""
    two.attach({}, 1)
    if first == "gone":
        two._roster.occupy(1)
        lose(two, 0)
        assert two.advance(0.0).failure is None
        two._roster.release(1)
    else:
        assert two.advance(0.0).failure is None
        lose(two, 0)
    assert two.advance(0.0).failure == "No worker is left; the last one: no such module"


@pytest.mark.parametrize(
    ("server", "method"),
    [
        ({"compensation_every": 1}, "compensation"),
        ({"mode": "sync"}, "apply_mean"),
        ({}, "apply"),
    ],
    indirect=["server"],
)
def test_a_gradient_whose_update_fails_is_not_missing_from_a_checkpoint(
    server, method, monkeypatch
):
    """Its batch would be counted as done: nothing is saved."""
    monkeypatch.setattr(server, "_calls", Calls(hanging=()))
    monkeypatch.setattr(server._update, method, mock.Mock(side_effect=MemoryError))
    server._roster.members.add(0)
    server._roster.ready(0, is_idle=True)
    with pytest.raises(MemoryError):
        server.advance(20.0)
    with pytest.raises(RuntimeError, match="failed half way, and is not saved"):
        server.save()
