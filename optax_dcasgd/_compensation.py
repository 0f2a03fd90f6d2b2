"""The mathematics of delay compensation, and `add_delay_compensation`.

A gradient ``g`` computed at stale parameters ``w_s`` is applied at ``w``. To first order, with the
outer product of the gradient for the Hessian and only its diagonal kept,

    g̃ = g + λ_t ⊙ g ⊙ g ⊙ (w − w_s)                    Zheng et al., arXiv 1609.08326, eq. 10
    λ_t = λ0                                            DC-ASGD-c
    λ_t = λ0 / sqrt(ν_t + ε),  ν_t = m·ν_{t−1} + (1−m)·g⊙g   DC-ASGD-a, eq. 14
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_dcasgd import _arguments, _stale_params, _trees
from optax_dcasgd._arguments import ScalarOrSchedule


class Lambda(NamedTuple):
    """What λ is: the hyperparameters of the compensation alone, scalars or schedules."""

    lamda: Any  # λ0
    decay: Any  # m of DC-ASGD-a, or None for DC-ASGD-c
    eps: Any  # ε
    clip: Any  # bound on |compensation| / |g|, or None


class Coefficients(NamedTuple):
    """The hyperparameters of one update as the formula takes them: scalars of one real dtype."""

    lamda: Any
    decay: Any  # None for DC-ASGD-c
    complement: Any  # 1 − m; None for DC-ASGD-c
    eps: Any
    clip: Any  # None without one


def check_lambda(hyperparams: Lambda) -> None:
    """Checks the arguments that every delay-compensating transformation shares."""
    _arguments.check_scalar("lamda", hyperparams.lamda, minimum=0.0)
    _arguments.check_scalar("decay", hyperparams.decay, minimum=0.0, below=1.0, optional=True)
    _arguments.check_scalar("eps", hyperparams.eps, minimum=0.0)
    _arguments.check_scalar("clip", hyperparams.clip, minimum=0.0, optional=True)


def at_count(hyperparams: Any, count: jax.Array) -> Any:
    """Evaluates the schedules in a NamedTuple of hyperparameters at an update count.

    Raises:
      ValueError: Names the schedule that does not return a number.
    """

    def value(name: str, hyperparam: Any) -> Any:
        if not callable(hyperparam):
            return hyperparam
        now = hyperparam(count)
        if now is None or np.shape(now) != ():
            raise ValueError(f"{name} is a schedule and must return a scalar; it returned {now!r}.")
        return now

    return type(hyperparams)(*map(value, hyperparams._fields, hyperparams))


def as_dtype(hyperparams: Any, dtype: Any) -> Any:
    """Casts a NamedTuple of scalars to one real dtype; ``None`` stays."""
    return type(hyperparams)(*(None if h is None else jnp.asarray(h, dtype) for h in hyperparams))


def complement(decay: Any, dtype: Any) -> jax.Array:
    """Returns 1 − decay, exact before it is rounded to a real dtype.

    With a decay that is rounded first, 1 − 0.999 in float32 is off by 1e-5, and ν with it for good.
    """
    if isinstance(decay, jax.Array):
        return 1 - decay.astype(dtype)
    return jnp.asarray(1 - float(decay), dtype)


def coefficients(hyperparams: Lambda, dtype: Any) -> Coefficients:
    """Casts the hyperparameters of one update to a real dtype, each rounded once."""
    lamda, decay, eps, clip = as_dtype(hyperparams, dtype)
    rest = None if decay is None else complement(hyperparams.decay, dtype)
    return Coefficients(lamda, decay, rest, eps, clip)


def compensate(
    grad: jax.Array, delta: jax.Array | None, nu: jax.Array | None, coefficients: Coefficients
) -> tuple[jax.Array, jax.Array | None]:
    """The formula at the top of this file, elementwise on arrays of one dtype.

    For complex numbers g⊙g is |g|². Where λ, ``w − w_s`` or ``grad`` is zero the result is ``grad``
    to the bit, also a −0, an infinity, or a value whose square overflows. (By selection and not by
    arithmetic: −0 + 0 is 0, and ∞·0 is NaN.)

    Args:
      grad: g.
      delta: w − w_s, or None where it is known to be zero.
      nu: ν_{t−1}, real, or None for DC-ASGD-c.
      coefficients: Scalars, of the real dtype that belongs to that of ``grad``.

    Returns:
      g̃ and ν_t.
    """
    lamda, decay, rest, eps, clip = coefficients
    if nu is not None:
        nu = decay * nu + rest * _abs_squared(grad)
    if delta is None:
        return grad, nu
    # For real g the sign may stay in: g·(λΔ·g). |g|·(λΔ·|g|) is what a complex g needs. Either way
    # g² itself, which overflows or underflows long before g does, is formed for ν alone.
    magnitude = jnp.abs(grad) if jnp.iscomplexobj(grad) else grad
    unchanged = (delta == 0) | (lamda == 0)
    if nu is not None:
        unchanged |= grad == 0
        square = nu + eps  # zero where no gradient was ever other than zero, and ε is zero too
        lamda = lamda * lax.rsqrt(jnp.where(square == 0, 1, square))
    scaled = lamda * delta
    relative = scaled * magnitude  # compensation / g, elementwise
    if clip is not None:
        relative = _limit(relative, clip)
    return jnp.where(unchanged, grad, grad + magnitude * relative), nu


def difference(param: Any, stale: Any, dtype: Any) -> jax.Array | None:
    """The difference w − w_s in the given dtype; None if they are one and the same array."""
    if stale is param:
        return None
    return jnp.asarray(param, dtype) - jnp.asarray(stale, dtype)


def _abs_squared(x: jax.Array) -> jax.Array:
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


def _limit(x: jax.Array, bound: jax.Array) -> jax.Array:
    if not jnp.iscomplexobj(x):
        return jnp.clip(x, -bound, bound)
    size = jnp.abs(x)
    outside = size > bound
    # Divided by 1 where it is not used, or the derivative there would be 0·∞.
    return jnp.where(outside, x * (bound / jnp.where(outside, size, 1)), x)


class AddDelayCompensationState(NamedTuple):
    """State of `add_delay_compensation`; fields that the chosen mode does not need are ``None``."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32: updates so far
    prev_params: Any  # like params, in their dtypes; with num_workers=M one more axis in front
    nu: Any  # like params, real, at least float32
    last_worker: jax.Array | None = None  # shape=(), dtype=int32; M for none


def add_delay_compensation(
    lamda: ScalarOrSchedule = 0.04,
    *,
    decay: ScalarOrSchedule | None = None,
    eps: ScalarOrSchedule = 1e-7,
    clip: ScalarOrSchedule | None = None,
    num_workers: int | None = None,
    store: str | None = "params",
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Corrects a stale gradient to first order; put it before any Optax optimizer.

    For a gradient :math:`g` computed at :math:`w_s` and applied at :math:`w`,

    .. math::
      \tilde g = g + \lambda_t \odot g \odot g \odot (w - w_s), \qquad
      \lambda_t = \lambda_0 \;\text{(DC-ASGD-c)} \;\text{or}\;
      \lambda_0 / \sqrt{\nu_t + \varepsilon} \;\text{(DC-ASGD-a)}, \quad
      \nu_t = m\,\nu_{t-1} + (1 - m)\,g \odot g .

    Where :math:`w_s` comes from, in this order:

    1. ``update(..., stale_params=tree)``: the caller knows. With ``store=None`` nothing is
       remembered and this is the only way.
    2. ``update(..., worker=i)`` with ``num_workers=M``: Algorithm 2 of the paper. Worker i computes
       at the parameters as they stood once its own previous update had been applied.
    3. Neither: the parameters of the previous ``update`` call, which is right for gradients that
       are exactly one update old (MXNet's rule).

    On the first call :math:`w_s = w`. Where λ is zero, or :math:`w = w_s`, the gradient passes
    bit for bit (but for its dtype: it is rounded to that of its parameter).

    What is remembered is what ``update`` was called with. If a wrapper such as
    ``optax.apply_if_finite`` keeps a call from reaching it, :math:`w_s` is older than it should be
    once; ``store=None`` with ``stale_params`` has no such memory.

    Args:
      lamda: :math:`\lambda_0 \ge 0`, a float or a schedule of this transformation's own count. The
        gradient of a mean over B samples makes :math:`g^2` about 1/B of the Fisher diagonal, so the
        λ of DC-ASGD-c that fits grows with B.
      decay: :math:`m` in [0, 1) of DC-ASGD-a, or None for DC-ASGD-c. Or a schedule.
      eps: :math:`\varepsilon`, inside the square root. Only DC-ASGD-a uses it. Or a schedule.
      clip: None, or the largest :math:`|\tilde g - g| / |g|` of a component; ``clip=1.0`` keeps the
        sign of the gradient. Or a schedule.
      num_workers: The number of workers M, or None. The state keeps M copies of the parameters.
        (``optax.inject_hyperparams`` needs it listed: ``static_args=("num_workers",)``.)
      store: ``"params"`` to remember parameters as the list above needs them, or None. (What
        ``"updates"`` means for `dcasgd` cannot be had here: what stands behind this transformation
        in a chain decides the update.)
      accumulator_dtype: The dtype of ν; by default float32 or that of the parameter, whichever is
        wider.

    Returns:
      A transformation whose updates have the dtype of their parameter. ``update`` takes
      ``stale_params`` (a tree like the parameters) and ``worker`` (an int, or an integer array of
      shape (); a JAX array out of range is clamped to it), and ignores other extra arguments. A
      parameter without a gradient (``None``) gets no update.

    Raises:
      ValueError: If an argument is out of range; in ``update``, if ``params`` is missing, if
        ``stale_params`` or ``worker`` is needed and missing, or if a tree does not fit ``params``
        (the message names the leaf).
      TypeError: If an argument has no legal type, or a parameter is an integer array.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_dcasgd import add_delay_compensation
      >>> tx = optax.chain(add_delay_compensation(0.5, store=None), optax.sgd(0.1))
      >>> stale_params = {"w": jnp.array([1.0, -1.0])}
      >>> params = {"w": jnp.array([1.5, -1.5])}
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(stale_params)
      >>> updates, state = tx.update(grads, state, params, stale_params=stale_params)
      >>> print(updates["w"])  # here as if the gradient were fresh; stale it gives [-0.2  0.2]
      [-0.3  0.3]

    References:
      Zheng et al., `Asynchronous Stochastic Gradient Descent with Delay Compensation
      <https://arxiv.org/abs/1609.08326>`_, 2017: equations 10 and 14, Algorithm 2.
    """
    hyperparams = Lambda(lamda, decay, eps, clip)
    check_lambda(hyperparams)
    if store == "updates":
        raise ValueError(
            "store='updates' is only for dcasgd: what stands behind add_delay_compensation in a "
            "chain decides the update. Use store='params', or store=None with stale_params."
        )
    _arguments.check_choice("store", store, ("params", None))
    _stale_params.check_num_workers(num_workers, store)
    accumulator_dtype = _arguments.check_accumulator_dtype(accumulator_dtype)

    def init_fn(params: optax.Params) -> AddDelayCompensationState:
        _trees.check_params(params)
        prev_params, last_worker = _stale_params.init(
            params, remember=store is not None, num_workers=num_workers
        )
        return AddDelayCompensationState(
            count=jnp.zeros((), jnp.int32),
            prev_params=prev_params,
            nu=(
                None
                if decay is None
                else _trees.init_accumulator(params, accumulator_dtype, real=True)
            ),
            last_worker=last_worker,
        )

    def update_fn(
        updates: optax.Updates,
        state: AddDelayCompensationState,
        params: optax.Params | None = None,
        *,
        stale_params: optax.Params | None = None,
        worker: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AddDelayCompensationState]:
        del extra_args
        _trees.check_updates(updates, params)
        _trees.check_mode(state, "prev_params", "store", store, kept=store is not None)
        _trees.check_mode(state, "nu", "decay", decay, kept=decay is not None)
        _trees.check_state(params, state.nu)
        stale, prev_params, last_worker = _stale_params.look_up(
            params, state, num_workers=num_workers, stale_params=stale_params, worker=worker
        )
        now = at_count(hyperparams, state.count)

        def leaf(grad: Any, param: Any, stale: Any, nu: Any) -> tuple[Any, Any]:
            if grad is None:
                return None, nu
            dtype = _trees.compute_dtype(grad, param, nu)
            real = _trees.real_dtype(dtype)
            compensated, new_nu = compensate(
                jnp.asarray(grad, dtype),
                difference(param, stale, dtype),
                None if nu is None else nu.astype(real),
                coefficients(now, real),
            )
            return (
                compensated.astype(_trees.dtype_of(param)),
                None if new_nu is None else new_nu.astype(nu.dtype),
            )

        updates, nu = _trees.map_leaves(leaf, 2, updates, params, stale, state.nu)
        return updates, AddDelayCompensationState(
            count=optax.safe_increment(state.count),
            prev_params=prev_params,
            nu=None if state.nu is None else nu,
            last_worker=last_worker,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
