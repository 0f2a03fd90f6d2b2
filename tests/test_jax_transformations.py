"""Under scan, vmap and grad, every transformation is the plainest loop of itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import random_tree
from transformation_cases import (
    CASES,
    GRADS,
    NUM_WORKERS,
    PARAMS,
    STALENESS,
    assert_close,
    inputs,
    make_step,
)

import optax_dcasgd as dc

STEPS = 5


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


SCANNED = ["fused_dcasgd", "workers", "adaptive-remembered", "delay_gradients-tree", "mxnet-1"]


@pytest.mark.parametrize("name", SCANNED)
def test_scan_equals_a_loop(name):
    step = make_step(CASES[name].make())
    initial = (PARAMS, CASES[name].make().init(PARAMS))
    per_step = [inputs(name, t)[1:] for t in range(STEPS)]

    @jax.jit
    def scan(initial, per_step):
        return jax.lax.scan(lambda carry, xs: (step(*carry, *xs), None), initial, per_step)[0]

    carry, step = initial, jax.jit(step)
    for xs in per_step:
        carry = step(*carry, *xs)
    assert_close(scan(initial, stacked(per_step)), carry)


@pytest.mark.parametrize("name", ["adaptive-remembered", "dcasgd-workers"])
def test_vmap_over_seeds_equals_a_loop(name):
    """Parameters and state have the axis, and the index of the worker differs in the batch."""
    tx = CASES[name].make()
    batch = [random_tree(300), random_tree(301)]
    orders = np.array([[0, 1, 0, 2], [1, 1, 2, 0]], np.int32)

    def run(params, order):
        state = tx.init(params)
        for t in range(3):
            extras = {"worker": order[t]} if name == "dcasgd-workers" else {}
            params, state = make_step(tx)(params, state, GRADS[t], extras)
        return params, state

    one_by_one = jax.jit(run)
    expected = stacked([one_by_one(p, order) for p, order in zip(batch, orders, strict=True)])
    assert_close(jax.jit(jax.vmap(run))(stacked(batch), orders), expected, rtol=2e-6)


def test_no_compilation_when_schedules_and_injected_values_change():
    rule = optax.inject_hyperparams(dc.add_delay_compensation)(
        lamda=lambda t: 0.1 * t, decay=0.9, clip=None
    )
    tx = dc.remember_params(
        optax.chain(dc.scale_by_staleness(0.5), rule, optax.scale(-0.1)), num_workers=NUM_WORKERS
    )
    traces = []

    @jax.jit
    def update(*args, **extras):
        traces.append(None)
        return tx.update(*args, **extras)

    state = tx.init(PARAMS)
    for t in range(STEPS):
        state.inner_state[1].hyperparams["decay"] = jnp.asarray(0.1 * t)
        extras = {"worker": t % NUM_WORKERS, "staleness": STALENESS[t]}
        _, state = update(GRADS[t], state, PARAMS, **extras)
    assert len(traces) == 1


# --- Derivatives: what hyperparameters and the start do to the loss at the end ---

# Most of the time of these tests would go into optimizing what runs once.
unoptimized = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# name: the optimizer for a learning rate
OPTIMIZERS = {
    "add_delay_compensation": lambda lr: sgd(dc.add_delay_compensation(0.5, decay=0.9), lr),
    "add_delay_compensation, eps=0": lambda lr: sgd(dc.add_delay_compensation(lr, eps=0.0), lr),
    "dcasgd": lambda lr: dc.dcasgd(lr, 0.9, 0.5, decay=0.9),
    "dcasgd, updates": lambda lr: dc.dcasgd(lr, 0.9, 0.5, store="updates"),
    "delay_gradients": lambda lr: dc.delay_gradients(dc.dcasgd(lr, store=None), 1),
    "with_master_weights": lambda lr: dc.with_master_weights(dc.dcasgd(lr, 0.9)),
    "scale_by_staleness": lambda lr: sgd(dc.scale_by_staleness(0.5), lr),
    "scale_by_gap": lambda lr: sgd(dc.scale_by_gap(0.9), lr),
    "scale_by_gap, eps=0": lambda lr: sgd(dc.scale_by_gap(eps=0.0), lr),
    "robust": lambda lr: sgd(dc.robust_delay_compensation(1.0), lr),
    "robust, eps=0": lambda lr: sgd(dc.robust_delay_compensation(lr, eps=0.0), lr),
}


def sgd(rule, lr):
    return dc.remember_params(optax.chain(rule, optax.sgd(lr)))


@pytest.mark.parametrize(
    "direction",
    [1.0, pytest.param(0.8 + 0.6j, marks=pytest.mark.slow)],
    ids=["real", "complex"],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_derivatives_are_finite_differences(name, direction):
    # One component and one unit (a column) start at the minimum and never have a gradient.
    start = np.array([[0.5, 0.0, -0.3], [0.0, 0.0, 0.8]]) * direction

    def loss(w):
        of_parts = [
            jnp.sum(1 - jnp.cos(x)) + 0.1 * jnp.sum(x) ** 2 * jnp.sum(x[:, 0])
            for x in (w.real, w.imag)
        ]
        return sum(of_parts)

    def trained(lr, scale):
        params, tx = scale * start, OPTIMIZERS[name](lr)
        state = tx.init(params)
        for _ in range(4):
            grads = (start != 0) * jax.grad(loss)(params).conj()
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return loss(params)

    with jax.enable_x64(True):
        at = (jnp.float64(0.2), jnp.float64(1.0))
        found = unoptimized(jax.grad(trained, (0, 1)))(*at)
        compiled = unoptimized(trained)
        for i, step in enumerate(np.eye(2) * 1e-6):
            lr, scale = at
            above, below = (compiled(lr + s[0], scale + s[1]) for s in (step, -step))
            np.testing.assert_allclose(found[i], (above - below) / 2e-6, rtol=1e-5)
