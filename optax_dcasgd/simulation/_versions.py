"""Where old versions of the parameters are kept: as few copies as the arrivals need.

Version v is the parameters after v updates. Push t reads version ``t - staleness[t]`` and then
makes version t + 1. A version is kept in a slot until its last reader has pushed. Where every
worker pulls after its own push, that is one slot a worker at most, and fewer while several hold the
same version; a worker that joins, or one that pulls ahead of its push, needs no case of its own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


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


def plan(staleness: jax.Array, num_slots: int) -> Plan:
    """Assigns slots; the initial parameters are in slot 0."""
    num_updates = staleness.shape[0]
    t = jnp.arange(num_updates, dtype=jnp.int32)
    version = t - staleness
    last_reader = jnp.full(num_updates + 1, -1, jnp.int32).at[version].max(t)

    def push(carry: Any, x: Any) -> Any:
        slot_of, free, fits = carry
        t, version, is_last_reader, has_reader = x
        read = slot_of[version]
        free = free.at[read].set(is_last_reader)
        write = jnp.argmax(free).astype(jnp.int32)
        fits &= free[write]
        free = free.at[write].set(~has_reader)
        return (slot_of.at[t + 1].set(write), free, fits), (read, write)

    slot_of = jnp.zeros(num_updates + 1, jnp.int32)
    free = jnp.arange(num_slots) > 0
    xs = (t, version, last_reader[version] == t, last_reader[1:] >= 0)
    (_, _, fits), (read, write) = lax.scan(push, (slot_of, free, jnp.array(True)), xs)
    return Plan(read, write, fits)
