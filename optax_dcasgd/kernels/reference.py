"""One leaf of the DCASGD update in plain JAX: what every kernel has to compute."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_dcasgd import _trees
from optax_dcasgd._compensation import Lambda, compensate, difference
from optax_dcasgd._stale_params import own_copy


class Hyperparameters(NamedTuple):
    """Everything numeric that `dcasgd` takes: scalars of one update, or schedules over updates."""

    learning_rate: Any
    momentum: Any  # μ, or None: no buffer, or (store="updates") a buffer of the last update alone
    lamda: Any
    decay: Any
    eps: Any
    clip: Any

    @property
    def compensation(self) -> Lambda:
        """The part that says what λ is."""
        return Lambda(self.lamda, self.decay, self.eps, self.clip)


class Leaf(NamedTuple):
    """The results of one leaf: the update, or the new parameter, and the new state."""

    out: Any  # dtype of the parameter
    prev: Any  # dtype of the buffer; None without one
    momentum: Any  # dtype of the buffer; None without one
    nu: Any  # dtype of the buffer; None without one


def leaf(
    grad: jax.Array,
    param: jax.Array,
    stale: jax.Array | None,
    prev: jax.Array | None,
    momentum: jax.Array | None,
    nu: jax.Array | None,
    count: jax.Array,
    hyperparams: Hyperparameters,
    *,
    step: bool,
) -> Leaf:
    """MXNet's rule for one array, in at least float32, in place where its arguments are donated.

        g̃ = g + λ_t·g²·(w − w_s);   mom' = μ·mom − lr·g̃;   w' = w + mom';   prev' = w

    In a donated step w' takes the buffer of w, prev' that of prev, mom' that of mom. XLA writes all
    three in place if whatever reads prev comes before prev' is written, and whatever reads w before
    w' is; where the order is open, it copies w and prev first. Here the order is a matter of data:

        mom'   = ...                     reads w and prev
        prev'  = count ≥ 0 ? w : mom'    after mom'; reads w
        update = count ≥ 0 ? mom' : prev'    after prev'; and w' = w + update, here or by the caller

    The predicate is always true, but only at run time. On a CPU that makes three passes without a
    copy; a TPU fuses all of it into one pass that reads and writes each array once.

    Args:
      grad: g.
      param: w.
      stale: w_s, or None where ``w − w_s`` is the last update and so ``momentum`` is that.
      prev: The buffer that is to hold w for the next update, or None.
      momentum: mom, or None.
      nu: ν of DC-ASGD-a, or None.
      count: The number of updates so far, int32.
      hyperparams: Scalars of this update.
      step: Whether ``out`` is w' (one rounding less than ``w + update``) or the update.
    """
    dtype = _trees.compute_dtype(grad, param, momentum, nu)
    real = _trees.real_dtype(dtype)
    delta = jnp.asarray(momentum, dtype) if stale is None else difference(param, stale, dtype)
    compensated, new_nu = compensate(
        jnp.asarray(grad, dtype),
        delta,
        None if nu is None else nu.astype(real),
        hyperparams.compensation,
    )
    update = -jnp.asarray(hyperparams.learning_rate, real) * compensated
    if hyperparams.momentum is not None and momentum is not None:
        update += jnp.asarray(hyperparams.momentum, real) * momentum.astype(dtype)
    new_momentum = None if momentum is None else update.astype(momentum.dtype)
    base, otherwise = param, jnp.zeros((), dtype)
    if prev is not None:
        prev = own_copy(count, param, update.astype(prev.dtype))
        if step:
            base = prev  # which is w
        else:
            otherwise = prev.astype(dtype)
    update = jnp.where(count >= 0, update, otherwise)
    out = jnp.asarray(base, dtype) + update if step else update
    return Leaf(
        out.astype(_trees.dtype_of(param)),
        prev,
        new_momentum,
        None if nu is None or new_nu is None else new_nu.astype(nu.dtype),
    )
