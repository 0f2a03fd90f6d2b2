"""`with_master_weights` where it is not outermost: refused by Optax or JAX, or documented.

docs/methods.md quotes these messages, and says what nothing can see.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from common import assert_bit_equal, raises, train
from property_cases import HALF

from optax_dcasgd import with_master_weights

BF16 = jnp.bfloat16
# Their `lax.cond` finds the gradient's dtype in the branch that does not call the masters.
CONDITIONAL = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: step < 9),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step < 9),
}
SUMS = {
    "apply_every": lambda: optax.apply_every(2),
    "ema": lambda: optax.ema(0.9),
    "trace": lambda: optax.trace(0.9),
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", CONDITIONAL)
def test_wrappers_with_a_condition_are_refused(name, dtype):
    """At the first update, compiled or not."""
    params = jnp.ones(3, dtype)
    tx = CONDITIONAL[name](with_master_weights(optax.sgd(0.1)))
    state = tx.init(params)
    told = "cond branches must have equal output types", "type float32[3]", f"type {dtype}[3]"
    with raises(TypeError, *told):
        tx.update(params, state, params)


@pytest.mark.parametrize("name", SUMS)
def test_sums_behind_them_are_refused_by_scan(name):
    params = jnp.ones(3, BF16)
    tx = optax.chain(with_master_weights(optax.sgd(0.1)), SUMS[name]())

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    with raises(TypeError, "carry output must have equal types", "bfloat16[3]", "float32[3]"):
        jax.lax.scan(step, (params, tx.init(params)), length=2)


AROUND = {  # a wrapper of the optimizer, and the gradient that it gets
    "ema": (lambda tx: optax.chain(tx, optax.ema(0.9)), 2.0**-10),
    "scale": (lambda tx: optax.chain(tx, optax.scale(0.25)), 2.0**-10),
    "weight decay": (lambda tx: optax.chain(tx, optax.add_decayed_weights(-(2.0**-12))), 0.0),
    "schedule_free": (
        lambda tx: optax.contrib.schedule_free(tx, 1.0, state_dtype=jnp.float32),
        2.0**-10,
    ),
}


@pytest.mark.parametrize("name", AROUND)
def test_in_a_loop_what_the_parameter_cannot_hold_is_lost(name):
    """The parameter stands still, and moves where the masters are outermost."""
    wrap, grad = AROUND[name]
    params = jnp.ones(3, BF16)  # which resolves 2⁻⁸ below 1
    grads, sgd = [jnp.full(3, grad, BF16)] * 32, optax.sgd(1.0)
    outermost, _ = train(with_master_weights(wrap(sgd)), params, grads)
    within, _ = train(wrap(with_master_weights(sgd)), params, grads)
    assert bool((outermost[-1] < params).all())
    assert_bit_equal(within[-1], params)
