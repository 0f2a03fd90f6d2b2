"""How many batches each worker takes at a time, where workers take unequal numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np

from optax_dcasgd import _arguments


class LocalSteps:
    """The argument ``local_steps`` of `train`: called with a worker, it returns its number."""

    def __init__(self, given: int | tuple[int, ...] | Callable[[int], Any] | None):
        self.given = given
        self._seconds: dict[int, float] = {}  # that a batch takes, by worker

    def __call__(self, worker: int) -> int | None:
        """None where there are no rounds."""
        match self.given:
            case None:
                return None
            case int(most):  # for the fastest
                if worker not in self._seconds:
                    return 1
                fastest = min(self._seconds.values())
                return max(1, round(most * fastest / self._seconds[worker]))
            case tuple(numbers):
                # One that `resize` has added is of unknown speed. With too few steps it costs
                # messages, with too many it would be stale.
                return numbers[worker] if worker < len(numbers) else min(numbers)
            case function:
                number = function(worker)
                _arguments.check_integer(f"local_steps({worker})", number, minimum=1)
                return int(number)

    def most(self, num_workers: int) -> int | None:
        """The largest number of the first workers."""
        if self.given is None or isinstance(self.given, int):
            return self.given
        return max(self(worker) or 1 for worker in range(num_workers))

    def took(self, worker: int, num_steps: int | None, seconds: float) -> None:
        """Notes how long a round took a worker; the last ones count most."""
        now = max(seconds, 1e-9) / (num_steps or 1)
        self._seconds[worker] = (self._seconds.get(worker, now) + now) / 2

    def forget(self, worker: int) -> None:
        """What was noted of a worker, which is gone or may come back on another machine."""
        self._seconds.pop(worker, None)


def check(local_steps: Any, num_workers: int) -> LocalSteps:
    """Checks the argument, a function as far as the first workers go.

    Raises:
      TypeError: If it is neither a function nor integers, or a function returns none.
      ValueError: If there is not one a worker, or one is below 1.
    """
    if local_steps is None or callable(local_steps):
        found = LocalSteps(local_steps)
        found.most(num_workers)
        return found
    numbers = np.asarray(local_steps)
    wanted = (
        f"local_steps must be one integer, for the fastest worker, or {num_workers}, one a worker, "
        f"or a function from a worker to its number; got {local_steps!r}."
    )
    if numbers.dtype.kind not in "iu":
        raise TypeError(wanted)
    if numbers.shape not in [(), (num_workers,)]:
        raise ValueError(wanted)
    _arguments.check_integer("The least of local_steps", numbers.min(), minimum=1)
    return LocalSteps(tuple(numbers.tolist()) if numbers.shape else int(numbers))
