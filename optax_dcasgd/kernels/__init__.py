"""The fused update of one array: the formula, the plan of memory, and the choice of who computes.

The formula, elementwise (`reference.formula`; its compensation is `_compensation.compensate`):

    ν'   = m·ν + (1−m)·g²                     only with ``decay``
    λ_t  = λ0;  with ``decay``  λ0 / √(ν' + ε)
    r    = λ_t·g·(w − w_s)                    the compensation over g; held within ± ``clip``
    mom' = μ·mom − lr·(g + g·r)
    w'   = w + mom'
    prev' = w

w_s is what the caller knows (``stale``), or else prev, or else (``store="updates"``) w − w_s is
mom. What each array costs, in bytes for a float32 parameter:

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

Who computes it, and why so:

* `reference`, in plain JAX, is what XLA gets. Its TPU compiler makes one pass of it, in place,
  whatever the order of the results, so that a kernel could win nothing and `implementation=None`
  is XLA. On a CPU XLA writes one array a pass; `reference.leaf` says how the copies are avoided.
* `mosaic_tpu`: a block of each array at a time, all of the minor two dimensions that fit, as a TPU
  lays them out in tiles and any other view would be a copy. The blocks of all operands share the
  VMEM of the smallest chip, and are held twice, so that copies overlap with arithmetic.
* `mosaic_gpu`: memory is linear there, so every array is one row of numbers. 16 bytes a thread and
  load, straight to the registers, because no number is used twice; what is less than one block of
  threads takes (1,024 numbers) is left to XLA, and so are 2³¹ numbers or more, as offsets are
  32-bit integers.
* `pallas` chooses between the kernels when the program is lowered for a platform, and says why
  where there is none.
"""

import jax
import jax.numpy as jnp

from optax_dcasgd import _arguments, _trees
from optax_dcasgd.kernels import pallas, reference
from optax_dcasgd.kernels.reference import Hyperparameters, Leaf, Operands

__all__ = ["Hyperparameters", "Leaf", "Operands", "check_implementation", "leaf"]


def check_implementation(implementation: str | None) -> None:
    """Checks that there is an implementation of that name."""
    _arguments.check_choice("implementation", implementation, (None, "xla", "pallas"))


def leaf(
    operands: Operands,
    count: jax.Array,
    hyperparams: Hyperparameters,
    *,
    step: bool,
    implementation: str | None,
) -> Leaf:
    """The update of one leaf, or the new parameter, and its new state.

    Args:
      operands: The arrays, NumPy's and Python's scalars among them.
      count: The number of updates so far, int32.
      hyperparams: The numbers of this update.
      step: Whether to compute the new parameter or the update.
      implementation: ``"pallas"``; or ``"xla"`` or None for XLA, as no kernel has been measured
        to be faster yet.

    Raises:
      NotImplementedError: If it is ``"pallas"``, for dtypes that the kernels do not compute in; or,
        when it is compiled, for a platform or a mesh that they do not run on.
    """
    known_to_be_fresh = operands.stale is operands.param
    operands = Operands(
        *(None if x is None else jnp.asarray(x, _trees.dtype_of(x)) for x in operands)
    )
    if known_to_be_fresh:
        operands = operands._replace(stale=operands.param)
    scalars = reference.scalars(hyperparams, _trees.real_dtype(operands.dtype))
    compute = pallas.leaf if implementation == "pallas" else reference.leaf
    return compute(operands, count, scalars, step=step)
