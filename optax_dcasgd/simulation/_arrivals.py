"""`Arrivals`: the order in which gradients reach the server, and its file."""

import dataclasses
import functools
import os
import zipfile
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from optax_dcasgd import _arguments

_FORMAT, _VERSION = "optax_dcasgd.Arrivals", 1
_ARRAYS = ("worker", "staleness", "time", "barrier", "batch", "num_steps", "local_steps")
_LARGEST = np.iinfo(np.int32).max


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=_ARRAYS, meta_fields=["num_workers"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Arrivals:
    """The order in which the gradients of M workers reach the server.

    Version v of the parameters is what they are after v updates. Push t, the t-th gradient that
    arrives, was computed at version ``t - staleness[t]`` and makes version ``t + 1``. Nothing else
    decides what is trained. An `Arrivals` may come from the event model `arrivals` or from a real
    run that recorded it, or you write it by hand. It is a pytree, so it may be an argument or a
    result of functions under ``jax.jit`` and ``jax.vmap``.

    Attributes:
      worker: shape (num_updates,), int: who pushes, in [0, M).
      staleness: shape (num_updates,), int: the number of updates between the pull of the parameters
        and the push of their gradient.
      time: shape (num_updates,), float: when the push arrives, in (virtual) seconds.
      barrier: shape (num_updates // M, M), float, or None: for ``mode="sync"``, when the gradient
        of worker i for round r is ready, in seconds; inf where the worker takes no part. None for
        not known.
      batch: shape (num_updates,), int, or None: the batch of each gradient. None for batch t in
        push t. (In a real run the batch of a slow worker arrives late.)
      num_workers: M, a Python integer, or None for the largest ``worker`` plus one.
      num_steps: shape (num_updates,), int, or None: for workers that take unequal numbers of
        `local_updates`, how many batches each push used, from ``batch`` on, which is needed then.
      local_steps: shape (M,), int, or None: with ``num_steps``, how many batches each worker takes
        behind the barrier of ``mode="sync"``. None for not known.

    Examples:
      Two workers take turns, and every gradient but the first is one update old:

      >>> import numpy as np
      >>> from optax_dcasgd import simulation
      >>> t = np.arange(6)
      >>> by_hand = simulation.Arrivals(t % 2, np.minimum(t, 1), 0.5 * (1 + t))
      >>> print(by_hand.worker, by_hand.staleness, by_hand.time)
      [0 1 0 1 0 1] [0 1 1 1 1 1] [0.5 1.  1.5 2.  2.5 3. ]
    """

    worker: Any
    staleness: Any
    time: Any
    barrier: Any = None
    num_workers: int | None = None
    batch: Any = None
    num_steps: Any = None
    local_steps: Any = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file that `load` reads back to the bit, in NumPy's ``.npz`` format.

        Its entries: ``format`` ("optax_dcasgd.Arrivals"), ``version`` (1), ``num_workers``, and the
        arrays ``worker``, ``staleness``, ``time`` and, where known, ``barrier``, ``batch``,
        ``num_steps`` and ``local_steps``.

        Args:
          path: The file, written as named; an existing one is replaced.

        Raises:
          ValueError: If the arrays are no legal arrivals.
        """
        entries: dict[str, Any] = {
            "format": _FORMAT,
            "version": _VERSION,
            "num_workers": check(self),
        }
        for name in _ARRAYS:
            if getattr(self, name) is not None:
                entries[name] = np.asarray(getattr(self, name))
        with open(path, "wb") as file:
            np.savez(file, **entries)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a file that `save` wrote; the arrays are NumPy's.

        Args:
          path: The file.

        Returns:
          The arrivals that were saved.

        Raises:
          OSError: If there is none (FileNotFoundError), or it cannot be read.
          ValueError: If it is no file of arrivals, is of a newer version, or is damaged.

        Examples:
          >>> import jax, tempfile, pathlib
          >>> from optax_dcasgd import simulation
          >>> path = pathlib.Path(tempfile.mkdtemp(), "arrivals.npz")
          >>> simulation.arrivals(jax.random.key(0), num_workers=4, num_updates=100).save(path)
          >>> simulation.Arrivals.load(path).num_workers
          4
        """
        try:
            with open(path, "rb") as file:
                entries = dict(np.load(file, allow_pickle=False))
        except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no file of arrivals: it is no .npz file.") from error
        if str(entries.get("format")) != _FORMAT:
            raise ValueError(f"{path} is no file of arrivals: its entry 'format' is not {_FORMAT}.")
        missing = {"version", "num_workers", *_ARRAYS[:3]} - entries.keys()
        if missing:
            raise ValueError(f"{path} is a damaged file of arrivals: {min(missing)} is missing.")
        if entries["version"] != _VERSION:
            raise ValueError(
                f"{path} is a file of arrivals of version {entries['version']}; this release "
                f"reads version {_VERSION}."
            )
        arrays = {name: entries.get(name) for name in _ARRAYS}
        try:
            arrivals = cls(**arrays, num_workers=int(entries["num_workers"]))
            check(arrivals)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is a damaged file of arrivals: {error}") from error
        return arrivals


def check(arrivals: Any) -> int:
    """Checks what is not traced, and returns the number of workers.

    Raises:
      TypeError: If it is no `Arrivals`, or an array has the wrong dtype.
      ValueError: If an array has the wrong shape or an illegal value, or ``worker`` is traced and
        the number of workers is not given.
    """
    if not isinstance(arrivals, Arrivals):
        raise TypeError(f"arrivals must be a simulation.Arrivals; got {arrivals!r}.")
    for name in _ARRAYS:
        array = getattr(arrivals, name)
        if array is not None and not hasattr(array, "shape"):
            raise TypeError(f"arrivals.{name} must be an array; got {array!r}.")
    shape = jnp.shape(arrivals.worker)
    if len(shape) != 1 or shape[0] == 0:
        raise ValueError(f"arrivals.worker must have shape (num_updates,); got {shape}.")
    columns = [("staleness", jnp.integer), ("worker", jnp.integer), ("time", jnp.floating)]
    columns += [(n, jnp.integer) for n in _ARRAYS[4:6] if getattr(arrivals, n) is not None]
    for name, kind in columns:
        array = getattr(arrivals, name)
        if jnp.shape(array) != shape:
            raise ValueError(
                f"arrivals.{name} has shape {jnp.shape(array)}, but arrivals.worker has {shape}."
            )
        if not jnp.issubdtype(jnp.result_type(array), kind):
            raise TypeError(
                f"arrivals.{name} must be of {kind.__name__} dtype; got {jnp.result_type(array)}."
            )
    num_workers = arrivals.num_workers
    if num_workers is not None:
        _arguments.check_integer("arrivals.num_workers", num_workers, minimum=1)
    elif isinstance(arrivals.worker, jax.core.Tracer):
        raise ValueError("arrivals.num_workers is required where arrivals.worker is traced.")
    else:
        num_workers = int(np.max(arrivals.worker)) + 1
    _check_range("worker", arrivals.worker, 0, num_workers - 1)
    _check_range("staleness", arrivals.staleness, 0, np.arange(shape[0]))
    _check_range("batch", arrivals.batch, 0)
    if arrivals.num_steps is not None and arrivals.batch is None:
        raise ValueError(
            "arrivals.num_steps needs arrivals.batch, the number of the first batch of each "
            "push; each batch once is batch=np.cumsum(num_steps) - num_steps."
        )
    _check_range("num_steps", arrivals.num_steps, 1)
    if arrivals.local_steps is not None:
        _check_local_steps(arrivals, num_workers)
    rounds = (shape[0] // num_workers, num_workers)
    if arrivals.barrier is not None and jnp.shape(arrivals.barrier) != rounds:
        raise ValueError(
            f"arrivals.barrier must have shape {rounds}; got {jnp.shape(arrivals.barrier)}."
        )
    return int(num_workers)


def _check_local_steps(arrivals: Arrivals, num_workers: int) -> None:
    """They are one integer a worker, none below one, and come with what the pushes used."""
    shape, dtype = jnp.shape(arrivals.local_steps), jnp.result_type(arrivals.local_steps)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"arrivals.local_steps must be of integer dtype; got {dtype}.")
    if shape != (num_workers,):
        raise ValueError(
            f"arrivals.local_steps must have shape {(num_workers,)}, one entry a worker; got "
            f"{shape}. (arrivals.num_workers says how many there are.)"
        )
    if arrivals.num_steps is None:
        raise ValueError(
            "arrivals.local_steps needs arrivals.num_steps, what each push used: "
            "num_steps=local_steps[worker], and batch=np.cumsum(num_steps) - num_steps."
        )
    _check_range("local_steps", arrivals.local_steps, 1)


def behind_barrier(arrivals: Arrivals, num_workers: int) -> Arrivals:
    """The same, with what worker i of round r uses as entry r·M + i of ``batch`` and ``num_steps``.

    Raises:
      ValueError: If workers take unequal steps, and it is not known how many each takes.
    """
    if arrivals.num_steps is None:
        return arrivals
    if arrivals.local_steps is None:
        raise ValueError(
            'arrivals.num_steps is of asynchronous pushes; mode="sync" needs arrivals.local_steps, '
            "how many batches each worker takes in a round."
        )
    num_rounds = jnp.shape(arrivals.worker)[0] // num_workers
    of_worker = arrivals.local_steps
    traced = isinstance(of_worker, jax.core.Tracer)
    steps = (jnp if traced else np).tile(of_worker, num_rounds)  # checked where it is known
    used = jnp.asarray(steps, jnp.int32)
    if arrivals.barrier is not None:  # who takes no part uses up no batches
        used = jnp.where(jnp.ravel(arrivals.barrier) < jnp.inf, used, 0)
    first = jnp.min(jnp.asarray(arrivals.batch))
    return dataclasses.replace(arrivals, batch=first + jnp.cumsum(used) - used, num_steps=steps)


def _check_range(name: str, array: Any, low: int, high: Any = _LARGEST) -> None:
    """Checks the numbers, unless there are none or they are traced."""
    if array is None or isinstance(array, jax.core.Tracer):
        return
    array = np.asarray(array)
    wrong = np.flatnonzero((array < low) | (array > high))
    if wrong.size:
        t = int(wrong[0])
        limit = int(np.broadcast_to(high, array.shape)[t])
        raise ValueError(
            f"arrivals.{name}[{t}] must be at least {low} and at most {limit}; got {array[t]}."
        )
