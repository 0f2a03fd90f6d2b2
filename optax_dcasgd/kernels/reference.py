"""One leaf of the DCASGD update in plain JAX: the formula, and what every kernel has to compute."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_dcasgd import _trees
from optax_dcasgd._compensation import Coefficients, Lambda, coefficients, compensate, difference
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


class Scalars(NamedTuple):
    """The hyperparameters of one update as the formula takes them: scalars of one real dtype."""

    learning_rate: Any
    momentum: Any  # None without μ
    compensation: Coefficients


class Operands(NamedTuple):
    """The arrays of one leaf, all of the parameter's shape; ``None`` where the mode has none."""

    grad: Any  # g
    param: Any  # w
    stale: Any  # w_s where the caller knows it; else it is prev, or w − w_s is momentum
    prev: Any  # the buffer that holds the last w, and is to hold this one for the next update
    momentum: Any  # mom
    nu: Any  # ν of DC-ASGD-a

    @property
    def dtype(self) -> Any:
        """The dtype of the arithmetic, at least float32."""
        return _trees.compute_dtype(self.grad, self.param, self.momentum, self.nu)


class Leaf(NamedTuple):
    """The results of one leaf: the update, or the new parameter, and the new state."""

    out: Any  # dtype of the parameter
    prev: Any  # dtype of the buffer; None without one
    momentum: Any  # dtype of the buffer; None without one
    nu: Any  # dtype of the buffer; None without one


def scalars(hyperparams: Hyperparameters, dtype: Any) -> Scalars:
    """Casts the hyperparameters of one update to a real dtype, each rounded once."""
    return Scalars(
        jnp.asarray(hyperparams.learning_rate, dtype),
        None if hyperparams.momentum is None else jnp.asarray(hyperparams.momentum, dtype),
        coefficients(hyperparams.compensation, dtype),
    )


def formula(operands: Operands, first: Any, scalars: Scalars) -> tuple[jax.Array, jax.Array | None]:
    """The update μ·mom − lr·g̃ and ν_t, in the dtype of the arithmetic.

    Args:
      operands: Arrays, or blocks of them.
      first: Whether w_s is w although ``prev`` may say otherwise: on the first update. A bool of
        shape ().
      scalars: The hyperparameters, of the real dtype that belongs to that of the arithmetic.
    """
    grad, param, stale, prev, momentum, nu = operands
    dtype = operands.dtype
    if stale is not None:
        delta = difference(param, stale, dtype)
    elif prev is not None:
        delta = jnp.where(first, 0, param.astype(dtype) - prev.astype(dtype))
    else:
        delta = momentum.astype(dtype)
    nu = None if nu is None else nu.astype(_trees.real_dtype(dtype))
    compensated, nu = compensate(grad.astype(dtype), delta, nu, scalars.compensation)
    update = -scalars.learning_rate * compensated
    if scalars.momentum is not None and momentum is not None:
        update += scalars.momentum * momentum.astype(dtype)
    return update, nu


def block(operands: Operands, first: Any, scalars: Scalars, *, step: bool) -> Leaf:
    """The results of a kernel for blocks of the operands, in the dtype of the arithmetic."""
    update, nu = formula(operands, first, scalars)
    out = operands.param.astype(operands.dtype) + update if step else update
    return Leaf(out, operands.param, update, nu)


def leaf(operands: Operands, count: jax.Array, scalars: Scalars, *, step: bool) -> Leaf:
    """MXNet's rule for one array, in at least float32, in place where its arguments are donated.

        g̃ = g + λ_t·g²·(w − w_s);   mom' = μ·mom − lr·g̃;   w' = w + mom';   prev' = w

    In a donated step w' takes the buffer of w, prev' that of prev, mom' that of mom (or, where the
    caller returns the state first, w' that of mom, prev' that of w, mom' that of prev). XLA writes
    all three in place if whatever reads a buffer comes before what is written there; where the
    order is open, it copies the buffer first. So the order is made a matter of data:

        mom'   = ...                     reads w and prev
        prev'  = count ≥ 0 ? w : mom'    after mom'; reads w
        w'     = prev' + mom'            after prev'; does not read w

    and where the caller adds the update to w,

        update = count ≥ 0 ? mom' : prev'    after prev'

    The predicate is always true, but the compiler cannot know: it may neither put w for prev' (then
    w' would read w, which prev' may have been written over), nor drop the operand that is never
    taken and that only says "after". On a CPU that makes three passes without a copy; a TPU fuses
    all of it into one pass that reads and writes each array once. Without a momentum buffer two
    arrays are written from three that are all read, and a CPU needs a temporary.

    Args:
      operands: The arrays.
      count: The number of updates so far, int32.
      scalars: The hyperparameters of this update, as `formula` takes them.
      step: Whether ``out`` is w' (one rounding less than ``w + update``) or the update.
    """
    _, param, _, prev, momentum, nu = operands
    dtype = operands.dtype
    update, new_nu = formula(operands, count == 0, scalars)
    if prev is None and momentum is not None and scalars.momentum is None:
        update = jnp.where(count >= 0, update, momentum.astype(dtype))  # for mom' to be in place
    new_momentum = None if momentum is None else update.astype(momentum.dtype)
    base, after = param, jnp.zeros((), dtype)
    if prev is not None:
        prev = own_copy(count, param, update.astype(prev.dtype))
        if step:
            base = prev
        else:
            after = prev.astype(dtype)
    # XLA's CPU compiler is slow at a bare w + mom' of four dimensions, and fast where it is fused
    # with anything, such as this select.
    update = jnp.where(count >= 0, update, after)
    out = base.astype(dtype) + update if step else update
    return Leaf(
        out.astype(param.dtype),
        prev,
        new_momentum,
        None if nu is None or new_nu is None else new_nu.astype(nu.dtype),
    )
