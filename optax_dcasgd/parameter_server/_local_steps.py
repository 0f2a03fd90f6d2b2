"""How many batches each worker takes at a time, where workers take unequal numbers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from optax_dcasgd import _arguments


@dataclasses.dataclass(frozen=True)
class LocalSteps:
    """The argument ``local_steps`` of `train`: called with a worker, it returns its number."""

    given: tuple[int, ...] | Callable[[int], Any]

    def __call__(self, worker: int) -> int:
        if not callable(self.given):
            # One that `resize` has added is of unknown speed. With too few steps it costs messages,
            # with too many it would be stale.
            return self.given[worker] if worker < len(self.given) else min(self.given)
        number = self.given(worker)
        _arguments.check_integer(f"local_steps({worker})", number, minimum=1)
        return int(number)


def check(local_steps: Any, num_workers: int) -> LocalSteps | None:
    """Checks the argument, a function as far as the first workers go.

    Raises:
      TypeError: If it is neither a function nor integers, or a function returns none.
      ValueError: If there is not one a worker, or one is below 1.
    """
    if local_steps is None:
        return None
    if callable(local_steps):
        found = LocalSteps(local_steps)
    else:
        numbers = np.asarray(local_steps)
        if numbers.shape != (num_workers,) or numbers.dtype.kind not in "iu":
            raise (TypeError if numbers.dtype.kind not in "iu" else ValueError)(
                f"local_steps must be {num_workers} integers, one a worker, or a function from a "
                f"worker to its number; got {local_steps!r}."
            )
        _arguments.check_integer("The least of local_steps", numbers.min(), minimum=1)
        found = LocalSteps(tuple(numbers.tolist()))
    for worker in range(num_workers):
        found(worker)
    return found
