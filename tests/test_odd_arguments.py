"""Arguments that are odd, but legal."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transformation_cases import CASES, inputs, make_step

import optax_dcasgd as dc

each_case = pytest.mark.parametrize("name", CASES)


@each_case
def test_odd_trees_are_legal(name):
    tx, (params, grads, extras) = CASES[name].make(), inputs(name, 0)
    update = getattr(tx, "step", None) or tx.update
    for path in ("bias", "kernel"), ("bias",):  # nothing has a gradient there
        without = {
            **grads,
            "dense": {k: None if k in path else g for k, g in grads["dense"].items()},
        }
        state = tx.init(params)
        _, after = jax.eval_shape(lambda s=state, g=without: update(g, s, params, **extras))
        assert jax.tree.structure(after) == jax.tree.structure(state)
    without = {**grads, "dense": None}  # nor anywhere below such a node
    jax.eval_shape(lambda: update(without, state, params, **extras))
    for tree in ({}, [], (), {"a": None}, {"a": optax.MaskedNode()}):
        if "stale_params" in extras:
            extras["stale_params"] = tree
        state = tx.init(tree)
        for _ in range(2):
            out, state = update(tree, state, tree, **extras)
            assert out == tree


@each_case
def test_numpy_arrays_and_python_floats_are_legal_parameters(name):
    tx, (params, grads, extras) = CASES[name].make(), inputs(name, 0)
    params = jax.tree.map(np.asarray, params)
    params["frozen"]["offset"] = 0.5

    def two_steps():  # these are arrays of NumPy's while they are traced
        initial, step = tx.init(params), make_step(tx)
        _, state = step(params, initial, jax.tree.map(np.asarray, grads), extras)
        return initial, *step(params, state, jax.tree.map(np.asarray, grads), extras)

    initial, out, state = jax.eval_shape(two_steps)
    jax.tree.map(lambda x, p: np.testing.assert_equal(x.shape, np.shape(p)), out, params)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((initial, out, state)))


UNUSUAL = {
    "zeros": {"decay": 0, "clip": 0.0, "lamda": 0},
    "large": {"lamda": 1e6, "clip": 1e6, "eps": 10, "decay": 0.5},
    "no eps": {"eps": 0.0, "decay": 0.5},
    "numpy": {"lamda": np.int64(1), "decay": np.float32(0.5), "eps": np.float16(0.1)},
    "0-d arrays": {"lamda": np.array(0.5), "clip": jnp.asarray(1), "decay": jnp.asarray(0.5)},
    "schedules": {
        "lamda": optax.linear_schedule(0.0, 1.0, 3),
        "decay": lambda count: 0.5,
        "clip": optax.constant_schedule(1.0),
        "eps": lambda count: jnp.exp(-count.astype(float)),
    },
    "accumulator": {"decay": 0.5, "accumulator_dtype": "bfloat16"},
}


@pytest.mark.parametrize("unusual", UNUSUAL)
@pytest.mark.parametrize("factory", [dc.add_delay_compensation, dc.dcasgd, dc.fused_dcasgd])
def test_unusual_hyperparameters_are_legal(factory, unusual):
    tx = factory(**UNUSUAL[unusual])
    function = getattr(tx, "step", None) or tx.update
    params, grads = jnp.array([1.0, -2.0]), jnp.array([0.0, 0.5])
    stale = params + 0.125
    out, state = function(grads, tx.init(params), params, stale_params=stale)
    out, state = function(grads, state, params, stale_params=stale)
    for leaf in jax.tree.leaves((out, state)):
        assert np.all(np.isfinite(np.asarray(leaf, np.float32)))
