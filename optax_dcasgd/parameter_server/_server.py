"""The server: it owns the parameters and the optimizer's state, and decides what happens next.

It sends each idle worker a batch and the newest parameters as one task, whose answer is the
gradient: a pull and the next push are one round trip. A task gets exactly one answer, or the worker
is lost; so a gradient is applied once or not at all, and what a lost worker was to compute goes to
another. Answers that have come by the time the server looks, and while it applies them, are applied
one after another, in the order in which they came; the parameters are sent out once after all.

Only one thread ever works here. The driver calls `advance` again and again, and so has the reins
between two calls: for a checkpoint, for workers that join or leave, to stop.
"""

import collections
import dataclasses
import time
from typing import Any, NamedTuple

import numpy as np
import optax

from optax_dcasgd.parameter_server import _bound, _calls, _history
from optax_dcasgd.parameter_server._checkpoint import Checkpoints, Snapshot
from optax_dcasgd.parameter_server._history import Event
from optax_dcasgd.parameter_server._metrics import Metrics
from optax_dcasgd.parameter_server._transport import Layout, Packed
from optax_dcasgd.parameter_server._update import Gradient, Update, Version
from optax_dcasgd.parameter_server._worker import RESULT, TASK


@dataclasses.dataclass(frozen=True)
class Options:
    """What the server has to know of a run; the arguments of `train`."""

    mode: str
    num_workers: int
    num_updates: int
    max_staleness: int | None
    on_stale: str
    checkpoint_dir: str | None
    checkpoint_every: int
    compensation_every: int | None
    max_bad_pushes: int
    name: str | None
    signature: list[str]


class Status(NamedTuple):
    """What the driver hears after each `advance`."""

    version: int
    loss: float
    staleness: float  # mean over the last updates
    events: list[Event]  # since the last status
    num_workers: int  # as last wished
    retired: list[int]  # workers that have left
    failure: str | None  # why training cannot go on


_PATIENCE = 60.0  # seconds without a gradient, after which it is said who is missing


class _Pull(NamedTuple):
    """A gradient under way."""

    worker: int
    batch: int
    version: Version


class _Push(NamedTuple):
    """A gradient that has come."""

    pull: _Pull
    loss: float
    seconds: float
    packed: Packed


class Server:
    """An actor that owns parameters and optimizer state."""

    def __init__(
        self,
        tx: optax.GradientTransformation,
        params: Any,
        layouts: tuple[Layout, Layout, Layout],  # of parameters, gradients, gradients as sent
        options: Options,
        workers: dict[int, Any],
    ):
        self._options = options
        # Up to which staleness workers wait for each other.
        self._limit = options.max_staleness if options.on_stale == "wait" else None
        self._workers = set(workers)
        self._present: set[int] = set()
        self._lost: set[int] = set()  # those that were there before
        self._num_workers = options.num_workers
        self._idle: collections.deque[int] = collections.deque()
        self._pulls: dict[int, _Pull] = {}  # by worker
        self._pushes: list[_Push] = []
        self._retired: list[int] = []
        self._to_apply: list[Gradient] = []  # counted already
        self._published: Version | None = None
        self._version, self._next_batch = 0, 0
        # Batches to be computed again, in this order: by whom their gradient came too late, if so.
        self._again: dict[int, int | None] = {}
        self._losses: collections.Counter[int] = collections.Counter()  # of workers, by batch
        self._rows = np.zeros(options.num_updates, _history.DTYPE)
        self._num_bad, self._time = 0, 0.0
        self._failure: str | None = None
        self._reported = 0
        self._events: list[Event] = []
        self._metrics = Metrics(options.name)
        self._update = Update(tx, params, layouts)
        self._checkpoints = None
        if options.checkpoint_dir is not None:
            self._checkpoints = Checkpoints(options.checkpoint_dir)
            if (version := self._checkpoints.latest()) is not None:
                self._restore(version)
        is_small = layouts[0].is_small and layouts[2].is_small
        self._calls: _calls.Calls = (
            _calls.StreamCalls(RESULT.size) if is_small else _calls.RayCalls()
        )
        for index, actor in sorted(workers.items()):
            self._calls.start(index, actor)
        self._heard = time.monotonic()
        self._started = self._heard - self._time

    # What the driver calls.

    def ready(self) -> int:
        """Returns, when the server is there, the updates done."""
        return self._version

    def attach(self, workers: dict[int, Any], num_workers: int) -> None:
        """Takes these workers on; those with an index of num_workers or more will leave."""
        self._num_workers = num_workers
        for index in workers.keys() - self._workers:
            self._workers.add(index)
            self._calls.start(index, workers[index])

    def resize(self, num_workers: int) -> None:
        """Wishes for so many workers; the driver makes new ones."""
        self._num_workers = num_workers

    def advance(self, seconds: float) -> Status:
        """Trains for so long, or until it is done."""
        end = time.monotonic() + seconds
        while self._version < self._options.num_updates and self._failure is None:
            left = end - time.monotonic()
            if left <= 0:
                break
            self._send_out()
            come = self._calls.wait(left)
            self._watch(bool(come))
            while come:  # and what has come during the update
                for index, news in come:
                    self._receive(index, news)
                self._apply()
                come = self._calls.wait(0)
        self._retire()
        return self._status()

    def save(self) -> int | None:
        """Writes a checkpoint and waits for it; returns its version, None if there is none."""
        if self._checkpoints is None:
            return None
        if (failure := self._checkpoints.settle()) is not None:
            self._report_failure(failure)
        self._write()
        self._checkpoints.wait()
        return self._version

    def result(self) -> tuple[Any, Any, Any, list[Event]]:
        """Parameters and optimizer state as host arrays, the history, and the last events."""
        rows = self._rows[: self._version]
        state = self._update.state_to_host()
        return self._update.params_to_host(), state, rows, self._events

    def close(self) -> None:
        """Has the workers finish; the last call before the end."""
        self._calls.close()

    # Pull.

    def _send_out(self) -> None:
        """Gives every idle worker that may pull a batch and the newest parameters."""
        if self._options.mode == "sync" and (
            self._pulls or self._pushes or self._workers - self._present - self._lost
        ):
            return  # until the round is over, and those that are new are there
        for _ in range(len(self._idle)):
            if self._limit is not None and not _bound.may_pull(self._under_way(), self._limit):
                return
            index = self._idle.popleft()
            if index >= self._num_workers:
                self._idle.append(index)
                continue
            self._send(index)

    def _send(self, index: int) -> None:
        if self._published is None or self._published.number != self._version:
            self._published = self._update.publish(self._version)
        message = self._published.message
        batch = self._choose_batch(index)
        self._pulls[index] = _Pull(index, batch, self._published)
        self._calls.send(index, TASK.pack(batch, 0), message)

    def _choose_batch(self, index: int) -> int:
        """The next for this worker: one that has to be computed again goes before a new one."""
        for batch, too_slow in self._again.items():
            # A slow worker would be too late with it once more, and keep it from all the others.
            if too_slow != index or len(self._present) == 1:
                del self._again[batch]
                return batch
        self._next_batch += 1
        return self._next_batch - 1

    def _under_way(self) -> list[int]:
        """How stale each gradient is that has not been applied: those here, then those pulled."""
        pulls = [*(push.pull for push in self._pushes), *self._pulls.values()]
        return [self._version - pull.version.number for pull in pulls]

    # Push.

    def _receive(self, index: int, news: _calls.News) -> None:
        match news:
            case _calls.Answer(header, packed):
                pull = self._pulls.pop(index)
                is_gradient, loss, seconds = RESULT.unpack_from(header)
                if is_gradient:
                    self._pushes.append(_Push(pull, loss, seconds, packed))
                else:
                    self._refuse(pull, bytes(packed).decode())
            case _calls.Ready():
                self._present.add(index)
                if index in self._lost:
                    self._lost.remove(index)
                    self._event("worker back", index, "restarted")
                if index not in [push.pull.worker for push in self._pushes]:
                    self._idle.append(index)
            case _calls.Lost(reason):
                self._lose(index)
                self._lost.add(index)
                self._event("worker lost", index, reason)
            case _calls.Gone(reason):
                self._lose(index)
                self._workers.remove(index)
                self._event("worker gone", index, reason)
                if not self._workers:
                    self._failure = f"No worker is left; the last one: {reason}"

    def _lose(self, index: int) -> None:
        """What it was to compute goes to another; what it has sent stays."""
        self._present.discard(index)
        if index in self._idle:
            self._idle.remove(index)
        if (pull := self._pulls.pop(index, None)) is not None:
            self._losses[pull.batch] += 1
            losses = self._losses[pull.batch]
            # All workers may have died together, each of them with this batch by and by. If more
            # die over it, it may be what kills them.
            if losses <= max(2, self._num_workers):
                self._again[pull.batch] = None
            else:
                self._refuse(pull, f"{losses} workers were lost over batch {pull.batch}")

    def _release(self, index: int) -> None:
        """Its gradient has been dealt with."""
        if index in self._present:
            self._idle.append(index)

    def _refuse(self, pull: _Pull, reason: str) -> None:
        self._num_bad += 1
        self._event("refused", pull.worker, reason)
        self._release(pull.worker)
        if self._num_bad > self._options.max_bad_pushes:
            self._failure = (
                f"{self._num_bad} gradients were refused, more than "
                f"max_bad_pushes={self._options.max_bad_pushes}; the last, of worker "
                f"{pull.worker}: {reason}"
            )

    # Update.

    def _apply(self) -> None:
        """Applies what may be applied, in the order in which it came."""
        if self._options.mode == "sync":
            if self._pushes and not self._pulls:
                self._apply_round()
            return
        while self._pushes and self._version < self._options.num_updates:
            i = self._first()
            if i is None:
                break
            push = self._pushes.pop(i)
            pull, limit = push.pull, self._options.max_staleness
            self._release(pull.worker)
            staleness = self._version - pull.version.number
            if limit is not None and staleness > limit:
                self._again[pull.batch] = pull.worker
                message = f"staleness {staleness} > max_staleness={limit} (batch {pull.batch})"
                self._event("dropped", pull.worker, message)
                continue
            gradient = Gradient(push.packed, pull.version, pull.worker, staleness)
            every, compensation = self._options.compensation_every, np.nan
            if every is not None and self._version % every == 0:
                self._flush()
                compensation = self._update.compensation(gradient)
            self._to_apply.append(gradient)
            self._count(push, staleness, compensation)
        self._flush()

    def _flush(self) -> None:
        if self._to_apply:
            self._update.apply(self._to_apply)
            self._to_apply = []

    def _first(self) -> int | None:
        """Which push is next: the first, or the first that need not wait for others."""
        if self._limit is None:
            return 0
        staleness = self._under_way()
        for i in range(len(self._pushes)):
            if _bound.may_apply(staleness, i, self._limit):
                return i
        return None

    def _apply_round(self) -> None:
        """One update with the mean of all workers' gradients."""
        pushes = sorted(self._pushes, key=lambda push: push.pull.batch)
        self._pushes = []
        for push in pushes:
            self._release(push.pull.worker)
        self._update.apply_mean([Gradient(push.packed, push.pull.version, 0, 0) for push in pushes])
        mean = _Push(
            pushes[0].pull._replace(worker=0),
            float(np.mean([push.loss for push in pushes])),
            max(push.seconds for push in pushes),
            b"",
        )
        self._count(mean, 0, np.nan)

    def _count(self, push: _Push, staleness: int, compensation: float) -> None:
        """One update more."""
        pull, now = push.pull, time.monotonic() - self._started
        self._rows[self._version] = (
            *(pull.worker, pull.version.number, staleness, pull.batch),
            *(push.loss, now, push.seconds, compensation),
        )
        self._version += 1
        if self._checkpoints is not None and self._version % self._options.checkpoint_every == 0:
            self._flush()
            self._try_to_write()

    # Checkpoints.

    def _write(self) -> None:
        assert self._checkpoints is not None
        if self._checkpoints.latest() == self._version:
            return
        # What is under way would be lost with the server.
        pulls = [*(push.pull for push in self._pushes), *self._pulls.values()]
        meta = {
            "signature": self._options.signature,
            "again": sorted({*self._again, *(pull.batch for pull in pulls)}),
            "next_batch": self._next_batch,
            "num_bad": self._num_bad,
            "time": time.monotonic() - self._started,
            "history": {name: self._rows.dtype[name].str for name in _history.History._fields},
        }
        snapshot = Snapshot(
            # Copies: the next update writes over the originals.
            [np.array(leaf) for leaf in self._update.params_to_host()],
            [np.array(leaf) for leaf in self._update.state_to_host()],
            _history.to_columns(self._rows[: self._version])._asdict(),
            meta,
        )
        self._checkpoints.save(self._version, snapshot)

    def _try_to_write(self) -> None:
        try:
            self._write()
        except Exception as error:  # a full disk must not end the run
            self._report_failure(error)

    def _report_failure(self, error: Exception) -> None:
        self._event("checkpoint failed", None, f"{type(error).__name__}: {error}")

    def _restore(self, version: int) -> None:
        assert self._checkpoints is not None
        snapshot = self._checkpoints.load(version, *self._update.like())
        self._update.restore(snapshot.params, snapshot.state)
        self._version, meta = version, snapshot.meta
        if version:
            self._rows[:version] = _history.to_rows(snapshot.history)
        self._next_batch, self._num_bad = meta["next_batch"], meta["num_bad"]
        self._again = dict.fromkeys(meta["again"])
        self._time = meta["time"]
        self._event("resumed", None, f"from the checkpoint of {version} updates")

    # Reports.

    def _event(self, kind: str, worker: int | None, message: str) -> None:
        self._events.append(Event(time.time(), kind, worker, message))
        self._metrics.event(kind)

    def _retire(self) -> None:
        for index in [i for i in self._idle if i >= self._num_workers]:
            self._idle.remove(index)
            self._workers.remove(index)
            self._present.remove(index)
            self._calls.stop(index)
            self._retired.append(index)

    def _watch(self, has_come: bool) -> None:
        """Says, now and then, who is missing while nothing happens."""
        now = time.monotonic()
        if has_come:
            self._heard = now
        elif now - self._heard > _PATIENCE:
            self._heard = now
            missing = sorted(self._workers - self._present)
            self._event(
                "waiting",
                None,
                f"nothing has come for {_PATIENCE:.0f} s. Workers that have not started: "
                f"{missing or 'none'}; that are computing: {sorted(self._pulls) or 'none'}",
            )

    def _status(self) -> Status:
        new = self._rows[self._reported : self._version]
        staleness = float(new["staleness"].mean()) if new.size else np.nan
        loss = float(new["loss"].mean()) if new.size else np.nan
        self._reported = self._version
        self._metrics.updates(new)
        events, self._events = self._events, []
        retired, self._retired = self._retired, []
        return Status(
            self._version, loss, staleness, events, self._num_workers, retired, self._failure
        )
