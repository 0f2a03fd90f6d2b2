"""The record of a run: its history, its events, and what Ray's metrics show of both."""

import time
from typing import NamedTuple

import numpy as np

from optax_dcasgd.parameter_server import _history
from optax_dcasgd.parameter_server._book import Push
from optax_dcasgd.parameter_server._history import Event
from optax_dcasgd.parameter_server._metrics import Metrics


class Report(NamedTuple):
    """What is new since the last report."""

    loss: float  # mean over the new updates
    staleness: float  # likewise
    events: list[Event]


class Record:
    """What has happened so far."""

    def __init__(self, num_updates: int, name: str | None):
        self._rows = np.zeros(num_updates, _history.DTYPE)
        self.version = 0  # the number of updates
        self._reported = 0
        self._events: list[Event] = []
        self._metrics = Metrics(name)
        self._started = time.monotonic()

    @property
    def rows(self) -> np.ndarray:
        """The history, an entry of `_history.DTYPE` an update."""
        return self._rows[: self.version]

    def is_done(self) -> bool:
        """Whether that were all updates."""
        return self.version >= len(self._rows)

    def seconds(self) -> float:
        """How long training has taken, with the time before a checkpoint."""
        return time.monotonic() - self._started

    def restore(self, rows: np.ndarray, seconds: float) -> None:
        """Goes on from a checkpoint."""
        self.version = len(rows)
        self.rows[:] = rows
        self._started = time.monotonic() - seconds

    def update(self, push: Push, staleness: int, compensation: float) -> None:
        """Adds an update."""
        pull = push.pull
        self._rows[self.version] = (
            *(pull.worker, pull.version.number, staleness, pull.task.batch),
            *(push.loss, self.seconds(), push.seconds, compensation, pull.task.num_steps or 1),
        )
        self.version += 1

    def event(self, kind: str, worker: int | None, message: str) -> None:
        """Adds an `Event` of now."""
        self._events.append(Event(time.time(), kind, worker, message))
        self._metrics.event(kind)

    def take_events(self) -> list[Event]:
        """The events since they were last taken."""
        events, self._events = self._events, []
        return events

    def report(self) -> Report:
        """Tells Ray's metrics and the caller what is new."""
        new = self.rows[self._reported :]
        self._reported = self.version
        self._metrics.updates(new)
        loss, staleness = (
            float(new[name].mean()) if new.size else np.nan for name in ("loss", "staleness")
        )
        return Report(loss, staleness, self.take_events())
