"""What is recorded of a run, and what it returns."""

from typing import Any, NamedTuple

import numpy as np

from optax_dcasgd.simulation import Arrivals


class History(NamedTuple):
    """What happened in a `train` of U updates: NumPy arrays of shape (U,).

    With ``mode="sync"`` an update has several gradients; then ``worker`` and ``staleness`` are 0,
    ``batch`` is the first one's, ``loss`` the mean, ``seconds`` the longest and ``num_steps`` the
    sum.
    """

    worker: np.ndarray  # dtype=int32: whose gradient it was
    version: np.ndarray  # dtype=int32: the updates before the parameters it was computed at
    staleness: np.ndarray  # dtype=int32: the updates between those parameters and this update
    batch: np.ndarray  # dtype=int32: the number of its batch, or of its first
    loss: np.ndarray  # dtype=float64: the loss at those parameters
    time: np.ndarray  # dtype=float64: when it was applied, in seconds of training
    seconds: np.ndarray  # dtype=float64: how long the gradient, or the round, took the worker
    compensation: np.ndarray  # dtype=float64: ‖compensation‖/‖gradient‖; NaN where not measured
    num_steps: np.ndarray  # dtype=int32: how many batches it used; 1 without ``local_steps``


DTYPE = np.dtype(
    [(name, np.int32) for name in History._fields[:4]]
    + [(name, np.float64) for name in History._fields[4:8]]
    + [(name, np.int32) for name in History._fields[8:]]
)


def to_columns(rows: np.ndarray) -> History:
    """One array a column, of an array of `DTYPE`."""
    return History(*(np.ascontiguousarray(rows[name]) for name in History._fields))


def to_rows(columns: dict[str, np.ndarray]) -> np.ndarray:
    """The reverse."""
    rows = np.zeros(columns["worker"].shape, DTYPE)
    for name in History._fields:
        rows[name] = columns[name]
    return rows


class Event(NamedTuple):
    """Something that went wrong, or right again.

    The kinds are ``"worker lost"``, ``"worker back"`` and ``"worker gone"`` (for good);
    ``"refused"`` (a gradient) and ``"dropped"`` (one that was too stale); ``"server lost"`` and
    ``"resumed"`` (from a checkpoint) and ``"changed"`` (arguments that it was not written with);
    ``"checkpoint failed"`` (to be written) and ``"checkpoint damaged"`` (it cannot be read);
    ``"waiting"`` (for a minute, for whom and why); ``"many workers"`` (for the cluster).
    """

    time: float  # Unix time, in seconds
    kind: str  # as above
    worker: int | None  # whom it concerns
    message: str


class Straggler(NamedTuple):
    """A worker that takes long."""

    worker: int
    seconds: float  # the median time it takes for a gradient; with ``local_steps``, for a batch
    ratio: float  # to the median over the other workers of the same


class Result(NamedTuple):
    """What `train` returns."""

    params: Any
    state: Any  # of the optimizer
    history: History
    arrivals: Arrivals | None  # for ``simulation.run``; None for mode="sync"
    events: tuple[Event, ...]  # in this call of `train`; also logged, but for most of the dropped
    workers: tuple[int, ...]  # those that took part in this call: had a gradient applied

    def stragglers(self, ratio: float = 2.0) -> list[Straggler]:
        """The workers whose median time for a gradient is ``ratio`` times the others' or more.

        With ``local_steps`` it is the time for a batch, since rounds are of unequal length.

        Args:
          ratio: Of a worker's median to the median of the other workers' medians.

        Returns:
          Those workers in the order of their indices; none if there is one worker alone.
        """
        worker, seconds = self.history.worker, self.history.seconds / self.history.num_steps
        medians = {int(i): float(np.median(seconds[worker == i])) for i in np.unique(worker)}
        found = []
        for i, median in medians.items():
            others = [m for j, m in medians.items() if j != i]
            if others and median >= ratio * (usual := float(np.median(others))):
                found.append(Straggler(i, median, median / usual if usual else np.inf))
        return found


def to_arrivals(history: History, num_workers: int, *, in_rounds: bool) -> Arrivals:
    """The order of a run, in which ``simulation.run`` trains to the same parameters.

    ``in_rounds`` if each push used the batches of a round.
    """
    return Arrivals(
        history.worker,
        history.staleness,
        history.time,
        num_workers=max(num_workers, int(history.worker.max(initial=0)) + 1),
        batch=history.batch,
        num_steps=history.num_steps if in_rounds else None,
    )
