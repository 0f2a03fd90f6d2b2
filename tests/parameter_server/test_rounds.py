"""Rounds of unequal size on a server without Ray, whose workers answer in an order made up here."""

import collections
from unittest import mock

import chex
import jax
import numpy as np
import optax
import parameter_server_cases as cases
import pytest
from parameter_server_cases import PARAMS

from optax_dcasgd import simulation
from optax_dcasgd.parameter_server import _book, _calls, _history, _local_steps, _record, _server
from optax_dcasgd.parameter_server._options import Options
from optax_dcasgd.parameter_server._transport import Layout
from optax_dcasgd.parameter_server._worker import Refused, Task, Worker

LAYOUT = Layout(PARAMS)
STEPS = (1, 2, 4)
RATE = 0.7  # of the server
ROUNDS = cases.Rounds()


class Calls:
    """In the place of Ray's: tasks are done here, when they are asked for, in a random order.

    After so many tasks each worker is lost once over one, and comes back; these are in ``lost``.
    """

    def __init__(self, worker, lose_after):
        self.worker, self.lose_after, self.lost = worker, lose_after, {}
        self.seconds = (0.1, 0.2, 0.4)  # that a batch takes a worker
        self.rng, self.tasks, self.sent, self.back = np.random.default_rng(0), {}, [], []

    def start(self, index, actor):
        self.back.append(index)

    def send(self, index, task, message):
        self.tasks[index] = len(self.sent), task, message
        self.sent.append((index, task))

    def wait(self, seconds):
        if self.back and (not self.tasks or self.rng.random() < 0.3):
            return [(self.back.pop(0), _calls.Ready())]
        if not self.tasks or seconds == 0:  # nothing comes while an update is made
            return []
        index = int(self.rng.choice(sorted(self.tasks)))
        number, task, message = self.tasks.pop(index)
        if number >= self.lose_after + 10 * index and index not in self.lost:
            self.lost[index] = task
            self.back.append(index)
            return [(index, _calls.Lost("killed"))]
        seconds = task.num_steps * self.seconds[index]
        return [(index, self.worker.gradient(*task, message)._replace(seconds=seconds))]


@pytest.fixture(scope="module")
def worker():
    traced = []

    def grad_fn(*args):
        traced.append(args)
        return ROUNDS.grad_fn(*args)

    made = Worker(grad_fn, ROUNDS, jax.random.key(0), LAYOUT, LAYOUT, LAYOUT, 1)
    made.ready()
    yield made
    assert len(traced) == 1  # before the first round, and whatever its number of steps


@pytest.fixture
def start(worker, monkeypatch):
    """Starts a server of three workers, as the driver does."""
    monkeypatch.setattr(_record, "Metrics", mock.Mock)

    def start(num_updates, lose_after=1000, **options):
        calls = Calls(worker, lose_after)
        monkeypatch.setattr(_server, "Calls", lambda: calls)
        options = {
            **{"mode": "async", "num_workers": 3, "max_staleness": None, "on_stale": "wait"},
            **{"checkpoint_dir": None, "checkpoint_every": 1000, "compensation_every": None},
            **{"max_bad_pushes": 3, "name": None, "signature": []},
            **{"local_steps": _local_steps.check(STEPS, 3), **options},
        }
        layouts, options = (LAYOUT,) * 3, Options(num_updates=num_updates, **options)
        workers = dict.fromkeys(range(options.num_workers))
        return _server.Server(optax.sgd(RATE), PARAMS, layouts, options, workers), calls

    return start


def numbers(batch, num_steps):
    """Each batch of these rounds."""
    return [i for b, n in zip(batch, num_steps, strict=True) for i in range(b, b + n)]


def numpy_run(history):
    """The recorded rounds one after another, in float64; each at the version that it names."""
    versions, losses = [jax.tree.map(lambda x: x.astype(float), PARAMS)], []
    for t in range(len(history.batch)):
        stale = versions[history.version[t]]
        loss, pseudo = cases.numpy_round(stale, history.batch[t], history.num_steps[t])
        losses.append(loss)
        versions.append(jax.tree.map(lambda w, g: w - RATE * g, versions[-1], pseudo))
    return versions[-1], losses


def assert_trained_as_recorded(server):
    params, _, rows, _ = server.result()
    params = jax.tree.unflatten(jax.tree.structure(PARAMS), params)
    history = _history.to_columns(rows)
    expected, losses = numpy_run(history)
    chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(history.loss, losses, 1e-4)
    arrivals = _history.to_arrivals(history, 3, in_rounds=True)
    replayed = simulation.run(ROUNDS.grad_fn, PARAMS, optax.sgd(RATE), ROUNDS, arrivals)
    chex.assert_trees_all_close(params, replayed.params, rtol=1e-6, atol=1e-6)
    return history


def test_each_batch_is_used_once_by_unequal_workers_of_which_some_are_lost(start, tmp_path):
    """And the numbers go on where a checkpoint was written. What was under way is done again."""
    server, calls = start(60, lose_after=20, checkpoint_dir=str(tmp_path))
    assert server.advance(60.0).version == 60
    assert len(calls.lost) == 3
    assert server.save() == 60
    under_way = [task for _, task, _ in calls.tasks.values()]
    resumed, later = start(120, checkpoint_dir=str(tmp_path))
    assert resumed.advance(60.0).version == 120
    assert {task for _, task in later.sent[:3]} >= {*under_way}

    history = assert_trained_as_recorded(resumed)
    used = numbers(history.batch, history.num_steps)
    left = numbers(*zip(*(task for _, task, _ in later.tasks.values()), strict=True))
    assert sorted(used + left) == list(range(len(used) + len(left)))  # none twice, and none missing
    # Everybody has what is its own, but for what others did not do.
    foreign = {*calls.lost.values(), *under_way}
    for worker, *task in zip(history.worker, history.batch, history.num_steps, strict=True):
        assert task[1] == STEPS[worker] or Task(*task) in foreign
    by = {task: index for index, task in calls.sent}  # at last
    assert any(task.num_steps > STEPS[by[task]] for task in calls.lost.values())
    assert history.staleness.max() > 2


def test_a_synchronous_update_is_the_mean_of_unequal_rounds(start):
    server, calls = start(5, mode="sync")
    server.advance(60.0)
    params, _, rows, _ = server.result()
    assert rows["num_steps"].tolist() == [7] * 5
    assert rows["batch"].tolist() == [0, 7, 14, 21, 28]
    expected = jax.tree.map(lambda x: x.astype(float), PARAMS)
    for t in range(5):
        rounds = calls.sent[3 * t : 3 * t + 3]
        assert sorted(task.num_steps for _, task in rounds) == [1, 2, 4]
        pseudo = [cases.numpy_round(expected, *task)[1] for _, task in rounds]
        expected = jax.tree.map(lambda w, *g: w - RATE * sum(g) / 3, expected, *pseudo)
    params = jax.tree.unflatten(jax.tree.structure(PARAMS), params)
    chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-5)


def test_workers_take_as_many_as_they_have_time_for(start):
    """The fastest four. Who is not known, at first or after a loss, takes one."""
    server, calls = start(80, lose_after=30, local_steps=_local_steps.check(4, 3))
    assert server.advance(60.0).version == 80
    taken = [[task.num_steps for i, task in calls.sent if i == j] for j in range(3)]
    assert [each[-5:] for each in taken] == [[4] * 5, [2] * 5, [1] * 5]
    assert len(calls.lost) == 3
    assert taken[0].count(1) == 2
    rows = server.result()[2]
    assert max(collections.Counter(numbers(rows["batch"], rows["num_steps"])).values()) == 1


def test_the_last_rounds_count_most():
    of = _local_steps.LocalSteps(16)
    for worker in (0, 1):
        assert of(worker) == 1
        of.took(worker, 1, 3.0)
    assert [of(0), of(1)] == [16, 16]
    for _ in range(10):
        of.took(1, 4, 36.0)  # three times as long
    assert [of(0), of(1), of(2)] == [16, 5, 1]
    of.took(2, 1, 1000.0)
    assert of(2) == 1
    of.forget(0)
    assert [of(0), of(1)] == [1, 16]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [((1, 2, 4), [1, 2, 4, 1, 1]), (np.array([4, 2, 2]), [4, 2, 2, 2, 2])],
)
def test_a_worker_that_is_added_takes_the_least(steps, expected):
    of = _local_steps.check(steps, 3)
    assert [of(worker) for worker in range(5)] == expected
    assert _local_steps.check(lambda i: np.int64(i + 1), 3)(7) == 8


@pytest.mark.parametrize(
    ("steps", "error", "message"),
    [
        (
            [1, 2],
            ValueError,
            "local_steps must be one integer, .* or 3, one a worker",
        ),
        (0, ValueError, "The least of local_steps must be at least 1; got 0"),
        ([1.0, 2.0, 4.0], TypeError, "local_steps must be one integer, for the fastest"),
        ([1, 0, 4], ValueError, "The least of local_steps must be at least 1; got 0"),
        (lambda i: 2 - i, ValueError, r"local_steps\(2\) must be at least 1; got 0"),
        (lambda i: 2.0, TypeError, r"local_steps\(0\) must be a Python integer"),
    ],
)
def test_wrong_local_steps(steps, error, message):
    with pytest.raises(error, match=message):
        _local_steps.check(steps, 3)


def test_a_round_is_named_by_its_batches(worker):
    """And too long a one, as a function for a new worker may have it, is refused."""
    refused = worker.gradient(5, 6, LAYOUT.pack(jax.tree.leaves(PARAMS)))
    assert isinstance(refused, Refused)
    assert "failed on batches 5 to 10:" in refused.reason
    assert "of num_steps=6 it returned shape (4, 16, 6) for batches[0]" in refused.reason
    book = _book.Book(None)
    for _ in range(3):
        book.pull(0, None, is_alone=True, num_steps=3)
        lost = book.lost(0, 1)
    assert lost[1] == "3 workers were lost over batches 0 to 2"
    assert book.pull(0, None, is_alone=True, num_steps=2) == Task(3, 2)
    book.drop(book.answered(0))
    assert book.pull(1, None, is_alone=False, num_steps=4) == Task(3, 2)  # as it is
    assert book.pull(0, None, is_alone=False, num_steps=2) == Task(5, 2)


def test_rounds_from_a_checkpoint_are_cut_up_where_they_are_too_long_now():
    book = _book.Book(None, longest=3)
    book.restore({"again": [(4, 8), (20, 3), (30, 1)], "next_batch": 40})
    found = [book.pull(0, None, is_alone=True, num_steps=2) for _ in range(6)]
    assert found == [(4, 3), (7, 3), (10, 2), (20, 3), (30, 1), (40, 2)]


def test_a_straggler_is_one_by_its_batches():
    """And not because its rounds are long."""
    columns = dict.fromkeys(_history.History._fields, np.zeros(4))
    columns |= {"worker": np.array([0, 1, 2, 2]), "num_steps": np.array([4, 64, 4, 4])}
    columns |= {"seconds": np.array([0.4, 6.4, 4.0, 4.0])}
    result = _history.Result(None, None, _history.History(**columns), None, (), (0, 1, 2))
    (straggler,) = result.stragglers()
    assert (straggler.worker, straggler.seconds) == (2, 1.0)
