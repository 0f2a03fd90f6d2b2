"""Where old versions of the parameters are kept: as few copies as the arrivals need.

Version v is the parameters after v updates. Push t reads version ``t - staleness[t]`` and then
makes version t + 1. A version is kept in a slot until its last reader has pushed. Where every
worker pulls after its own push, that is one slot a worker at most, and fewer while several hold the
same version; a worker that joins, or one that pulls ahead of its push, needs no case of its own.
"""

from typing import NamedTuple

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
    # When a version is dropped, in half pushes: between its last reader's read and write; one that
    # nobody reads, after the push that made it.
    unread = 2 * jnp.arange(num_updates + 1, dtype=jnp.int32) - 1
    dropped = unread.at[version].max(2 * t)
    # Slots are handed on in the order in which they become free: first those that never held
    # anything, then from version to version. The first holder of slot i is version i.
    order = jnp.argsort(dropped).astype(jnp.int32)
    first = jnp.arange(num_slots, dtype=jnp.int32)
    holder = jnp.concatenate([first, order])[: num_updates + 1]
    fits = jnp.all(dropped[holder[num_slots:]] < 2 * t[num_slots - 1 :] + 1)
    # From the previous holder to the first, in steps of twice the length each time.
    holder = lax.fori_loop(0, num_updates.bit_length(), lambda _, h: h[h], holder)
    return Plan(read=holder[version], write=holder[1:], fits=fits)
