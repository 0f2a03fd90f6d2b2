"""`overlap_reduction` on a mesh, against a float64 loop that is one update late.

The loop is `reference.one_update_old`, with gradients of the whole batch written out in NumPy.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from overlap_cases import (
    CASES,
    HYPERPARAMS,
    PARAMS,
    UPDATES,
    X,
    Y,
    assert_close,
    exact_grads,
    loss,
    mesh_of,
    overlap,
    start,
    train,
)

import optax_dcasgd as dc
from optax_dcasgd import OverlapReductionState, overlap_reduction


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_a_loop_that_is_one_update_late(case):
    hyperparams = CASES[case][1]
    actual, _ = train(overlap(case))
    chex.assert_trees_all_equal(actual[1], PARAMS)  # nothing has been reduced yet
    expected = reference.one_update_old(exact_grads, PARAMS, UPDATES - 1, **hyperparams)
    assert_close(actual[2:], expected)
    if case != "uncompensated":  # else the cases would pass without compensation
        plain = reference.one_update_old(
            exact_grads, PARAMS, UPDATES - 1, **{**hyperparams, "lamda": 0.0}
        )
        gaps = reference.subtract(expected[-1], plain[-1])
        assert max(np.max(np.abs(gap)) for gap in gaps.values()) > 0.01


def test_it_is_the_same_where_shard_map_does_not_check_what_varies():
    tx = overlap("updates")
    chex.assert_trees_all_equal(train(tx, check_vma=False), train(tx))


def test_an_inner_optimizer_with_a_count_of_its_own():
    """Adam's bias correction would be off by one if it saw the first, empty, update."""
    told = optax.chain(dc.add_delay_compensation(0.5), optax.adam(0.1))
    actual, state = train(overlap_reduction(dc.remember_params(told), "data"))
    told_state, history, update = told.init(PARAMS), [PARAMS, PARAMS], jax.jit(told.update)
    for t in range(UPDATES - 1):
        grads = jax.tree.map(jnp.float32, exact_grads(reference.wide(history[-2]), t))
        updates, told_state = update(grads, told_state, history[-1], stale_params=history[-2])
        history.append(optax.apply_updates(history[-1], updates))
    assert_close(actual, history, rtol=1e-4)
    assert state.inner_state.inner_state[1][0].count == UPDATES - 1


def test_gradients_at_parameters_that_the_caller_says():
    """They are handed to the optimizer inside one update later, with the gradients."""
    tx = overlap_reduction(dc.dcasgd(0.1, 0.9, 2.0, store=None), "data")

    def elsewhere(params, state, t):
        return jax.tree.map(lambda w: w + 0.1 * (t + 1), params)

    init, step = start(tx, mesh_of(), elsewhere=elsewhere)
    params, state = PARAMS, init(PARAMS)
    expected, optimizer, waiting = reference.wide(PARAMS), reference.DCASGD(**HYPERPARAMS), None
    for t in range(4):
        params, state = jax.block_until_ready(step(params, state, (X[t], Y[t]), np.float32(t)))
        if waiting is not None:
            grads, at = waiting
            at_next = jax.tree.map(lambda w, t=t: w + 0.1 * (t + 1), expected)
            waiting = exact_grads(at_next, t), at_next
            expected = reference.add(expected, optimizer(grads, expected, at))
        else:
            at = jax.tree.map(lambda w: w + 0.1, expected)
            waiting = exact_grads(at, t), at
        assert_close(params, expected)
    assert_close(state.stale_params, waiting[1])


def test_gradients_that_were_late_before_each_parameter_by_its_own_number():
    tx = overlap_reduction(optax.chain(dc.scale_by_staleness(), optax.sgd(1.0)), "data")
    ages = {name: age for age, name in enumerate(PARAMS)}

    def second_update(params):
        grads = jax.tree.map(jnp.ones_like, jax.lax.pcast(params, "data", to="varying"))
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params, staleness=ages)
        return updates

    found = jax.shard_map(second_update, mesh=mesh_of(), in_specs=P(), out_specs=P())(PARAMS)
    for name, age in ages.items():  # and one update later for the reduction
        np.testing.assert_allclose(found[name], -1 / (age + 1), rtol=1e-6)


def test_the_number_of_devices_changes_nothing_but_rounding():
    tx = overlap("updates")
    assert_close(train(tx, devices=1)[0], train(tx)[0])


def test_an_update_does_not_depend_on_the_batch_of_its_step():
    """So that the reduction can start before the step has computed anything."""
    init, step = start(overlap("params"), mesh_of())
    params, state = jax.block_until_ready(step(PARAMS, init(PARAMS), (X[0], Y[0])))
    expected, _ = jax.block_until_ready(step(params, state, (X[1], Y[1])))
    actual, after = step(params, state, (np.full_like(X[1], np.nan), Y[1]))
    chex.assert_trees_all_equal(actual, expected)
    assert np.isnan(after.grads["kernel"]).all()


def test_it_compiles_once_and_in_a_scan_inside_shard_map():
    tx = overlap("params")

    def run(params, batches):
        def step(carry, batch):
            params, state = carry
            grads = jax.grad(loss)(jax.lax.pcast(params, "data", to="varying"), batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
        return params

    specs = (P(), P(None, "data"))
    run = jax.shard_map(run, mesh=mesh_of(), in_specs=specs, out_specs=P())
    assert_close(jax.jit(run)(PARAMS, (X, Y)), train(tx)[0][-1])


def test_two_axes_of_a_mesh():
    tx = overlap_reduction(dc.dcasgd(0.1, 0.9, 2.0), ("host", "chip"))
    mesh = jax.make_mesh((4, 2), ("host", "chip"), (AxisType.Auto,) * 2)
    specs = OverlapReductionState(P(), P(("host", "chip")), P())

    def step(params, state, batch):
        local = jax.lax.pcast(params, ("host", "chip"), to="varying")
        updates, state = tx.update(jax.grad(loss)(local, batch), state, params)
        return optax.apply_updates(params, updates), state

    init = jax.jit(jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs))
    step = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(P(), specs, P(("host", "chip"))), out_specs=(P(), specs)
        )
    )
    params, state = PARAMS, init(PARAMS)
    for t in range(UPDATES):
        params, state = jax.block_until_ready(step(params, state, (X[t], Y[t])))
    assert_close(params, train(overlap("params"))[0][-1])
