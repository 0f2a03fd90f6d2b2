"""The fused update of one array, and the choice of who computes it.

`reference` holds the formula and computes it in plain JAX; `mosaic_tpu` and `mosaic_gpu` compute
the same formula in one Pallas kernel; `pallas` chooses between those two. What each array costs,
in bytes for a float32 parameter, with momentum:

===================  ==========  =====================  ==================  ===========
                     read        written, in place of   ``store="params"``  "updates"
===================  ==========  =====================  ==================  ===========
g                    once                               4                   4
w                    once        w', of w               8                   8
prev                 once        prev' = w, of prev     8                   –
mom                  once        mom', of mom           8                   8
ν (DC-ASGD-a)        once        ν', of ν               8                   8
===================  ==========  =====================  ==================  ===========

That is 28 and 20 bytes without ν: what XLA's TPU compiler makes of the reference too, so that
`implementation=None` is XLA there. On a CPU, XLA writes one array a pass, and the reference says
how it avoids the copies.
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
    own = {id(x): jnp.asarray(x, _trees.dtype_of(x)) for x in operands if x is not None}
    operands = Operands(*(None if x is None else own[id(x)] for x in operands))  # stays `is`
    scalars = reference.scalars(hyperparams, _trees.real_dtype(operands.dtype))
    compute = pallas.leaf if implementation == "pallas" else reference.leaf
    return compute(operands, count, scalars, step=step)
