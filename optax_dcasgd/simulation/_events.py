"""`arrivals`: an event model of workers that makes `Arrivals`."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_dcasgd import _arguments
from optax_dcasgd.simulation._arrivals import Arrivals
from optax_dcasgd.simulation._compute_time import ComputeTime, exponential


def arrivals(
    key: jax.Array,
    num_workers: int,
    num_updates: int,
    *,
    compute_time: ComputeTime | float | None = None,
    slowdown: Any = None,
    start: Any = None,
    stop: Any = None,
    local_steps: Any = None,
) -> Arrivals:
    """Simulates M workers that pull parameters, compute a gradient, push it, and pull again.

    Only computing takes time. The k-th gradient of worker i takes
    ``slowdown[i] * compute_time(jax.random.fold_in(jax.random.fold_in(key, i), k))`` seconds
    (times ``local_steps[i]``), k = 0, 1, …, whatever the other workers do. Pushes of the same
    moment are applied in the order of the workers' indices. Where this matters, let the times be
    whole numbers: sums of others are rounded, so that equal times may differ. Each call compiles
    anew. To make many, call it inside ``jax.jit``.

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
      local_steps: How many batches a worker takes for a push, with `local_updates`: M integers of
        at least 1, or a mapping (by default 1). Or one integer, for the fastest worker; the others
        take fewer, by their ``slowdown``, so that all push equally often. None for one batch a
        push.

    Returns:
      The arrivals, with the barrier times of synchronous training with the same compute times.
      With ``local_steps`` they have ``batch``, ``num_steps`` and ``local_steps``: each batch is
      used once, behind a barrier too.

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
    several = isinstance(local_steps, Mapping | Sequence | None)
    if not several and np.ndim(local_steps) == 0:
        _arguments.check_integer("local_steps, where it is one for all,", local_steps, minimum=1)
        steps = (local_steps * slowdown.min() / slowdown).round().clip(1)
    else:
        steps = _per_worker("local_steps", local_steps, num_workers, 1.0)
    whole = steps.astype(np.int32)  # NumPy's unless traced, and so known inside jax.jit
    if isinstance(whole, np.ndarray) and not np.all((whole >= 1) & (whole == steps)):
        raise ValueError(f"local_steps must be integers of at least 1; got {local_steps}.")
    steps, slowdown = whole, slowdown * whole

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
    made = Arrivals(worker, staleness, time, barrier, int(num_workers))
    if local_steps is None:
        return made
    used = jnp.asarray(steps)[worker]
    return dataclasses.replace(
        made, batch=jnp.cumsum(used) - used, num_steps=used, local_steps=steps
    )


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
