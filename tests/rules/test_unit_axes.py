"""`unit_axes`: a layout of the weights changes nothing about what `robust_delay_compensation` does.

The same weights are trained twice: as Flax's Dense keeps them, (in, out), one array a layer; and
stacked, transposed, or with their outputs split into heads.
"""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import random_tree, train

from optax_dcasgd import remember_params, robust_delay_compensation

# Three layers, stacked; (out, in); (embed, heads, head_dim), which one head at a time is one unit
# each in "per_head". And two that are as Flax's Dense keeps them.
SHAPES = {
    "stacked": {"kernel": (3, 4, 2), "bias": (3, 2)},
    "out_in": (2, 4),
    "attention": (4, 3, 2),
    "per_head": (4, 3, 2),
    "whole": (4, 2),
    "plain": (4, 2),
}
PARAMS = random_tree(0, shapes=SHAPES)
# With an outlier, so that every factor of the formula acts.
GRADS = [random_tree(t, shapes=SHAPES, scale=9.0 if t == 5 else 1.0) for t in range(1, 9)]
AXES = {
    "stacked": (0, -1),
    "out_in": 0,
    "attention": (-2, -1),
    "per_head": np.int64(1),
    "whole": (),
    "plain": None,
}


def separate(tree):
    """The same weights as matrices of shape (in, out), and what is one unit as a column."""
    return {
        "stacked": [jax.tree.map(lambda x, i=i: x[i], tree["stacked"]) for i in range(3)],
        "out_in": tree["out_in"].T,
        "attention": tree["attention"].reshape(4, 6),
        "per_head": [tree["per_head"][:, i].reshape(-1, 1) for i in range(3)],
        "whole": tree["whole"].reshape(-1, 1),
        "plain": tree["plain"],
    }


def trained(unit_axes, params=PARAMS, grads=GRADS):
    robust = robust_delay_compensation(unit_axes=unit_axes)
    return train(remember_params(optax.chain(robust, optax.sgd(0.3))), params, grads)


def test_units_are_the_same_in_every_layout():
    trajectory, state = trained(AXES)
    expected, _ = trained(None, separate(PARAMS), [separate(g) for g in GRADS])
    actual = [separate(params) for params in trajectory]
    chex.assert_trees_all_close(actual, expected, rtol=2e-6, atol=2e-6)
    nu = jax.tree.map(jnp.shape, state.inner_state[0][0].nu)
    assert nu == {
        "stacked": {"kernel": (3, 1, 2), "bias": (3, 2)},
        "out_in": (2, 1),
        "attention": (1, 3, 2),
        "per_head": (1, 3, 1),
        "whole": (1, 1),
        "plain": (1, 2),
    }
    # Along the wrong axes each of them ends elsewhere.
    wrong = separate(trained(None)[0][-1])
    for name in AXES.keys() - {"plain", "attention", "stacked"}:
        pairs = zip(jax.tree.leaves(wrong[name]), jax.tree.leaves(actual[-1][name]), strict=True)
        assert max(np.abs(a - b).max() for a, b in pairs) > 1e-2, name
    for name in ("attention", "stacked"):
        a, b = (jax.tree.leaves(tree[name])[-1] for tree in (wrong, actual[-1]))
        assert np.abs(a - b).max() > 1e-2, name


def test_axes_may_be_a_function_of_path_and_parameter():
    by_function, by_tree = (
        robust_delay_compensation(unit_axes=axes)
        for axes in (lambda path, param: AXES[path[0].key] if param.ndim else (), AXES)
    )
    states = [tx.init(PARAMS) for tx in (by_function, by_tree)]
    chex.assert_trees_all_equal_shapes_and_dtypes(*states)
    for grads in GRADS[:2]:
        extra = {"stale_params": GRADS[2], "staleness": 2}
        results = [
            tx.update(grads, state, PARAMS, **extra)
            for tx, state in zip((by_function, by_tree), states, strict=True)
        ]
        states = [state for _, state in results]
        chex.assert_trees_all_equal(*results)


def test_one_value_holds_for_all_parameters():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((4, 3)), "scalar": jnp.ones(())}
    for axes, expected in [
        (0, {"a": (2, 1), "b": (4, 1), "scalar": ()}),
        (-1, {"a": (1, 3), "b": (1, 3), "scalar": ()}),
        ((0, 1), {"a": (2, 3), "b": (4, 3), "scalar": ()}),
        ((), {"a": (1, 1), "b": (1, 1), "scalar": ()}),
    ]:
        state = robust_delay_compensation(unit_axes=axes).init(params)
        assert jax.tree.map(jnp.shape, state[0].nu) == expected


@pytest.mark.parametrize(
    ("axes", "error", "message"),
    [
        (2, ValueError, "unit_axes=(2,) of params['out_in'], but the parameter has shape (2, 4)"),
        ((0, -3), ValueError, "of params['out_in'], but the parameter has shape (2, 4)"),
        ({**AXES, "whole": 5}, ValueError, "unit_axes=(5,) of params['whole']"),
        (lambda path, param: 7, ValueError, "unit_axes=(7,) of params['attention']"),
        ({"out_in": 0}, ValueError, "unit_axes must be one value or a prefix tree of params"),
        ("last", TypeError, "unit_axes must be a Python integer"),
        (True, TypeError, "unit_axes must be a Python integer"),
        ({**AXES, "whole": 1.0}, TypeError, "unit_axes['whole'] must be a Python integer"),
        (
            lambda path, param: "last",
            TypeError,
            "unit_axes of params['attention'] must be a Python int",
        ),
    ],
)
def test_axes_that_a_parameter_has_not_are_refused_by_name(axes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        robust_delay_compensation(unit_axes=axes).init(PARAMS)
