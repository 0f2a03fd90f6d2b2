"""`with_master_weights`: around sources and hosts, inside them, and where its updates land."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import WORKERS, assert_bit_equal, train
from hypothesis import strategies as st
from property_cases import HALF, apply, cases, examples, initialise, is_half, leaves_of, signature
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


# --- Where updates land ---


def starts(dtype):
    """Half-precision numbers that are hard to reach by an addition, and some that are not."""
    info = jnp.finfo(dtype)
    # XLA flushes subnormal float32 to zero on the CPU, and bfloat16 has the exponents of float32.
    smallest = float(info.smallest_subnormal if dtype == "float16" else info.tiny)
    edges = [0.0, 1.0, 1.0 + float(info.eps), smallest, float(info.tiny), float(info.max)]
    edges += [2 * smallest, 3 * smallest, 1.0 - float(info.epsneg), 65504.0, 1e-4, 0.3, 1234.5]
    return np.float32([*edges, *(-x for x in edges)])


# Steps by themselves; and as multiples of the master: to zero, across zero, or almost to zero. (The
# sum of a float32 master and a float32 step is never too near to zero to be reached, but that with
# a float64 step may be.)
ABSOLUTE = [1.0, -1.0, 2.0**-9, 2.0**-25, 1e-8, -3e-8, 1e-20, 0.0, 0.7, -60000.0]
FACTORS = [-1, -2, -1 + 2.0**-10, -1 + 2.0**-23, -1 + 1e-8]


@pytest.mark.parametrize("step_dtype", ["float32", "float64"])
@pytest.mark.parametrize("dtype", HALF)
def test_applied_updates_land_on_the_rounded_master_weights(dtype, step_dtype):
    with jax.enable_x64(step_dtype == "float64"):
        check_landing(dtype, step_dtype)


def check_landing(dtype, step_dtype):
    absolute, factor = np.array([*((s, 0) for s in ABSOLUTE), *((0, f) for f in FACTORS)]).T
    start = np.repeat(starts(dtype), absolute.size)
    absolute, factor = (np.resize(x, start.size).astype(step_dtype) for x in (absolute, factor))
    params = jnp.asarray(start).astype(dtype)
    tx = dc.with_master_weights(optax.identity())
    state = tx.init(params)
    kind = signature(state)
    alive = np.ones(start.size, bool)  # what has overflowed is no longer compared
    tiny, huge = float(jnp.finfo("float32").tiny), float(jnp.finfo("float32").max)
    for t in range(4):
        if t == 2:  # somebody else writes every third parameter; the master has to follow that
            params = jnp.where(np.arange(params.size) % 3, params, jnp.roll(params, 7))
        follows = np.asarray(state.master.astype(dtype)) == params
        master = np.where(follows, np.asarray(state.master), params)
        with np.errstate(over="ignore", invalid="ignore"):
            steps = absolute + factor * master.astype(step_dtype)
            exact = np.asarray(jnp.asarray(master) + jnp.asarray(steps)).astype(np.float32)
            # XLA flushes subnormal float32 to zero on the CPU.
            exact = np.where(np.abs(exact) < tiny, np.float32(0), exact)
        updates, state = tx.update(jnp.asarray(steps), state, params)
        assert signature(state) == kind
        old, params = params, optax.apply_updates(params, updates)
        assert params.dtype == old.dtype
        wanted = jnp.asarray(exact).astype(dtype)
        with np.errstate(invalid="ignore"):  # inf − inf is nan: not alive either
            # Finite, and not further away than float32 reaches.
            alive &= np.abs(np.asarray(wanted, float) - np.asarray(old, float)) <= huge
        landed, master, rounded, goal, begin, exact = (
            np.asarray(x).astype(np.float64)[alive]
            for x in (params, state.master, state.master.astype(dtype), wanted, old, exact)
        )
        np.testing.assert_array_equal(landed, rounded)
        # A float32 update is off by 2⁻²⁵ of the parameter it starts from at most, and the sum by
        # as much; that is less than half of what half precision resolves at the end of the step,
        # unless the end is 2⁻¹² times nearer to zero than the beginning, or nearer still. And
        # where the difference of the two is subnormal, it is flushed to zero.
        within_reach = (np.abs(goal) >= 2.0**-12 * np.abs(begin)) | (goal == 0)
        within_reach &= (np.abs(goal - begin) >= tiny) | (goal == begin)
        np.testing.assert_array_equal(landed[within_reach], goal[within_reach])
        np.testing.assert_array_equal(master[within_reach], exact[within_reach])
        assert np.all(np.abs(landed - goal) <= 2.0**-23 * np.abs(begin) + tiny)
        absolute, factor = np.roll(absolute, 1), np.roll(factor, 1)
    assert np.mean(alive) > 0.5


# --- What the optimizer inside sees ---

OPTIMIZERS = {
    "dcasgd": lambda: dc.dcasgd(0.1, 0.9, 1.0),
    "dcasgd, adaptive": lambda: dc.dcasgd(0.1, 0.5, 2.0, decay=0.95, clip=1.0, store="updates"),
    "adam": lambda: optax.adam(0.01),
}


@hypothesis.given(
    case=cases({}, dtypes_of_x64=((False, [*HALF, "float32"]), (True, [*HALF, "float64"]))),
    inner=st.sampled_from(list(OPTIMIZERS)),
    wider=st.booleans(),
)
@examples(20)
def test_master_weights_train_as_if_the_parameters_were_float32(case, inner, wider):
    x64, tree, _, data = case
    with jax.enable_x64(x64):
        params = data.params(tree)
        masters = [p.astype(jnp.float32) if is_half(p) else p for p in params]
        optimizer = OPTIMIZERS[inner]()
        tx = dc.with_master_weights(optimizer)
        state = initialise(tx, tree.unflatten(params))
        kind = signature(state)
        inner_state = optimizer.init(tree.unflatten(masters))
        for _ in range(4):
            grads = data.grads(tree, wider=wider, absent=False)
            updates, state = tx.update(tree.unflatten(grads), state, tree.unflatten(params))
            assert signature(state) == kind
            params = apply(params, leaves_of(tree, updates))
            widened = [g.astype(m.dtype) for g, m in zip(grads, masters, strict=True)]
            updates, inner_state = optimizer.update(
                tree.unflatten(widened), inner_state, tree.unflatten(masters)
            )
            masters = apply(masters, leaves_of(tree, updates))
            assert_bit_equal(state.inner_state, inner_state)
            for p, m in zip(params, masters, strict=True):
                np.testing.assert_array_equal(np.asarray(p), np.asarray(m.astype(p.dtype)))
