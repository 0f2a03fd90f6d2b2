"""`remember_params` beside what the matrix and the properties show: one worker, loops, refusals."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import WORKERS, assert_bit_equal, random_tree, train

import optax_dcasgd as dc
from optax_dcasgd import remember_params

PARAMS = random_tree(0)
GRADS = [random_tree(t) for t in range(1, 10)]
RULES = {
    "add_delay_compensation": dc.add_delay_compensation(2.0),
    "robust_delay_compensation": dc.robust_delay_compensation(max_norm=None),
    "scale_by_gap": dc.scale_by_gap(),
    "scale_by_staleness": dc.scale_by_staleness(),
}


@pytest.mark.parametrize("inner", [optax.sgd(0.1, 0.9), optax.adam(0.1)], ids=["sgd", "adam"])
@pytest.mark.parametrize("rule", RULES)
def test_one_worker_is_the_inner_optimizer_on_fresh_gradients(rule, inner):
    """M = 1: nobody pushes in between, which is known while tracing, so not a bit may change."""
    tx = remember_params(optax.chain(RULES[rule], inner), num_workers=1)
    actual, _ = train(tx, PARAMS, GRADS, lambda t: {"worker": 0})
    expected, _ = train(inner, PARAMS, GRADS)
    assert_bit_equal(actual, expected)


def test_one_worker_is_told_so_while_tracing():
    """By the parameters themselves for w_s: zero at run time may be rounded in another way."""
    calls = []

    def update(updates, state, params, **extra):
        calls.append((params, extra))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = remember_params(inner, num_workers=1)
    jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS, worker=jnp.int32(0))
    params, extra = calls[0]
    assert extra["stale_params"] is params
    assert extra["staleness"] == 0


def test_the_worker_may_be_traced():
    tx = remember_params(optax.chain(RULES["scale_by_staleness"], optax.sgd(0.1)), num_workers=3)

    def push(carry, step):
        params, state = carry
        worker, grads = step
        updates, state = tx.update(grads, state, params, worker=worker)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *GRADS)
    _, scanned = jax.lax.scan(push, (PARAMS, tx.init(PARAMS)), (jnp.array(WORKERS), grads))
    looped, _ = train(tx, PARAMS, GRADS, lambda t: {"worker": WORKERS[t]}, jit=False)
    last = jax.tree.map(lambda p: p[-1], scanned)
    chex.assert_trees_all_close(last, looped[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("index", "clamped"), [(7, 2), (-(2**31), 0)])
def test_a_traced_worker_out_of_range_is_clamped_in_every_respect(index, clamped):
    """Its own backup is completed on the next call too, and it alone."""
    tx = remember_params(optax.chain(RULES["scale_by_gap"], optax.sgd(0.1)), num_workers=3)
    update = jax.jit(tx.update)

    def outputs(worker):
        order = (0, worker, 1, worker, 2)
        tx_ = optax.GradientTransformationExtraArgs(tx.init, update)
        return train(tx_, PARAMS, GRADS[:5], lambda t: {"worker": jnp.int32(order[t])}, jit=False)

    chex.assert_trees_all_equal(outputs(index), outputs(clamped))


def test_the_memory_does_not_depend_on_what_the_caller_says():
    """What is remembered are the parameters that update was called with."""
    tx = remember_params(optax.sgd(0.1))
    state, params = tx.init(PARAMS), PARAMS
    for grads in GRADS[:3]:
        updates, state = tx.update(grads, state, params, stale_params=GRADS[5], staleness=9)
        assert_bit_equal(state.prev_params, params)
        params = optax.apply_updates(params, updates)


def test_workers_and_their_absence_are_refused_where_they_do_not_fit():
    alone, three = remember_params(optax.sgd(0.1)), remember_params(optax.sgd(0.1), num_workers=3)

    def refused(message, tx, made_by=None, error=ValueError, **extra):
        with pytest.raises(error, match=re.escape(message)):
            tx.update(PARAMS, (made_by or tx).init(PARAMS), PARAMS, **extra)

    refused("worker was passed, but num_workers is None", alone, worker=0)
    refused("worker is required because num_workers=3", three)
    refused("worker is required because num_workers=3", three, stale_params=PARAMS)
    refused("worker", three, worker=3)
    refused("worker", three, worker=-1)
    refused("worker", three, worker=1.0, error=TypeError)
    refused("worker", three, worker=jnp.arange(2), error=(TypeError, ValueError))
    refused("was made with num_workers=None", three, made_by=alone, worker=0)
    refused("was made with num_workers=3", alone, made_by=three)
    refused("stale_params['dense']", alone, stale_params={**PARAMS, "dense": jnp.ones(2)})
    # With stale_params said, who computed the gradient may be said too.
    alone.update(PARAMS, alone.init(PARAMS), PARAMS, worker=0, stale_params=PARAMS)
    for number, error in [(0, ValueError), (2.0, TypeError), (True, TypeError)]:
        with pytest.raises(error, match="num_workers"):
            remember_params(optax.sgd(0.1), num_workers=number)
    with pytest.raises(TypeError, match="inner"):
        remember_params("sgd")


@pytest.mark.parametrize(
    "rule",
    [RULES["add_delay_compensation"], RULES["scale_by_gap"], dc.dcasgd(store=None)],
    ids=["add_delay_compensation", "scale_by_gap", "dcasgd"],
)
def test_a_rule_without_a_source_says_which_there_are(rule):
    with pytest.raises(ValueError, match="stale_params is required") as raised:
        rule.update(PARAMS, rule.init(PARAMS), PARAMS, staleness=1)
    for source in ("remember_params", "delay_gradients", "stale_params="):
        assert source in str(raised.value)


@pytest.mark.parametrize("rule", ["scale_by_staleness", "robust_delay_compensation"])
def test_a_rule_without_an_age_says_who_passes_it(rule):
    rule = RULES[rule]
    with pytest.raises(ValueError, match="staleness is required") as raised:
        rule.update(PARAMS, rule.init(PARAMS), PARAMS, stale_params=PARAMS)
    for source in ("remember_params", "delay_gradients", "staleness="):
        assert source in str(raised.value)


def test_on_the_first_call_the_gradient_is_fresh_and_passes_bit_for_bit():
    """MXNet copies the weights when it first updates them, whatever they were made as."""
    grads = {"x": jnp.array([0.0, -0.0, np.inf, 1e-25, 1e25, -2.0])}
    made, loaded = {"x": jnp.zeros(6)}, {"x": jnp.ones(6)}
    for options, extra in [({}, {}), ({"num_workers": 2}, {"worker": 1})]:
        tx = remember_params(dc.add_delay_compensation(2.0, decay=0.5), **options)
        updates, _ = tx.update(grads, tx.init(made), loaded, **extra)
        assert_bit_equal(updates, grads)
