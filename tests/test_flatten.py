"""Inside `optax.flatten`, which makes one vector of all gradients and one of all parameters.

It flattens no extra arguments, promotes dtypes, and knows no sharding: what that changes is either
nothing, or refused, or said here.
"""

import functools
import pathlib
import re

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
import pytest
from common import random_tree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from transformation_cases import CASES, GRADS, PARAMS, STALE, assert_close, given, run

import optax_dcasgd as dc

SIZE = sum(p.size for p in jax.tree.leaves(PARAMS))
FRESH = dc.dcasgd(0.1, 0.9, 0.5, store=None)


@pytest.mark.parametrize(
    "name", ["dcasgd-updates", "adaptive-remembered", "dcasgd-workers", "delay_gradients"]
)
def test_inside_it_nothing_changes(name):
    """And each array of the state is one vector, or one a worker or an update of delay."""
    tx, extras = CASES[name].make(), CASES[name].extras
    actual, state = run(optax.flatten(tx), extras, grads=GRADS[:4])
    # Not to the bit: a square root in a vector register may round otherwise than one beside it.
    assert_close(actual, run(tx, extras, grads=GRADS[:4])[0])
    assert all(leaf.shape[-1:] in [(), (SIZE,), (3,)] for leaf in jax.tree.leaves(state))


# --- stale_params ---


def test_it_takes_stale_params_that_are_flat():
    def flat(t):
        return {"stale_params": jax.flatten_util.ravel_pytree(STALE[t])[0]}

    actual, _ = run(optax.flatten(FRESH), flat, grads=GRADS[:3])
    expected, _ = run(FRESH, given, grads=GRADS[:3])
    assert_close(actual, expected)


REFUSED = {
    "by a caller": (optax.flatten(FRESH), {"stale_params": STALE[0]}),
    "by a caller, with a memory": (
        optax.flatten(dc.dcasgd(0.1, 0.9)),
        {"stale_params": STALE[0]},
    ),
    "by remember_params": (dc.remember_params(optax.flatten(FRESH)), {}),
    "by delay_gradients": (dc.delay_gradients(optax.flatten(FRESH), 2), {}),
}


@pytest.mark.parametrize(("tx", "extras"), REFUSED.values(), ids=REFUSED)
def test_a_tree_of_stale_params_is_refused_with_the_remedy(tx, extras):
    with pytest.raises(ValueError, match=r"stale_params must.*ravel_pytree\(stale_params\)"):
        tx.update(GRADS[0], tx.init(PARAMS), PARAMS, **extras)


def test_a_tree_beside_a_tree_is_told_nothing_of_flatten():
    with pytest.raises(ValueError, match=r"stale_params\['dense'\] is missing\.$"):
        FRESH.update(GRADS[0], FRESH.init(PARAMS), PARAMS, stale_params={})


# --- Masks, and gradients that are missing ---


def test_what_a_mask_around_it_leaves_out_has_no_place_in_the_vector():
    mask = {"dense": {"bias": False, "kernel": True}, "frozen": False}
    trajectories = []
    for tx in (dc.dcasgd(0.1, 0.9, 0.5), optax.flatten(dc.dcasgd(0.1, 0.9, 0.5))):
        actual, state = run(optax.masked(tx, mask), grads=GRADS[:3])
        trajectories.append(actual)
    assert_close(*trajectories)
    assert state.inner_state.momentum.shape == (6,)


INSIDE = {
    "a mask": lambda: optax.masked(dc.dcasgd(), jax.tree.map(lambda _: True, PARAMS)),
    "delays": lambda: dc.delay_gradients(FRESH, {"dense": 1, "frozen": 0}),
    "multipliers": lambda: dc.mxnet.DCASGD(lr_mult={"dense": 1.0, "frozen": 0.5}),
}


@pytest.mark.parametrize("inner", INSIDE.values(), ids=INSIDE)
def test_a_value_a_parameter_does_not_fit_the_vector(inner):
    tx = optax.flatten(inner())
    with pytest.raises(ValueError, match="prefix"):
        tx.update(GRADS[0], tx.init(PARAMS), PARAMS)


def test_a_missing_gradient_is_refused():
    tx = optax.flatten(dc.dcasgd())
    grads = GRADS[0] | {"frozen": {**GRADS[0]["frozen"], "offset": None}}
    with pytest.raises(ValueError, match=r"updates has shape \(12,\).*parameter has shape \(13,\)"):
        tx.update(grads, tx.init(PARAMS), PARAMS)


# --- Dtypes ---


def mixed(tree):
    return tree | {"frozen": jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree["frozen"])}


def test_mixed_dtypes_become_the_wider_one():
    """So that the update of a bfloat16 parameter is rounded once, where it is added."""
    params, grads = mixed(PARAMS), list(map(mixed, GRADS[:3]))
    actual, state = run(optax.flatten(dc.dcasgd(0.1, 0.9, 0.5)), params=params, grads=grads)
    expected, _ = run(dc.dcasgd(0.1, 0.9, 0.5), params=params, grads=grads)
    chex.assert_trees_all_equal_dtypes(actual[-1], params)
    assert state.prev_params.dtype == jnp.float32
    assert_close(actual[-1]["dense"], expected[-1]["dense"])
    assert_close(actual[-1]["frozen"], expected[-1]["frozen"], rtol=2**-7, atol=2**-7)
    with (
        jax.numpy_dtype_promotion("strict"),
        pytest.raises(Exception, match="no available implicit dtype promotion path"),
    ):
        optax.flatten(dc.dcasgd()).init(params)


def test_one_vector_a_dtype_by_partition():
    def dtypes(tree):
        return jax.tree.map(lambda x: x.dtype.name, tree)

    tx = dc.dcasgd(0.1, 0.9, 0.5)
    params, grads = mixed(PARAMS), list(map(mixed, GRADS[:3]))
    by_dtype = {name: optax.flatten(tx) for name in ("float32", "bfloat16")}
    with jax.numpy_dtype_promotion("strict"):
        actual, state = run(optax.partition(by_dtype, dtypes), params=params, grads=grads)
    expected, _ = run(tx, params=params, grads=grads)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)
    for name, of_dtype in state.inner_states.items():
        assert of_dtype.inner_state.prev_params.dtype.name == name


# --- Several devices ---

COLLECTIVE = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute")
SHAPES, SPECS = {"bias": (8,), "kernel": (4, 6)}, {"bias": P("x"), "kernel": P(None, "x")}


def on_mesh(axis_type):
    """A mesh of two devices, and parameters that are split over both."""
    mesh = jax.make_mesh((2,), ("x",), (axis_type,), devices=jax.devices()[:2])
    params = random_tree(0, shapes=SHAPES)
    placed = {k: jax.device_put(v, NamedSharding(mesh, SPECS[k])) for k, v in params.items()}
    return mesh, params, placed


def step(tx, params, state):
    updates, state = tx.update(params, state, params)
    return optax.apply_updates(params, updates), state


def test_inside_shard_map_each_device_has_the_vector_of_its_shards():
    tx = optax.flatten(dc.dcasgd(0.1, 0.9, 0.5))
    mesh, params, placed = on_mesh(AxisType.Auto)
    state_specs = dc.DCASGDState(count=P(), momentum=P("x"), nu=None, prev_params=P("x"))
    init = jax.jit(jax.shard_map(tx.init, mesh=mesh, in_specs=(SPECS,), out_specs=state_specs))
    advance = jax.jit(
        jax.shard_map(
            functools.partial(step, tx),
            mesh=mesh,
            in_specs=(SPECS, state_specs),
            out_specs=(SPECS, state_specs),
        )
    )
    actual, state = placed, init(placed)
    assert state.momentum.sharding.shard_shape(state.momentum.shape) == (16,)
    expected, plain = params, tx.init(params)
    assert not COLLECTIVE.search(advance.lower(actual, state).compile().as_text())
    for _ in range(2):
        actual, state = advance(actual, state)
        expected, plain = step(tx, expected, plain)
    assert_close(actual, expected)


def test_an_explicit_mesh_refuses_what_has_no_sharding_as_a_vector():
    mesh, _, placed = on_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh), pytest.raises(Exception, match="sharding of the output"):
        optax.flatten(dc.dcasgd()).init(placed)


def test_on_an_auto_mesh_it_is_right_but_talks_at_every_step():
    tx = optax.flatten(dc.dcasgd(0.1, 0.9, 0.5))
    mesh, params, placed = on_mesh(AxisType.Auto)
    with jax.set_mesh(mesh):
        state = tx.init(placed)
        advance = jax.jit(functools.partial(step, tx)).lower(placed, state).compile()
        actual, _ = advance(placed, state)
    assert_close(actual, step(tx, params, tx.init(params))[0])
    assert COLLECTIVE.search(advance.as_text())


def test_the_programs_of_the_manual_run(capsys):
    page = pathlib.Path(__file__).parents[1] / "docs" / "speed.md"
    section = page.read_text().partition("\n## Many small arrays")[2].partition("\n## ")[0]
    names = {}
    for program in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(program, names)
    assert capsys.readouterr().out == "(8,) (4, 8)\n"
    assert set(names["tx"].init(mixed(PARAMS)).inner_states) == {"float32", "bfloat16"}
