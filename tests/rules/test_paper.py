"""Zheng et al., arXiv 1609.08326, against a parameter server written in float64 NumPy.

The reference shares no code with the library: it holds what each worker pulled, differentiates by
hand, and applies the paper's equations. The library gets its gradients from `jax.grad`.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_dcasgd import add_delay_compensation, dcasgd, remember_params

NUM_WORKERS = 4
NUM_UPDATES = 30
LEARNING_RATE = 0.3

_rng = np.random.default_rng(0)
X = _rng.normal(size=(20, 3))
Y = _rng.normal(size=(20, 2))
INITIAL = {"kernel": _rng.normal(size=(3, 2)), "bias": _rng.normal(size=(2,))}
ARRIVALS = _rng.integers(NUM_WORKERS, size=NUM_UPDATES).tolist()

METHODS = {
    "c": {"lamda": 2.0, "decay": None, "clip": None},
    "a": {"lamda": 2.0, "decay": 0.95, "clip": None},
    "a without memory": {"lamda": 0.5, "decay": 0.0, "eps": 1e-3, "clip": None},
    "a clipped": {"lamda": 8.0, "decay": 0.95, "clip": 1.0},
}


def numpy_grads(params):
    """The gradient of mean((tanh(x·kernel + bias) − y)²) over rows and columns, by hand."""
    h = np.tanh(X @ params["kernel"] + params["bias"])
    d = 2 * (h - Y) * (1 - h**2) / h.size
    return {"kernel": X.T @ d, "bias": d.sum(0)}


@jax.jit
@jax.grad
def jax_grads(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["kernel"] + params["bias"]) - y) ** 2)


def numpy_server(momentum, lamda, decay=None, eps=1e-7, clip=None):
    """Algorithm 2: worker i's backup is what it pulled after its own last push was applied."""
    params = {name: w.copy() for name, w in INITIAL.items()}
    backup = [{name: w.copy() for name, w in INITIAL.items()} for _ in range(NUM_WORKERS)]
    mean_square = {name: np.zeros_like(w) for name, w in INITIAL.items()}
    velocity = {name: np.zeros_like(w) for name, w in INITIAL.items()}
    trajectory, compensations = [], []
    for worker in ARRIVALS:
        grads = numpy_grads(backup[worker])
        for name, g in grads.items():
            rate = lamda
            if decay is not None:
                mean_square[name] = decay * mean_square[name] + (1 - decay) * g**2
                rate = lamda / np.sqrt(mean_square[name] + eps)
            compensation = rate * g * g * (params[name] - backup[worker][name])
            if clip is not None:
                compensation = np.clip(compensation, -clip * np.abs(g), clip * np.abs(g))
            velocity[name] = momentum * velocity[name] - LEARNING_RATE * (g + compensation)
            compensations.append(np.abs(compensation).max() / np.abs(g).max())
            params[name] = params[name] + velocity[name]
        backup[worker] = {name: w.copy() for name, w in params.items()}
        trajectory.append(params)
        params = dict(params)
    return trajectory, max(compensations)


def jax_server(tx, *told):
    """A server that applies `tx`; the workers really hold the parameters they pulled.

    ``told`` are the names of the extra arguments that it passes.
    """
    update = jax.jit(tx.update)
    params = jax.tree.map(jnp.asarray, INITIAL)
    pulled = [params] * NUM_WORKERS
    state = tx.init(params)
    trajectory = []
    for worker in ARRIVALS:
        extra = {"worker": worker, "stale_params": pulled[worker]}
        grads = jax_grads(pulled[worker], jnp.asarray(X), jnp.asarray(Y))
        updates, state = update(grads, state, params, **{name: extra[name] for name in told})
        params = jax.tree.map(jnp.add, params, updates)
        pulled[worker] = params
        trajectory.append(params)
    return trajectory


def backups(tx):
    return remember_params(tx, num_workers=NUM_WORKERS)


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("method", METHODS)
def test_algorithm_2_with_random_arrivals(method, momentum):
    """Eq. 10 and 14 in float64: with backups, and where the caller says what was pulled."""
    hyperparams = METHODS[method]
    expected, compensation = numpy_server(momentum or 0.0, **hyperparams)
    assert compensation > 0.01  # else this would test plain SGD

    with jax.enable_x64(True):
        told = dcasgd(LEARNING_RATE, momentum, **hyperparams, store=None)
        servers = [(backups(told), "worker")]
        if method == "a" and momentum:
            servers += [
                (backups(told), "worker", "stale_params"),
                (told, "stale_params"),
                (dcasgd(LEARNING_RATE, momentum, **hyperparams), "stale_params"),
                (dcasgd(LEARNING_RATE, momentum, **hyperparams, store="updates"), "stale_params"),
            ]
        for tx, *names in servers:
            trajectory = jax_server(tx, *names)
            chex.assert_trees_all_close(trajectory, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("method", METHODS)
def test_algorithm_2_as_a_link_of_a_chain(method, momentum):
    """The backup holds what the *whole* chain made of worker i's gradient."""
    expected, _ = numpy_server(momentum or 0.0, **METHODS[method])
    rule = add_delay_compensation(**METHODS[method])
    with jax.enable_x64(True):
        tx = backups(optax.chain(rule, optax.sgd(LEARNING_RATE, momentum)))
        chex.assert_trees_all_close(jax_server(tx, "worker"), expected, rtol=1e-12, atol=1e-12)
