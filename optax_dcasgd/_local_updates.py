"""`local_updates`: a gradient function that takes several steps of its own."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_dcasgd import _arguments, _checks, _trees
from optax_dcasgd._gradients import GradFn, LocalBatches, check_returned, row


def local_updates(grad_fn: GradFn, tx: optax.GradientTransformation, num_steps: int) -> GradFn:
    r"""Lets a worker take several steps before it sends anything: local SGD, DiLoCo.

    From the parameters :math:`w_0` that the worker got it takes H steps of its own optimizer,

    .. math:: w_{h+1} = w_h + u_h, \qquad h = 0, \ldots, H - 1,

    where :math:`u_h` is the update that ``tx`` makes of the gradient at :math:`w_h` on the h-th of
    H batches. In place of a gradient it sends the pseudo-gradient

    .. math:: \Delta = -\sum_h u_h = w_0 - w_H,

    to which an outer optimizer is applied like to a gradient. So one message does the work of H
    gradients, and with workers that do not wait for each other it is as stale as theirs. With
    outer ``optax.sgd(1.0)`` and one worker this is plain training with ``tx``. The sum is that of
    the updates and not the difference of the parameters, in at least float32: that loses no update
    that is too small for the parameters' dtype. Then for H = 1 it is :math:`-u_0` to the bit, which
    with ``tx = optax.sgd(lr)`` and outer ``optax.sgd(1.0)`` is what ``grad_fn`` with
    ``optax.sgd(lr)`` is.

    What is returned is a gradient function like any other, for `simulation.run`,
    `parameter_server.train`, `overlap_reduction` and `diagnostics`. One batch of theirs is H
    batches of ``grad_fn``, stacked.

    Args:
      grad_fn: ``grad_fn(params, batch, key) -> (loss, grads)``, such as ``jax.value_and_grad`` of a
        loss.
      tx: The inner optimizer, any of Optax's whose ``update`` needs no extra arguments but
        ``stale_params`` and ``staleness``. It starts anew in every round: its momentum, moments and
        step count are not carried over. (Schedules of the inner learning rate see the steps of one
        round. To anneal over the whole of training, schedule the outer rate.)
      num_steps: H, at least 1. With a batch that is `LocalBatches`, the most steps of a round.

    Returns:
      A function ``(params, batches, key) -> (loss, pseudo_gradient)``:

      * ``batches``: every leaf has a leading axis of size H; or `LocalBatches`, which says how many
        of them are used (a traced number that is out of range makes the loss NaN);
      * ``key``: for H = 1 passed on as it is; otherwise step h gets ``jax.random.fold_in(key, h)``;
      * ``loss``: the mean of the losses of the steps, each before its step;
      * ``pseudo_gradient``: a tree like ``params``, in their dtypes. It points where a gradient
        does: descent subtracts it.

    Raises:
      TypeError: If an argument has no legal type; from the returned function, if a parameter is no
        floating-point or complex number, or ``tx`` needs an extra argument.
      ValueError: If ``num_steps`` is below 1; from the returned function, if a leaf of ``batches``
        has another leading axis, or a gradient does not fit the parameters.

    Examples:
      Four asynchronous workers take 16 steps between two messages:

      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_dcasgd import local_updates, robust_delay_compensation, simulation
      >>> grad_fn = jax.value_and_grad(lambda w, x, key: jnp.mean((x @ w - x.sum(-1)) ** 2))
      >>> x = jax.random.normal(jax.random.key(0), (50, 16, 32, 3))  # 50 rounds of 16 batches
      >>> arrivals = simulation.arrivals(jax.random.key(1), num_workers=4, num_updates=50)
      >>> local = local_updates(grad_fn, optax.sgd(0.02), num_steps=16)
      >>> outer = optax.chain(robust_delay_compensation(), optax.sgd(0.5))
      >>> result = simulation.run(local, jnp.zeros(3), outer, x, arrivals)
      >>> print(result.params.round(2))
      [1. 1. 1.]

    References:
      Stich, `Local SGD Converges Fast and Communicates Little <https://arxiv.org/abs/1805.09767>`_,
      2018. Douillard et al., `DiLoCo <https://arxiv.org/abs/2311.08105>`_, 2023. Liu et al.,
      `Asynchronous Local-SGD Training for Language Modeling <https://arxiv.org/abs/2401.09135>`_,
      2024.
    """
    _arguments.check_callable("grad_fn", grad_fn, "(params, batch, key) -> (loss, grads)")
    _arguments.check_transformation("tx", tx)
    _arguments.check_integer("num_steps", num_steps, minimum=1)
    optimizer = optax.with_extra_args_support(tx)

    def local_grad_fn(params: Any, batches: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        given = count = None
        if isinstance(batches, LocalBatches):
            batches, given = batches
            count = _check_count(given, num_steps)
        _checks.check_params(params)
        _check_stack(batches, num_steps)
        if num_steps > 1:
            _arguments.check_key("key", key)
        params = jax.tree.map(lambda p: jnp.asarray(p, _trees.dtype_of(p)), params)

        def step(carry: Any, inputs: Any) -> Any:
            params, state, total = carry
            batch, h = inputs
            returned = grad_fn(params, batch, key if num_steps == 1 else jax.random.fold_in(key, h))
            check_returned(returned, params)
            loss, grads = returned
            updates, state = _update(optimizer, grads, state, params)
            total = jax.tree.map(
                lambda s, u: s if u is None else s + u.astype(s.dtype), total, updates
            )
            return (optax.apply_updates(params, updates), state, total), loss

        def step_if_used(carry: Any, inputs: Any) -> Any:
            def skip(carry: Any, inputs: Any) -> Any:
                return carry, _zero_like(jax.eval_shape(step, carry, inputs)[1])

            return lax.cond(inputs[1] < count, step, skip, carry, inputs)

        # −0 and not 0, which would make 0 of a sum of −0.
        total = jax.tree.map(lambda p: -jnp.zeros_like(p, _trees.compute_dtype(p)), params)
        carry = params, optimizer.init(params), total
        if num_steps == 1:  # not even a loop: the program of grad_fn and tx
            (_, _, total), loss = step(carry, (row(batches, 0), 0))
        else:
            inputs = batches, jnp.arange(num_steps, dtype=jnp.int32)
            (_, _, total), losses = lax.scan(step if count is None else step_if_used, carry, inputs)
            used = None if count is None else jnp.arange(num_steps) < count
            loss = losses.mean(where=used)
        if count is not None:  # NaN where a traced number was out of range, and so was clamped
            loss = jnp.where(given == count, loss, jnp.nan)
        return loss, jax.tree.map(lambda p, s: -s.astype(p.dtype), params, total)

    return local_grad_fn


def _update(optimizer: Any, grads: Any, state: Any, params: Any) -> Any:
    """One update of the inner optimizer, whose gradients are fresh."""
    fresh = {"stale_params": params, "staleness": jnp.zeros((), jnp.int32)}
    try:
        return optimizer.update(grads, state, params, **fresh)
    except TypeError as error:
        if not re.search(r"missing \d+ required|unexpected keyword argument", str(error)):
            raise
        raise TypeError(
            "tx cannot be the optimizer of local_updates, which calls tx.update(grads, state, "
            f"params, stale_params=..., staleness=...): {error}. Choose one that needs no other "
            "arguments."
        ) from error


def _check_count(count: Any, num_steps: int) -> jax.Array:
    """The number of steps of a round, clamped where its value cannot be checked."""
    if jnp.shape(count) != () or not jnp.issubdtype(jnp.result_type(count), jnp.integer):
        raise TypeError(
            "batches.num_steps must be one integer, the number of batches that are used; got "
            f"{count!r}."
        )
    if not isinstance(count, jax.core.Tracer) and not 1 <= int(count) <= num_steps:
        raise ValueError(
            f"batches.num_steps must be at least 1 and at most num_steps={num_steps}; got {count}."
        )
    return jnp.clip(jnp.asarray(count, jnp.int32), 1, num_steps)


def _check_stack(batches: Any, num_steps: int) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(batches)[0]:
        if jnp.shape(leaf)[:1] != (num_steps,):
            raise ValueError(
                f"batches{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, but needs a "
                f"leading axis of size num_steps={num_steps}: one batch a local step, stacked. (A "
                "round of fewer steps is LocalBatches(batches, num_steps).)"
            )


def _zero_like(loss: Any) -> jax.Array:
    """Zero of the type of a loss that was not computed: a condition has one type."""
    zero = jnp.zeros((), loss.dtype)
    kind = getattr(loss, "manual_axis_type", None)  # inside jax.shard_map
    return lax.pcast(zero, tuple(kind.varying), to="varying") if kind and kind.varying else zero
