"""Every transformation in every mode, and the plainest loop of it, for the tests of its hosts.

Training starts at random, with gradients that are really stale.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import optax_dcasgd as dc

NUM_WORKERS = 3
WORKERS = [1, 0, 1, 2, 2, 0, 1, 0]
STALENESS = [1, 3, 2, 5, 1, 4, 2, 3]
STEPS = 6
SHAPES = {"dense": {"bias": (2,), "kernel": (3, 2)}, "scale": ()}


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


PARAMS = random_tree(0)
GRADS = [random_tree(100 + t) for t in range(8)]
STALE = [random_tree(200 + t, 0.5) for t in range(8)]


def tree_cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def assert_same(actual, expected):
    """Equal to the bit, in structure, dtype and value."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        one_ulp = float(jnp.finfo(a.dtype).eps) if jnp.issubdtype(a.dtype, jnp.inexact) else 0
        np.testing.assert_allclose(
            reference.wide(a), reference.wide(b), rtol=max(rtol, one_ulp), atol=atol
        )


def largest_gap(a, b):
    return max(np.max(np.abs(gap)) for gap in jax.tree.leaves(reference.subtract(a, b)))


# --- Every transformation in every mode: (optimizer, extra arguments of step t). ---


def no_extras(t):
    return {}


def given(t):
    return {"stale_params": STALE[t]}


def worker(t):
    return {"worker": np.int32(WORKERS[t])}


MODES = {
    "previous": (dc.dcasgd(0.1, 0.9, 0.5), no_extras),
    "updates": (dc.dcasgd(0.1, 0.9, 0.5, store="updates"), no_extras),
    "updates-no-momentum": (dc.dcasgd(0.1, None, 0.5, store="updates"), no_extras),
    "adaptive-given": (dc.dcasgd(0.1, 0.9, 0.5, decay=0.9, clip=0.5, store=None), given),
    "workers": (dc.dcasgd(0.1, 0.9, 0.5, decay=0.9, num_workers=NUM_WORKERS), worker),
    "one-worker": (dc.dcasgd(0.1, 0.9, 0.5, num_workers=1), lambda t: {"worker": np.int32(0)}),
    "compensated-adam": (
        optax.chain(dc.add_delay_compensation(0.5, decay=0.9), optax.adam(0.1)),
        no_extras,
    ),
    "delay": (dc.delay_gradients(dc.dcasgd(0.1, 0.9, 0.5, decay=0.9, store=None), 2), no_extras),
    "delay-tree": (
        dc.delay_gradients(dc.dcasgd(0.1, 0.9, 0.5, store=None), {"dense": 2, "scale": 0}),
        no_extras,
    ),
    "half": (dc.dcasgd(0.1, 0.9, 0.5, decay=0.9), no_extras),
    "masters": (dc.with_master_weights(dc.dcasgd(0.1, 0.9, 0.5)), no_extras),
    "masters-delay": (
        dc.with_master_weights(dc.delay_gradients(dc.dcasgd(0.1, 0.9, 0.5, store=None), 1)),
        no_extras,
    ),
    "gap-workers": (
        optax.chain(dc.scale_by_gap(0.9, num_workers=NUM_WORKERS), optax.sgd(0.1)),
        worker,
    ),
    "robust-workers": (
        optax.chain(dc.robust(num_workers=NUM_WORKERS), optax.sgd(0.1)),
        lambda t: {"worker": np.int32(WORKERS[t]), "staleness": np.int32(STALENESS[t])},
    ),
    "staleness": (
        optax.chain(dc.scale_by_staleness(0.5), optax.sgd(0.1)),
        lambda t: {"staleness": np.int32(STALENESS[t])},
    ),
}
each_mode = pytest.mark.parametrize("mode", MODES)


def start(mode):
    """The optimizer, its extra arguments, and parameters and gradients in the dtype it is for."""
    tx, extras = MODES[mode]
    dtype = jnp.bfloat16 if mode.startswith(("half", "masters")) else jnp.float32
    return tx, extras, tree_cast(PARAMS, dtype), [tree_cast(g, dtype) for g in GRADS]


def make_step(tx):
    def step(params, state, grads, extra_args):
        updates, state = tx.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    return step


class TraceCounter:
    """Counts how often jit traces a function: once for every compilation."""

    def __init__(self, function):
        self.count = 0

        def counted(*args, **kwargs):
            self.count += 1
            return function(*args, **kwargs)

        self.jitted = jax.jit(counted)


@functools.cache
def counted_step(mode):
    """Compiled once for all tests of a mode."""
    return TraceCounter(make_step(MODES[mode][0]))


def jitted_step(mode):
    return counted_step(mode).jitted


@functools.cache
def plain_run(mode):
    """Parameters and state after STEPS steps of a compiled step, nothing donated."""
    tx, extras, params, grads = start(mode)
    state = tx.init(params)
    for t in range(STEPS):
        params, state = jitted_step(mode)(params, state, grads[t], extras(t))
    return params, state
