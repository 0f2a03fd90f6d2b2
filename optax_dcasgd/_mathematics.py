"""The mathematics of delay compensation, elementwise on arrays.

A gradient ``g`` computed at stale parameters ``w_s`` is applied at ``w``. To first order, with the
outer product of the gradient for the Hessian and only its diagonal kept,

    g̃ = g + λ_t ⊙ g ⊙ g ⊙ (w − w_s)                    Zheng et al., arXiv 1609.08326, eq. 10
    λ_t = λ0                                            DC-ASGD-c
    λ_t = λ0 / sqrt(ν_t + ε),  ν_t = m·ν_{t−1} + (1−m)·g⊙g   DC-ASGD-a, eq. 14

`add_delay_compensation` makes a transformation of it; the kernels of `dcasgd` fuse it with the
optimizer's step.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_dcasgd._hyperparameters import Hyperparameters


def compensate(
    grad: jax.Array, delta: jax.Array | None, nu: jax.Array | None, hyperparams: Hyperparameters
) -> tuple[jax.Array, jax.Array | None]:
    """The formula at the top of this file.

    For complex numbers g⊙g is |g|². Where λ, ``w − w_s`` or ``grad`` is zero the result is ``grad``
    to the bit, also a −0, an infinity, or a value whose square overflows. (By selection and not by
    arithmetic: −0 + 0 is 0, and ∞·0 is NaN.)

    Args:
      grad: g.
      delta: w − w_s, or None where it is known to be zero.
      nu: ν_{t−1}, real, or None for DC-ASGD-c.
      hyperparams: lamda, decay, 1 - decay, eps and clip: scalars of the real dtype that belongs to
        that of ``grad``; ``decay`` is read only with ``nu``, and ``clip`` may be None.

    Returns:
      g̃ and ν_t.
    """
    lamda, clip = hyperparams["lamda"], hyperparams["clip"]
    if nu is not None:
        nu = moving_average(abs_squared(grad), nu, hyperparams)
    if delta is None:
        return grad, nu
    # For real g the sign may stay in: g·(λΔ·g). |g|·(λΔ·|g|) is what a complex g needs. Either way
    # g² itself, which overflows or underflows long before g does, is formed for ν alone.
    magnitude = jnp.abs(grad) if jnp.iscomplexobj(grad) else grad
    unchanged = (delta == 0) | (lamda == 0)
    if nu is not None:
        unchanged |= grad == 0
        square = nu + hyperparams["eps"]  # zero where g and ε have always been zero
        lamda = lamda * lax.rsqrt(jnp.where(square == 0, 1, square))
    relative = scale(scale(delta, lamda), magnitude)  # compensation / g, elementwise
    if clip is not None:
        relative = _limit(relative, clip)
    return jnp.where(unchanged, grad, grad + scale(relative, magnitude)), nu


def moving_average(x: jax.Array, average: jax.Array, hyperparams: Hyperparameters) -> Any:
    """m·average + (1 − m)·x, with ``decay`` for m."""
    return hyperparams["decay"] * average + hyperparams["1 - decay"] * x


def abs_squared(x: jax.Array) -> jax.Array:
    """|x|², real."""
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


def scale(x: jax.Array, factor: Any) -> Any:
    """x·factor for a real factor, also where ``x`` is complex and dtypes are promoted strictly."""
    return x * (factor.astype(x.dtype) if factor.dtype != x.dtype else factor)


def _limit(x: jax.Array, bound: Any) -> jax.Array:
    if not jnp.iscomplexobj(x):
        return jnp.clip(x, -bound, bound)
    size = jnp.abs(x)
    outside = size > bound
    # Divided by 1 where it is not used, or the derivative there would be 0·∞.
    return jnp.where(outside, scale(x, bound / jnp.where(outside, size, 1)), x)
