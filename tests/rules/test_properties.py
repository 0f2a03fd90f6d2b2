"""Rules on arbitrary trees, against the float64 reference."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import reference
from common import assert_bit_equal
from hypothesis import strategies as st
from property_bounds import (
    Bounds,
    check,
    check_update,
    initialise,
    signature,
    subnormal_rounding,
    unit_roundoff,
)
from property_cases import (
    COMPENSATION,
    DECAY,
    around,
    build,
    cases,
    examples,
    is_complex,
    leaves_of,
    own_state,
)

from optax_dcasgd import add_delay_compensation, scale_by_gap, scale_by_staleness


def steps(tx, tree, data, *, wider=False, number=3):
    """Yields params, grads, stale parameters, updates (lists of leaves) and state of each update.

    A parameter without a gradient has no update; the state never changes its form.
    """
    params = data.params(tree)
    state = initialise(tx, tree.unflatten(params))
    kind = signature(state)
    for _ in range(number):
        grads, stale = data.grads(tree, wider=wider), data.perturbed(params)
        updates, state = tx.update(
            tree.unflatten(grads),
            state,
            tree.unflatten(params),
            stale_params=tree.unflatten(stale),
            other=None,
        )
        assert signature(state) == kind
        updates = leaves_of(tree, updates)
        assert [u is None for u in updates] == [g is None for g in grads]
        yield params, grads, stale, updates, state
        # A transformation does not know what becomes of its update.
        params = [
            p if u is None else p - p.dtype.type(0.5) * u
            for p, u in zip(params, updates, strict=True)
        ]


@hypothesis.given(
    case=cases(COMPENSATION),
    accumulator_dtype=st.sampled_from([None, None, None, "bfloat16"]),
    wider=st.booleans(),
)
@examples(40)
def test_compensated_gradients_follow_the_reference(case, accumulator_dtype, wider):
    x64, tree, hyperparams, data = case
    options = {"accumulator_dtype": accumulator_dtype} if accumulator_dtype else {}
    with jax.enable_x64(x64):
        tx, bounds = build(add_delay_compensation, hyperparams, **options), None
        for params, grads, stale, updates, state in steps(tx, tree, data, wider=wider):
            if bounds is None:
                bounds = [Bounds(p, accumulator_dtype, **hyperparams.reference) for p in params]
            for bound, w, w_s, update, g in zip(bounds, params, stale, updates, grads, strict=True):
                if g is None:
                    bound.formula.count += 1
                    continue
                check_update(update, w, *bound.compensate(g, w, w_s))
                bound(g, w, w_s)
            nu = own_state(hyperparams, state).nu
            if nu is None:
                assert not any(bound.adaptive for bound in bounds)
                continue
            for leaf, bound in zip(tree.treedef.flatten_up_to(nu), bounds, strict=True):
                assert jnp.issubdtype(leaf.dtype, jnp.floating)
                if bound.formula.nu is not None:
                    check(leaf, bound.formula.nu, bound.nu_error(), rounded=True)


@hypothesis.given(
    case=cases({"lamda": st.sampled_from([2.0, 1e4, 1e10]), "decay": st.none() | DECAY}),
    clip=st.sampled_from([1.0, 0.5, 0.0]),
)
@examples(12)
def test_a_clip_of_one_never_turns_a_component_round(case, clip):
    x64, tree, hyperparams, data = case
    hypothesis.assume(not hyperparams.injected)
    with jax.enable_x64(x64):
        tx = add_delay_compensation(**hyperparams.ours, clip=clip)
        for _, grads, _, updates, _ in steps(tx, tree, data):
            for g, u in zip(grads, updates, strict=True):
                if g is None:
                    continue
                # A few roundings: that of the limit, of the correction, of the sum, of the result.
                rounding = 8 * unit_roundoff(u.dtype) * np.abs(reference.wide(g))
                rounding += subnormal_rounding(u.dtype)
                g, u = reference.wide(g), reference.wide(u)
                assert np.all(np.abs(u - g) <= clip * np.abs(g) + rounding)
                if not is_complex(g):
                    assert np.all(u * g >= 0)


GAP = {
    "decay": st.sampled_from([0.999, 0.9, 0.0]) | around(0, 0.999),
    "eps": st.sampled_from([1e-8, 1e-3]),
}


@hypothesis.given(case=cases(GAP), wider=st.booleans())
@examples(30)
def test_gap_aware_gradients_follow_the_reference(case, wider):
    x64, tree, hyperparams, data = case
    with jax.enable_x64(x64):
        tx, formulas = build(scale_by_gap, hyperparams), None
        for t, (params, grads, stale, updates, state) in enumerate(
            steps(tx, tree, data, wider=wider)
        ):
            formulas = formulas or [reference.GapAware(**hyperparams.reference) for _ in params]
            rows = zip(formulas, params, stale, updates, grads, strict=True)
            for formula, w, w_s, update, g in rows:
                # The step that led here was taken, whether there is a gradient now or not.
                expected = formula(jnp.zeros_like(w) if g is None else g, w, w_s)
                if g is not None:
                    check_update(update, w, expected, gap_error(w, expected, t, hyperparams))
            own = own_state(hyperparams, state)
            assert_bit_equal(own.prev_params, tree.unflatten(params))


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
@examples(30)
def test_updates_scaled_by_staleness_follow_the_reference(case, scalar, wider, where):
    """Also where the power is a schedule: it sees 0 on the first update."""
    x64, tree, hyperparams, data = case
    with jax.enable_x64(x64):
        tx = build(scale_by_staleness, hyperparams)
        given = {"int": int, "float": float, "array": lambda x: jnp.asarray(x, jnp.int32)}[where]
        state = tx.init(tree.unflatten(data.params(tree)))
        kind = signature(state)
        for t in range(3):
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
            power = reference.at(hyperparams.reference["power"], t)
            for update, g, age in zip(leaves_of(tree, updates), grads, ages, strict=True):
                if g is None:
                    assert update is None
                    continue
                expected = reference.scale_by_staleness(g, age, power)
                # exp(p·ln τ): its argument is off by 3u·p·ln τ and so is the result, relatively;
                # the exponential, the logarithm and the division take a few units more.
                u = unit_roundoff(jnp.promote_types(jnp.float32, g.dtype))
                relative = (3 * power * math.log(max(age, 1)) + 6) * u
                check_update(update, g, expected, relative * np.abs(expected))
