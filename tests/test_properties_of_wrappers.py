"""Delays, gaps, stalenesses and masters on arbitrary trees, against the float64 reference."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from hypothesis import strategies as st
from property_cases import (
    HALF,
    NUM_WORKERS,
    OPTIMIZER,
    Bounds,
    Pair,
    apply,
    around,
    build,
    cases,
    check_bits,
    check_trees_bits,
    check_update,
    examples,
    initialise,
    is_complex,
    is_half,
    leaves_of,
    remember,
    renamed,
    signature,
    unit_roundoff,
    where_from,
)

from optax_dcasgd import (
    dcasgd,
    delay_gradients,
    scale_by_gap,
    scale_by_staleness,
    with_master_weights,
)


@hypothesis.given(
    case=cases(OPTIMIZER), delay=st.integers(0, 3), wider=st.booleans(), count=st.integers(3, 5)
)
@examples(70)
def test_a_uniform_delay_is_a_queue_in_front_of_the_optimizer(case, delay, wider, count):
    x64, tree, hyperparams, data = case
    with jax.enable_x64(x64):
        inner = build(dcasgd, hyperparams, store=None)
        tx = delay_gradients(inner, delay)
        params = data.params(tree)
        state = initialise(tx, tree.unflatten(params))
        kind = signature(state)
        bounds = [Bounds(p, None, **renamed(hyperparams)) for p in params]
        lines = [reference.DelayLine(delay) for _ in params]
        first_inner_state = inner.init(tree.unflatten(params))
        for t in range(count):
            # Without a delay there is nothing that could say where the gradient was computed.
            grads = data.grads(tree, wider=wider, absent=delay > 0)
            extra = {"stale_params": tree.unflatten(params)} if delay == 0 else {}
            updates, state = tx.update(
                tree.unflatten(grads), state, tree.unflatten(params), **extra
            )
            assert signature(state) == kind
            updates = leaves_of(tree, updates)
            for i, (bound, update) in enumerate(zip(bounds, updates, strict=True)):
                w = params[i]
                due = lines[i](queued(grads[i], w, delay), w)
                if due is None:
                    check_bits(update, jnp.zeros_like(w))
                else:
                    expected, error = bound(due[0], w, due[1])
                    check_update(update, w, expected, error)
            if t < delay:
                check_trees_bits(state.inner_state, first_inner_state)
            params = apply(params, updates)


@hypothesis.given(
    case=cases(OPTIMIZER), first=st.integers(0, 2), second=st.integers(0, 2), wider=st.booleans()
)
@examples(12)
def test_delays_add_up(case, first, second, wider):
    x64, tree, hyperparams, data = case
    hypothesis.assume(first + second)
    with jax.enable_x64(x64):
        inner = build(dcasgd, hyperparams, store=None)
        nested = delay_gradients(delay_gradients(inner, first), second)
        whole = delay_gradients(inner, first + second)
        params = data.params(tree)
        nested_state, state = (tx.init(tree.unflatten(params)) for tx in (nested, whole))
        for _ in range(4):
            grads = tree.unflatten(data.grads(tree, wider=wider))
            at = tree.unflatten(params)
            expected, state = whole.update(grads, state, at)
            updates, nested_state = nested.update(grads, nested_state, at)
            check_trees_bits(updates, expected)
            params = apply(params, leaves_of(tree, updates))


def queued(grad, param, delay):
    """A gradient as it is put into a queue: in its parameter's dtype, an absent one as zeros."""
    if grad is None:
        return jnp.zeros_like(param)
    return grad.astype(param.dtype) if delay else grad


@st.composite
def prefixes(draw, tree):
    """A tree of delays that is a prefix of the parameters, and the delay of each parameter."""
    delays = []

    def cut(node):
        if isinstance(node, float) or (node is not None and draw(st.integers(0, 3)) == 0):
            delay = draw(st.integers(0, 3))
            delays.extend([delay] * len(jax.tree.leaves(node)))
            return delay
        if node is None or isinstance(node, optax.MaskedNode):
            return node
        if isinstance(node, dict):
            return {key: cut(child) for key, child in node.items()}
        children = [cut(child) for child in node]
        return Pair(*children) if isinstance(node, Pair) else type(node)(children)

    return cut(tree.unflatten([0.0] * len(tree.specs))), delays


@hypothesis.given(case=cases(OPTIMIZER), draw=st.data(), wider=st.booleans())
@examples(70)
def test_a_tree_of_delays_gives_every_parameter_its_own_queue(case, draw, wider):
    x64, tree, hyperparams, data = case
    hypothesis.assume(not isinstance(tree.unflatten([0.0] * len(tree.specs)), float))
    prefix, delays = draw.draw(prefixes(tree))
    hypothesis.assume(not isinstance(prefix, int))
    with jax.enable_x64(x64):
        tx = delay_gradients(build(dcasgd, hyperparams, store=None), prefix)
        params = data.params(tree)
        state = initialise(tx, tree.unflatten(params))
        kind = signature(state)
        bounds = [Bounds(p, None, **renamed(hyperparams)) for p in params]
        lines = [reference.DelayLine(delay) for delay in delays]
        for _ in range(5):
            grads = data.grads(tree, wider=wider)
            updates, state = tx.update(tree.unflatten(grads), state, tree.unflatten(params))
            assert signature(state) == kind
            updates = leaves_of(tree, updates)
            for i, (bound, update) in enumerate(zip(bounds, updates, strict=True)):
                w = params[i]
                due = lines[i](queued(grads[i], w, delays[i]), w)
                if due is None:
                    # The optimizer runs, on a zero gradient that is not stale.
                    bound(jnp.zeros_like(w), w, w)
                    check_bits(update, jnp.zeros_like(w))
                else:
                    expected, error = bound(due[0], w, due[1])
                    check_update(update, w, expected, error)
            params = apply(params, updates)


GAP = {
    "decay": st.sampled_from([0.999, 0.9, 0.0]) | around(0, 0.999),
    "eps": st.sampled_from([1e-8, 1e-3]),
}


@hypothesis.given(
    case=cases(GAP),
    store=st.sampled_from(["params", "workers", None]),
    wider=st.booleans(),
)
@examples(100)
def test_gap_aware_gradients_follow_the_reference(case, store, wider):
    x64, tree, hyperparams, data = case
    with jax.enable_x64(x64):
        options = {"num_workers": NUM_WORKERS} if store == "workers" else {}
        tx = build(scale_by_gap, hyperparams, **options)
        params = data.params(tree)
        state = initialise(tx, tree.unflatten(params))
        kind = signature(state)
        formulas = [reference.GapAware(**hyperparams.reference) for _ in params]
        backups = reference.Backups(params, NUM_WORKERS if store == "workers" else None)
        for t in range(4):
            grads = data.grads(tree, wider=wider)
            stale, worker, extra = where_from(store, tree, params, backups, data)
            updates, state = tx.update(
                tree.unflatten(grads), state, tree.unflatten(params), **extra
            )
            assert signature(state) == kind
            updates = leaves_of(tree, updates)
            for i, (formula, update, g) in enumerate(zip(formulas, updates, grads, strict=True)):
                w = params[i]
                # The step that led here was taken, whether there is a gradient now or not.
                expected = formula(jnp.zeros_like(w) if g is None else g, w, stale[i])
                if g is None:
                    assert update is None
                    continue
                check_update(update, w, expected, gap_error(w, expected, t, hyperparams))
            before = params
            params = [
                p if u is None else p - p.dtype.type(0.5) * u
                for p, u in zip(params, updates, strict=True)
            ]
            remember(backups, before, params, worker)


def gap_error(param, expected, t, hyperparams):
    """The rounding error of the Gap-Aware gradient of update ``t``."""
    u = unit_roundoff(jnp.promote_types(jnp.float32, param.dtype))
    extra = 8 if is_complex(param) else 0
    # 1 − ρᵗ: ρᵗ is rounded (a power takes a few units) and then nearly cancels. ν: ρ, 1 − ρ, and
    # four operations an update. The root halves both. Then √, ε, +, |w − w_s|, /, 1+, and the
    # division of g.
    product = math.prod(reference.at(hyperparams.reference["decay"], i) for i in range(1, t + 1))
    bias = 3 * u * product / (1 - product) if t else 0.0
    return ((bias + 6 * t * u) / 2 + (8 + extra) * u) * np.abs(expected)


@hypothesis.given(
    case=cases({"power": st.sampled_from([1.0, 0.0, 0.25, 0.5, 2.0]) | around(0, 2)}),
    scalar=st.booleans(),
    wider=st.booleans(),
    where=st.sampled_from(["int", "float", "array"]),
)
@examples(100)
def test_updates_scaled_by_staleness_follow_the_reference(case, scalar, wider, where):
    x64, tree, hyperparams, data = case
    hypothesis.assume(not callable(hyperparams.reference["power"]))
    with jax.enable_x64(x64):
        tx = build(scale_by_staleness, hyperparams)
        given = {"int": int, "float": float, "array": lambda x: jnp.asarray(x, jnp.int32)}[where]
        params = data.params(tree)
        state = tx.init(tree.unflatten(params))
        kind = signature(state)
        for _ in range(3):
            grads = data.grads(tree, wider=wider)
            ages = [int(age) for age in data.rng.integers(0, 100, max(1, len(grads)))]
            if scalar:
                ages = [ages[0]] * len(grads)
                staleness = given(ages[0]) if ages else 1
            else:
                ages = ages[: len(grads)]
                staleness = tree.unflatten([given(age) for age in ages])
            updates, state = tx.update(tree.unflatten(grads), state, staleness=staleness)
            assert signature(state) == kind
            for update, g, age in zip(leaves_of(tree, updates), grads, ages, strict=True):
                if g is None:
                    assert update is None
                    continue
                power = hyperparams.reference["power"]
                expected = reference.scale_by_staleness(g, age, power)
                # exp(p·ln τ): its argument is off by 3u·p·ln τ and so is the result, relatively;
                # the exponential, the logarithm and the division take a few units more.
                u = unit_roundoff(jnp.promote_types(jnp.float32, g.dtype))
                relative = (3 * power * math.log(max(age, 1)) + 6) * u
                check_update(update, g, expected, relative * np.abs(expected))


# Master weights ---------------------------------------------------------------------------------


def half_numbers(dtype):
    """Half-precision numbers that are hard to reach by an addition."""
    info = jnp.finfo(dtype)
    # XLA flushes subnormal float32 to zero on the CPU, and bfloat16 has the exponents of float32.
    smallest = float(info.smallest_subnormal if dtype == "float16" else info.tiny)
    edges = [0.0, -0.0, 1.0, 1.0 + float(info.eps), smallest, float(info.tiny), float(info.max)]
    edges += [2 * smallest, 3 * smallest, 1.0 - float(info.epsneg), 65504.0, 1e-4]
    return st.sampled_from([*edges, *(-x for x in edges)]) | st.floats(
        -60000, 60000, width=16, allow_subnormal=dtype == "float16"
    )


STEPS = st.sampled_from([1.0, -1.0, 2.0**-9, 2.0**-25, 1e-8, -3e-8, 1e-20, 0.0]) | st.floats(
    -60000, 60000, width=32, allow_subnormal=False
)


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@hypothesis.given(dtype=st.sampled_from(HALF), draw=st.data())
@examples(50)
def test_applied_updates_land_on_the_rounded_master_weights(x64, dtype, draw):
    with jax.enable_x64(x64):
        check_landing(np.float64 if x64 else np.float32, dtype, draw)


def check_landing(step_dtype, dtype, draw):
    size = 4

    def numbers(strategy):
        return np.asarray(draw.draw(st.lists(strategy, min_size=size, max_size=size)), np.float32)

    params = jnp.asarray(numbers(half_numbers(dtype))).astype(dtype)
    tx = with_master_weights(optax.identity())
    state = tx.init(params)
    kind = signature(state)
    alive = np.ones(size, bool)  # what has overflowed is no longer compared
    tiny, huge = float(jnp.finfo("float32").tiny), float(jnp.finfo("float32").max)
    for _ in range(5):
        # Often to zero, across zero, or almost to zero (the sum of a float32 master and a float32
        # step is never too near to zero to be reached, but that with a float64 step may be). Now
        # and then somebody else writes the parameter; the master has to follow that.
        how = numbers(st.integers(0, 6)).astype(int)
        params = jnp.where(
            how == 5, jnp.asarray(numbers(half_numbers(dtype))).astype(dtype), params
        )
        master = np.asarray(state.master)
        master = np.where(np.asarray(state.master.astype(dtype)) == params, master, params)
        factors = np.asarray([0, -1, -2, -1 + 2.0**-10, -1 + 2.0**-23, 0, -1 + 1e-8], step_dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            steps = factors[how] * master.astype(step_dtype)
            steps = np.where(np.isin(how, [0, 5]), numbers(STEPS).astype(step_dtype), steps)
            exact = np.asarray(jnp.asarray(master) + jnp.asarray(steps)).astype(np.float32)
            # XLA flushes subnormal float32 to zero on the CPU.
            exact = np.where(np.abs(exact) < tiny, np.float32(0), exact)
        updates, state = tx.update(jnp.asarray(steps), state, params)
        assert signature(state) == kind
        old, params = params, optax.apply_updates(params, updates)
        assert params.dtype == old.dtype

        def exactly(x, alive=alive):
            return np.asarray(x).astype(np.float64)[alive]

        wanted = jnp.asarray(exact).astype(dtype)
        # Finite, and not further away than float32 reaches.
        with np.errstate(invalid="ignore"):  # inf − inf is nan: not alive either
            alive &= np.abs(np.asarray(wanted, np.float64) - np.asarray(old, np.float64)) <= huge
        np.testing.assert_array_equal(exactly(params), exactly(state.master.astype(dtype)))
        # A float32 update is off by 2⁻²⁵ of the parameter it starts from at most, and the sum by
        # as much; that is less than half of what half precision resolves at the end of the step,
        # unless the end is 2⁻¹² times nearer to zero than the beginning, or nearer still. And
        # where the difference of the two is subnormal, it is flushed to zero.
        goal, start = exactly(wanted), exactly(old)
        within_reach = (np.abs(goal) >= 2.0**-12 * np.abs(start)) | (goal == 0)
        within_reach &= (np.abs(goal - start) >= tiny) | (goal == start)
        np.testing.assert_array_equal(exactly(params)[within_reach], goal[within_reach])
        np.testing.assert_array_equal(
            exactly(state.master)[within_reach], exactly(exact)[within_reach]
        )
        assert np.all(np.abs(exactly(params) - goal) <= 2.0**-23 * np.abs(start) + tiny)


INNER = {
    "dcasgd": lambda: dcasgd(0.1, 0.9, 1.0),
    "dcasgd, adaptive": lambda: dcasgd(0.1, 0.5, 2.0, decay=0.95, clip=1.0, store="updates"),
    "adam": lambda: optax.adam(0.01),
    "sgd": lambda: optax.sgd(0.1),
}


@hypothesis.given(
    case=cases({}, dtypes_of_x64=((False, [*HALF, "float32"]), (True, [*HALF, "float64"]))),
    inner=st.sampled_from(list(INNER)),
    wider=st.booleans(),
)
@examples(50)
def test_master_weights_train_as_if_the_parameters_were_float32(case, inner, wider):
    x64, tree, _, data = case
    with jax.enable_x64(x64):
        params = data.params(tree)
        masters = [p.astype(jnp.float32) if is_half(p) else p for p in params]
        optimizer = INNER[inner]()
        tx = with_master_weights(optimizer)
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
            check_trees_bits(state.inner_state, inner_state)
            for p, m in zip(params, masters, strict=True):
                np.testing.assert_array_equal(np.asarray(p), np.asarray(m.astype(p.dtype)))
