"""When checkpoints are written and what of, and how a server goes on; without Ray."""

from unittest import mock

import jax
import numpy as np
import optax
import pytest
from parameter_server_cases import PARTS_PARAMS as PARAMS

from optax_dcasgd.parameter_server import _checkpoint, _lock, _record
from optax_dcasgd.parameter_server._book import Book, Pull, Push
from optax_dcasgd.parameter_server._options import Options
from optax_dcasgd.parameter_server._saving import Saving
from optax_dcasgd.parameter_server._transport import Layout
from optax_dcasgd.parameter_server._update import Gradient, Update, Version

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
MASKED = {**PARAMS, "mask": np.array([0, -np.inf], np.float32)}  # not finite, and meant to be


class Run:
    """The server's parts that a checkpoint is made of, and gradients of one number."""

    def __init__(self, directory, tx=None, *, every=2, params=MASKED, **about):
        layout = Layout(params)
        self.params, self.layout = params, layout
        self.update = Update(tx or optax.sgd(0.1), params, (layout, layout, layout))
        self.record, self.book = _record.Record(1000, None), Book(None)
        options = Options(
            **{"mode": "async", "num_workers": 1, "num_updates": 1000, "max_staleness": None},
            **{"on_stale": "wait", "compensation_every": None, "max_bad_pushes": 0, "name": None},
            checkpoint_dir=None if directory is None else str(directory),
            checkpoint_every=every,
            signature=["lines"],
            **about,
        )
        self.saving = Saving(options, (self.update, self.record, self.book))
        self.saving.restore()

    def step(self, number=1.0):
        grads = jax.tree.map(lambda x: np.full(np.shape(x), number, np.float32), self.params)
        grads = {**grads, "mask": np.zeros_like(grads["mask"])}
        version = self.update.publish(self.record.version)
        packed = self.layout.pack(jax.tree.leaves(grads))
        self.update.apply([Gradient(packed, version, 0, 0)])
        batch = self.book.pull(0, version, is_alone=True)
        self.book.answered(0)
        pull = Pull(0, batch, Version(self.record.version, b"", None))
        self.record.update(Push(pull, 0.0, 0.0, b""), 0, np.nan)
        return self.saving.begin() if self.saving.is_due() else None

    def events(self):
        return {event.kind: event.message for event in self.record.take_events()}


@pytest.fixture(autouse=True)
def without_metrics(monkeypatch):
    monkeypatch.setattr(_record, "Metrics", mock.Mock)


def versions(directory):
    return {int(path.name) for path in directory.iterdir() if path.name.isdigit()}


def test_a_damaged_checkpoint_costs_the_updates_since_the_one_before(tmp_path):
    run = Run(tmp_path)
    for _ in range(5):
        run.step()
    assert run.saving.save() == 5
    expected = run.update.params_to_host()
    assert versions(tmp_path) == {4, 5}
    (tmp_path / "5" / "meta" / "metadata").unlink()

    run = Run(tmp_path)
    assert run.record.version == 4
    events = run.events()
    assert list(events) == ["checkpoint damaged", "resumed"]
    for told in ("of 5 updates", str(tmp_path / "damaged-5"), "1 updates are lost"):
        assert told in events["checkpoint damaged"]
    run.step()
    np.testing.assert_array_equal(run.update.params_to_host()[-1], expected[-1])
    assert run.saving.save() == 5  # written anew, and read
    assert Run(tmp_path).record.version == 5


def test_parts_of_a_killed_server_are_removed(tmp_path):
    part = tmp_path / "7.orbax-checkpoint-tmp"
    part.mkdir()
    Run(tmp_path)
    assert not part.exists()


# Divergence.


@pytest.mark.parametrize(
    ("tx", "names"),
    [
        (optax.sgd(1e38), "params['b'], params['w']"),
        # Its second moment overflows, so that the parameters would never move again.
        (optax.adam(0.1), "state[0].nu['b'], state[0].nu['w']"),
    ],
)
def test_what_is_not_finite_is_never_written(tx, names, tmp_path):
    run = Run(tmp_path, tx)
    for number in (1e-3, 1e-3, 1.0, 1e-3, 1e20):
        assert run.step(number) is None
    failure = run.step(1e20)
    assert f"Not finite after 6 updates: {names}. The last checkpoint is of 4" in failure
    assert run.saving.failure() == failure
    assert run.saving.save() is None
    assert versions(tmp_path) == {2, 4}
    assert Run(tmp_path, tx).saving.failure() is None


def test_divergence_without_checkpoints_and_of_many_leaves():
    params = {**{str(i): np.ones(2, np.float32) for i in range(5)}, "mask": MASKED["mask"]}
    run = Run(None, optax.sgd(1e38), params=params)
    run.step(1e20)
    told = "params['0'], params['1'], params['2'] and 2 more. There is no checkpoint"
    assert told in run.saving.failure()


def test_refusals_of_before_do_not_count(tmp_path):
    run = Run(tmp_path)
    run.book.num_refused = 11
    run.step()
    run.saving.save()
    assert Run(tmp_path).book.num_refused == 0


# Other runs.


def test_nothing_is_written_to_a_directory_that_another_run_has_taken(tmp_path):
    with _lock.held(str(tmp_path)) as token:
        run = Run(tmp_path, lock=token)
        run.step()
        assert run.step() is None
    with _lock.held(str(tmp_path)):
        run.step()
        assert "Another run has taken checkpoint_dir" in run.step()
        assert run.saving.save() is None
    assert versions(tmp_path) == {2}


def test_what_is_not_as_before_is_told(tmp_path):
    run = Run(tmp_path, fingerprint={"batches": "a", "key": "b"})
    run.step()
    run.saving.save()
    run = Run(tmp_path, fingerprint={"batches": "c", "key": "b"})
    events = run.events()
    assert "batches differ from those of the first 1 updates" in events["changed"]
    assert "hyperparameters" not in events["changed"]
    run.step()
    run.saving.save()
    assert list(Run(tmp_path, fingerprint={"batches": "c", "key": "b"}).events()) == ["resumed"]


def test_a_state_that_holds_hyperparameters_holds_those_of_before(tmp_path):
    def tx(rate):
        return optax.inject_hyperparams(lambda rate: optax.sgd(rate))(rate)

    run = Run(tmp_path, tx(0.1), fingerprint={"tx": "a"})
    run.step()
    run.saving.save()
    was = run.update.state_to_host()
    run = Run(tmp_path, tx(0.2), fingerprint={"tx": "b"})
    for new, old in zip(run.update.state_to_host(), was, strict=True):
        np.testing.assert_array_equal(new, old)
    told = "hyperparameters kept in the state, as by optax.inject_hyperparams, are the checkpoint's"
    assert told in run.events()["changed"]


# How much a server that dies can lose.


class Slow:
    """In the place of Orbax's manager: what it writes is complete when it is waited for."""

    def __init__(self):
        self.complete, self.writing = 0, 0

    def save(self, version, **_):
        self.writing = version

    def wait_until_finished(self):
        self.complete = self.writing

    def latest_step(self):
        return self.writing


def test_at_most_two_intervals_are_lost(tmp_path, monkeypatch):
    """While one checkpoint is being written the next one waits for it."""
    run, manager, lost = Run(tmp_path, every=5), Slow(), []
    monkeypatch.setattr(run.saving._checkpoints, "_manager", manager)
    for _ in range(40):
        lost.append(run.record.version + 1 - manager.complete)  # if it dies after this update
        run.step()
    assert max(lost) == 2 * 5
    assert isinstance(run.saving._checkpoints, _checkpoint.Checkpoints)
