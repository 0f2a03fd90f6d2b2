"""`with_master_weights` around sources and hosts, and inside them."""

import jax
import jax.numpy as jnp
import optax
import pytest
from common import WORKERS, assert_bit_equal, train
from transformation_cases import (
    CASES,
    GRADS,
    NUM_WORKERS,
    PARAMS,
    assert_close,
    cast,
    given,
    no_extras,
    worker,
)

import optax_dcasgd as dc

BF16 = jnp.bfloat16
STEPS = 5
HALF_PARAMS = cast(PARAMS, BF16)
HALF_GRADS = [cast(g, BF16) for g in GRADS[:STEPS]]


def rules():
    rule = dc.add_delay_compensation(0.8, decay=0.9, clip=None)
    return optax.chain(rule, optax.trace(0.5), optax.scale(-0.1))


INNER = {
    "given": (rules, given),
    "remembered": (lambda: dc.remember_params(rules()), no_extras),
    "masked-updates": (
        lambda: optax.masked(
            dc.dcasgd(0.1, 0.9, 0.5, store="updates"), jax.tree.map(lambda _: True, PARAMS)
        ),
        no_extras,
    ),
    "apply_if_finite-workers": (
        lambda: optax.apply_if_finite(dc.remember_params(rules(), num_workers=NUM_WORKERS), 3),
        worker,
    ),
    "inject_hyperparams": (lambda: optax.inject_hyperparams(dc.dcasgd)(0.1, 0.9, 0.5), no_extras),
    "delay_gradients": (lambda: dc.delay_gradients(rules(), 2), no_extras),
    # What behind or around the masters would see float32 updates of bfloat16 parameters.
    "ema-trace": (
        lambda: optax.chain(rules(), optax.trace(0.5), optax.ema(0.9)),
        given,
    ),
    "apply_every": (lambda: optax.chain(rules(), optax.apply_every(2)), given),
    "conditionally_transform": (
        lambda: optax.conditionally_mask(
            optax.conditionally_transform(rules(), lambda step: step % 2 == 0),
            lambda step: step != 1,
        ),
        given,
    ),
}


@pytest.mark.parametrize("name", INNER)
def test_the_masters_are_a_float32_run_of_what_is_inside(name):
    """On the same numbers, and the parameters are the rounded masters."""
    make, extras = INNER[name]

    def half(t):
        return {k: cast(v, BF16) if k == "stale_params" else v for k, v in extras(t).items()}

    def full(t):
        return {k: cast(v, jnp.float32) if k == "stale_params" else v for k, v in half(t).items()}

    actual, state = train(dc.with_master_weights(make()), HALF_PARAMS, HALF_GRADS, half)
    wide = [cast(g, jnp.float32) for g in HALF_GRADS]
    expected, _ = train(make(), cast(HALF_PARAMS, jnp.float32), wide, full)
    assert_close(state.master, expected[-1])
    for params, master in zip(actual, expected, strict=True):
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(BF16)}
        # Rounded: equal, or neighbours where the master is near a tie.
        assert_close(cast(params, jnp.float32), master, rtol=2**-8 + 1e-5)
    assert_bit_equal(cast(state.master, BF16), actual[-1])


def test_masters_inside_a_source_compensate_for_the_rounded_parameters():
    """Outside of it, what is remembered are the masters; inside, the parameters."""
    inner = rules()
    tx = dc.remember_params(dc.with_master_weights(inner), num_workers=NUM_WORKERS)
    actual, state = train(tx, HALF_PARAMS, HALF_GRADS, worker)

    master, update = cast(HALF_PARAMS, jnp.float32), jax.jit(inner.update)
    inner_state, pulled = inner.init(master), [master] * NUM_WORKERS
    for t, grads in enumerate(HALF_GRADS):
        updates, inner_state = update(
            cast(grads, jnp.float32), inner_state, master, stale_params=pulled[WORKERS[t]]
        )
        master = optax.apply_updates(master, updates)
        pulled[WORKERS[t]] = cast(actual[t], jnp.float32)
    assert_close(state.inner_state.master, master, rtol=1e-5)


def test_apply_if_finite_around_masters_takes_float32_gradients():
    make = CASES["with_master_weights"].make
    bad = jax.tree.map(lambda g: g * jnp.nan, GRADS[0])
    grads = [GRADS[0], bad, *GRADS[1:4]]
    actual, state = train(optax.apply_if_finite(make(), 5), HALF_PARAMS, grads)
    _, expected_state = train(make(), HALF_PARAMS, GRADS[:4])
    assert_bit_equal(actual[1], actual[0])
    assert_close(state.inner_state.master, expected_state.master)


def test_masked_masters_round_only_what_they_hold():
    """Without masters a bfloat16 parameter stands still under steps it cannot resolve."""
    params = {"dense": jnp.ones(3, BF16), "frozen": jnp.ones(2, BF16)}
    grads = jax.tree.map(lambda p: jnp.full_like(p, 2.0**-11), params)
    tx = optax.partition(
        {"dense": dc.with_master_weights(dc.dcasgd(1.0)), "frozen": dc.dcasgd(1.0)},
        {"dense": "dense", "frozen": "frozen"},
    )
    actual, _ = train(tx, params, [grads] * 32)
    assert_bit_equal(actual[-1]["frozen"], params["frozen"])
    assert_bit_equal(actual[-1]["dense"], jnp.full(3, 1 - 2.0**-6, BF16))
