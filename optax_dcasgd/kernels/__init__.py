"""The fused update of a tree: the formula, the plan of memory, and the table of who computes it.

The formula, elementwise (`reference.formula`; its compensation is `_mathematics.compensate`):

    ν'   = m·ν + (1−m)·g²                     only with ``decay``
    λ_t  = λ0;  with ``decay``  λ0 / √(ν' + ε)
    r    = λ_t·g·(w − w_s)                    the compensation over g; held within ± ``clip``
    mom' = μ·mom − lr·(g + g·r)
    w'   = w + mom'
    prev' = w

w_s is ``stale`` where the caller passes it, else prev; with ``store="updates"``, w − w_s is mom.
The memory traffic of each array, in bytes for a float32 parameter:

===================  ==========  =====================  ==================  ===========
                     read        written, in place of   ``store="params"``  "updates"
===================  ==========  =====================  ==================  ===========
g                    once                               4                   4
w                    once        w', of w               8                   8
prev                 once        prev' = w, of prev     8                   –
mom                  once        mom', of mom           8                   8
ν (DC-ASGD-a)        once        ν', of ν               8                   8
stale, if given      once                               4                   –
===================  ==========  =====================  ==================  ===========

That is 28 and 20 bytes without ν. (With ``stale``, prev is written and not read.)

The implementations:

* `reference` is plain JAX, for XLA, and the default. XLA's TPU compiler makes one pass of it, in
  place, whatever the order of the results: a kernel could win nothing. On a CPU, XLA writes one
  array a pass; `reference.update` says how copies are avoided.
* `mosaic_tpu` is a Pallas kernel an array, on blocks of the two minor dimensions.
* `mosaic_gpu` is one for many arrays at a time, each as a row of numbers.
* `pallas` has the table of kernels, a row a platform. Where there is none, it says why.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from optax_dcasgd import _arguments, _trees
from optax_dcasgd._hyperparameters import Hyperparameters, cast
from optax_dcasgd.kernels import reference
from optax_dcasgd.kernels.reference import Operands, Results

__all__ = ["IMPLEMENTATIONS", "Operands", "Results", "check_implementation", "update"]

# Jitted, so that arrays of one shape are traced once; inlined, so that XLA sees no difference.
_update_by_xla = jax.jit(reference.update, static_argnames=("step", "fresh"))


def _by_xla(
    arrays: Sequence[Operands], count: jax.Array, hyperparams: Hyperparameters, *, step: bool
) -> list[Results]:
    numbers = functools.cache(lambda dtype: cast(hyperparams, dtype))  # once, and not once an array

    def one(operands: Operands) -> Results:
        fresh = operands.stale is operands.param
        if fresh:
            operands = operands._replace(stale=None)
        dtype = _trees.real_dtype(operands.dtype)
        out: Results = _update_by_xla(operands, count, numbers(dtype), step=step, fresh=fresh)
        return out

    return [one(operands) for operands in arrays]


def _by_pallas(
    arrays: Sequence[Operands], count: jax.Array, hyperparams: Hyperparameters, *, step: bool
) -> list[Results]:
    from optax_dcasgd.kernels import pallas  # it takes long to import, and few need it

    return pallas.update(arrays, count, cast(hyperparams, jnp.float32), step=step)


# Each computes the update of a tree: (arrays, count, hyperparams, *, step) -> results.
IMPLEMENTATIONS: dict[str | None, Callable[..., list[Results]]] = {
    None: _by_xla,  # never refused, and for one large array as fast as a kernel
    "xla": _by_xla,
    "pallas": _by_pallas,
}


def check_implementation(implementation: str | None) -> None:
    """Checks that there is an implementation of that name."""
    _arguments.check_choice("implementation", implementation, tuple(IMPLEMENTATIONS))


def update(
    arrays: Sequence[Operands],
    count: jax.Array,
    hyperparams: Hyperparameters,
    *,
    step: bool,
    implementation: str | None,
) -> list[Results]:
    """The update, or the new parameter, and the new state of every parameter.

    Args:
      arrays: The arrays of each parameter, NumPy's and Python's scalars among them.
      count: The number of updates so far, int32.
      hyperparams: Those of this update: numbers or None.
      step: Whether to compute the new parameter or the update.
      implementation: A name in the table `IMPLEMENTATIONS`.

    Raises:
      NotImplementedError: If it is ``"pallas"``, for dtypes that the kernels do not compute in; or,
        when it is compiled, for a platform or a mesh that they do not run on.
    """
    return IMPLEMENTATIONS[implementation](arrays, count, hyperparams, step=step)
