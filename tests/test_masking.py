"""`optax.masked` and `optax.partition`: hidden leaves are out of reach."""

import jax
import jax.numpy as jnp
import optax
import pytest
from common import train
from transformation_cases import (
    CASES,
    DELAYS,
    GRADS,
    PARAMS,
    assert_close,
    before_sgd,
    given,
    inputs,
    no_extras,
)

import optax_dcasgd as dc

LEAVES = {"dense": {"bias": False, "kernel": True}, "frozen": {"offset": True, "scale": False}}
SUBTREE = {"dense": {"bias": True, "kernel": True}, "frozen": {"offset": False, "scale": False}}
MATRICES = {"dense": {"bias": False, "kernel": True}, "frozen": {"offset": False, "scale": False}}


def opposite(mask):
    return jax.tree.map(lambda m: not m, mask)


def masked_pair(tx, mask, other_mask, **kwargs):
    return optax.chain(
        optax.masked(tx, mask, **kwargs), optax.masked(optax.sgd(0.3), other_mask, **kwargs)
    )


def partitioned(tx, mask, **kwargs):
    labels = jax.tree.map(lambda m: "compensated" if m else "plain", mask)
    return optax.partition({"compensated": tx, "plain": optax.sgd(0.3)}, labels, **kwargs)


PREFIX = {"dense": True, "frozen": False}
# How the other leaves are hidden from the optimizer under test: (host, what it leaves visible).
HIDING = {
    "masked-leaves": (lambda tx: masked_pair(tx, LEAVES, opposite(LEAVES)), LEAVES),
    "masked-subtree": (lambda tx: masked_pair(tx, PREFIX, opposite(PREFIX)), SUBTREE),
    "masked-callable": (
        lambda tx: masked_pair(
            tx,
            lambda tree: jax.tree.map(lambda x: jnp.ndim(x) == 2, tree),
            lambda tree: jax.tree.map(lambda x: jnp.ndim(x) != 2, tree),
        ),
        MATRICES,
    ),
    "masked-extra-args": (
        lambda tx: masked_pair(tx, PREFIX, opposite(PREFIX), mask_compatible_extra_args=True),
        SUBTREE,
    ),
    "partition-leaves": (lambda tx: partitioned(tx, LEAVES), LEAVES),
    "partition-subtree": (lambda tx: partitioned(tx, PREFIX), SUBTREE),
    "partition-extra-args": (
        lambda tx: partitioned(tx, LEAVES, mask_compatible_extra_args=True),
        LEAVES,
    ),
}
each_hiding = pytest.mark.parametrize("hiding", HIDING)


def visible(tree, mask):
    """The leaves that a mask leaves visible, as a list."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(mask), strict=True)
    return [leaf for leaf, shown in pairs if shown]


def assert_equals_parts(tx, bare, extras, mask, *, params=PARAMS, grads=GRADS, hidden=None):
    """What is visible moves as under ``bare`` alone, what is hidden as under plain SGD."""
    rest = opposite(mask)

    def extras_on_visible(t):
        more = extras(t)
        return {k: visible(v, mask) if k == "stale_params" else v for k, v in more.items()}

    steps = 5
    both, state = train(tx, params, grads[:steps], extras)
    shown = [visible(g, mask) for g in grads[:steps]]
    alone, alone_state = train(bare, visible(params, mask), shown, extras_on_visible)
    others, _ = train(
        optax.sgd(0.3) if hidden is None else hidden,
        visible(params, rest),
        [visible(g, rest) for g in grads[:steps]],
        jit=False,
    )
    assert_close([visible(tree, mask) for tree in both], alone)
    assert_close([visible(tree, rest) for tree in both], others)
    return state, alone_state


@pytest.mark.parametrize(
    "name",
    [
        *("dcasgd-updates", "dcasgd-given", "adaptive-remembered", "gap-remembered", "workers"),
        *("delay_gradients", "with_master_weights"),
    ],
)
def test_hidden_leaves_are_out_of_reach(name):
    hide, mask = HIDING["masked-leaves"]
    case, (params, _, _) = CASES[name], inputs(name, 0)
    grads = [inputs(name, t)[1] for t in range(5)]
    state, alone = assert_equals_parts(
        hide(case.make()), case.make(), case.extras, mask, params=params, grads=grads
    )
    # Nothing is remembered of a leaf that is hidden, and the memory of the others is the same.
    assert_close(jax.tree.leaves(state), jax.tree.leaves(alone))


@each_hiding
def test_every_way_to_hide_leaves(hiding):
    """The caller's stale parameters cover all leaves; in a tree of delays, so do the delays."""
    hide, mask = HIDING[hiding]
    rule = CASES["adaptive-given"].make
    assert_equals_parts(hide(rule()), rule(), given, mask)
    inner = dc.dcasgd(0.1, 0.9, 0.5, store=None)
    delays = {**DELAYS, "frozen": {"offset": 3, "scale": 1}}
    tx, bare = hide(dc.delay_gradients(inner, delays)), visible(delays, mask)
    assert_equals_parts(tx, dc.delay_gradients(inner, bare), no_extras, mask)


@each_hiding
def test_a_source_around_a_mask(hiding):
    """One memory around all of it, and behind the mask a rule that sees some of the leaves."""
    hide, mask = HIDING[hiding]
    rule = before_sgd(dc.scale_by_staleness(0.5), dc.add_delay_compensation(0.8))
    hidden = optax.sgd(0.3)
    assert_equals_parts(
        dc.remember_params(hide(rule)), dc.remember_params(rule), no_extras, mask, hidden=hidden
    )


@pytest.mark.parametrize("hiding", ["masked-leaves", "masked-subtree", "partition-subtree"])
def test_a_tree_of_stalenesses_behind_a_mask(hiding):
    """delay_gradients hands on the staleness of every leaf; a mask hides some of the updates."""
    delays = {"dense": {"bias": 1, "kernel": 2}, "frozen": {"offset": 3, "scale": 2}}
    hide, mask = HIDING[hiding]
    scaled = optax.chain(dc.scale_by_staleness(), optax.sgd(0.1))
    tx = dc.delay_gradients(hide(scaled), delays)
    bare = dc.delay_gradients(scaled, visible(delays, mask))
    hidden = dc.delay_gradients(optax.sgd(0.3), visible(delays, opposite(mask)))
    assert_equals_parts(tx, bare, no_extras, mask, hidden=hidden)
