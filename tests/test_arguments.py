"""Extra arguments, odd trees, unusual hyperparameters: what may be passed and what reaches whom."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import WORKERS, assert_bit_equal
from transformation_cases import (
    CASES,
    GRADS,
    PARAMS,
    STALE,
    STALENESS,
    cast,
    given,
    inputs,
    make_step,
)

import optax_dcasgd as dc

each_case = pytest.mark.parametrize("name", CASES)


@each_case
def test_unknown_extra_arguments_are_ignored(name):
    """Those too that are called as arguments of inner functions are."""
    params, grads, extras = inputs(name, 0)
    tx = CASES[name].make()
    state, step = tx.init(params), make_step(tx)
    unknown = {"loss_fn": print, "value": 1.0, "step": 3, "leaf": 1, "count": 2, "tx": None}
    unknown |= {} if isinstance(tx, dc.FusedOptimizer) else {"grads": None}

    def program(**more):
        return str(
            jax.make_jaxpr(lambda *args: step(*args, {**extras, **more}))(params, state, grads)
        )

    assert program(**unknown) == program()


def recorder():
    """A transformation that keeps the extra arguments it was given."""
    seen = []

    def update(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update), seen


def record(wrap, extras, *, params=PARAMS, steps=4):
    inner, seen = recorder()
    tx = wrap(inner)
    state = tx.init(params)
    for t in range(steps):
        _, state = tx.update(cast(GRADS[t], jnp.float32), state, params, **extras(t))
    return seen


def test_delay_gradients_adds_up_stalenesses_and_hands_on_the_rest():
    seen = record(
        lambda inner: dc.delay_gradients(inner, 2),
        lambda t: {**given(t), "worker": WORKERS[t], "loss": "any object"},
    )
    for t, extra_args in enumerate(seen):
        assert extra_args.keys() == {"stale_params", "worker", "staleness", "loss"}
        assert (extra_args["worker"], extra_args["loss"]) == (WORKERS[t], "any object")
        assert extra_args["staleness"] == 2 + STALENESS[t]
        if t >= 2:  # the caller's stale parameters are as old as their gradient
            assert_bit_equal(extra_args["stale_params"], STALE[t - 2])


def test_with_master_weights_hands_on_extra_arguments_and_widens_stale_params():
    stale = cast(STALE[0], jnp.bfloat16)
    (extra_args,) = record(
        dc.with_master_weights,
        lambda t: {"stale_params": stale, "worker": 2, "loss": "any object"},
        params=cast(PARAMS, jnp.bfloat16),
        steps=1,
    )
    assert (extra_args["worker"], extra_args["loss"]) == (2, "any object")
    assert_bit_equal(extra_args["stale_params"], cast(stale, jnp.float32))


# --- optax.tree.map_params ---

LIKE_PARAMS = {"prev_params", "momentum", "nu", "grads", "params", "velocity", "master"}


@each_case
def test_map_params_reaches_what_is_like_the_parameters_and_nothing_else(name):
    params, _, _ = inputs(name, 0)
    tx = CASES[name].make()
    state = tx.init(params)
    # A second tree, of numbers, says which parameter a leaf of the state belongs to.
    numbers = jax.tree.unflatten(jax.tree.structure(params), range(len(jax.tree.leaves(params))))
    reached = optax.tree.map_params(
        tx,
        lambda leaf, number: number if isinstance(leaf, jax.Array) else leaf,
        state,
        numbers,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
        transform_non_params=lambda leaf: -1,
    )

    def check(path, leaf, number):
        fields = [entry.name for entry in path if isinstance(entry, jax.tree_util.GetAttrKey)]
        keys = [entry for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        at = [n for p, n in jax.tree_util.tree_leaves_with_path(numbers) if list(p) == keys]
        assert [number] == (at if fields[-1] in LIKE_PARAMS else [-1])

    jax.tree_util.tree_map_with_path(check, state, reached)


# --- Odd, but legal ---


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
