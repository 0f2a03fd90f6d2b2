"""`Arrivals`: the order in which gradients reach the server; and an event model that makes one."""

import dataclasses
import functools
import os
import zipfile
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_dcasgd import _arguments
from optax_dcasgd.simulation._compute_time import ComputeTime, exponential

_FORMAT, _VERSION = "optax_dcasgd.Arrivals", 1
_ARRAYS = ("worker", "staleness", "time", "barrier", "batch")


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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file that `load` reads back to the bit, in NumPy's ``.npz`` format.

        Its entries: ``format`` ("optax_dcasgd.Arrivals"), ``version`` (1), ``num_workers``, and the
        arrays ``worker``, ``staleness``, ``time`` and, where known, ``barrier`` and ``batch``.

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
    if arrivals.batch is not None:
        columns.append(("batch", jnp.integer))
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
    if not isinstance(arrivals.worker, jax.core.Tracer):
        worker = np.asarray(arrivals.worker)
        num_workers = int(worker.max()) + 1 if num_workers is None else num_workers
        _check_range("worker", worker, 0, num_workers - 1)
    if num_workers is None:
        raise ValueError("arrivals.num_workers is required where arrivals.worker is traced.")
    if not isinstance(arrivals.staleness, jax.core.Tracer):
        _check_range("staleness", np.asarray(arrivals.staleness), 0, np.arange(shape[0]))
    if arrivals.batch is not None and not isinstance(arrivals.batch, jax.core.Tracer):
        _check_range("batch", np.asarray(arrivals.batch), 0, np.iinfo(np.int32).max)
    rounds = (shape[0] // num_workers, num_workers)
    if arrivals.barrier is not None and jnp.shape(arrivals.barrier) != rounds:
        raise ValueError(
            f"arrivals.barrier must have shape {rounds}; got {jnp.shape(arrivals.barrier)}."
        )
    return int(num_workers)


def _check_range(name: str, array: Any, low: int, high: Any) -> None:
    wrong = np.flatnonzero((array < low) | (array > high))
    if wrong.size:
        t = int(wrong[0])
        limit = int(np.broadcast_to(high, array.shape)[t])
        raise ValueError(
            f"arrivals.{name}[{t}] must be at least {low} and at most {limit}; got {array[t]}."
        )


def arrivals(
    key: jax.Array,
    num_workers: int,
    num_updates: int,
    *,
    compute_time: ComputeTime | float | None = None,
    slowdown: Any = None,
    start: Any = None,
    stop: Any = None,
) -> Arrivals:
    """Simulates M workers that pull parameters, compute a gradient, push it, and pull again.

    Only computing takes time. The k-th gradient of worker i takes
    ``slowdown[i] * compute_time(jax.random.fold_in(jax.random.fold_in(key, i), k))`` seconds,
    k = 0, 1, …, whatever the other workers do. Pushes of the same moment are applied in the order
    of the workers' indices. Where this matters, let the times be whole numbers: sums of others are
    rounded, so that equal times may differ. Each call compiles anew. To make many, call it inside
    ``jax.jit``.

    Args:
      key: A JAX random key.
      num_workers: M, the number of workers.
      num_updates: How many pushes to simulate.
      compute_time: `deterministic`, `exponential` (the default, with a mean of one second) or
        `lognormal`; or any function of a random key that returns seconds (at least zero). A number
        stands for ``deterministic(number)``.
      slowdown: The factor on a worker's compute times: M numbers above zero, or a mapping from some
        workers' indices to theirs. By default 1.
      start: When a worker joins and pulls the parameters, in seconds: M numbers, or a mapping. By
        default 0.
      stop: When a worker stops, in seconds. The gradient that it computes then is lost. M numbers,
        or a mapping. By default inf. At least one worker must be present from 0 to inf.

    Returns:
      The arrivals, with the barrier times of synchronous training with the same compute times.

    Raises:
      TypeError: If an argument has no legal type.
      ValueError: If an argument is out of range, or names a worker there is not; if
        ``compute_time`` returns no scalar, or (outside of ``jax.jit`` and ``jax.vmap``) times
        below zero or no numbers.

    Examples:
      Worker 2 takes three times as long, and worker 1 stops after 3.5 seconds:

      >>> import jax
      >>> from optax_dcasgd import simulation
      >>> arrivals = simulation.arrivals(
      ...   jax.random.key(0), 3, 9, compute_time=1.0, slowdown={2: 3.0}, stop={1: 3.5})
      >>> print(arrivals.worker)
      [0 1 0 1 0 1 2 0 0]
      >>> print(arrivals.staleness)
      [0 1 1 1 1 1 6 2 0]
    """
    _arguments.check_key("key", key)
    _arguments.check_integer("num_workers", num_workers, minimum=1)
    _arguments.check_integer("num_updates", num_updates, minimum=1)
    if compute_time is None:
        compute_time = exponential()
    elif not callable(compute_time):
        _arguments.check_scalar("compute_time", compute_time, above=0.0, schedule=False)
    else:
        shape = jnp.shape(jax.eval_shape(compute_time, key))
        if shape != ():
            raise ValueError(f"compute_time must return a scalar; it returned shape {shape}.")
    slowdown = _per_worker("slowdown", slowdown, num_workers, 1.0)
    start = _per_worker("start", start, num_workers, 0.0)
    stop = _per_worker("stop", stop, num_workers, np.inf)
    _check_presence(slowdown, start, stop)

    def simulate(key: Any, slowdown: Any, start: Any, stop: Any) -> Any:
        def duration(i: Any, k: Any) -> Any:
            drawn = compute_time
            if callable(compute_time):
                drawn = compute_time(jax.random.fold_in(jax.random.fold_in(key, i), k))
            return jnp.asarray(drawn, float) * slowdown[i]

        num_rounds = num_updates // num_workers
        rounds, workers = jnp.arange(max(num_rounds, 1)), jnp.arange(num_workers)
        durations = jax.vmap(jax.vmap(duration, (0, None)), (None, 0))(workers, rounds)

        first = start + durations[0]
        events = _Workers(
            remaining=jnp.where(first > stop, jnp.inf, first),
            until_start=start,
            until_stop=stop,
            num_pushes=jnp.zeros(num_workers, jnp.int32),
            pulled=jnp.zeros(num_workers, jnp.int32),
        )
        push = functools.partial(_push, duration)
        _, (worker, staleness, elapsed) = lax.scan(push, events, jnp.arange(num_updates))

        def synchronize(begin: Any, durations: Any) -> Any:
            ready = begin + durations
            ready = jnp.where((start <= begin) & (ready <= stop), ready, jnp.inf)
            return jnp.max(ready, where=ready < jnp.inf, initial=0.0), ready

        _, barrier = lax.scan(synchronize, jnp.zeros((), float), durations[:num_rounds])
        # cumsum adds pairwise: a running float32 sum would lose small steps in a long run.
        time = jnp.cumsum(elapsed)
        is_legal = jnp.all((elapsed >= 0) & (elapsed < jnp.inf)) & jnp.all(durations >= 0)
        return is_legal, worker, staleness, time, barrier

    is_legal, worker, staleness, time, barrier = jax.jit(simulate)(key, slowdown, start, stop)
    if not isinstance(is_legal, jax.core.Tracer) and not is_legal:
        raise ValueError("compute_time must return finite numbers, none below zero.")
    return Arrivals(worker, staleness, time, barrier, int(num_workers))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Workers:
    """What each worker is doing: arrays of shape (M,), times relative to now."""

    remaining: Any  # seconds until it pushes; inf for never
    until_start: Any
    until_stop: Any
    num_pushes: Any
    pulled: Any  # the version of the parameters that it computes at


def _push(duration: Any, events: _Workers, t: Any) -> tuple[_Workers, Any]:
    """The next event. Times stay relative, so that rounding errors do not grow with the run."""
    worker = jnp.argmin(events.remaining).astype(jnp.int32)
    elapsed = events.remaining[worker]
    staleness = t.astype(jnp.int32) - events.pulled[worker]
    until_start, until_stop = events.until_start - elapsed, events.until_stop - elapsed
    is_worker = jnp.arange(events.remaining.size) == worker
    num_pushes = events.num_pushes + is_worker
    next_push = duration(worker, num_pushes[worker])
    next_push = jnp.where(next_push > until_stop, jnp.inf, next_push)
    # A worker that joins now or later pulls the version of this push, or a newer one.
    pulls = is_worker | (until_start >= 0)
    return _Workers(
        remaining=jnp.where(is_worker, next_push, events.remaining - elapsed),
        until_start=until_start,
        until_stop=until_stop,
        num_pushes=num_pushes,
        pulled=jnp.where(pulls, t.astype(jnp.int32) + 1, events.pulled),
    ), (worker, staleness, elapsed)


def _per_worker(name: str, value: Any, num_workers: int, default: float) -> Any:
    """An array of one number a worker; NumPy's unless one is traced."""
    if value is None:
        value = {}
    if isinstance(value, Mapping):
        numbers = [default] * num_workers
        for worker, number in value.items():
            _arguments.check_integer(f"A worker in {name}", worker, minimum=0)
            if worker >= num_workers:
                raise ValueError(f"{name} names worker {worker}, but num_workers={num_workers}.")
            numbers[worker] = number
        value = numbers
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(value))
    value = jnp.asarray(value) if traced else np.asarray(value)
    if value.shape != (num_workers,) or value.dtype.kind not in "fiu":
        raise ValueError(
            f"{name} must be {num_workers} numbers, one a worker, or a mapping from workers to "
            f"numbers; got shape {value.shape}, dtype {value.dtype}."
        )
    return value.astype(float)


def _check_presence(slowdown: Any, start: Any, stop: Any) -> None:
    """Checks those that are not traced."""
    if isinstance(slowdown, np.ndarray) and not np.all((slowdown > 0) & (slowdown < np.inf)):
        raise ValueError(f"slowdown must be finite and above 0; got {slowdown}.")
    if isinstance(start, np.ndarray) and not np.all((start >= 0) & (start < np.inf)):
        raise ValueError(f"start must be finite and at least 0; got {start}.")
    if isinstance(stop, np.ndarray) and np.any(np.isnan(stop)):
        raise ValueError(f"stop must be no NaN; got {stop}.")
    known = isinstance(start, np.ndarray) and isinstance(stop, np.ndarray)
    if known and not np.any((start == 0) & (stop == np.inf)):
        raise ValueError(
            "start and stop leave no worker that is present from 0 to inf, so the run may stop "
            "for good: let at least one worker stay."
        )
