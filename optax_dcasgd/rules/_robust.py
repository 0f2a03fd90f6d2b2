"""`robust_delay_compensation`: compensation and step scaling that need no tuning."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_dcasgd import _arguments, _checks
from optax_dcasgd._arguments import ScalarOrSchedule
from optax_dcasgd._hyperparameters import Hyperparameters
from optax_dcasgd._mathematics import abs_squared, moving_average, scale
from optax_dcasgd.rules._driver import transformation
from optax_dcasgd.rules._staleness import scale_by_staleness


def robust_delay_compensation(
    lamda: ScalarOrSchedule = 8.0,
    *,
    decay: ScalarOrSchedule = 0.95,
    max_norm: ScalarOrSchedule | None = 2.0,
    power: ScalarOrSchedule = 0.25,
    eps: ScalarOrSchedule = 1e-12,
    unit_axes: Any = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes training with stale gradients safe without tuning; put it before any optimizer.

    Everything is done unit by unit. A unit :math:`u` is the weights into one neuron or channel: by
    default what a parameter holds at one index of its last axis, as in Flax's ``Dense`` and
    ``Conv``; see ``unit_axes``. (Every component of a vector is a unit, and so is a scalar.) For a
    gradient :math:`g` computed at :math:`w_s` and applied at :math:`w`, :math:`\tau` updates later,

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

    :math:`w_s` and :math:`\tau` come from a source around the whole chain (`remember_params`,
    `delay_gradients`, ...) or from who calls ``update``.

    Args:
      lamda: :math:`\lambda_0 \ge 0`, a float or a schedule of this transformation's own count.
      decay: :math:`m` in [0, 1), or a schedule. (``optax.inject_hyperparams`` needs
        ``hyperparam_dtype=jnp.float32`` for bfloat16 parameters: 0.999 is 1 in bfloat16, and a
        decay of 1 is refused.)
      max_norm: :math:`c > 0`, or None for no limit, or a schedule.
      power: :math:`p \ge 0`, or a schedule; 0 leaves the step its size.
      eps: :math:`\varepsilon \ge 0`, or a schedule.
      unit_axes: Which axes of a parameter index its units; all others are summed over. None for the
        last axis; an int or a tuple of ints (negative ones count from the end; ``()`` makes a whole
        parameter one unit); a prefix tree of them over the parameters (a tuple of ints is axes,
        not a node of that tree); or a function ``(path, parameter) -> None, an int or a tuple``,
        with the path of ``jax.tree_util.tree_map_with_path``. None is right for Flax and Haiku, but
        for ``(-2, -1)`` for attention kernels of shape (embed, heads, head_dim) and ``(0, -1)`` for
        layers stacked along a first axis, as by ``nn.scan``. Equinox, which stores (out, in), takes
        ``0``, and ``-1`` for embeddings. ``docs/units.md`` has a table of layers.
      accumulator_dtype: The dtype of :math:`\nu`; by default float32 or that of the parameter,
        whichever is wider.

    Returns:
      A transformation whose updates have the dtype of their parameter. ``update`` needs
      ``stale_params`` as `add_delay_compensation` does, and ``staleness`` as `scale_by_staleness`
      does. Its state is that of ``optax.chain(compensation, scale_by_staleness(power))``; the
      :math:`\nu` of the compensation has one number a unit.

    Raises:
      ValueError: If an argument is out of range; in ``update``, if ``params``, ``stale_params`` or
        ``staleness`` is missing, or a tree does not fit ``params`` (the message names the leaf); in
        both, if a parameter has no such axis as ``unit_axes`` says.
      TypeError: If an argument has no legal type, or a parameter is an integer array.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax_dcasgd import robust_delay_compensation
      >>> tx = optax.chain(robust_delay_compensation(decay=0.0), optax.sgd(1.0))
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
    _arguments.check_scalar("lamda", lamda, minimum=0.0)
    _arguments.check_scalar("decay", decay, minimum=0.0, below=1.0)
    _arguments.check_scalar("max_norm", max_norm, above=0.0, optional=True)
    _arguments.check_scalar("eps", eps, minimum=0.0)
    if not callable(unit_axes):
        for path, axes in jax.tree_util.tree_flatten_with_path(unit_axes, is_leaf=_is_axes)[0]:
            _check_axes(f"unit_axes{jax.tree_util.keystr(path)}", axes)
    compensation = transformation(
        _shrink,
        {"lamda": lamda, "decay": decay, "max_norm": max_norm, "eps": eps},
        nu_like=lambda params: _units(params, unit_axes),
        accumulator_dtype=_arguments.check_accumulator_dtype(accumulator_dtype),
    )
    return optax.chain(compensation, scale_by_staleness(power))


def _shrink(
    grad: jax.Array, delta: jax.Array | None, nu: jax.Array, hyperparams: Hyperparameters
) -> tuple[jax.Array, jax.Array]:
    """The formula of `robust_delay_compensation` without 1/τ^p; ν has size 1 where it sums."""
    axes = tuple(i for i, n in enumerate(nu.shape) if n == 1)
    squared = jnp.sum(abs_squared(grad), axis=axes, keepdims=True)
    nu = moving_average(squared, nu, hyperparams)
    square = nu + hyperparams["eps"]
    # Of zero it has no derivative. Where it is zero, so is the gradient, and the root is not used.
    root = jnp.sqrt(jnp.where(square == 0, 1, square))
    factor = jnp.ones_like(root)
    if delta is not None:
        along = jnp.sum((grad.conj() * delta).real, axis=axes, keepdims=True)
        moved = jnp.any(delta != 0, axis=axes, keepdims=True) & (along != 0)
        factor = jnp.where(moved, jnp.clip(1 + hyperparams["lamda"] * along / root, 0, 1), 1)
    if hyperparams["max_norm"] is not None:
        norm = jnp.sqrt(jnp.where(squared > 0, squared, 1))
        largest = hyperparams["max_norm"] * root
        factor *= jnp.where((squared > 0) & (norm > largest), largest / norm, 1)
    return jnp.where(factor == 1, grad, scale(grad, factor)), nu


def _is_axes(x: Any) -> bool:
    """Whether this is a leaf of ``unit_axes``, rather than a node of a tree of them."""
    return x is None or (type(x) is tuple and all(isinstance(axis, int | np.integer) for axis in x))


def _check_axes(name: str, axes: Any) -> tuple[int, ...]:
    """Returns ``unit_axes`` of one parameter as a tuple."""
    if axes is None:
        return (-1,)
    for axis in axes if isinstance(axes, tuple) else (axes,):
        _arguments.check_integer(name, axis)
    return axes if isinstance(axes, tuple) else (axes,)


def _units(params: Any, unit_axes: Any) -> Any:
    """A tree like the parameters: of their size along ``unit_axes``, of size 1 along the others."""

    def units(path: Any, param: Any, axes: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if callable(unit_axes):
            axes = unit_axes(path, param)
        shape = np.shape(param)
        axes = _check_axes(f"unit_axes of params{name}", axes) if shape else ()
        if not all(-len(shape) <= axis < len(shape) for axis in axes):
            raise ValueError(
                f"unit_axes={axes} of params{name}, but the parameter has shape {shape}. Give its "
                "own axes, as a tree of them or a function of (path, parameter)."
            )
        kept = {axis % len(shape) for axis in axes}
        return np.broadcast_to(np.False_, tuple(n if i in kept else 1 for i, n in enumerate(shape)))

    axes = None if callable(unit_axes) else unit_axes
    trees = _checks.broadcast_prefix("unit_axes", axes, params, _is_axes)
    return jax.tree_util.tree_map_with_path(units, params, trees)
