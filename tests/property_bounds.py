"""How exact the results of the property tests have to be.

How far a result may be from the reference is derived, not tuned. ``u`` is the unit roundoff of a
dtype, half its `eps`: one operation is off by at most u times its result. All comparisons are made
with the parameters that the transformation really saw, rounded as they were, so what is left is

* the roundings of the formula itself, in the dtype of the arithmetic (float32, or float64 and
  complex of either precision): counted in `Bounds`, relative to the terms that are added, because
  terms of opposite sign may cancel;
* one more, in the dtype of the state, each time a momentum or ν is put into it;
* one more, in the dtype of the parameter, for the update that is handed out.
"""

import jax
import jax.numpy as jnp
import numpy as np
import reference
from property_cases import is_complex


def unit_roundoff(dtype):
    return float(jnp.finfo(dtype).eps) / 2


def subnormal_rounding(dtype):
    """The rounding of subnormal float16; in the other dtypes all values used here are normal."""
    return 2.0**-25 if dtype == jnp.float16 else 0.0


class Bounds:
    """The reference for one array, with the rounding errors a right implementation may make.

    Args:
      param: The parameter, for its dtype.
      accumulator_dtype: The user's choice for the state, or None.
      hyperparams: The reference's.
    """

    def __init__(self, param, accumulator_dtype, **hyperparams):
        compute = jnp.promote_types(jnp.float32, param.dtype)
        self.u = unit_roundoff(compute)
        self.u_state = unit_roundoff(accumulator_dtype) if accumulator_dtype else self.u
        # |z| of a complex number, and its product with a real one, take a few operations each.
        self.extra = 8 if is_complex(param) else 0
        self.formula = reference.DCASGD(**hyperparams)
        self.adaptive = hyperparams["decay"] is not None
        self.momentum_error = 0.0
        self.last_update = reference.zeros(param)

    def compensation_error(self, count, corrected, correction):
        """The rounding error of g̃ = g + correction, exact inputs given."""
        # Δ, λ, λ·, ·g, ·Δ, ·g, and the clip's limit.
        relative = (7 + self.extra) * self.u
        if self.adaptive:
            relative += self.relative_nu_error(count + 1) / 2  # halved by the root
            relative += 4 * self.u  # ε, +, √, /
        return relative * np.abs(correction) + self.u * np.abs(corrected)

    def relative_nu_error(self, count):
        """That of ν after ``count`` updates; nothing cancels in it."""
        # m, 1 − m, g², two products, a sum, and the rounding to the state.
        return count * ((6 + self.extra) * self.u + self.u_state)

    def values(self, *names):
        """The hyperparameters of the next update."""
        return [reference.at(getattr(self.formula, name), self.formula.count) for name in names]

    def compensate(self, g, w, w_s):
        """g̃ of the next update, and how far off it may be before it is rounded."""
        lamda, decay, eps, clip = self.values("lamda", "decay", "eps", "clip")
        corrected, _ = reference.compensate(g, w, w_s, lamda, self.formula.nu, decay, eps, clip)
        correction = corrected - reference.wide(g)
        return corrected, self.compensation_error(self.formula.count, corrected, correction)

    def __call__(self, g, w, w_s, stale_error=0.0):
        """The update, and how far off it may be before it is rounded to be handed out.

        Args:
          g: The gradient.
          w: The parameter.
          w_s: The stale parameter.
          stale_error: How far ``w − w_s`` is off already.
        """
        lr, momentum, lamda, decay, eps = self.values("lr", "momentum", "lamda", "decay", "eps")
        momentum = momentum or 0.0
        nu, mom = self.formula.nu, self.formula.mom
        corrected, error = self.compensate(g, w, w_s)
        ones, zeros = np.ones(w.shape), np.zeros(w.shape)
        slope = reference.compensate(g, ones, zeros, lamda, nu, decay, eps)[0] - reference.wide(g)
        decayed = 0.0 if mom is None else momentum * np.abs(mom)
        update = self.formula(g, w, w_s)
        # lr and μ, the products lr·g̃ and μ·m, and their sum.
        rounding = (3 + self.extra) * self.u * (lr * np.abs(corrected) + decayed)
        error = lr * (error + np.abs(slope) * stale_error)
        error = error + momentum * self.momentum_error + rounding
        self.momentum_error = error + self.u_state * np.abs(update)
        return update, error

    def nu_error(self):
        return self.relative_nu_error(self.formula.count) * self.formula.nu


def check(actual, expected, error, *, rounded=False):
    """``actual`` is off by ``error`` at most, and by its own rounding if that is not in there."""
    assert actual.shape == np.shape(expected)
    if not rounded:
        error = (
            error
            + unit_roundoff(actual.dtype) * np.abs(expected)
            + subnormal_rounding(actual.dtype)
        )
    # Errors of errors, and the errors being computed from the exact result: 2⁻⁶ pays for both.
    allowed = (1 + 2.0**-6) * error
    off = np.abs(reference.wide(actual) - expected)
    assert np.all(off <= allowed), f"off by {off}, allowed {allowed}: {actual} for {expected}"


def check_update(update, param, expected, error):
    assert update.dtype == param.dtype
    check(update, expected, error)


def signature(tree):
    """Everything by which jit tells two trees apart."""
    return jax.tree.structure(tree), [
        (x.shape, x.dtype, x.weak_type, type(x)) for x in jax.tree.leaves(tree)
    ]


def buffers(tree):
    return {x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) if x.size}


def initialise(tx, params):
    """``tx.init``, which owes its users to copy, and to say in advance what it will return."""
    state = tx.init(params)
    assert not buffers(state) & buffers(params)
    assert not {id(x) for x in jax.tree.leaves(state)} & {id(x) for x in jax.tree.leaves(params)}
    expected = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(expected) == jax.tree.structure(state)
    for promised, leaf in zip(jax.tree.leaves(expected), jax.tree.leaves(state), strict=True):
        assert (promised.shape, promised.dtype) == (leaf.shape, leaf.dtype)
        assert not leaf.weak_type
    return state
