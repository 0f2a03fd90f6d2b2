"""The DCASGD update of one array in plain JAX: the formula, and what every kernel computes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_dcasgd import _trees
from optax_dcasgd._hyperparameters import Hyperparameters
from optax_dcasgd._mathematics import compensate, scale


class Operands(NamedTuple):
    """The arrays of one parameter, all of its shape; ``None`` where the mode has none."""

    grad: Any  # g
    param: Any  # w
    stale: Any  # w_s where the caller knows it; else it is prev, or w − w_s is momentum
    prev: Any  # the buffer that holds the last w, and is to hold this one for the next update
    momentum: Any  # mom; without μ (store="updates") the last update alone
    nu: Any  # ν of DC-ASGD-a

    @property
    def dtype(self) -> Any:
        """The dtype of the arithmetic, at least float32."""
        return _trees.compute_dtype(self.grad, self.param, self.momentum, self.nu)


class Results(NamedTuple):
    """What becomes of one parameter: the update, or the new parameter, and the new state."""

    out: Any  # dtype of the parameter
    prev: Any  # dtype of the buffer; None without one
    momentum: Any  # dtype of the buffer; None without one
    nu: Any  # dtype of the buffer; None without one


def formula(
    operands: Operands, fresh: Any, numbers: Hyperparameters
) -> tuple[jax.Array, jax.Array | None]:
    """The update μ·mom − lr·g̃ and ν_t, in the dtype of the arithmetic.

    Args:
      operands: Arrays, or blocks of them.
      fresh: Whether w_s is w: True where that is known; or, for a ``prev`` that is not meant on the
        first update, a bool of shape ().
      numbers: learning_rate, momentum (None: no μ), and those of `compensate`: scalars of the real
        dtype that belongs to that of the arithmetic.
    """
    grad, param, stale, prev, momentum, nu = operands
    dtype = operands.dtype
    if fresh is True:
        delta = None
    elif stale is not None:
        delta = param.astype(dtype) - stale.astype(dtype)
    elif prev is not None:
        delta = jnp.where(fresh, 0, param.astype(dtype) - prev.astype(dtype))
    else:
        delta = momentum.astype(dtype)
    nu = None if nu is None else nu.astype(_trees.real_dtype(dtype))
    compensated, nu = compensate(grad.astype(dtype), delta, nu, numbers)
    update = scale(compensated, -numbers["learning_rate"])
    if numbers["momentum"] is not None and momentum is not None:
        update += scale(momentum.astype(dtype), numbers["momentum"])
    return update, nu


def block(operands: Operands, fresh: Any, numbers: Hyperparameters, *, step: bool) -> Results:
    """The results of a kernel for blocks of the operands, in the dtype of the arithmetic."""
    update, nu = formula(operands, fresh, numbers)
    out = operands.param.astype(operands.dtype) + update if step else update
    return Results(out, operands.param, update, nu)


def update(
    operands: Operands,
    count: jax.Array,
    numbers: Hyperparameters,
    *,
    step: bool,
    fresh: bool = False,
) -> Results:
    """MXNet's rule for one array, in at least float32, in place where its arguments are donated.

        g̃ = g + λ_t·g²·(w − w_s);   mom' = μ·mom − lr·g̃;   w' = w + mom';   prev' = w

    In a donated step w' takes the buffer of w, prev' that of prev, mom' that of mom. (Where the
    state is taken first and returned last: w' that of mom, prev' that of w, mom' that of prev.) XLA
    writes all three in place if everything that reads a buffer comes before what is written there;
    where the order is open, it copies the buffer first. So data dependences fix the order:

        mom'   = ...                     reads w and prev
        prev'  = count ≥ 0 ? w : mom'    after mom'; reads w
        w'     = prev' + mom'            after prev'; does not read w

    and where the caller adds the update to w,

        update = count ≥ 0 ? mom' : prev'    after prev'

    The predicate is always true, but the compiler cannot know: it may neither put w for prev' (w'
    would then read w again), nor drop the operand that is never taken and only says "after". On a
    CPU that makes three passes without a copy; a TPU fuses all of it into one pass that reads and
    writes each array once. Without a momentum buffer two arrays are written from three that are all
    read, and a CPU needs a temporary.

    Args:
      operands: The arrays.
      count: The number of updates so far, int32.
      numbers: The hyperparameters of this update, as `formula` takes them.
      step: Whether ``out`` is w' (one rounding less than ``w + update``) or the update.
      fresh: Whether w_s is known to be w.
    """
    operands = Operands(*(None if x is None else jnp.asarray(x) for x in operands))
    _, param, _, prev, momentum, nu = operands
    dtype = operands.dtype
    change, new_nu = formula(operands, fresh or count == 0, numbers)
    if prev is None and momentum is not None and numbers["momentum"] is None:
        change = jnp.where(count >= 0, change, momentum.astype(dtype))  # for mom' to be in place
    new_momentum = None if momentum is None else change.astype(momentum.dtype)
    base, after = param, jnp.zeros((), dtype)
    if prev is not None:
        prev = _trees.own_copy(count, param, change.astype(prev.dtype))
        if step:
            base = prev
        else:
            after = prev.astype(dtype)
    # XLA's CPU compiler is slow at a bare w + mom' of four dimensions, and fast where the sum is
    # fused with another operation, such as this select.
    change = jnp.where(count >= 0, change, after)
    out = base.astype(dtype) + change if step else change
    return Results(
        out.astype(param.dtype),
        prev,
        new_momentum,
        None if nu is None or new_nu is None else new_nu.astype(nu.dtype),
    )
