"""`robust`: delay compensation and a staleness-scaled step with settings that need no tuning."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_dcasgd import _arguments, _stale_params, _trees
from optax_dcasgd._arguments import ScalarOrSchedule
from optax_dcasgd._compensation import as_dtype, at_count, complement, difference
from optax_dcasgd._staleness import scale_by_staleness


class _Hyperparameters(NamedTuple):
    lamda: Any
    decay: Any
    max_norm: Any
    eps: Any


class RobustState(NamedTuple):
    """State of the compensation in `robust`; fields that its mode does not need are ``None``."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32: updates so far
    prev_params: Any  # like params, in their dtypes; with num_workers=M one more axis in front
    nu: Any  # one real number a unit, at least float32: the last axis of each parameter
    last_worker: jax.Array | None = None  # shape=(), dtype=int32; M for none


def robust(
    lamda: ScalarOrSchedule = 8.0,
    *,
    decay: ScalarOrSchedule = 0.95,
    max_norm: ScalarOrSchedule | None = 2.0,
    power: float | jax.Array = 0.25,
    eps: ScalarOrSchedule = 1e-12,
    num_workers: int | None = None,
    store: str | None = "params",
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes training with stale gradients safe without tuning; put it before any optimizer.

    Everything is done unit by unit. A unit :math:`u` is what a parameter holds at one index of its
    last axis: in Flax's ``Dense`` and ``Conv`` the weights into one neuron or channel. (Every
    component of a vector is a unit, and so is a scalar.) For a gradient :math:`g` computed at
    :math:`w_s` and applied at :math:`w`, :math:`\tau` updates later,

    .. math::
      \nu_u &\leftarrow m\,\nu_u + (1 - m)\,\|g_u\|^2, \qquad r_u = \sqrt{\nu_u + \varepsilon} \\
      \tilde g_u &= \frac{g_u}{\max(\tau, 1)^p} \;
        \Bigl[1 + \frac{\lambda_0}{r_u}\, g_u^\top (w - w_s)_u\Bigr]_0^1 \;
        \min\Bigl(1, \frac{c\, r_u}{\|g_u\|}\Bigr)

    where :math:`[x]_0^1` limits to the interval. The bracket is DC-ASGD-a with the outer product
    :math:`g_u g_u^\top` kept whole, where Zheng et al. keep only its diagonal, so that it sees the
    components of a unit move together; and it may only shrink a gradient, never reverse or grow it.
    Where :math:`w = w_s` throughout a unit it is left out. The last factor keeps an outlier from
    throwing the parameters far from where the gradients on their way were computed. It acts on
    fresh gradients too; with ``max_norm=None``, a fresh gradient (of age 0 or 1) passes bit for bit
    and one worker trains as without. As :math:`\nu` starts at zero, the first five or so updates
    are shortened.

    What it buys, on the digits of ``benchmarks/robust_search.py`` with 4 to 256 workers: with these
    defaults 89 of 91 cells (workers × learning rate, without momentum and with 0.9; 8 seeds) end
    under 5 % test error, where plain asynchronous SGD does in 24. The price: at learning rates that
    were safe anyway it is slower, as its steps are shorter.

    Where :math:`w_s` comes from is as for `add_delay_compensation`: ``stale_params``, else the
    backup of ``worker``, else the parameters of the previous call.

    Args:
      lamda: :math:`\lambda_0 \ge 0`, a float or a schedule of this transformation's own count.
      decay: :math:`m` in [0, 1), or a schedule.
      max_norm: :math:`c > 0`, or None for no limit, or a schedule.
      power: :math:`p \ge 0`; 0 leaves the step its size.
      eps: :math:`\varepsilon \ge 0`, or a schedule.
      num_workers: The number of workers M, or None. The state keeps M copies of the parameters.
      store: ``"params"`` to remember parameters as needed, or None, and then ``stale_params`` is
        required.
      accumulator_dtype: The dtype of :math:`\nu`; by default float32 or that of the parameter,
        whichever is wider.

    Returns:
      A transformation whose updates have the dtype of their parameter. ``update`` needs
      ``staleness`` as `scale_by_staleness` does, and takes ``stale_params`` and ``worker`` as
      `add_delay_compensation` does. Its state is that of
      ``optax.chain(compensation, scale_by_staleness(power))``.

    Raises:
      ValueError: If an argument is out of range; in ``update``, if ``params`` or ``staleness`` is
        missing, if ``stale_params`` or ``worker`` is needed and missing, or if a tree does not fit
        ``params`` (the message names the leaf).
      TypeError: If an argument has no legal type, or a parameter is an integer array.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax_dcasgd import robust
      >>> tx = optax.chain(robust(decay=0.0, store=None), optax.sgd(1.0))
      >>> params = jnp.array([[1.0, 1.0], [1.0, 1.0]])  # the columns are two neurons
      >>> state = tx.init(params)
      >>> stale_params = params + jnp.array([[0.2, 0.0], [0.2, 0.0]])  # one has moved since
      >>> grads = jnp.array([[3.0, 3.0], [4.0, 4.0]])
      >>> updates, state = tx.update(grads, state, params, stale_params=stale_params, staleness=1)
      >>> print(updates)  # and far enough downhill: 1 - 8 · 1.4 / 5 < 0
      [[-0. -3.]
       [-0. -4.]]

    References:
      Zheng et al., `Asynchronous Stochastic Gradient Descent with Delay Compensation
      <https://arxiv.org/abs/1609.08326>`_, 2017; Zhang et al., `Staleness-aware Async-SGD for
      Distributed Deep Learning <https://arxiv.org/abs/1511.05950>`_, 2016.
    """
    hyperparams = _Hyperparameters(lamda, decay, max_norm, eps)
    _arguments.check_scalar("lamda", lamda, minimum=0.0)
    _arguments.check_scalar("decay", decay, minimum=0.0, below=1.0)
    _arguments.check_scalar("max_norm", max_norm, above=0.0, optional=True)
    _arguments.check_scalar("power", power, minimum=0.0, schedule=False)
    _arguments.check_scalar("eps", eps, minimum=0.0)
    _arguments.check_choice("store", store, ("params", None))
    _stale_params.check_num_workers(num_workers, store)
    accumulator_dtype = _arguments.check_accumulator_dtype(accumulator_dtype)

    def init_fn(params: optax.Params) -> RobustState:
        _trees.check_params(params)
        prev_params, last_worker = _stale_params.init(
            params, remember=store is not None, num_workers=num_workers
        )
        zeros = _trees.init_accumulator(params, accumulator_dtype, real=True)
        return RobustState(
            count=jnp.zeros((), jnp.int32),
            prev_params=prev_params,
            # A sum, and not zeros of that shape, is sharded as the parameter's last axis is.
            nu=jax.tree.map(_sum_units, zeros),
            last_worker=last_worker,
        )

    def update_fn(
        updates: optax.Updates,
        state: RobustState,
        params: optax.Params | None = None,
        *,
        stale_params: optax.Params | None = None,
        worker: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RobustState]:
        del extra_args
        _trees.check_updates(updates, params)
        _trees.check_mode(state, "prev_params", "store", store, kept=store is not None)
        _trees.check_state(jax.tree.map(_units_of, params), state.nu)
        stale, prev_params, last_worker = _stale_params.look_up(
            params, state, num_workers=num_workers, stale_params=stale_params, worker=worker
        )
        now = at_count(hyperparams, state.count)

        def leaf(grad: Any, param: Any, stale: Any, nu: Any) -> tuple[Any, Any]:
            if grad is None:
                return None, nu
            dtype = _trees.compute_dtype(grad, param, nu)
            real = _trees.real_dtype(dtype)
            shrunk, new_nu = _shrink(
                jnp.asarray(grad, dtype), difference(param, stale, dtype), nu.astype(real), now
            )
            return shrunk.astype(_trees.dtype_of(param)), new_nu.astype(nu.dtype)

        updates, nu = _trees.map_leaves(leaf, 2, updates, params, stale, state.nu)
        return updates, RobustState(
            count=optax.safe_increment(state.count),
            prev_params=prev_params,
            nu=nu,
            last_worker=last_worker,
        )

    compensation = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return optax.chain(compensation, scale_by_staleness(power))


def _shrink(
    grad: jax.Array, delta: jax.Array | None, nu: jax.Array, hyperparams: _Hyperparameters
) -> tuple[jax.Array, jax.Array]:
    """The formula of `robust` without 1/τ^p, on arrays of one dtype; returns ν too."""
    lamda, decay, max_norm, eps = as_dtype(hyperparams, nu.dtype)
    squared = _sum_units(grad.real**2 + grad.imag**2 if jnp.iscomplexobj(grad) else grad**2)
    nu = decay * nu + complement(hyperparams.decay, nu.dtype) * squared
    square = nu + eps
    # Of zero it has no derivative. Where it is zero, so is the gradient, and the root is not used.
    root = jnp.sqrt(jnp.where(square == 0, 1, square))
    factor = jnp.ones_like(root)
    if delta is not None:
        along = _sum_units((grad.conj() * delta).real)
        moved = jnp.any(delta != 0, axis=tuple(range(delta.ndim - 1))) & (along != 0)
        factor = jnp.where(moved, jnp.clip(1 + lamda * along / root, 0, 1), 1)
    if max_norm is not None:
        norm, largest = jnp.sqrt(jnp.where(squared > 0, squared, 1)), max_norm * root
        factor *= jnp.where((squared > 0) & (norm > largest), largest / norm, 1)
    factor = jnp.expand_dims(factor, range(grad.ndim - factor.ndim))
    return jnp.where(factor == 1, grad, grad * factor), nu


def _sum_units(x: jax.Array) -> jax.Array:
    """Sums over all axes but the last."""
    return jnp.sum(x, axis=tuple(range(x.ndim - 1)))


def _units_of(param: Any) -> Any:
    """Something of the shape that ν has for this parameter."""
    return np.broadcast_to(np.False_, jnp.shape(param)[-1:])
