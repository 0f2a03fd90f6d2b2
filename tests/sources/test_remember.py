"""`remember_params` beside what the matrix and the properties show: one worker, loops, refusals."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_bit_equal, random_tree, train

import optax_dcasgd as dc
from optax_dcasgd import remember_params

PARAMS = random_tree(0)
GRADS = [random_tree(t) for t in range(1, 10)]
RULES = {
    "add_delay_compensation": dc.add_delay_compensation(2.0),
    "robust_delay_compensation": dc.robust_delay_compensation(max_norm=None),
    "scale_by_gap": dc.scale_by_gap(),
    "scale_by_staleness": dc.scale_by_staleness(),
}


@pytest.mark.parametrize("inner", [optax.sgd(0.1, 0.9), optax.adam(0.1)], ids=["sgd", "adam"])
@pytest.mark.parametrize("rule", RULES)
def test_one_worker_is_the_inner_optimizer_on_fresh_gradients(rule, inner):
    """M = 1: nobody pushes in between, which is known while tracing, so not a bit may change."""
    tx = remember_params(optax.chain(RULES[rule], inner), num_workers=1)
    actual, _ = train(tx, PARAMS, GRADS, lambda t: {"worker": 0})
    expected, _ = train(inner, PARAMS, GRADS)
    assert_bit_equal(actual, expected)


def test_one_worker_is_told_so_while_tracing():
    """By the parameters themselves for w_s: zero at run time may be rounded in another way."""
    calls = []

    def update(updates, state, params, **extra):
        calls.append((params, extra))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = remember_params(inner, num_workers=1)
    jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS, worker=jnp.int32(0))
    params, extra = calls[0]
    assert extra["stale_params"] is params
    assert extra["staleness"] == 0


@pytest.mark.parametrize(("index", "clamped"), [(7, 2), (-(2**31), 0)])
def test_a_traced_worker_out_of_range_is_clamped_in_every_respect(index, clamped):
    """Its own backup is completed on the next call too, and it alone."""
    tx = remember_params(optax.chain(RULES["scale_by_gap"], optax.sgd(0.1)), num_workers=3)
    update = jax.jit(tx.update)

    def outputs(worker):
        order = (0, worker, 1, worker, 2)
        tx_ = optax.GradientTransformationExtraArgs(tx.init, update)
        return train(tx_, PARAMS, GRADS[:5], lambda t: {"worker": jnp.int32(order[t])}, jit=False)

    chex.assert_trees_all_equal(outputs(index), outputs(clamped))


def test_on_the_first_call_the_gradient_is_fresh_and_passes_bit_for_bit():
    """MXNet copies the weights when it first updates them, whatever they were made as."""
    grads = {"x": jnp.array([0.0, -0.0, np.inf, 1e-25, 1e25, -2.0])}
    made, loaded = {"x": jnp.zeros(6)}, {"x": jnp.ones(6)}
    for options, extra in [({}, {}), ({"num_workers": 2}, {"worker": 1})]:
        tx = remember_params(dc.add_delay_compensation(2.0, decay=0.5), **options)
        updates, _ = tx.update(grads, tx.init(made), loaded, **extra)
        assert_bit_equal(updates, grads)
