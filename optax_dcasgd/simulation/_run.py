"""`run`: training in the order of given arrivals, as one compiled loop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_dcasgd import _arguments, _checks, _trees
from optax_dcasgd._gradients import (
    GradFn,
    batch_at,
    batch_of_push,
    check_batches,
    check_grad_fn,
    row,
)
from optax_dcasgd.simulation import _arrivals, _steps
from optax_dcasgd.simulation._arrivals import Arrivals
from optax_dcasgd.simulation._progress import Bar, is_traced
from optax_dcasgd.simulation._steps import Step


class History(NamedTuple):
    """What happened in a `run` of U updates, with E evaluations."""

    loss: jax.Array  # shape=(U,): the loss that came with each applied gradient, at its own params
    time: jax.Array  # shape=(U,): when each update was applied, in (virtual) seconds
    num_finite: jax.Array  # shape=(), dtype=int32: updates before the first that is not finite
    evaluation: Any  # what `evaluate` returned, with a new leading axis of size E; or None
    evaluated: jax.Array | None  # shape=(E,), dtype=int32: updates done before each evaluation


class Result(NamedTuple):
    """What `run` returns."""

    params: Any
    state: Any  # of the optimizer
    history: History


def run(
    grad_fn: GradFn,
    params: optax.Params,
    tx: optax.GradientTransformation,
    batches: Any,
    arrivals: Arrivals,
    *,
    mode: str = "async",
    evaluate: Callable[[Any], Any] | None = None,
    evaluate_every: int | None = None,
    key: jax.Array | None = None,
    progress: bool = False,
) -> Result:
    r"""Trains with the gradients in the order in which they arrive.

    :math:`w_v` are the parameters after v updates, and :math:`\tau_t` is the staleness of push t.
    The worker computes :math:`g_t` on batch t at :math:`w_{t-\tau_t}`. The optimizer applies it at
    :math:`w_t`:

    ===============  =========================================================================
    ``mode``         one update
    ===============  =========================================================================
    "async"          One push, stale as in ``arrivals``.
    "sync"           A round: the mean of the gradients of all M workers at the same parameters.
                     Worker i of round r uses batch r·M + i, and the round ends with the slowest
                     worker. There are num_updates // M updates; the last num_updates % M
                     batches are not used. With ``arrivals.local_steps`` worker i takes the
                     next ``local_steps[i]`` batches, after those of workers 0 to i − 1; the
                     first of all is the lowest of ``arrivals.batch``.
    "sequential"     One push, never stale. One machine computes the same gradients one after
                     another, so the time is the sum of their times. (The time of a gradient
                     starts when its version of the parameters was made. For the first gradient
                     of a worker that joins late, this is before it joined.)
    ===============  =========================================================================

    Args:
      grad_fn: ``grad_fn(params, batch, key) -> (loss, grads)``, such as
        ``jax.value_and_grad(loss_fn)`` of a ``loss_fn(params, batch, key)``. The key of batch t is
        ``jax.random.fold_in(key, t)``.
      params: The initial parameters, which all workers hold at first.
      tx: Any Optax optimizer. If its ``update`` takes extra arguments, it gets ``stale_params``
        (the parameters of the gradient), ``staleness`` and ``worker``. So the simulation is the
        source for every rule in ``tx``, and needs no other. A source around ``tx`` does no harm:
        in ``remember_params(tx)`` what is passed wins over what is remembered.
      batches: A pytree whose leaves have a leading axis of size num_updates: batch t is
        ``leaf[t]``. Or a function from t (a traced int32 scalar) to batch t, so that not all have
        to be in memory: ``lambda t: (x[index[t]], y[index[t]])``. (Of a list of batches make such
        a pytree: ``jax.tree.map(lambda *x: jnp.stack(x), *batches)``.) With ``arrivals.batch``,
        push t uses batch ``arrivals.batch[t]`` and its key. The leading axis may then have any size
        n: batch i is ``leaf[i % n]``. With ``arrivals.num_steps`` too, a function: ``grad_fn`` gets
        ``LocalBatches(batches(first, num_steps), num_steps)``, both numbers traced.
      arrivals: From `arrivals`, or `Arrivals` that a real run recorded.
      mode: "async", "sync" or "sequential", as above.
      evaluate: ``evaluate(params)``, traceable, returns a pytree of arrays; or None.
      evaluate_every: The number of updates between evaluations. There is always one after the last
        update, and by default no other.
      key: A JAX random key, by default ``jax.random.key(0)``.
      progress: Whether to show a progress bar (with tqdm). The compiled loop calls Python for it
        about once a second. Inside ``jax.jit`` and ``jax.vmap`` there is no bar.

    Returns:
      The last parameters, the last state of the optimizer, and the `History`. If
      ``history.num_finite`` is the number of updates, the run was finite to its end. Otherwise the
      loss of update ``num_finite`` is the first that is not finite (or only the last parameters
      are not). In "sync" mode without ``arrivals.barrier``, ``history.time`` is NaN.

      Each call compiles anew. To train with many keys, arrivals or hyperparameters, call it inside
      ``jax.jit`` or ``jax.vmap``; ``tx`` may be made there too. With traced arrivals, M versions of
      the parameters are kept. A worker that pulls before it pushes may need more. Such a run cannot
      be replayed with traced arrivals, and gives NaN everywhere.

    Raises:
      TypeError: If an argument has no legal type, or ``grad_fn`` does not return a pair.
      ValueError: If an argument is out of range, a batch has no num_updates entries, or the
        gradient does not fit the parameters (the message names the leaf).

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_dcasgd import add_delay_compensation, simulation
      >>> grad_fn = jax.value_and_grad(lambda w, x, key: jnp.mean((x @ w - x.sum(-1)) ** 2))
      >>> batches = jax.random.normal(jax.random.key(0), (200, 32, 3))
      >>> arrivals = simulation.arrivals(jax.random.key(1), num_workers=4, num_updates=200)
      >>> tx = optax.chain(add_delay_compensation(), optax.sgd(0.05))
      >>> result = simulation.run(grad_fn, jnp.zeros(3), tx, batches, arrivals)
      >>> print(result.params.round(2), result.history.num_finite)
      [1. 1. 1.] 200

      Five learning rates in one program:

      >>> def final_loss(learning_rate):
      ...   tx = optax.sgd(learning_rate)
      ...   return simulation.run(grad_fn, jnp.zeros(3), tx, batches, arrivals).history.loss[-1]
      >>> losses = jax.vmap(final_loss)(jnp.array([0.01, 0.05, 0.1, 0.2, 0.4]))
      >>> print(losses.shape)
      (5,)

    References:
      Zheng et al., `Asynchronous Stochastic Gradient Descent with Delay Compensation
      <https://arxiv.org/abs/1609.08326>`_, 2017: Algorithms 1 and 2.
    """
    _arguments.check_callable("grad_fn", grad_fn, "(params, batch, key) -> (loss, grads)")
    _arguments.check_transformation("tx", tx)
    _arguments.check_choice("mode", mode, ("async", "sync", "sequential"))
    if evaluate is not None:
        _arguments.check_callable("evaluate", evaluate, "of params")
    if evaluate_every is not None:
        _arguments.check_integer("evaluate_every", evaluate_every, minimum=1)
        if evaluate is None:
            raise ValueError("evaluate_every has no meaning without evaluate.")
    key = jax.random.key(0) if key is None else key
    _arguments.check_key("key", key)
    num_workers = _arrivals.check(arrivals)
    _checks.check_arrays("params", params, _checks.OF_EQUINOX)
    params = _trees.copy(params)  # arrays of their own dtype, none of them weak
    num_updates = num_pushes = jnp.shape(arrivals.worker)[0]
    if mode == "sync":
        num_updates //= num_workers
        if num_updates == 0:
            raise ValueError(
                f"arrivals has {num_pushes} pushes, too few for one round of "
                f"num_workers={num_workers}."
            )
        arrivals = _arrivals.behind_barrier(arrivals, num_workers)
    in_rounds = arrivals.num_steps is not None
    check_batches(batches, num_pushes if arrivals.batch is None else None, in_rounds=in_rounds)
    check_grad_fn(grad_fn, params, batches, key, arrivals.num_steps)
    inputs = (params, None if callable(batches) else batches, arrivals, key)
    num_slots, slots_known = 1, True
    if mode == "async":
        slots_known = not isinstance(arrivals.staleness, jax.core.Tracer)
        num_slots = num_workers
        if slots_known:
            num_slots = _steps.num_slots(np.asarray(arrivals.staleness, np.int64))
    bar = Bar(num_updates) if progress and not is_traced() else None

    def train(params: Any, data: Any, arrivals: Arrivals, key: jax.Array) -> Result:
        def gradient(params: Any, t: jax.Array) -> Any:
            index, num_steps = batch_of_push(arrivals, t)
            batch = batch_at(batches, data, index, num_steps)
            return grad_fn(params, batch, jax.random.fold_in(key, index))

        def update(carry: _Carry, step: Step) -> tuple[_Carry, jax.Array]:
            params, state, versions, report_at = carry
            if bar is not None:
                report_at = bar.step(step.t, report_at)
            stale = params if versions is None else row(versions, step.read)
            if mode == "sync":
                loss, grads = _mean_gradient(gradient, stale, step, num_workers)
            else:
                loss, grads = gradient(stale, step.t)
            updates, state = optimizer.update(
                grads,
                state,
                params,
                stale_params=stale,
                worker=step.worker,
                staleness=step.staleness,
            )
            params = optax.apply_updates(params, updates)
            if versions is not None:
                versions = jax.tree.map(
                    lambda v, p: lax.dynamic_update_index_in_dim(v, p, step.write, 0),
                    versions,
                    params,
                )
            return _Carry(params, state, versions, report_at), loss

        optimizer = optax.with_extra_args_support(tx)
        steps, time, fits = _steps.steps(arrivals, mode, num_workers, num_slots)
        carry = _Carry(
            params,
            optimizer.init(params),
            # With one slot every gradient is fresh. Known while tracing, so that the program is
            # that of sequential training.
            None if num_slots == 1 else jax.tree.map(lambda p: jnp.stack([p] * num_slots), params),
            None if bar is None else bar.first(),
        )
        carry, loss, evaluation, evaluated = _scan(update, carry, steps, evaluate, evaluate_every)
        if not slots_known:

            def if_fits(x: jax.Array) -> jax.Array:
                return jnp.where(fits, x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.inexact) else x

            loss = if_fits(loss)
            carry = carry._replace(params=jax.tree.map(if_fits, carry.params))
        num_finite = _num_finite(loss, carry.params)
        return Result(
            carry.params, carry.state, History(loss, time, num_finite, evaluation, evaluated)
        )

    if bar is None:
        result: Result = jax.jit(train)(*inputs)
    else:
        with bar:
            result = jax.block_until_ready(jax.jit(train)(*inputs))
    return result


class _Carry(NamedTuple):
    params: Any
    state: Any
    versions: Any  # like params with a leading axis of slots; None where no gradient is stale
    report_at: Any  # of the progress bar, or None


def _mean_gradient(gradient: Any, params: Any, step: Step, num_workers: int) -> Any:
    """The mean loss and gradient of a round."""
    batches = step.t * num_workers + jnp.arange(num_workers, dtype=jnp.int32)
    of_workers = jax.vmap(gradient, (None, 0))(params, batches)

    def mean(x: jax.Array) -> jax.Array:
        if step.takes_part is None:
            return jnp.mean(x, 0)
        return jnp.mean(x, 0, where=jnp.expand_dims(step.takes_part, range(1, x.ndim)))

    return jax.tree.map(mean, of_workers)


def _scan(update: Any, carry: Any, steps: Step, evaluate: Any, every: int | None) -> Any:
    """Scans over the steps, in blocks with an evaluation after each.

    Blocks and not a condition in the loop: under vmap that would be evaluated at every step.
    """
    if evaluate is None:
        return (*lax.scan(update, carry, steps), None, None)
    num_updates = steps.t.shape[0]
    every = min(num_updates, every or num_updates)

    def block(carry: Any, steps: Step) -> Any:
        carry, loss = lax.scan(update, carry, steps)
        return carry, (loss, evaluate(carry.params))

    whole = num_updates // every * every
    blocks = jax.tree.map(lambda x: x[:whole].reshape(-1, every, *x.shape[1:]), steps)
    carry, (loss, evaluation) = lax.scan(block, carry, blocks)
    loss, evaluated = loss.reshape(-1), np.arange(every, whole + 1, every)
    if whole < num_updates:
        carry, (last_loss, last) = block(carry, jax.tree.map(lambda x: x[whole:], steps))
        loss, evaluated = jnp.concatenate([loss, last_loss]), np.append(evaluated, num_updates)
        evaluation = jax.tree.map(
            lambda xs, x: jnp.concatenate([xs, jnp.asarray(x)[None]]), evaluation, last
        )
    return carry, loss, evaluation, jnp.asarray(evaluated, jnp.int32)


def _num_finite(loss: jax.Array, params: Any) -> jax.Array:
    """The number of updates before the first whose loss is not finite.

    What an update makes of the parameters shows in the losses that follow, all but the last's.
    """
    finite = jnp.isfinite(loss)
    params_finite = jnp.array([jnp.all(jnp.isfinite(p)) for p in jax.tree.leaves(params)]).all()
    at_the_end = loss.shape[0] - 1 + params_finite.astype(jnp.int32)
    return jnp.where(finite.all(), at_the_end, jnp.argmin(finite).astype(jnp.int32))
