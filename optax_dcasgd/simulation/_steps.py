"""What is known of every update before training: whose it is, how old, and where to find w_s.

Version v is the parameters after v updates. Push t reads version ``t - staleness[t]`` and then
makes version t + 1. A version stays in its slot until its last reader has pushed. Where every
worker pulls after its own push, this takes at most one slot a worker, and fewer while several
workers hold the same version. A worker that joins, or that pulls before it pushes, is no special
case.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_dcasgd.simulation._arrivals import Arrivals


class Step(NamedTuple):
    """What is known of one update before training; over all updates, with a leading axis."""

    t: jax.Array
    worker: jax.Array
    staleness: jax.Array
    read: Any = None  # slots, as in `Plan`
    write: Any = None
    takes_part: Any = None  # shape=(M,), bool: of which workers a round is the mean


def steps(
    arrivals: Arrivals, mode: str, num_workers: int, num_slots: int
) -> tuple[Step, jax.Array, Any]:
    """All steps, when each is done, and whether the slots suffice."""
    worker, staleness = (jnp.asarray(x, jnp.int32) for x in (arrivals.worker, arrivals.staleness))
    arrival = jnp.asarray(arrivals.time, float)
    t = jnp.arange(worker.shape[0], dtype=jnp.int32)
    if mode == "async":
        plan = plan_slots(staleness, num_slots)
        return Step(t, worker, staleness, plan.read, plan.write), arrival, plan.fits
    if mode == "sequential":
        # A push was computed since its version was made, or since the start.
        pulled = jnp.concatenate([jnp.zeros(1, arrival.dtype), arrival])[t - staleness]
        return Step(t, jnp.zeros_like(t), jnp.zeros_like(t)), jnp.cumsum(arrival - pulled), True
    t = t[: worker.shape[0] // num_workers]
    rounds = Step(t, jnp.zeros_like(t), jnp.zeros_like(t))
    if arrivals.barrier is None:
        return rounds, jnp.full(t.shape, jnp.nan, arrival.dtype), True
    ready = jnp.asarray(arrivals.barrier, float)
    takes_part = ready < jnp.inf
    time = jnp.max(ready, axis=1, where=takes_part, initial=0.0)
    return rounds._replace(takes_part=takes_part), time, True


class Plan(NamedTuple):
    """The slots that push t reads from and then writes to."""

    read: jax.Array  # shape=(num_updates,), dtype=int32
    write: jax.Array  # shape=(num_updates,), dtype=int32
    fits: jax.Array  # shape=(), dtype=bool: whether there was always a slot to write to


def num_slots(staleness: np.ndarray) -> int:
    """The largest number of versions that are kept at once."""
    t = np.arange(staleness.size)
    # The last push before which a version is kept: its last reader, or else the push that makes it.
    end = np.arange(staleness.size + 1)
    np.maximum.at(end, t - staleness, t)
    dropped = np.cumsum(np.bincount(end, minlength=end.size))[t]
    return int(np.max(t + 2 - dropped))


def plan_slots(staleness: jax.Array, num_slots: int) -> Plan:
    """Assigns slots; the initial parameters are in slot 0."""
    num_updates = staleness.shape[0]
    t = jnp.arange(num_updates, dtype=jnp.int32)
    version = t - staleness
    # When a version is dropped, counted in half pushes: between the read and the write of its last
    # reader; or, if nobody reads it, after the push that made it.
    unread = 2 * jnp.arange(num_updates + 1, dtype=jnp.int32) - 1
    dropped = unread.at[version].max(2 * t)
    # Slots are given out in the order in which they become free. At first all are empty, so slot i
    # goes to version i. Then each goes from one version to the next.
    order = jnp.argsort(dropped).astype(jnp.int32)
    first = jnp.arange(num_slots, dtype=jnp.int32)
    holder = jnp.concatenate([first, order])[: num_updates + 1]
    fits = jnp.all(dropped[holder[num_slots:]] < 2 * t[num_slots - 1 :] + 1)
    # Follow the chain of holders to the first one; each pass doubles the length of a step.
    holder = lax.fori_loop(0, num_updates.bit_length(), lambda _, h: h[h], holder)
    return Plan(read=holder[version], write=holder[1:], fits=fits)
