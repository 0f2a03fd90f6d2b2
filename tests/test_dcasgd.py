"""What `dcasgd` and `fused_dcasgd` promise beside the paper's rule: modes, state, schedules."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_bit_equal, random_tree, train

from optax_dcasgd import add_delay_compensation, dcasgd, remember_params

SHAPES = {"w": (5, 3), "b": ()}
PARAMS = random_tree(0, shapes=SHAPES)
GRADS = [random_tree(t, shapes=SHAPES) for t in range(1, 9)]


close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)


def test_the_state_keeps_only_what_the_mode_needs():
    modes = itertools.product(["params", "updates", None], [None, 0.9], [None, 0.9])
    for store, momentum, decay in modes:
        state = dcasgd(0.1, momentum, decay=decay, store=store).init(PARAMS)
        assert (state.prev_params is None) == (store != "params")
        assert (state.momentum is None) == (momentum is None and store != "updates")
        assert (state.nu is None) == (decay is None)


def test_on_the_first_call_w_s_is_w_whatever_init_saw():
    """MXNet copies the weights when it first updates them."""
    loaded = jax.tree.map(lambda p: p + 1, PARAMS)
    tx = dcasgd(0.1, lamda=2.0)
    updates, _ = tx.update(GRADS[0], tx.init(PARAMS), loaded)
    close(updates, jax.tree.map(lambda g: -0.1 * g, GRADS[0]))


def test_an_update_without_a_gradient_is_remembered_as_none():
    """w did not move, so the next gradient, one update old, is fresh."""
    grad, trajectories = jnp.array([1.0, -2.0]), []
    for store in ("params", "updates"):
        tx, w = dcasgd(0.1, None, 2.0, store=store), jnp.array([1.0, 2.0])
        state, trajectory = tx.init(w), []
        for g in (grad, None, grad, grad):
            update, state = tx.update(g, state, w)
            w = w if update is None else w + update
            trajectory.append(w)
        trajectories.append(trajectory)
    np.testing.assert_allclose(*trajectories, rtol=1e-6)
    np.testing.assert_allclose(trajectories[1][2] - trajectories[1][1], -0.1 * grad, rtol=1e-6)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_of_one_worker_it_is_itself_with_lamda_zero(momentum):
    one_worker = remember_params(dcasgd(0.1, momentum, 2.0, store=None), num_workers=1)
    actual, _ = train(one_worker, PARAMS, GRADS, lambda t: {"worker": 0})
    told = dcasgd(0.1, momentum, 0.0, store=None)
    expected, _ = train(told, PARAMS, GRADS, lambda t: {"stale_params": PARAMS})
    assert_bit_equal(actual, expected)
    # And SGD: the learning rate stands inside the momentum, so to rounding.
    close(actual, train(optax.sgd(0.1, momentum), PARAMS, GRADS)[0])


@pytest.mark.parametrize("lamda", [0.0, lambda count: 0.0], ids=["number", "schedule"])
def test_without_lamda_it_steps_against_the_gradient_exactly(lamda):
    with jax.enable_x64(True):
        dtypes = ["float32", "bfloat16", "float64", "complex64"]
        grads = {d: jnp.asarray([0.0, -0.0, 1e-15, -3e30, 1.0], d) for d in dtypes}
        params = {d: jnp.arange(5).astype(d) for d in dtypes}
        tx = dcasgd(0.5, lamda=lamda)
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(grads, state, params)
            for d in dtypes:
                np.testing.assert_array_equal(updates[d], -grads[d] / 2)
            # somebody else's update, so that the next gradient is stale
            params = jax.tree.map(lambda p: p + jnp.ones_like(p), params)


def test_nu_is_kept_in_float32_for_low_precision_parameters():
    """Fault 10: in bfloat16, 0.999·ν + 0.001·g² stops moving at once."""
    params = jnp.ones(4, jnp.bfloat16)
    grads = random_tree(3, shapes=(200, 4), dtype=jnp.bfloat16)
    for tx in (
        remember_params(dcasgd(0.0, decay=0.999, momentum=0.9, store=None)),
        remember_params(add_delay_compensation(decay=0.999)),
    ):

        def scan(state, g, tx=tx):
            return tx.update(g, state, params)[1], None

        state, _ = jax.lax.scan(scan, tx.init(params), grads)
        expected = np.zeros(4)
        for g in np.asarray(grads, np.float64):
            expected = 0.999 * expected + 0.001 * g**2
        assert state.inner_state.nu.dtype == jnp.float32
        np.testing.assert_allclose(state.inner_state.nu, expected, 1e-5)


def test_accumulator_dtype_is_that_of_the_momentum_and_nu():
    tx = dcasgd(0.1, 0.9, decay=0.9, accumulator_dtype=jnp.bfloat16)
    params = {"real": jnp.ones(2), "complex": jnp.ones(2, jnp.complex64)}
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    assert state.momentum["real"].dtype == state.nu["real"].dtype == jnp.bfloat16
    assert state.momentum["complex"].dtype == jnp.complex64
    assert state.nu["complex"].dtype == jnp.float32
    assert state.prev_params["real"].dtype == jnp.float32
