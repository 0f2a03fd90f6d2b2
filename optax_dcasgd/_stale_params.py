"""Where the stale parameters ``w_s`` come from: the caller, a worker's backup, or the last update.

Every transformation that compares ``w`` with ``w_s`` keeps its memory of old parameters in two
fields of its state, and this module is all that reads or writes them:

``prev_params``
  ``None``; or the parameters of the previous ``update`` call; or, with ``num_workers=M``, one
  backup a worker along a new leading axis of size M.
``last_worker``
  With ``num_workers``, the worker of the previous ``update`` call, ``M`` for none. Algorithm 2 of
  Zheng et al. backs up, for worker i, the parameters *with its own update applied*. A gradient
  transformation does not see those (what stands behind it in a chain decides), but it sees them as
  ``params`` of the next call, whoever makes it. So the backup of ``last_worker`` is filled in
  there, before any backup is read.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_dcasgd import _arguments, _trees


class Memory(NamedTuple):
    """What `look_up` reads of a state; a state with these three fields will do as it is."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32: updates so far
    prev_params: Any
    last_worker: jax.Array | None = None


class StaleParams(NamedTuple):
    """The stale parameters of one update, and the memory for the next."""

    stale: Any  # like params
    prev_params: Any  # the state's fields, as above
    last_worker: jax.Array | None  # shape=(), dtype=int32


def check_num_workers(num_workers: Any, store: Any) -> None:
    """Checks ``num_workers`` and that ``store`` lets one backup a worker be kept."""
    if num_workers is None:
        return
    _arguments.check_integer("num_workers", num_workers, minimum=1)
    if store != "params":
        raise ValueError(
            f"num_workers={num_workers} keeps one copy of the parameters a worker and so needs "
            f"store='params'; got store={store!r}."
        )


def require(stale_params: Any) -> None:
    """Raises the error of a transformation that remembers no parameters and was given none."""
    if stale_params is None:
        raise ValueError(
            "stale_params is required because store=None: pass update(..., stale_params=tree), "
            "the parameters the gradient was computed at."
        )


def init(params: Any, *, remember: bool, num_workers: int | None) -> tuple[Any, jax.Array | None]:
    """Returns the first ``prev_params`` and ``last_worker``: every worker has pulled ``params``."""
    if not remember:
        return None, None
    if num_workers is None:
        return _trees.copy(params), None
    backups = jax.tree.map(lambda p: _trees.stack_copies(p, num_workers), params)
    return backups, jnp.full((), num_workers, jnp.int32)


def check_memory(params: Any, state: Any, num_workers: int | None) -> None:
    """Checks that the state was made for these parameters and for this number of workers.

    Raises:
      ValueError: Names the parameter that differs, or says what the state was made for.
    """
    made_for = None
    if state.last_worker is not None:  # behind masks there may be no backup at all
        backups = jax.tree.leaves(state.prev_params)
        made_for = jnp.shape(backups[0])[0] if backups else num_workers
    if made_for != num_workers:
        raise ValueError(
            f"num_workers={num_workers}, but the optimizer state was made with "
            f"num_workers={made_for}. Make a new state with init(params), or pass the number it "
            "was made with."
        )
    _trees.check_state(params, state.prev_params, stacked=num_workers is not None, same_dtype=True)


def look_up(
    params: Any, state: Any, *, num_workers: int | None, stale_params: Any, worker: Any
) -> StaleParams:
    """Finds ``w_s`` for the gradient at hand and brings the memory up to date.

    Args:
      params: The parameters the gradient is applied at, ``w``.
      state: A `Memory`, or a state with its fields. On the first update ``w_s`` is ``w`` unless
        the caller says otherwise.
      num_workers: The number of backups, or None.
      stale_params: What the caller says the gradient was computed at, or None.
      worker: Whose gradient this is, or None; without ``num_workers`` it has no meaning.

    Raises:
      ValueError: If neither the caller nor the memory has ``w_s``, or ``stale_params`` has the
        wrong structure or a wrong shape, or ``worker`` is out of range, or `check_memory` does.
      TypeError: If ``worker`` is no integer.
    """
    count, prev_params, last_worker = state.count, state.prev_params, state.last_worker
    if stale_params is not None:
        stale_params = _trees.align("stale_params", stale_params, params)
    check_memory(params, state, num_workers)
    if prev_params is None:
        require(stale_params)
        return StaleParams(stale_params, None, None)

    if num_workers is None:
        if stale_params is None:
            stale_params = _unless_first(count, prev_params, params)
        return StaleParams(stale_params, _remember(count, prev_params, params), None)

    assert last_worker is not None
    if worker is None and stale_params is None:
        raise ValueError(
            f"worker is required because num_workers={num_workers}: pass update(..., worker=i), "
            "the index of the worker whose gradient this is, or update(..., stale_params=...)."
        )
    backups = jax.tree.map(
        lambda b, w: _fill_row(b, w, last_worker, num_workers), prev_params, params
    )
    if worker is None:
        return StaleParams(stale_params, backups, jnp.full((), num_workers, jnp.int32))
    index = _arguments.check_worker(worker, num_workers)
    if stale_params is None and num_workers == 1:
        # Nobody pushed in between. Known while tracing, so that the compiled program is that of the
        # inner optimizer; a run-time zero leaves the compiler free to round that one differently.
        stale_params = params
    if stale_params is None:
        row = jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, index, 0, keepdims=False), backups)
        stale_params = _unless_first(count, row, params)
    return StaleParams(stale_params, backups, index)


def _unless_first(count: jax.Array, remembered: Any, params: Any) -> Any:
    return jax.tree.map(
        lambda old, w: jnp.where(count == 0, jnp.asarray(w, old.dtype), old), remembered, params
    )


def _remember(count: jax.Array, prev_params: Any, params: Any) -> Any:
    return jax.tree.map(lambda old, w: own_copy(count, w, old), prev_params, params)


def own_copy(count: jax.Array, x: Any, like: jax.Array) -> jax.Array:
    """Returns ``x`` in a buffer of its own, with the dtype of ``like``, once ``like`` is computed.

    A bare ``x`` would hand the caller's own buffer back as state, and donating it later would
    delete the state. This is a select whose predicate is always true, but only at run time.
    """
    return jnp.where(count >= 0, jnp.asarray(x, like.dtype), like)


def _fill_row(backups: Any, w: Any, last_worker: jax.Array, num_workers: int) -> Any:
    row = jnp.minimum(last_worker, num_workers - 1)
    old = lax.dynamic_index_in_dim(backups, row, 0, keepdims=False)
    new = jnp.where(last_worker < num_workers, jnp.asarray(w, backups.dtype), old)
    return lax.dynamic_update_index_in_dim(backups, new, row, 0)
