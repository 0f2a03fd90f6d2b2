"""All transformations on parameters of every kind of dtype, with and without strict promotion."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transformation_cases import CASES, GRADS, PARAMS

import optax_dcasgd as dc

STEPS = 4
DTYPES = {
    "dense": {"bias": jnp.float8_e4m3fn, "kernel": jnp.bfloat16},
    "frozen": {"offset": jnp.float32, "scale": jnp.complex64},
}


def in_dtypes(tree, dtypes):
    """The tree in the dtypes of another; complex leaves get an imaginary part."""

    def leaf(x, dtype):
        if jnp.issubdtype(dtype, jnp.complexfloating):
            x = x + 1j * x[::-1]
        return x.astype(dtype)

    return jax.tree.map(leaf, tree, dtypes)


def dtypes_of(tree):
    return jax.tree.map(lambda x: x.dtype, tree)


def widen(tree):
    """Every narrow leaf in float32, which holds all its values."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def advance(tx, params, state, grads, extras):
    """The new parameters, the new state and the updates (of a fused step: the parameters)."""
    if isinstance(tx, dc.FusedOptimizer):
        params, state = tx.step(grads, state, params, **extras)
        return params, state, params
    updates, state = tx.update(grads, state, params, **extras)
    return optax.apply_updates(params, updates), state, updates


def eps_of(x):
    return float(jnp.finfo(x.dtype).eps)


def assert_rounded(actual, expected, *, roundings, of=None):
    """Each leaf is the other but for that many roundings to its dtype, and float32's own.

    What is rounded is of the size of ``of``, where that is not the result itself.
    """

    def check(path, x, y, size):
        smallest = float(jnp.finfo(x.dtype).smallest_subnormal)
        y = np.asarray(y, np.complex128)
        tolerance = np.maximum(np.abs(y), size) * (roundings * eps_of(x) / 2 + 2e-6)
        gap = np.abs(np.asarray(x, np.complex128) - y)
        assert np.all(gap <= tolerance + roundings * smallest / 2 + 1e-6), (path, x, y)

    sizes = jax.tree.map(lambda _: 0.0, actual) if of is None else of
    jax.tree_util.tree_map_with_path(check, actual, expected, sizes)


# Of what size is what is rounded in between, here: as large as the largest component.
ROUND_IN_BETWEEN = ("mxnet-1", "workers")


# Under standard promotion only the updates of masters differ. (All are traced under it below.)
STANDARD = [name for name, case in CASES.items() if case.has_masters] + [
    *("dcasgd-params", "adaptive-remembered", "delay_gradients-tree", "mxnet-2"),
]


@pytest.mark.parametrize(
    ("promotion", "name"),
    [("strict", name) for name in CASES] + [("standard", name) for name in STANDARD],
)
def test_all_dtypes_side_by_side(promotion, name):
    """Each update is that of a run in float32 (complex64) from the same parameters, rounded."""
    case = CASES[name]
    tx = case.make()
    dtypes = DTYPES
    if case.is_real:
        dtypes = {**DTYPES, "frozen": {"offset": jnp.float32, "scale": jnp.float16}}

    def both(params, state, wide_params, wide_state, grads, extras):
        with jax.numpy_dtype_promotion(promotion):
            params, state, updates = advance(tx, params, state, grads, extras)
        with jax.numpy_dtype_promotion("standard"):
            if "stale_params" in extras:
                extras = {**extras, "stale_params": widen(extras["stale_params"])}
            wide = advance(tx, wide_params, wide_state, widen(grads), extras)
        return (params, state, updates), wide

    both = jax.jit(both)
    params = in_dtypes(PARAMS, dtypes)
    with jax.numpy_dtype_promotion(promotion):
        state = tx.init(params)
    wide_params = widen(params)
    wide_state = tx.init(wide_params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        fields = [entry.name for entry in path if isinstance(entry, jax.tree_util.GetAttrKey)]
        if fields[-1] in ("momentum", "nu", "velocity", "master"):
            assert leaf.dtype in (jnp.float32, jnp.complex64)
    landed = jax.tree.map(lambda w: np.zeros(w.shape), wide_params)
    for t in range(STEPS):
        grads, extras = in_dtypes(GRADS[t], dtypes), dict(case.extras(t))
        if "stale_params" in extras:
            extras["stale_params"] = in_dtypes(extras["stale_params"], dtypes)
        arguments = (params, state, wide_params, wide_state, grads, extras)
        (params, new_state, updates), (wide_params, wide_state, wide_updates) = both(*arguments)
        assert dtypes_of(new_state) == dtypes_of(state)
        assert dtypes_of(params) == dtypes
        state = new_state
        update_dtypes = dtypes
        if case.has_masters:
            # An update in the parameter's own dtype may land next to the rounded master.
            landed = jax.tree.map(
                lambda size, u: size + 2 * np.abs(np.float64(u)) if u.itemsize < 4 else size,
                landed,
                jax.tree.map(np.asarray, updates),
            )
            sizes = jax.tree.map(lambda size, w: size + np.abs(w), landed, wide_params)
            assert_rounded(params, wide_params, roundings=1, of=sizes)
            of_half = jnp.float32 if promotion == "standard" else jnp.bfloat16
            update_dtypes = {**dtypes, "dense": {**dtypes["dense"], "kernel": of_half}}
        else:  # one rounding of the rule, and one where what stands behind computes in the dtype
            wide_params = widen(params)
            if name in ROUND_IN_BETWEEN:
                sizes = jax.tree.map(lambda u: np.max(np.abs(u)), wide_updates)
                assert_rounded(updates, wide_updates, roundings=4, of=sizes)
            else:
                assert_rounded(updates, wide_updates, roundings=2)
        assert dtypes_of(updates) == update_dtypes


@pytest.mark.parametrize("promotion", ["strict", "standard"])
def test_four_bits(promotion):
    """float4 has the values 0 to 6 and no NaN, so that only dtypes and shapes are compared."""
    params = jax.tree.map(lambda p: p.astype(jnp.float4_e2m1fn), PARAMS)
    for case in CASES.values():
        tx, extras = case.make(), dict(case.extras(0))
        if "stale_params" in extras:
            extras["stale_params"] = params
        with jax.numpy_dtype_promotion(promotion):
            state = jax.eval_shape(tx.init, params)
            update = tx.step if isinstance(tx, dc.FusedOptimizer) else tx.update
            updates, new_state = jax.eval_shape(update, params, state, params, **extras)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


def test_predicted_parameters_have_the_dtypes_of_the_parameters():
    tx = optax.chain(optax.scale(-0.5), dc.track_velocity(0.0))
    params, grads = in_dtypes(PARAMS, DTYPES), in_dtypes(GRADS[0], DTYPES)
    with jax.numpy_dtype_promotion("strict"):
        updates, state = tx.update(grads, tx.init(params), params)
        predicted = dc.predict_params(params, state, 2)
    assert dtypes_of(predicted) == DTYPES
    expected = jax.tree.map(lambda w, u: w + 2 * u, widen(params), widen(updates))
    assert_rounded(predicted, expected, roundings=1)
