"""The book of batches: which are under way, have come, or have to be computed again."""

import collections
from typing import Any, NamedTuple

import numpy as np

from optax_dcasgd.parameter_server import _bound
from optax_dcasgd.parameter_server._transport import Packed
from optax_dcasgd.parameter_server._update import Version
from optax_dcasgd.parameter_server._worker import Task

_MIN_LOSSES = 2  # of workers over one batch, that need not be the batch's fault


class Pull(NamedTuple):
    """A gradient under way."""

    worker: int
    task: Task
    version: Version


class Push(NamedTuple):
    """A gradient that has come."""

    pull: Pull
    loss: float
    seconds: float
    packed: Packed


def mean_of(pushes: list[Push]) -> Push:
    """The update that they are together, as it is recorded: by the first one's batch."""
    task = pushes[0].pull.task
    if task.num_steps is not None:
        task = Task(task.batch, sum(push.pull.task.num_steps or 1 for push in pushes))
    return Push(
        pushes[0].pull._replace(worker=0, task=task),
        float(np.mean([push.loss for push in pushes])),
        max(push.seconds for push in pushes),
        b"",
    )


def _parts(task: Task, longest: int | None) -> list[Task]:
    """The task, as rounds that are no longer than the longest."""
    if longest is None or task.num_steps is None:
        return [task]
    return [
        Task(task.batch + k, min(longest, task.num_steps - k))
        for k in range(0, task.num_steps, longest)
    ]


class Book:
    """Sees to it that every batch is applied once, or refused.

    A round of several batches stays one. Who takes it in the place of a lost worker takes as many
    steps as that was to take.
    """

    def __init__(self, limit: int | None, longest: int | None = None):
        """The limit is the staleness up to which workers wait for each other; None for any.

        The longest round is that of a new one; those from a checkpoint are cut up to fit.
        """
        self._limit, self._longest = limit, longest
        self._next_batch = 0
        # In the order in which they are sent out. The value is the worker whose gradient came too
        # late, if it was dropped for that.
        self._again: dict[Task, int | None] = {}
        self._losses: collections.Counter[Task] = collections.Counter()  # of workers, by task
        self._pulls: dict[int, Pull] = {}  # by worker
        self._pushes: list[Push] = []
        self.num_refused = 0

    def to_save(self) -> dict[str, Any]:
        """What a checkpoint keeps. What is under way would be lost with the server."""
        again = {*self._again, *(pull.task for pull in self._under_way())}
        return {
            "again": sorted(again, key=lambda task: task.batch),
            "next_batch": self._next_batch,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Goes on from what `to_save` returned; what was refused before counts no more."""
        self._again = dict.fromkeys(
            part for task in saved["again"] for part in _parts(Task(*task), self._longest)
        )
        self._next_batch = saved["next_batch"]

    # Pull.

    def may_pull(self, version: int) -> bool:
        """Whether another gradient may be under way without exceeding the bound."""
        return self._limit is None or _bound.may_pull(self._staleness(version), self._limit)

    def pull(
        self, worker: int, version: Version, *, is_alone: bool, num_steps: int | None = None
    ) -> Task:
        """Chooses the batch for an idle worker, which may be the only one that is there.

        With ``num_steps`` it is a round of so many batches, if it is a new one.
        """
        task = self._choose(worker, is_alone, num_steps)
        self._pulls[worker] = Pull(worker, task, version)
        return task

    def _choose(self, worker: int, is_alone: bool, num_steps: int | None) -> Task:
        """One that has to be computed again goes before a new one."""
        for task, too_slow in self._again.items():
            # A slow worker would be too late once more, and keep the batch from all the others.
            if too_slow != worker or is_alone:
                del self._again[task]
                return task
        task = Task(self._next_batch, num_steps)
        self._next_batch += num_steps or 1
        return task

    def answered(self, worker: int) -> Pull:
        """What the worker was to compute, which it has answered."""
        return self._pulls.pop(worker)

    def lost(self, worker: int, num_workers: int) -> tuple[Pull, str] | None:
        """Gives what a lost worker was to compute to another; what it has sent stays.

        Returns:
          A gradient to refuse and why, if so many workers were lost over the batch that the batch
          may be the cause; otherwise None.
        """
        if (pull := self._pulls.pop(worker, None)) is None:
            return None
        self._losses[pull.task] += 1
        losses = self._losses[pull.task]
        # A fault of the machines may take all workers, and each may hold this batch when it dies.
        if losses <= max(_MIN_LOSSES, num_workers):
            self._again[pull.task] = None
            return None
        return pull, f"{losses} workers were lost over {pull.task}"

    # Push.

    def push(self, push: Push) -> None:
        """Notes a gradient that has come."""
        self._pushes.append(push)

    def has_pushed(self, worker: int) -> bool:
        """Whether a gradient of the worker waits to be applied."""
        return any(push.pull.worker == worker for push in self._pushes)

    def next_push(self, version: int) -> Push | None:
        """The first gradient that may be applied now; None if all have to wait for others."""
        staleness = [] if self._limit is None else self._staleness(version)
        for i in range(len(self._pushes)):
            if self._limit is None or _bound.may_apply(staleness, i, self._limit):
                return self._pushes.pop(i)
        return None

    def drop(self, pull: Pull) -> None:
        """Gives the batch of a gradient that came too late to another worker, if there is one."""
        self._again[pull.task] = pull.worker

    # Rounds of mode="sync".

    def is_empty(self) -> bool:
        """Whether no gradient is under way or waits."""
        return not self._pulls and not self._pushes

    def whole_round(self) -> list[Push]:
        """The gradients of a round in the order of their batches; none before all have come."""
        if self._pulls:
            return []
        pushes, self._pushes = self._pushes, []
        return sorted(pushes, key=lambda push: push.pull.task.batch)

    def computing(self) -> list[int]:
        """The workers that owe a gradient."""
        return sorted(self._pulls)

    def _under_way(self) -> list[Pull]:
        """Each gradient that has not been applied: those that have come, then those pulled."""
        return [*(push.pull for push in self._pushes), *self._pulls.values()]

    def _staleness(self, version: int) -> list[int]:
        return [version - pull.version.number for pull in self._under_way()]
