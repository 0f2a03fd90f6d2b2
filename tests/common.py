"""What tests of every folder share: trees of random numbers, a loop of updates, comparisons."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

SHAPES = {
    "dense": {"bias": (2,), "kernel": (3, 2)},
    "frozen": {"offset": (), "scale": (4,)},
}

# Who pushes, of three workers: worker 1 comes back after two updates, and after four.
WORKERS = [1, 0, 1, 2, 2, 0, 1, 0, 2]


def random_tree(seed, *, shapes=SHAPES, dtype=jnp.float32, scale=1.0):
    """Normally distributed arrays of these shapes; complex ones for a complex dtype."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        x = rng.normal(size=shape)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            x = x + 1j * rng.normal(size=shape)
        return jnp.asarray(scale * x, dtype)

    return jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def train(tx, params, grads, extras=lambda t: {}, *, jit=True):
    """The parameters after each of the given gradients, and the last state.

    Args:
      tx: The optimizer.
      params: The initial parameters.
      grads: One tree for each update.
      extras: The extra arguments of update t.
      jit: Whether to compile the update.
    """
    state = tx.init(params)
    update = jax.jit(tx.update) if jit else tx.update
    trajectory = []
    for t, grad in enumerate(grads):
        updates, state = update(grad, state, params, **extras(t))
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory, state


def assert_bit_equal(actual, expected):
    """Equal in structure, shape, dtype and every bit: −0 is not 0, and NaN is NaN."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_equal(*(jax.tree.map(_bits, tree) for tree in (actual, expected)))


def _bits(x):
    return np.frombuffer(np.asarray(x).tobytes(), np.uint8)


def raises(error, *parts):
    """``pytest.raises`` for a message in which these texts occur, in order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in parts))
