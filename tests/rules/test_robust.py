"""`robust_delay_compensation` against a float64 loop over its formula, and what it leaves alone."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from common import WORKERS, assert_bit_equal, random_tree, train

from optax_dcasgd import remember_params, robust_delay_compensation

NUM_WORKERS = 3
SHAPES = {"conv": (2, 3, 2, 4), "dense": {"bias": (3,), "kernel": (5, 3)}, "scale": ()}
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


def test_it_never_grows_or_reverses_a_component():
    tx = robust_delay_compensation()
    state = tx.init(PARAMS)
    for t in range(10):
        grads, stale = random_tree(t, shapes=SHAPES), random_tree(50 + t, shapes=SHAPES)
        updates, state = tx.update(grads, state, PARAMS, stale_params=stale, staleness=3)
        for u, g in pairs_of_leaves(updates, grads):
            assert np.all(np.abs(u) <= np.abs(g))
            assert np.all(u * g >= 0)


def test_nothing_is_nan_where_gradients_were_always_zero():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    tx, far = robust_delay_compensation(eps=0.0), random_tree(1, shapes=SHAPES)
    trajectory, _ = train(
        tx, PARAMS, [zeros] * 3, lambda t: {"stale_params": far, "staleness": 2}, jit=False
    )
    chex.assert_trees_all_equal(trajectory[-1], PARAMS)


def test_the_state_keeps_its_form_and_the_update_the_dtype_of_its_parameter():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    params["empty"] = jnp.zeros((0, 3))
    tx = robust_delay_compensation(power=lambda count: 0.5)
    state = tx.init(params)
    update = jax.jit(tx.update, donate_argnums=1)
    updates, new_state = update(params, state, params, stale_params=params, staleness=2)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, jax.eval_shape(tx.init, params))
    assert jax.tree.map(lambda x: (x.shape, x.dtype.name), new_state[0].nu) == {
        "conv": ((1, 1, 1, 4), "float32"),
        "dense": {"bias": ((3,), "float32"), "kernel": ((1, 3), "float32")},
        "empty": ((1, 3), "float32"),
        "scale": ((), "float32"),
    }


def test_masked_injected_and_without_gradients():
    injected = optax.inject_hyperparams(robust_delay_compensation, static_args=("unit_axes",))
    tx = optax.masked(injected(lamda=2.0), {"conv": True, "dense": False, "scale": True})
    given = {"stale_params": random_tree(9, shapes=SHAPES), "staleness": 16}
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, **given)
    expected = reference.Robust(lamda=2.0)(PARAMS, PARAMS, *given.values())
    expected["dense"] = PARAMS["dense"]
    close(updates, jax.tree.map(jnp.float32, expected))

    tx = robust_delay_compensation()
    updates, _ = tx.update({**PARAMS, "dense": None}, tx.init(PARAMS), PARAMS, **given)
    assert updates["dense"] is None


def test_under_scan_and_vmap_over_settings():
    def run(lamda):
        tx = remember_params(optax.chain(robust_delay_compensation(lamda), optax.scale(-0.1)))

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), length=10)
        return params

    both = jax.jit(jax.vmap(run))(jnp.array([0.5, 8.0]))
    for i, lamda in enumerate((0.5, 8.0)):
        close(jax.tree.map(lambda x, i=i: x[i], both), run(lamda))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("lamda", -1.0, ValueError),
        ("lamda", "1", TypeError),
        ("decay", 1.0, ValueError),
        ("decay", None, TypeError),
        ("max_norm", 0.0, ValueError),
        ("power", -0.5, ValueError),
        ("eps", -1e-9, ValueError),
        ("accumulator_dtype", jnp.int32, TypeError),
    ],
)
def test_wrong_arguments_are_refused_by_name(name, value, error):
    with pytest.raises(error, match=name):
        robust_delay_compensation(**{name: value})


def test_wrong_updates_are_refused_by_leaf():
    tx = robust_delay_compensation()
    state = tx.init(PARAMS)
    right = {"stale_params": PARAMS, "staleness": 2}
    other = {**PARAMS, "conv": jnp.ones((2, 3, 2, 5))}

    def refused(message, grads=PARAMS, params=PARAMS, **extra):
        with pytest.raises(ValueError, match=re.escape(message)):
            tx.update(grads, state, params, **{**right, **extra})

    refused("params", params=None)
    refused("staleness", staleness=-1)
    refused("updates['conv']", grads=other)
    refused("params['conv']", grads=other, params=other, stale_params=other)
    refused("stale_params['conv']", stale_params=other)
    with pytest.raises(TypeError, match=re.escape("params['steps']")):
        tx.init({"steps": jnp.arange(3)})
