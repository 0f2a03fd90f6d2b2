"""`delay_gradients`: run any optimizer under a known delay."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_dcasgd import _arguments, _checks, _trees


class DelayGradientsState(NamedTuple):
    """State of `delay_gradients`: a ring buffer a parameter, as long as its delay."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32: updates so far
    # Like params, one more axis in front; optax.MaskedNode() for a parameter whose delay is 0.
    grads: Any  # the gradients that are still to be applied
    inner_state: Any
    params: Any  # the parameters they were computed at


def delay_gradients(
    inner: optax.GradientTransformation, delay: Any
) -> optax.GradientTransformationExtraArgs:
    """Feeds ``inner`` the gradient of ``delay`` updates ago, and says how old it is.

    At update t, ``inner.update`` receives the gradient g_{t−d}, the current parameters w_t, and the
    extra arguments ``stale_params=w_{t−d}`` and ``staleness=d``. So
    ``delay_gradients(optax.sgd(...), d)`` trains with gradients d updates old: what asynchronous
    workers or a pipeline would do, in one process. With a rule in the chain, or
    ``dcasgd(..., store=None)`` for ``optax.sgd``, they are compensated.

    Args:
      inner: Any Optax optimizer.
      delay: d ≥ 0, a Python integer, or a prefix tree of integers over the parameters (the stages
        of a pipeline; for ``nnx.Optimizer`` over ``nnx.as_pure(nnx.state(model, nnx.Param))``). The
        state keeps d gradients and d copies of a parameter, in its dtype.

        * An integer: the first d updates are zero and leave the state of ``inner`` untouched.
          With 0, ``inner`` runs on fresh gradients, bit for bit, told ``stale_params=params`` and
          ``staleness=0``.
        * A tree: ``inner`` runs from the start. A parameter whose history is not yet full gives it
          a zero gradient, its current value as ``stale_params``, and gets a zero update.
          ``staleness`` is the tree of delays.

    Returns:
      A transformation. If its caller passes ``stale_params`` or ``staleness`` (this transformation
      inside another `delay_gradients`, say), the parameters are delayed along with their gradient,
      and the staleness is added. Other extra arguments reach ``inner`` undelayed. A gradient that
      is ``None`` counts as zero.

    Raises:
      TypeError: If a delay is no integer, or a parameter is an integer array.
      ValueError: If a delay is negative, if the tree of delays is no prefix of the parameters, or
        in ``update``, if ``params`` is missing, a tree does not fit it, or the state was made with
        another delay.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax_dcasgd import delay_gradients
      >>> tx = delay_gradients(optax.sgd(1.0), 2)
      >>> params = jnp.array(10.0)
      >>> state = tx.init(params)
      >>> for grad in [1.0, 2.0, 3.0, 4.0]:
      ...   updates, state = tx.update(jnp.array(grad), state, params)
      ...   params = optax.apply_updates(params, updates)
      ...   print(params)
      10.0
      10.0
      9.0
      7.0
    """
    _arguments.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    uniform = isinstance(delay, int | np.integer) and not isinstance(delay, bool)
    if delay is None:
        raise TypeError("delay must be an integer or a tree of integers; got None.")
    for path, leaf in jax.tree_util.tree_flatten_with_path(delay)[0]:
        _arguments.check_integer(f"delay{jax.tree_util.keystr(path)}", leaf, minimum=0)

    def init_fn(params: optax.Params) -> DelayGradientsState:
        _checks.check_params(params)
        delays = _checks.broadcast_prefix("delay", delay, params)
        # No entry at all where there is no delay: orbax refuses to save arrays without elements.
        history = jax.tree.map(
            lambda p, age: _trees.stack_copies(p, age) if age else optax.MaskedNode(),
            params,
            delays,
        )
        return DelayGradientsState(
            count=jnp.zeros((), jnp.int32),
            grads=jax.tree.map(_trees.zeros_like, history),
            inner_state=inner.init(params),
            params=history,
        )

    def update_fn(
        updates: optax.Updates,
        state: DelayGradientsState,
        params: optax.Params | None = None,
        *,
        stale_params: optax.Params | None = None,
        staleness: Any = 0,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DelayGradientsState]:
        _checks.check_updates(updates, params)
        computed_at = (
            params if stale_params is None else _checks.align("stale_params", stale_params, params)
        )
        delays = _checks.broadcast_prefix("delay", delay, params)
        _checks.check_state(params, state.params, stacked=True)
        jax.tree_util.tree_map_with_path(_check_length, delays, state.params)
        if uniform and delay == 0:
            updates, inner_state = inner.update(
                updates,
                state.inner_state,
                params,
                stale_params=computed_at,
                staleness=staleness,
                **extra_args,
            )
            count = optax.safe_increment(state.count)
            return updates, state._replace(count=count, inner_state=inner_state)
        updates = jax.tree.map(
            lambda grad, param: jax.tree.map(jnp.zeros_like, param) if grad is None else grad,
            updates,
            params,
            is_leaf=_trees.is_none,
        )

        def exchange(grad: Any, param: Any, at: Any, age: int, grads: Any, history: Any) -> Any:
            if not age:  # no delay, or no parameter
                return grad, at, grads, history
            return _exchange(state.count, grad, param, at, grads, history)

        due, due_at, grads, history = _trees.map_leaves(
            exchange, 4, updates, params, computed_at, delays, state.grads, state.params
        )
        new_updates, inner_state = inner.update(
            due,
            state.inner_state,
            params,
            stale_params=due_at,
            staleness=_add_staleness(delay if uniform else delays, staleness),
            **extra_args,
        )

        def once_full(update: Any, age: int) -> Any:
            return _zero_unless(state.count >= age, update) if age else update

        if uniform:
            inner_state = jax.tree.map(
                lambda new, old: jnp.where(state.count >= delay, new, old),
                inner_state,
                state.inner_state,
            )
        return jax.tree.map(once_full, new_updates, delays), DelayGradientsState(
            count=optax.safe_increment(state.count),
            grads=grads,
            inner_state=inner_state,
            params=history,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# Jitted, so that parameters of one shape are traced once; inlined, so that XLA sees no difference.
@jax.jit
def _exchange(count: Any, grad: Any, param: Any, at: Any, grads: Any, history: Any) -> Any:
    """Takes the oldest entry out of both ring buffers and puts the newest in its place."""
    age = grads.shape[0]
    slot, full = count % age, count >= age
    due = lax.dynamic_index_in_dim(grads, slot, 0, keepdims=False)
    due_at = lax.dynamic_index_in_dim(history, slot, 0, keepdims=False)
    return (
        jnp.where(full, due, jnp.zeros_like(due)),
        jnp.where(full, due_at, jnp.asarray(param, due_at.dtype)),
        lax.dynamic_update_index_in_dim(grads, jnp.asarray(grad, grads.dtype), slot, 0),
        lax.dynamic_update_index_in_dim(history, jnp.asarray(at, history.dtype), slot, 0),
    )


@jax.jit
def _zero_unless(full: Any, update: Any) -> Any:
    return jnp.where(full, update, jnp.zeros_like(update))


def _check_length(path: Any, age: int, history: Any) -> None:
    """Checks that the ring buffer of a parameter is as long as its delay."""
    length = jnp.shape(history)[0] if jax.tree.leaves(history) else 0
    if length != age:
        raise ValueError(
            f"delay is {age}, but the optimizer state was made with a delay of {length} (for "
            f"params{jax.tree_util.keystr(path)}). Make a new state with init(params), or pass the "
            "delay it was made with."
        )


def _add_staleness(delay: Any, staleness: Any) -> Any:
    """The sum of two stalenesses, each a number or a prefix tree of the other."""
    if jax.tree_util.all_leaves([staleness]):
        return jax.tree.map(lambda age: age + staleness, delay)
    if jax.tree_util.all_leaves([delay]):
        return jax.tree.map(lambda age: age + delay, staleness)
    return jax.tree.map(jnp.add, delay, _checks.broadcast_prefix("staleness", staleness, delay))
