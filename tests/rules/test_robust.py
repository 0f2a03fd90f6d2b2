"""`robust_delay_compensation` against a float64 loop over its formula, and what it leaves alone."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from common import WORKERS, assert_bit_equal, random_tree, train

from optax_dcasgd import robust_delay_compensation

NUM_WORKERS = 3
SHAPES = {
    "conv": (2, 3, 2, 4),
    "dense": {"bias": (3,), "kernel": (5, 3)},
    "empty": (0, 3),
    "scale": (),
}
PARAMS = random_tree(0, shapes=SHAPES)


close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=3e-6)
SETTINGS = {
    "default": {},
    "no limit": {"max_norm": None},
    "other": {"lamda": 12.0, "decay": 0.5, "max_norm": 1.0, "power": 0.5, "eps": 0.1},
    "schedules": {
        "lamda": lambda t: 4.0 + t / 2,
        "decay": lambda t: 0.9 - 0.01 * t,
        "max_norm": lambda t: 1.5 / (1 + t),
        "power": lambda t: 1.0 / (1 + t),
        "eps": lambda t: 0.1 / (1 + t),
    },
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_against_the_formula(settings):
    """Gradients that depend on where they are computed, with an outlier now and then."""
    tx = robust_delay_compensation(**SETTINGS[settings])
    expected, params, state, update = (
        reference.Robust(**SETTINGS[settings]),
        PARAMS,
        None,
        jax.jit(tx.update),
    )
    state = tx.init(PARAMS)
    pulled, pulled_at = [PARAMS] * NUM_WORKERS, [0] * NUM_WORKERS
    for t, worker in enumerate(WORKERS * 2):
        stale, staleness = pulled[worker], t - pulled_at[worker]
        noise, size = random_tree(100 + t, shapes=SHAPES, scale=0.5), 8.0 if t % 7 == 6 else 1.0
        grads = jax.tree.map(lambda w, e, size=size: size * (0.3 * w + e), stale, noise)
        updates, state = update(grads, state, params, stale_params=stale, staleness=staleness)
        close(updates, jax.tree.map(np.float32, expected(grads, params, stale, staleness)))
        params = jax.tree.map(lambda w, u: w - 0.2 * u, params, updates)
        pulled[worker], pulled_at[worker] = params, t + 1
    # Every branch of the formula was taken.
    assert min(expected.shrunk, expected.zeroed) > 0
    assert (expected.limited > 0) == (expected.hyperparams["max_norm"] is not None)


def test_complex_parameters_are_pairs_of_real_ones():
    tree = functools.partial(random_tree, shapes={"z": (4, 3)}, dtype=jnp.complex64)

    def pairs(tree):
        return {"z": jnp.concatenate([tree["z"].real, tree["z"].imag])}

    tx, params = robust_delay_compensation(), tree(0)
    state, real_state = tx.init(params), tx.init(pairs(params))
    expected = reference.Robust()
    for t in range(12):
        grads, stale = tree(1 + t), jax.tree.map(lambda w, d: w + 0.1 * d, params, tree(50 + t))
        updates, state = tx.update(grads, state, params, stale_params=stale, staleness=t)
        real, real_state = tx.update(
            pairs(grads), real_state, pairs(params), stale_params=pairs(stale), staleness=t
        )
        close(pairs(updates), real)
        close(updates, jax.tree.map(np.complex64, expected(grads, params, stale, t)))
        params = jax.tree.map(lambda w, u: w - 0.1 * u, params, updates)


def test_fresh_gradients_pass_bit_for_bit_without_a_limit():
    tx = robust_delay_compensation(max_norm=None)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for t in range(20):
        grads = random_tree(t, shapes=SHAPES, scale=10.0**t)  # outliers after the one before
        grads["dense"]["bias"] = jnp.array([-0.0, jnp.inf, 1e30])
        updates, state = update(grads, state, PARAMS, stale_params=PARAMS, staleness=t % 2)
        assert_bit_equal(updates, grads)


def test_fresh_gradients_pass_bit_for_bit_unless_they_are_outliers():
    tx = robust_delay_compensation()
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for t in range(30):
        factor = jnp.where(t == 20, 100.0, 1.0 + 0.1 * (t % 3))
        grads = jax.tree.map(lambda w, factor=factor: factor * w, PARAMS)
        updates, state = update(grads, state, PARAMS, stale_params=PARAMS, staleness=t % 2)
        if t == 20:
            assert all((abs(u) < abs(g)).all() for u, g in pairs_of_leaves(updates, grads))
        elif t >= 6:  # ν has grown
            assert_bit_equal(updates, grads)


def pairs_of_leaves(*trees):
    return zip(*map(jax.tree.leaves, trees), strict=True)


def test_a_unit_that_did_not_move_passes_beside_one_that_did():
    tx, params = robust_delay_compensation(max_norm=None), jnp.ones((2, 2))
    grads = jnp.array([[3.0, 3.0], [4.0, 4.0]])
    stale = params + jnp.array([[0.0, 2.0], [0.0, 0.0]])
    updates, _ = tx.update(grads, tx.init(params), params, stale_params=stale, staleness=1)
    np.testing.assert_array_equal(updates, [[3.0, 0.0], [4.0, 0.0]])


def test_nothing_is_nan_where_gradients_were_always_zero():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    tx, far = robust_delay_compensation(eps=0.0), random_tree(1, shapes=SHAPES)
    trajectory, _ = train(
        tx, PARAMS, [zeros] * 3, lambda t: {"stale_params": far, "staleness": 2}, jit=False
    )
    chex.assert_trees_all_equal(trajectory[-1], PARAMS)
