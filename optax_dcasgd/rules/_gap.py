"""`scale_by_gap`: Gap-Aware, a shorter step where the parameters have moved far."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_dcasgd import _arguments, _checks, _stale_params, _trees
from optax_dcasgd._arguments import ScalarOrSchedule
from optax_dcasgd._hyperparameters import Hyperparameters, at_count, cast
from optax_dcasgd._mathematics import moving_average
from optax_dcasgd.rules._driver import apply


class ScaleByGapState(NamedTuple):
    """State of `scale_by_gap`."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32: updates so far
    nu: Any  # like params, real, at least float32: decaying sum of the squared steps taken
    prev_params: Any  # like params: the parameters of the previous update, to know the last step
    weight: jax.Array  # shape=(), float: the sum of the weights in nu, 1 in the end


def scale_by_gap(
    decay: ScalarOrSchedule = 0.999,
    *,
    eps: ScalarOrSchedule = 1e-8,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gap-Aware: divides each component by how many typical steps lie between w_s and w.

    .. math::
      \tilde g = g \,/\, \bigl(1 + |w - w_s| / (C + \varepsilon)\bigr), \qquad
      C = \sqrt{\nu_t / (1 - \rho^t)}, \quad
      \nu_t = \rho\,\nu_{t-1} + (1 - \rho)\,(w_t - w_{t-1})^2

    The steps :math:`w_t - w_{t-1}` are those really taken, whatever stands behind this
    transformation in the chain; it keeps a copy of the parameters to see them. :math:`w_s` is
    ``stale_params``, as for `add_delay_compensation`. The first update passes unchanged: no step is
    known yet.

    Args:
      decay: :math:`\rho` in [0, 1), a float or a schedule. (``optax.inject_hyperparams`` needs
        ``hyperparam_dtype=jnp.float32`` for bfloat16 parameters: 0.999 is 1 in bfloat16, and a
        decay of 1 is refused.)
      eps: :math:`\varepsilon \ge 0`, a float or a schedule.
      accumulator_dtype: The dtype of :math:`\nu`; by default float32 or that of the parameter,
        whichever is wider.

    Returns:
      A transformation with state `ScaleByGapState` whose updates have the dtype of their parameter.
      ``update`` needs ``stale_params``, as that of `add_delay_compensation` does.

    Raises:
      ValueError: If an argument is out of range; in ``update``, as `add_delay_compensation`.
      TypeError: If an argument has no legal type, or a parameter is an integer array.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax_dcasgd import remember_params, scale_by_gap
      >>> tx = remember_params(optax.chain(scale_by_gap(), optax.sgd(0.1)))
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
    hyperparams = {"decay": decay, "eps": eps}
    _arguments.check_scalar("decay", decay, minimum=0.0, below=1.0)
    _arguments.check_scalar("eps", eps, minimum=0.0)
    accumulator_dtype = _arguments.check_accumulator_dtype(accumulator_dtype)

    def init_fn(params: optax.Params) -> ScaleByGapState:
        _checks.check_params(params)
        return ScaleByGapState(
            count=jnp.zeros((), jnp.int32),
            nu=_trees.init_accumulator(params, accumulator_dtype, real=True),
            prev_params=_trees.copy(params),
            weight=jnp.zeros((), float),
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByGapState,
        params: optax.Params | None = None,
        *,
        stale_params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByGapState]:
        _checks.check_updates(updates, params)
        _checks.check_state(params, state.nu)
        _checks.check_state(params, state.prev_params, same_dtype=True)
        stale_params = _stale_params.check(stale_params, params, state, extra_args.get("staleness"))
        now = at_count(hyperparams, state.count)
        first = state.count == 0

        def observe(param: Any, prev: Any, nu: Any) -> Any:
            real = _trees.real_dtype(_trees.compute_dtype(param, nu))
            return _observe(first, param, prev, nu, numbers_in(real))

        numbers_in = functools.cache(lambda dtype: cast(now, dtype))
        nu = jax.tree.map(observe, params, state.prev_params, state.nu)
        numbers = numbers_in(state.weight.dtype)  # 1 − ρ^t, for a ρ that changes too
        weight = jnp.where(first, 0, numbers["decay"] * state.weight + numbers["1 - decay"])
        updates, _ = apply(
            _divide_by_gap, updates, params, stale_params, nu, now | {"weight": weight}
        )
        return updates, ScaleByGapState(
            count=optax.safe_increment(state.count),
            nu=nu,
            prev_params=_trees.renew(state.count, params, state.prev_params),
            weight=weight,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@jax.jit  # as in the driver of rules
def _observe(first: Any, param: Any, prev: Any, nu: Any, numbers: Hyperparameters) -> Any:
    """The moving average of the squared steps; the first call sees none."""
    dtype = _trees.compute_dtype(param, nu)
    step = jnp.where(first, 0, jnp.abs(jnp.asarray(param, dtype) - jnp.asarray(prev, dtype)))
    average = moving_average(jnp.square(step), nu.astype(step.dtype), numbers)
    return average.astype(nu.dtype)


def _divide_by_gap(
    grad: jax.Array, delta: jax.Array | None, nu: jax.Array, hyperparams: Hyperparameters
) -> tuple[jax.Array, jax.Array]:
    if delta is None:
        return grad, nu
    distance, weight = jnp.abs(delta), hyperparams["weight"]  # the weight is 0 on the first update
    # Where w never moved ν is zero, and the root has no derivative there.
    moved = nu > 0
    square = jnp.where(moved, nu / jnp.where(moved, weight, 1), 1)
    typical_step = jnp.where(moved, jnp.sqrt(square), 0)
    # On the first update, and where w never moved, 0/0 would stand there if ε is 0.
    has_gap = (weight > 0) & (distance != 0)
    size = typical_step + hyperparams["eps"]
    gap = jnp.where(has_gap, 1 + distance / jnp.where(has_gap, size, 1), 1)
    return grad / gap.astype(grad.dtype), nu
