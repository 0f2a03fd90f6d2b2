"""`transformation`: an Optax transformation from a rule, one function of arrays."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_dcasgd import _checks, _stale_params, _trees
from optax_dcasgd._hyperparameters import Hyperparameters, at_count, cast

# (g, w − w_s or None where it is zero, ν or None, hyperparameters) -> (g̃, ν')
Rule = Callable[[Any, Any, Any, Hyperparameters], tuple[Any, Any]]


class RuleState(NamedTuple):
    """State of a rule."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32: updates so far
    nu: Any  # like params, real, at least float32, of size 1 where a rule sums; None without ν


def transformation(
    rule: Rule,
    hyperparams: Hyperparameters,
    *,
    nu_like: Callable[[Any], Any] | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation that applies a rule to every parameter.

    Args:
      rule: ``rule(g, delta, nu, hyperparams) -> (g̃, nu')`` on arrays of one dtype, at least
        float32. ``delta`` is w − w_s, or None where w_s is known to be w. ``nu`` is real, or None
        without ``nu_like``. The numbers in ``hyperparams`` are scalars of that real dtype; beside
        a "decay" that is not None stands "1 - decay". Give the same function object for each
        transformation that you make, as JAX caches its traces by it.
      hyperparams: Numbers, schedules of this transformation's own count, or None, by name.
      nu_like: None for a rule without ν; or a function from the parameters to a tree like them
        whose leaves have the shape that ν has: the parameter's, or 1 along axes that are summed.
      accumulator_dtype: The dtype of ν; by default float32 or that of the parameter, whichever is
        wider.

    Returns:
      A transformation with state `RuleState` whose updates have the dtype of their parameter. Its
      ``update`` needs ``stale_params`` and ignores other extra arguments. A parameter without a
      gradient (``None``) gets no update.

    Raises:
      ValueError: In ``update``, if ``params`` or ``stale_params`` is missing, or a tree does not
        fit (the message names the leaf).
      TypeError: In ``init``, if a parameter is no floating-point or complex array.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax_dcasgd import remember_params, rules
      >>> def shrink(g, delta, nu, hyperparams):
      ...   if delta is not None:
      ...     g = g / (1 + hyperparams["weight"] * jnp.abs(delta))
      ...   return g, nu
      >>> rule = rules.transformation(shrink, {"weight": 3.0})
      >>> tx = remember_params(optax.chain(rule, optax.sgd(1.0)))
      >>> params = jnp.array([1.0])
      >>> state = tx.init(params)
      >>> for _ in range(2):  # the second gradient is one update old
      ...   updates, state = tx.update(jnp.array([1.0]), state, params)
      ...   params = optax.apply_updates(params, updates)
      ...   print(params)
      [0.]
      [-0.25]
    """

    def init_fn(params: optax.Params) -> RuleState:
        _checks.check_params(params)
        nu = None
        if nu_like is not None:
            zeros = _trees.init_accumulator(params, accumulator_dtype, real=True)
            nu = jax.tree.map(_sum_to, zeros, nu_like(params))
        return RuleState(jnp.zeros((), jnp.int32), nu)

    def update_fn(
        updates: optax.Updates,
        state: RuleState,
        params: optax.Params | None = None,
        *,
        stale_params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RuleState]:
        _checks.check_updates(updates, params)
        _checks.check_mode(state, "nu", "decay", hyperparams.get("decay"), kept=nu_like is not None)
        if nu_like is not None:
            _checks.check_state(nu_like(params), state.nu)
        updates, nu = apply(
            rule,
            updates,
            params,
            _stale_params.check(stale_params, params, state, extra_args.get("staleness")),
            state.nu,
            at_count(hyperparams, state.count),
        )
        return updates, RuleState(optax.safe_increment(state.count), nu)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def apply(
    rule: Rule,
    updates: Any,
    params: Any,
    stale_params: Any,
    nu: Any,
    hyperparams: Hyperparameters,
) -> tuple[Any, Any]:
    """Applies a rule to every parameter that has a gradient, with the numbers of this update.

    Returns:
      The updates, in the dtypes of the parameters, and ν' in that of ν (None without).
    """
    numbers = functools.cache(lambda dtype: cast(hyperparams, dtype))  # once, and not once a leaf

    def one(grad: Any, param: Any, stale: Any, nu: Any) -> tuple[Any, Any]:
        if grad is None:
            return None, nu
        real = _trees.real_dtype(_trees.compute_dtype(grad, param, nu))
        stale = None if stale is param else stale
        new: tuple[Any, Any] = _apply_to_array(rule, grad, param, stale, nu, numbers(real))
        return new

    updates, new_nu = _trees.map_leaves(one, 2, updates, params, stale_params, nu)
    return updates, None if nu is None else new_nu


# Jitted, so that parameters of one shape are traced once; inlined, so that XLA sees no difference.
@functools.partial(jax.jit, static_argnums=0)
def _apply_to_array(
    rule: Rule, grad: Any, param: Any, stale: Any, nu: Any, numbers: Hyperparameters
) -> tuple[Any, Any]:
    dtype = _trees.compute_dtype(grad, param, nu)
    new, new_nu = rule(
        jnp.asarray(grad, dtype),
        None if stale is None else jnp.asarray(param, dtype) - jnp.asarray(stale, dtype),
        None if nu is None else nu.astype(_trees.real_dtype(dtype)),
        numbers,
    )
    new = new.astype(_trees.dtype_of(param))
    return new, None if nu is None else new_nu.astype(nu.dtype)


def _sum_to(zeros: Any, like: Any) -> Any:
    """Zeros of a smaller shape; a sum, so that they are sharded as the parameter's axes are."""
    shape = jnp.shape(like)
    if zeros.shape == shape:
        return zeros
    axes = tuple(i for i, n in enumerate(shape) if n != zeros.shape[i])
    return jnp.sum(zeros, axis=axes, keepdims=True)
