"""Stale gradients and the true ones beside them: from a run, or from a trajectory of the user's."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_dcasgd import _arguments, _checks, _trees, simulation
from optax_dcasgd._gradients import (
    GradFn,
    batch_at,
    batch_of_push,
    check_batches,
    check_grad_fn,
    row,
)
from optax_dcasgd.rules import add_delay_compensation
from optax_dcasgd.simulation import Arrivals


class Pairs(NamedTuple):
    """Gradients at K pairs (w_s, w) of stale and current parameters, each pair on one batch.

    Every leaf has a leading axis of size K; otherwise all trees are like the parameters.
    """

    params: Any  # w
    stale_params: Any  # w_s
    grads: Any  # at w: the true gradient
    stale_grads: Any  # at w_s
    nu: Any  # ν of DC-ASGD-a, this gradient included; real


def pairs(
    grad_fn: GradFn,
    params: Any,
    stale_params: Any,
    batches: Any,
    *,
    decay: float = 0.95,
    key: jax.Array | None = None,
) -> Pairs:
    r"""Computes both gradients of pairs from a trajectory of your own.

    Args:
      grad_fn: ``grad_fn(params, batch, key) -> (loss, grads)``, as for `simulation.run`.
      params: K current parameters w, stacked along a new leading axis.
      stale_params: K stale parameters :math:`w_s`, likewise.
      batches: K batches along a leading axis; or a function from k (traced) to batch k.
      decay: m of :math:`\nu_k = m\,\nu_{k-1} + (1 - m)\,|g_k|^2`, over the stale gradients of the
        pairs in their order, from :math:`\nu = 0`. This is the ν of training if the pairs are
        consecutive updates. For every n-th update, pass the n-th power of the decay.
      key: A JAX random key, by default ``jax.random.key(0)``; pair k gets ``fold_in(key, k)``.

    Returns:
      The K pairs with both gradients and ν.

    Raises:
      TypeError: If an argument has no legal type.
      ValueError: If a tree does not fit the others (the message names the leaf).

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_dcasgd import diagnostics
      >>> grad_fn = jax.value_and_grad(lambda w, batch, key: 2 * jnp.sum(w**2))  # g = 4·w
      >>> w, w_s = jnp.array([[0.4], [0.6]]), jnp.array([[0.5], [0.5]])
      >>> pairs = diagnostics.pairs(grad_fn, w, w_s, batches=None)
      >>> diagnostics.fit(pairs).lamda  # exact here: 4 / (4·0.5)²
      1.0
    """
    _arguments.check_callable("grad_fn", grad_fn, "(params, batch, key) -> (loss, grads)")
    _arguments.check_scalar("decay", decay, minimum=0.0, below=1.0, schedule=False)
    key = jax.random.key(0) if key is None else key
    _arguments.check_key("key", key)
    params = _trees.copy(params)
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(params)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "params must be parameters stacked along a leading axis, of the same size in every "
            f"leaf; got leading axes {sorted(sizes)}."
        )
    stale_params = _checks.align("stale_params", stale_params, params)
    num_pairs = jax.tree.leaves(params)[0].shape[0]
    check_batches(batches, num_pairs)
    check_grad_fn(grad_fn, row(params, 0), batches, key)
    k = jnp.arange(num_pairs, dtype=jnp.int32)
    grads = _gradients(grad_fn, params, batches, key, k)
    stale_grads = _gradients(grad_fn, stale_params, batches, key, k)
    link = add_delay_compensation(0.0, decay=decay)

    def accumulate(state: Any, pair: Any) -> Any:
        params, grads = pair
        _, state = link.update(grads, state, params, stale_params=params)
        return state, state.nu

    _, nu = lax.scan(accumulate, link.init(row(params, 0)), (params, stale_grads))
    return Pairs(params, stale_params, grads, stale_grads, nu)


def collect(
    grad_fn: GradFn,
    params: optax.Params,
    tx: optax.GradientTransformation,
    batches: Any,
    arrivals: Arrivals,
    *,
    num_pairs: int = 32,
    decay: float = 0.95,
    key: jax.Array | None = None,
) -> Pairs:
    """Trains as ``simulation.run`` does and keeps evenly spaced pairs of that run.

    While it trains it keeps 4 · num_pairs copies of the parameters.

    Args:
      grad_fn: As for `simulation.run`, like the next four.
      params: The initial parameters.
      tx: Any Optax optimizer. The trajectory is its own.
      batches: The batches.
      arrivals: The order of the pushes, and on which batch each was computed.
      num_pairs: K, the number of pairs. The last is that of the last update.
      decay: m of DC-ASGD-a. Its ν runs over the stale gradients of all updates.
      key: A JAX random key, by default ``jax.random.key(0)``.

    Returns:
      The K pairs with both gradients and ν.

    Raises:
      TypeError: If an argument has no legal type.
      ValueError: If an argument is out of range or does not fit, as in `simulation.run`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_dcasgd import diagnostics, simulation
      >>> grad_fn = jax.value_and_grad(lambda w, batch, key: 2 * jnp.sum(w**2))
      >>> arrivals = simulation.arrivals(jax.random.key(0), num_workers=4, num_updates=64)
      >>> pairs = diagnostics.collect(
      ...     grad_fn, jnp.ones(3), optax.sgd(0.01), None, arrivals, num_pairs=8
      ... )
      >>> print(pairs.grads.shape)
      (8, 3)
    """
    _arguments.check_transformation("tx", tx)
    _arguments.check_integer("num_pairs", num_pairs, minimum=1)
    _arguments.check_scalar("decay", decay, minimum=0.0, below=1.0, schedule=False)
    key = jax.random.key(0) if key is None else key
    at = recorded_at(arrivals, num_pairs)
    recorder = _record(at, decay)
    result = simulation.run(grad_fn, params, optax.chain(recorder, tx), batches, arrivals, key=key)
    seen: Pairs = result.state[0].pairs
    grads = _gradients(grad_fn, seen.params, batches, key, *batch_of_push(arrivals, at))
    return seen._replace(grads=grads)


def recorded_at(arrivals: Arrivals, num_pairs: int) -> np.ndarray:
    """The updates whose pairs `collect` keeps, evenly spaced, shape (num_pairs,)."""
    if not isinstance(arrivals, Arrivals):
        raise TypeError(f"arrivals must be a simulation.Arrivals; got {arrivals!r}.")
    num_updates = int(np.size(arrivals.worker))
    if num_updates < num_pairs:
        raise ValueError(f"num_pairs={num_pairs} is more than the {num_updates} updates there are.")
    return (np.arange(1, num_pairs + 1) * num_updates // num_pairs - 1).astype(np.int32)


class _RecordState(NamedTuple):
    link: Any  # keeps ν
    pairs: Pairs


def _record(at: np.ndarray, decay: float) -> optax.GradientTransformationExtraArgs:
    """Passes gradients on as they are, and keeps the pairs of the updates ``at``."""
    link = add_delay_compensation(0.0, decay=decay)

    def init_fn(params: optax.Params) -> _RecordState:
        state = link.init(params)
        rows = jax.tree.map(lambda p: jnp.zeros((at.size, *p.shape), p.dtype), (params, state.nu))
        return _RecordState(state, Pairs(rows[0], rows[0], None, rows[0], rows[1]))

    def update_fn(
        updates: optax.Updates,
        state: _RecordState,
        params: optax.Params | None = None,
        *,
        stale_params: Any,
        **extra_args: Any,
    ) -> tuple[optax.Updates, _RecordState]:
        del extra_args
        # Every update goes to the place of the next that is kept, which overwrites it.
        place = jnp.searchsorted(at, state.link.count)
        _, link_state = link.update(updates, state.link, params, stale_params=stale_params)
        kept = jax.tree.map(
            lambda rows, x: lax.dynamic_update_index_in_dim(
                rows, jnp.asarray(x, rows.dtype), place, 0
            ),
            state.pairs,
            Pairs(params, stale_params, None, updates, link_state.nu),
        )
        return updates, _RecordState(link_state, kept)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _gradients(
    grad_fn: GradFn, params: Any, batches: Any, key: Any, t: Any, num_steps: Any = None
) -> Any:
    """The gradients at stacked parameters, each on its batch ``t``, one after another."""

    def gradients(params: Any, data: Any, key: Any) -> Any:
        def gradient(x: Any) -> Any:
            params, t, num_steps = x
            batch = batch_at(batches, data, t, num_steps)
            return grad_fn(params, batch, jax.random.fold_in(key, t))[1]

        return lax.map(gradient, (params, jnp.asarray(t), num_steps))

    return jax.jit(gradients)(params, None if callable(batches) else batches, key)
