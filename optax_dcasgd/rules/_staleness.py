"""`scale_by_staleness`: a shorter step for an older gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_dcasgd import _arguments, _checks, _trees
from optax_dcasgd._arguments import ScalarOrSchedule
from optax_dcasgd._hyperparameters import as_dtype, at_count


class ScaleByStalenessState(NamedTuple):
    """State of `scale_by_staleness` where ``power`` is a schedule; else it has none."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32: updates so far


def scale_by_staleness(power: ScalarOrSchedule = 1.0) -> optax.GradientTransformationExtraArgs:
    r"""Divides each update by :math:`\max(\tau, 1)^p`, where :math:`\tau` is its age in updates.

    Args:
      power: :math:`p \ge 0`, a float or a schedule. 1 is the staleness-aware SGD of Zhang et al.; 0
        changes nothing; PipeMare anneals it from 1 to 0 over the first updates.

    Returns:
      A transformation. ``update`` needs ``staleness``: a number, an array of shape (), or a prefix
      tree of them over the updates (`delay_gradients` with a tree passes one). The dtypes of the
      updates stay as they are.

    Raises:
      ValueError: If ``power`` is negative; in ``update``, if ``staleness`` is missing or does not
        fit the updates.
      TypeError: If ``power`` is no number and no schedule.

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
      <https://arxiv.org/abs/1511.05950>`_, 2016, equation 6; Yang et al., `PipeMare: Asynchronous
      Pipeline Parallel DNN Training <https://arxiv.org/abs/1910.05124>`_, 2021, section 3.1.
    """
    _arguments.check_scalar("power", power, minimum=0.0)
    is_schedule = callable(power)

    def init_fn(params: optax.Params) -> Any:
        del params
        if is_schedule:
            return ScaleByStalenessState(jnp.zeros((), jnp.int32))
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        staleness: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        _checks.check_arrays("updates", updates)
        if staleness is None:
            raise ValueError(
                "staleness is required, the number of updates since the parameters of the gradient "
                "were read. Wrap the optimizer in optax_dcasgd.remember_params or delay_gradients, "
                "which pass it, or pass update(..., staleness=tau)."
            )
        for path, age in jax.tree_util.tree_flatten_with_path(staleness)[0]:
            name = f"staleness{jax.tree_util.keystr(path)}"
            _arguments.check_scalar(name, age, minimum=0.0, schedule=False)
        power_now = power
        if is_schedule:
            power_now = at_count({"power": power}, state.count)["power"]
            state = ScaleByStalenessState(optax.safe_increment(state.count))

        def scale(update: Any, age: Any) -> Any:
            real = _trees.real_dtype(_trees.compute_dtype(update))
            return _divide(update, as_dtype(age, real), as_dtype(power_now, real))

        ages = _checks.broadcast_prefix("staleness", staleness, updates)
        return jax.tree.map(scale, updates, ages), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@jax.jit  # as in the driver of rules
def _divide(update: Any, age: Any, power: Any) -> Any:
    dtype = _trees.compute_dtype(update)
    factor = jnp.maximum(age, 1) ** power
    return (jnp.asarray(update, dtype) / factor.astype(dtype)).astype(_trees.dtype_of(update))
