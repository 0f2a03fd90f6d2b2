"""Parameters, transformations and helpers of the tests of validation.

Messages are matched for the names that a user needs to find the mistake, not for their wording.
"""

import re

import jax
import jax.numpy as jnp
import pytest

from optax_dcasgd import (
    add_delay_compensation,
    dcasgd,
    delay_gradients,
    fused_dcasgd,
    mxnet,
    scale_by_gap,
    with_master_weights,
)

PARAMS = {
    "dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones((3,))},
    "scales": [jnp.ones(()), jnp.ones((2,))],
}
GRADS = jax.tree.map(lambda p: p / 2, PARAMS)

# Trees that are no prefix of PARAMS, and the path that the message names.
NO_PREFIXES = {
    "missing key": ({"dense": 1}, []),
    "extra key": ({"dense": 1, "scales": 1, "more": 1}, []),
    "missing element": ({"dense": 1, "scales": [1]}, ["['scales']"]),
    "extra element": ({"dense": 1, "scales": [1, 1, 1]}, ["['scales']"]),
    "a tuple for a list": ({"dense": 1, "scales": (1, 1)}, ["['scales']"]),
    "a subtree for a leaf": ({"dense": {"kernel": [1], "bias": 1}, "scales": 1}, ["['kernel']"]),
    "empty dict": ({}, []),
    "empty list": ([], []),
}

FACTORIES = {
    "add_delay_compensation": add_delay_compensation,
    "dcasgd": dcasgd,
    "fused_dcasgd": fused_dcasgd,
}

WITH_WORKERS = {**FACTORIES, "scale_by_gap": scale_by_gap}

# One of every kind that keeps parameters, momenta or gradients; all take the same calls.
TRANSFORMATIONS = {
    "add_delay_compensation": lambda: add_delay_compensation(0.5, decay=0.9),
    "dcasgd": lambda: dcasgd(0.1, 0.9, decay=0.9),
    "dcasgd, updates": lambda: dcasgd(0.1, 0.9, store="updates"),
    "fused_dcasgd": lambda: fused_dcasgd(0.1, 0.9, decay=0.9),
    "delay_gradients": lambda: delay_gradients(dcasgd(0.1, 0.9, store=None), 1),
    "delay_gradients, tree": lambda: delay_gradients(
        dcasgd(0.1, 0.9, store=None), {"dense": 1, "scales": [2, 1]}
    ),
    "scale_by_gap": scale_by_gap,
    "with_master_weights": lambda: with_master_weights(dcasgd(0.1, 0.9)),
    "mxnet.DCASGD": lambda: mxnet.DCASGD(0.1, 0.9, wd=0.1),
    "mxnet.DCASGD, multipliers": lambda: mxnet.DCASGD(
        0.1, 0.9, wd=0.1, wd_mult={"dense": 1.0, "scales": 0.0}, lr_mult={"dense": 1.0, "scales": 2}
    ),
    "mxnet.DCASGD, multi_precision": lambda: mxnet.DCASGD(0.1, 0.9, multi_precision=True),
}
transformations = pytest.mark.parametrize("name", TRANSFORMATIONS)


def call(tx, grads, params, state=None, **extra_args):
    """``update``, or ``step`` of a fused optimizer, which is called alike."""
    state = tx.init(PARAMS) if state is None else state
    return (tx.step if hasattr(tx, "step") else tx.update)(grads, state, params, **extra_args)


def gradients_of(tx):
    """What the tree of gradients is called in the signature of what ``call`` calls."""
    return "grads" if hasattr(tx, "step") else "updates"


def raises(error, *parts):
    """``pytest.raises`` for a message in which these texts occur, in order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in parts))


def without(tree, *path):
    """The tree without what is at the path."""
    return changed(tree, *path, value=without)


def changed(tree, *path, value):
    """A copy of the tree with something else at the path; ``value=without`` takes it away."""
    tree = jax.tree.map(lambda x: x, tree)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    if value is without:
        del parent[path[-1]]
    elif isinstance(parent, list) and path[-1] == len(parent):
        parent.append(value)
    else:
        parent[path[-1]] = value
    return tree
