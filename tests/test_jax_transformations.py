"""Under scan and vmap, every transformation is the plainest loop of itself."""

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
