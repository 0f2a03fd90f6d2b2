"""Our wrappers around and inside Optax's, and what `optax.tree.map_params` reaches."""

from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
import pytest
import reference
from wrapper_cases import (
    BF16,
    COMPILES_A_BRANCH,
    EVERYWHERE,
    GRADS,
    HALF_GRADS,
    HALF_PARAMS,
    HALF_STALE,
    NUM_WORKERS,
    OPTIMIZERS,
    PARAMS,
    SGD,
    STEPS,
    Adam,
    Compensation,
    StaleParams,
    adam,
    assert_close,
    assert_same,
    assert_trajectory,
    dtype_for,
    extras_of,
    no_extras,
    opposite,
    run,
    tree_cast,
)

import optax_dcasgd as dc

# --- delay_gradients and with_master_weights, inside and around ---


def delayed_by_hand(correct, optimize, delay, steps=STEPS):
    """Holds the parameters of every step; the gradient of step t is applied at step t + delay."""
    params, held, trajectory = reference.wide(PARAMS), [], []
    for t in range(steps):
        held.append((reference.wide(GRADS[t]), params))
        if t >= delay:
            grads, stale = held[t - delay]
            params = reference.add(params, optimize(correct(grads, params, stale), t - delay))
        trajectory.append(params)
    assert correct.largest > 0.05
    return trajectory


@pytest.mark.parametrize("delay", [1, 3])
def test_delay_gradients_around_a_chain(delay):
    tx = dc.delay_gradients(
        optax.named_chain(
            ("compensation", dc.add_delay_compensation(0.8, decay=0.9, store=None)),
            ("adam", adam(0.2)),
        ),
        delay,
    )
    actual, _ = run(tx, steps=8)
    assert_trajectory(
        actual, delayed_by_hand(Compensation(0.8, decay=0.9), Adam(0.2), delay, steps=8)
    )


# Hosts that change nothing, around an optimizer that is made from its learning rate.
AROUND = {
    "inject_hyperparams": lambda make: optax.inject_hyperparams(make)(0.2),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(0.2), 3),
    "masked": lambda make: optax.masked(make(0.2), EVERYWHERE),
    "partition": lambda make: optax.partition({0: make(0.2)}, 0),
}


@pytest.mark.parametrize("host", AROUND)
def test_delay_gradients_around_and_inside_hosts(host):
    def compensated(learning_rate):
        return dc.dcasgd(learning_rate, 0.9, 0.8, store=None)

    def delayed(learning_rate):
        return dc.delay_gradients(compensated(learning_rate), 2)

    jit = host in COMPILES_A_BRANCH
    expected = delayed_by_hand(Compensation(0.8), SGD(0.2, 0.9), 2)
    around, _ = run(dc.delay_gradients(AROUND[host](compensated), 2), jit=jit)
    inside, _ = run(AROUND[host](delayed), jit=jit)
    assert_trajectory(around, expected)
    assert_trajectory(inside, expected)


@pytest.mark.parametrize("delays", [(2, 1), (3, 2), (0, 2)], ids=str)
def test_a_tree_of_delays_equals_a_partition_by_delay(delays):
    """For SGD with momentum the zero gradients at the start leave no trace."""
    inner = dc.dcasgd(0.1, 0.9, 0.5, store=None)
    fresh = optax.sgd(0.1, momentum=0.9)
    tree = dict(zip(("dense", "frozen"), delays, strict=True))
    partition = optax.partition(
        {
            name: dc.delay_gradients(inner, delay) if delay else fresh
            for name, delay in tree.items()
        },
        {"dense": "dense", "frozen": "frozen"},
    )
    actual, _ = run(dc.delay_gradients(inner, tree), jit=False)
    expected, _ = run(partition, jit=False)
    assert_trajectory(actual, expected, rtol=1e-6, atol=1e-6)


def test_each_leaf_is_scaled_by_its_own_delay():
    delays = {"dense": 2, "frozen": 4}
    inner = optax.chain(dc.scale_by_staleness(), optax.sgd(0.1))
    actual, _ = run(dc.delay_gradients(inner, delays), jit=False)
    params = reference.wide(PARAMS)
    for t in range(STEPS):
        for name, delay in delays.items():
            if t >= delay:
                step = SGD(0.1 / delay)
                params[name] = reference.add(params[name], step(GRADS[t - delay][name], t))
        assert_close(actual[t], params)


def assert_masters(trajectory, masters):
    """Parameters are the rounded masters: equal, or neighbours where float64 is near a tie."""
    for params, master in zip(trajectory, masters, strict=True):
        assert all(leaf.dtype == BF16 for leaf in jax.tree.leaves(params))
        assert_close(params, master, rtol=2**-8 + 1e-5)


MASTERED = {
    "chain-given": (
        lambda: optax.chain(
            dc.add_delay_compensation(0.5, decay=0.9, store=None), optax.sgd(0.1, momentum=0.9)
        ),
        "given",
    ),
    "masked-previous": (
        lambda: optax.masked(dc.dcasgd(0.1, 0.9, 0.5, decay=0.9), EVERYWHERE),
        "previous",
    ),
    "apply_if_finite-worker": (
        lambda: optax.apply_if_finite(
            dc.dcasgd(0.1, 0.9, 0.5, decay=0.9, num_workers=NUM_WORKERS), 3
        ),
        "worker",
    ),
    "inject_hyperparams-updates": (
        lambda: optax.inject_hyperparams(dc.dcasgd)(0.1, 0.9, 0.5, decay=0.9, store="updates"),
        "previous",
    ),
}


@pytest.mark.parametrize("name", MASTERED)
def test_with_master_weights_around_hosts(name):
    make, source = MASTERED[name]
    tx = dc.with_master_weights(make())

    def extras(t):
        return {"stale_params": HALF_STALE[t]} if source == "given" else extras_of(source, t)

    actual, state = run(tx, extras=extras, params=HALF_PARAMS, grads=HALF_GRADS)

    params = reference.wide(HALF_PARAMS)
    memory = StaleParams(source, params)
    correct, optimize, masters = Compensation(0.5, decay=0.9), SGD(0.1, 0.9), []
    for t in range(STEPS):
        corrected = correct(HALF_GRADS[t], params, memory.at(t, given=HALF_STALE))
        before, params = params, reference.add(params, optimize(corrected, t))
        memory.applied(t, before, params)
        masters.append(params)
    assert correct.largest > 0.05
    assert_masters(actual, masters)
    assert_close(state.master, masters[-1])  # float32 throughout, though the parameters are not
    assert_same(tree_cast(state.master, BF16), actual[-1])


@pytest.mark.parametrize("inside", [True, False], ids=["masters-inside", "masters-outside"])
def test_delayed_master_weights(inside):
    """Outside, the masters are delayed; inside, the parameters the gradient was computed at."""
    compensated = dc.dcasgd(0.1, 0.9, 0.5, store=None)
    if inside:
        tx = dc.delay_gradients(dc.with_master_weights(compensated), 2)
    else:
        tx = dc.with_master_weights(dc.delay_gradients(compensated, 2))
    actual, state = run(tx, params=HALF_PARAMS, grads=HALF_GRADS)

    master, held, masters = reference.wide(HALF_PARAMS), [], []
    correct, optimize = Compensation(0.5), SGD(0.1, 0.9)
    for t in range(STEPS):
        parameters = reference.wide(HALF_PARAMS if t == 0 else actual[t - 1])
        held.append((reference.wide(HALF_GRADS[t]), parameters if inside else master))
        if t >= 2:
            grads, stale = held[t - 2]
            master = reference.add(master, optimize(correct(grads, master, stale), t))
        masters.append(master)
    assert correct.largest > 0.05
    assert_masters(actual, masters)
    assert_close((state.inner_state if inside else state).master, masters[-1])


def test_masked_master_weights_round_only_what_they_hold():
    """Without masters a bfloat16 parameter stands still under steps it cannot resolve."""
    params = {"dense": jnp.ones(3, BF16), "frozen": jnp.ones(2, BF16)}
    grads = jax.tree.map(lambda p: jnp.full_like(p, 2.0**-11), params)
    mask = {"dense": True, "frozen": False}
    tx = optax.chain(
        optax.masked(dc.with_master_weights(dc.dcasgd(1.0, None, 0.0)), mask),
        optax.masked(dc.dcasgd(1.0, None, 0.0), opposite(mask)),
    )
    actual, _ = run(tx, params=params, grads=[grads] * 32, steps=32)
    assert_same(actual[-1]["frozen"], params["frozen"])
    assert_same(actual[-1]["dense"], jnp.full(3, 1 - 2.0**-6, BF16))


# --- optax.tree.map_params ---

PARAM_LIKE = {
    "dcasgd-previous": ("prev_params", "momentum"),
    "dcasgd-updates": ("momentum",),
    "dcasgd-given": ("momentum", "nu"),
    "dcasgd-workers": ("prev_params", "nu"),
    "compensated-adam": ("prev_params", "nu", "mu"),
    "delay_gradients": ("grads", "params", "momentum"),
    "delay_gradients-tree": ("grads", "params", "momentum"),
    "with_master_weights": ("master", "prev_params", "momentum"),
    "scale_by_gap": ("prev_params", "nu", "backups"),
    "scale_by_staleness": (),
}


class Reached(NamedTuple):
    """What map_params leaves in the place of a leaf that it takes for one of a parameter's."""

    parameter: int
    shape: tuple


@pytest.mark.parametrize("name", PARAM_LIKE)
def test_map_params_reaches_what_is_like_the_parameters_and_nothing_else(name):
    if name == "delay_gradients-tree":
        delays = {"dense": 2, "frozen": {"offset": 0, "scale": 3}}
        tx, extras = dc.delay_gradients(dc.dcasgd(0.1, 0.9, store=None), delays), no_extras
    else:
        make, extras = OPTIMIZERS[name]
        tx = make()
    params = tree_cast(PARAMS, dtype_for(name))
    state = tx.init(params)
    _, state = tx.update(tree_cast(GRADS[0], dtype_for(name)), state, params, **extras(0))

    # A second tree, of numbers, says which parameter a leaf of the state belongs to.
    leaves, structure = jax.tree.flatten(PARAMS)
    mapped = optax.tree.map_params(
        tx,
        lambda leaf, i: (
            Reached(i, leaf.shape[leaf.ndim - leaves[i].ndim :])
            if isinstance(leaf, jax.Array)
            else leaf
        ),
        state,
        structure.unflatten(range(len(leaves))),
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
        transform_non_params=lambda leaf: None,
    )
    reached = set()
    for path, leaf in jax.tree_util.tree_flatten_with_path(
        mapped, is_leaf=lambda x: isinstance(x, Reached)
    )[0]:
        assert isinstance(leaf, Reached)
        assert leaf.shape == leaves[leaf.parameter].shape
        fields = [entry.name for entry in path if isinstance(entry, jax.tree_util.GetAttrKey)]
        reached.add((fields[-1], leaf.parameter))
    missing = {("grads", 2), ("params", 2)} if name == "delay_gradients-tree" else set()
    expected = {(field, i) for field in PARAM_LIKE[name] for i in range(len(leaves))}
    assert reached == expected - missing
