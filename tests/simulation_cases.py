"""A small model, and training it in float64 NumPy with every version of the parameters kept."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import reference

from optax_dcasgd import simulation

NUM_WORKERS = 4
NUM_UPDATES = 40
LEARNING_RATE = 0.3

_rng = np.random.default_rng(0)
BATCHES = {
    "x": _rng.normal(size=(NUM_UPDATES, 5, 3)),
    "y": _rng.normal(size=(NUM_UPDATES, 5, 2)),
}
PARAMS = {"kernel": _rng.normal(size=(3, 2)), "bias": _rng.normal(size=(2,))}


def loss(params, batch, key):
    del key
    h = jnp.tanh(batch["x"] @ params["kernel"] + params["bias"])
    return jnp.mean((h - batch["y"]) ** 2)


grad_fn = jax.value_and_grad(loss)


def numpy_grad_fn(params, x, y):
    """The loss and the gradient, by hand."""
    h = np.tanh(x @ params["kernel"] + params["bias"])
    d = 2 * (h - y) * (1 - h**2) / h.size
    return np.mean((h - y) ** 2), {"kernel": x.T @ d, "bias": d.sum(0)}


def numpy_run(updates, learning_rate=LEARNING_RATE, **hyperparameters):
    """The parameters after each update, and its loss.

    Args:
      updates: One list of (batch, staleness) an update; the gradient is the mean over the list.
      learning_rate: That of `reference.DCASGD`.
      **hyperparameters: The others.
    """
    optimizer = reference.DCASGD(lr=learning_rate, **hyperparameters)
    versions, losses = [reference.wide(PARAMS)], []
    for pushes in updates:
        stale = versions[len(versions) - 1 - pushes[0][1]]
        pairs = [numpy_grad_fn(stale, BATCHES["x"][t], BATCHES["y"][t]) for t, _ in pushes]
        grads = {name: np.mean([g[name] for _, g in pairs], 0) for name in stale}
        losses.append(np.mean([value for value, _ in pairs]))
        versions.append(reference.add(versions[-1], optimizer(grads, w=versions[-1], w_s=stale)))
    return versions[1:], np.array(losses)


def one_push_each(staleness):
    """The ``updates`` of `numpy_run` for asynchronous pushes."""
    return [[(t, tau)] for t, tau in enumerate(np.asarray(staleness))]


@functools.cache
def arrivals(*, all_present=False):
    """Four workers, one slow; one that stops and one that joins unless all are to be present."""
    absence = {} if all_present else {"start": {2: 4.0}, "stop": {3: 5.0}}
    with jax.ensure_compile_time_eval():  # whoever asks first may be inside a transformation
        key = jax.random.key(3)
        return simulation.arrivals(key, NUM_WORKERS, NUM_UPDATES, slowdown={1: 3.0}, **absence)


def as_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


def assert_close(actual, expected, tolerance):
    chex.assert_trees_all_close(actual, expected, rtol=tolerance, atol=tolerance)
