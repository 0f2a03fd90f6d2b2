"""How the server sends tasks to its workers and hears from them: by Ray's actor calls.

Ray places, starts and restarts the workers. One call is one task, and its answer is the gradient.
A call has exactly one answer, or it fails and the worker counts as lost.
"""

import time
from typing import Any, NamedTuple

import ray

from optax_dcasgd.parameter_server import _reasons
from optax_dcasgd.parameter_server._worker import Computed, Refused, Task

_ASK_AGAIN = 0.05  # seconds, while there is no call to wait for
NOT_STARTED = (ray.exceptions.ActorUnschedulableError, ray.exceptions.RuntimeEnvSetupError)
# An actor whose start ends with one of these is not started by Ray. (Where the memory monitor kills
# one that has restarts left, Ray restarts it, and the call of its start waits for that.)
_NEVER_AGAIN = (ray.exceptions.ActorDiedError, ray.exceptions.OutOfMemoryError, *NOT_STARTED)
# What a call raises if the actor has died, cannot be reached or was never started.
ENDED = (ray.exceptions.RayActorError, *_NEVER_AGAIN)


class Ready(NamedTuple):
    """The worker has been started or restarted, and has nothing to do."""


class Lost(NamedTuple):
    """The worker has died or cannot be reached; it may come back."""

    reason: str


class Gone(NamedTuple):
    """The worker will not come back."""

    reason: str


News = Computed | Refused | Ready | Lost | Gone


class Calls:
    """The calls under way: at most one for each worker."""

    def __init__(self) -> None:
        self._actors: dict[int, Any] = {}
        self._calls: dict[ray.ObjectRef[Any], int] = {}
        self._starting: set[ray.ObjectRef[Any]] = set()  # those that wait for the worker's start

    def start(self, index: int, actor: Any) -> None:
        """Takes a worker on; `Ready` follows when it has been started."""
        self._actors[index] = actor
        # Ray queues the call until the worker has been started, or restarted.
        ref = actor.ready.options(max_task_retries=-1).remote()
        self._calls[ref] = index
        self._starting.add(ref)

    def stop(self, index: int) -> None:
        """Forgets a worker, which has nothing to do."""
        del self._actors[index]

    def send(self, index: int, task: Task, message: Any) -> None:
        """Sends an idle worker a task, and the packed parameters or a reference to them."""
        self._calls[self._actors[index].gradient.remote(*task, message)] = index

    def wait(self, seconds: float) -> list[tuple[int, News]]:
        """Returns what has come, by the order of its tasks; waits, but no longer than this."""
        if not self._calls:
            time.sleep(min(seconds, _ASK_AGAIN))
            return []
        done, rest = ray.wait(list(self._calls), timeout=seconds)
        if done and rest:
            done += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        return [self._news(ref) for ref in done]

    def _news(self, ref: ray.ObjectRef[Any]) -> tuple[int, News]:
        index = self._calls.pop(ref)
        is_start = ref in self._starting
        self._starting.discard(ref)
        try:
            answer: Computed | Refused = ray.get(ref)
        except ray.exceptions.RayTaskError as error:  # the worker is there, and has not done it
            reason = _reasons.one_line(error)
            if not is_start:
                return index, Refused(reason)
            self.stop(index)
            return index, Gone(reason)
        except ray.exceptions.RayError as error:
            reason = _reasons.one_line(error)
            if is_start and isinstance(error, _NEVER_AGAIN):
                self.stop(index)
                return index, Gone(reason)
            self.start(index, self._actors[index])
            return index, Lost(reason)
        return index, Ready() if is_start else answer
