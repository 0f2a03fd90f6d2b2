"""`scale_by_staleness` and `scale_by_gap`: answers to staleness that shrink the step instead."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_dcasgd import _arguments, _stale_params, _trees
from optax_dcasgd._arguments import ScalarOrSchedule
from optax_dcasgd._compensation import at_count, complement


def scale_by_staleness(power: float | jax.Array = 1.0) -> optax.GradientTransformationExtraArgs:
    r"""Divides each update by :math:`\max(\tau, 1)^p`, where :math:`\tau` is its age in updates.

    Args:
      power: :math:`p \ge 0`. 1 is the staleness-aware SGD of Zhang et al.; 0 changes nothing.

    Returns:
      A stateless transformation. ``update`` needs ``staleness``: a number, an array of shape (), or
      a prefix tree of them over the updates (`delay_gradients` with a tree passes one). The dtypes
      of the updates stay as they are.

    Raises:
      ValueError: If ``power`` is negative; in ``update``, if ``staleness`` is missing or does not
        fit the updates.
      TypeError: If ``power`` is no number.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax_dcasgd import scale_by_staleness
      >>> tx = optax.chain(scale_by_staleness(), optax.sgd(1.0))
      >>> params = jnp.array([1.0, 2.0])
      >>> updates, _ = tx.update(params, tx.init(params), params, staleness=4)
      >>> print(updates)
      [-0.25 -0.5 ]

    References:
      Zhang et al., `Staleness-aware Async-SGD for Distributed Deep Learning
      <https://arxiv.org/abs/1511.05950>`_, 2016, equation 6.
    """
    _arguments.check_scalar("power", power, minimum=0.0, schedule=False)

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        *,
        staleness: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params, extra_args
        if staleness is None:
            raise ValueError(
                "staleness is required: pass update(..., staleness=tau), the number of updates "
                "that were applied since the gradient's parameters were read, or wrap the "
                "optimizer in delay_gradients with a delay above 0, which passes it."
            )

        def leaf(update: Any, age: Any) -> Any:
            dtype = _trees.compute_dtype(update)
            real = _trees.real_dtype(dtype)
            factor = jnp.maximum(jnp.asarray(age, real), 1) ** jnp.asarray(power, real)
            return (jnp.asarray(update, dtype) / factor).astype(_trees.dtype_of(update))

        for path, age in jax.tree_util.tree_flatten_with_path(staleness)[0]:
            name = f"staleness{jax.tree_util.keystr(path)}"
            _arguments.check_scalar(name, age, minimum=0.0, schedule=False)
        ages = _trees.broadcast_prefix("staleness", staleness, updates)
        return jax.tree.map(leaf, updates, ages), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


class _Hyperparameters(NamedTuple):
    decay: Any
    eps: Any


class ScaleByGapState(NamedTuple):
    """State of `scale_by_gap`."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32: updates so far
    prev_params: Any  # like params: the parameters of the previous update
    nu: Any  # like params, real, at least float32: decaying sum of the squared steps taken
    weight: jax.Array  # shape=(), float: the sum of their weights, 1 in the end
    backups: Any = None  # with num_workers=M, like params with one more axis in front
    last_worker: jax.Array | None = None  # shape=(), dtype=int32; M for none


def scale_by_gap(
    decay: ScalarOrSchedule = 0.999,
    *,
    eps: ScalarOrSchedule = 1e-8,
    num_workers: int | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gap-Aware: divides each component by how many typical steps lie between w_s and w.

    .. math::
      \tilde g = g \,/\, \bigl(1 + |w - w_s| / (C + \varepsilon)\bigr), \qquad
      C = \sqrt{\nu_t / (1 - \rho^t)}, \quad
      \nu_t = \rho\,\nu_{t-1} + (1 - \rho)\,(w_t - w_{t-1})^2

    The steps :math:`w_t - w_{t-1}` are those really taken, whatever stands behind this
    transformation in the chain. :math:`w_s` is ``stale_params``, or the backup of ``worker``, or
    the parameters of the previous call, as in `add_delay_compensation`. The first update passes
    unchanged: no step is known yet.

    Args:
      decay: :math:`\rho` in [0, 1), a float or a schedule. (``optax.inject_hyperparams`` needs
        ``hyperparam_dtype=jnp.float32`` for bfloat16 parameters: 0.999 is 1 in bfloat16.)
      eps: :math:`\varepsilon \ge 0`, a float or a schedule.
      num_workers: The number of workers M, or None.
      accumulator_dtype: The dtype of :math:`\nu`; by default float32 or that of the parameter,
        whichever is wider.

    Returns:
      A transformation whose updates have the dtype of their parameter. Put it before the
      optimizer. ``update`` takes ``stale_params`` and ``worker`` as `add_delay_compensation` does.

    Raises:
      ValueError: If an argument is out of range; in ``update``, as `add_delay_compensation`.
      TypeError: If an argument has no legal type, or a parameter is an integer array.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax_dcasgd import scale_by_gap
      >>> tx = optax.chain(scale_by_gap(), optax.sgd(0.1))
      >>> params = jnp.array([1.0, 2.0])
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> updates, state = tx.update(params, state, params)  # one typical step old: halved
      >>> print(params, updates)
      [0.9 1.8] [-0.045 -0.09 ]

    References:
      Barkai et al., `Gap-Aware Mitigation of Gradient Staleness
      <https://arxiv.org/abs/1909.10802>`_, 2020.
    """
    _arguments.check_scalar("decay", decay, minimum=0.0, below=1.0)
    _arguments.check_scalar("eps", eps, minimum=0.0)
    _stale_params.check_num_workers(num_workers, "params")
    accumulator_dtype = _arguments.check_accumulator_dtype(accumulator_dtype)

    def init_fn(params: optax.Params) -> ScaleByGapState:
        _trees.check_params(params)
        backups, last_worker = _stale_params.init(
            params, remember=num_workers is not None, num_workers=num_workers
        )
        return ScaleByGapState(
            count=jnp.zeros((), jnp.int32),
            prev_params=_trees.copy(params),
            nu=_trees.init_accumulator(params, accumulator_dtype, real=True),
            weight=jnp.zeros((), float),
            backups=backups,
            last_worker=last_worker,
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByGapState,
        params: optax.Params | None = None,
        *,
        stale_params: optax.Params | None = None,
        worker: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByGapState]:
        del extra_args
        _trees.check_updates(updates, params)
        last = _stale_params.Memory(state.count, state.prev_params)
        step_from, prev_params, _ = _stale_params.look_up(
            params, last, num_workers=None, stale_params=None, worker=None
        )
        if stale_params is None and num_workers is None:
            stale_params = step_from
        of_workers = _stale_params.Memory(state.count, state.backups, state.last_worker)
        stale, backups, last_worker = _stale_params.look_up(
            params, of_workers, num_workers=num_workers, stale_params=stale_params, worker=worker
        )
        rho, eps_now = at_count(_Hyperparameters(decay, eps), state.count)
        first = state.count == 0

        def mean_square(param: Any, step_from: Any, nu: Any) -> Any:
            dtype = _trees.compute_dtype(param, nu)
            real = _trees.real_dtype(dtype)
            step = jnp.abs(jnp.asarray(param, dtype) - jnp.asarray(step_from, dtype))
            new_nu = jnp.asarray(rho, real) * nu + complement(rho, real) * jnp.square(step)
            return new_nu.astype(nu.dtype)

        nu = jax.tree.map(mean_square, params, step_from, state.nu)
        # 1 − ρ^t, for a ρ that changes too.
        weight = jnp.asarray(rho, state.weight.dtype) * state.weight
        weight = jnp.where(first, 0, weight + complement(rho, weight.dtype))

        def leaf(grad: Any, param: Any, stale: Any, nu: Any) -> tuple[Any]:
            if grad is None:
                return (None,)
            dtype = _trees.compute_dtype(grad, param, nu)
            real = _trees.real_dtype(dtype)
            distance = jnp.abs(jnp.asarray(param, dtype) - jnp.asarray(stale, dtype))
            # Where w never moved ν is zero (so is the weight on the first update), and the root has
            # no derivative there.
            moved = nu > 0
            square = jnp.where(moved, nu.astype(real) / jnp.where(moved, weight.astype(real), 1), 1)
            typical_step = jnp.where(moved, jnp.sqrt(square), 0)
            # On the first update, and where w never moved, 0/0 would stand there if ε is 0.
            has_gap = ~first & (distance != 0)
            scale = typical_step + jnp.asarray(eps_now, real)
            gap = jnp.where(has_gap, 1 + distance / jnp.where(has_gap, scale, 1), 1)
            return ((jnp.asarray(grad, dtype) / gap).astype(_trees.dtype_of(param)),)

        (updates,) = _trees.map_leaves(leaf, 1, updates, params, stale, nu)
        return updates, ScaleByGapState(
            count=optax.safe_increment(state.count),
            prev_params=prev_params,
            nu=nu,
            weight=weight,
            backups=backups,
            last_worker=last_worker,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
