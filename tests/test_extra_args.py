"""Extra arguments and `optax.tree.map_params`: what reaches whom."""

import jax
import jax.numpy as jnp
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
