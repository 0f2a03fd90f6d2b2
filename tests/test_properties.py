"""Rules and optimizers on arbitrary trees, each update against the float64 reference.

Every update is followed from the library's own state before it, so that errors do not add up.
"""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from common import assert_bit_equal
from hypothesis import strategies as st
from property_cases import (
    OPTIMIZER,
    apply,
    around,
    build,
    cases,
    check,
    examples,
    initialise,
    leaves_of,
    signature,
)

import optax_dcasgd as dc


def column(tree, field):
    """A field of the state as a list like the parameters; of None where the mode has none."""
    return [None] * len(tree.specs) if field is None else tree.treedef.flatten_up_to(field)


def gaps_between(params, stale):
    return [reference.subtract(w, w_s) for w, w_s in zip(params, stale, strict=True)]


def where_from(store, tree, data, params, state):
    """w − w_s of the next gradient of each parameter, and the extra arguments that say so.

    ``stale_params`` is passed where it is needed, and elsewhere now and then: it comes before what
    the state remembers.
    """
    if store is None or data.rng.random() < 0.2:
        stale = data.perturbed(params)
        return gaps_between(params, stale), {"stale_params": tree.unflatten(stale)}
    if store == "updates":
        return [reference.wide(m) for m in column(tree, state.momentum)], {}
    previous = column(tree, state.prev_params) if state.count else params
    return gaps_between(params, previous), {}


@pytest.mark.parametrize("store", ["params", "updates", None, "a rule"])
@hypothesis.given(
    case=cases(OPTIMIZER),
    options=st.sampled_from([{}, {}, {}, {"accumulator_dtype": "bfloat16"}]),
    wider=st.booleans(),
)
@examples(20)
def test_dcasgd_and_its_rule_follow_the_reference(store, case, options, wider):
    x64, tree, hyperparams, data = case
    is_rule = store == "a rule"
    if is_rule:
        factory, store = dc.add_delay_compensation, None
        hyperparams.ours.pop("learning_rate"), hyperparams.ours.pop("momentum")
    else:
        factory, options = dc.dcasgd, {"store": store, **options}
    with jax.enable_x64(x64):
        tx, own = build(factory, hyperparams, **options)
        params = data.params(tree)
        state = initialise(tx, tree.unflatten(params))
        kind = signature(state)
        for t in range(4):
            # Without a gradient a parameter stays where it is, so that the momentum, which does not
            # decay either, is not its last update.
            grads = data.grads(tree, wider=wider, absent=store != "updates")
            before = own(state)
            gaps, extra = where_from(store, tree, data, params, before)
            arguments = tree.unflatten(grads), state, tree.unflatten(params)
            updates, state = tx.update(*arguments, **extra, other=None)
            assert signature(state) == kind
            after, updates = own(state), leaves_of(tree, updates)
            if store == "params":
                assert_bit_equal(after.prev_params, tree.unflatten(params))
            memory = [
                column(tree, getattr(s, name, None))
                for name in ("momentum", "nu")
                for s in (before, after)
            ]
            now = hyperparams.at(t)
            lr, momentum = (-1.0, 0.0) if is_rule else (now["learning_rate"], now["momentum"])
            for row in zip(params, grads, gaps, updates, *memory, strict=True):
                w, g, gap, update, mom, new_mom, nu, new_nu = row
                assert (new_nu is None) == (now["decay"] is None)
                if g is None:
                    assert update is None
                    assert_bit_equal((new_mom, new_nu), (mom, nu))
                    continue
                g, mom, nu = reference.wide((g, mom, nu))
                numbers = (now[name] for name in ("decay", "eps", "clip"))
                g_tilde, nu = reference.compensate_leaf(g, gap, 0.0, now["lamda"], nu, *numbers)
                decayed = 0.0 if mom is None else (momentum or 0.0) * mom
                expected = decayed - lr * g_tilde
                terms = np.abs(decayed) + abs(lr) * (np.abs(g) + np.abs(g_tilde - g))
                assert update.dtype == w.dtype
                check(update, expected, terms)
                if new_mom is not None:
                    check(new_mom, expected, terms)
                if new_nu is not None:
                    assert jnp.issubdtype(new_nu.dtype, jnp.floating)
                    check(new_nu, nu, nu)
            params = apply(params, updates)


@hypothesis.given(
    case=cases(OPTIMIZER), store=st.sampled_from(["params", "updates", None]), wider=st.booleans()
)
@examples(25)
def test_the_fused_step_is_dcasgd_with_its_updates_applied(case, store, wider):
    x64, tree, hyperparams, data = case
    with jax.enable_x64(x64):
        tx = dc.dcasgd(**hyperparams.ours, store=store)
        fused = dc.fused_dcasgd(**hyperparams.ours, store=store)
        params = data.params(tree)
        state = fused_state = initialise(fused, tree.unflatten(params))
        assert_bit_equal(tx.init(tree.unflatten(params)), state)
        for _ in range(3):
            grads, at = tree.unflatten(data.grads(tree, wider=wider)), tree.unflatten(params)
            _, extra = where_from(store, tree, data, params, state)
            stepped, fused_state = fused.step(grads, fused_state, at, **extra)
            updates, state = tx.update(grads, state, at, **extra)
            assert signature(fused_state) == signature(state)
            assert_bit_equal(fused_state, state)
            updates, stepped = leaves_of(tree, updates), leaves_of(tree, stepped)
            for new, p, u in zip(stepped, params, updates, strict=True):
                if u is None:
                    assert_bit_equal(new, p)
                else:  # u has been rounded to the dtype of p, the step's own update has not
                    assert new.dtype == p.dtype
                    expected = reference.add(p, u)
                    check(new, expected, np.abs(expected), rounded=reference.wide(u))
            params = apply(params, updates)


GAP = {
    "decay": st.sampled_from([0.999, 0.9, 0.0]) | around(0, 0.999),
    "eps": st.sampled_from([1e-8, 1e-3]),
}


@hypothesis.given(case=cases(GAP), wider=st.booleans())
@examples(30)
def test_gap_aware_gradients_follow_the_reference(case, wider):
    """g / (1 + |w − w_s| / (C + ε)), C the bias-corrected root mean square of the steps taken."""
    x64, tree, hyperparams, data = case
    with jax.enable_x64(x64):
        tx, own = build(dc.scale_by_gap, hyperparams)
        params = data.params(tree)
        state = initialise(tx, tree.unflatten(params))
        for t in range(4):
            grads, stale = data.grads(tree, wider=wider), data.perturbed(params)
            before, arguments = own(state), (tree.unflatten(grads), state, tree.unflatten(params))
            updates, state = tx.update(*arguments, stale_params=tree.unflatten(stale))
            after, updates = own(state), leaves_of(tree, updates)
            assert_bit_equal(after.prev_params, tree.unflatten(params))
            rho, eps = (hyperparams.at(t)[name] for name in ("decay", "eps"))
            weight = rho * float(before.weight) + (1 - rho) if t else 0.0
            np.testing.assert_allclose(after.weight, weight, 1e-6)
            memory = (column(tree, x) for x in (before.prev_params, before.nu, after.nu))
            gaps = gaps_between(params, stale)
            for row in zip(params, grads, gaps, updates, *memory, strict=True):
                w, g, gap, update, prev, nu, new_nu = row
                # A step was taken, whether there is a gradient now or not.
                step = np.abs(reference.subtract(w, prev)) if t else 0.0
                nu = rho * reference.wide(nu) + (1 - rho) * step**2
                check(new_nu, nu, nu)
                assert (update is None) == (g is None)
                if g is not None:
                    typical = np.sqrt(nu / weight) if t else np.inf
                    expected = reference.wide(g) / (1 + np.abs(gap) / (typical + eps))
                    assert update.dtype == w.dtype
                    check(update, expected, np.abs(expected))
            params = [
                p if u is None else p - p.dtype.type(0.5) * u
                for p, u in zip(params, updates, strict=True)
            ]


@hypothesis.given(
    case=cases({"power": st.sampled_from([1.0, 0.0, 0.25, 0.5, 2.0]) | around(0, 2)}),
    scalar=st.booleans(),
    wider=st.booleans(),
    kind=st.sampled_from([int, float, lambda x: jnp.asarray(x, jnp.int32)]),
)
@examples(30)
def test_updates_scaled_by_staleness_follow_the_reference(case, scalar, wider, kind):
    """Also where the power is a schedule: it sees 0 on the first update."""
    x64, tree, hyperparams, data = case
    with jax.enable_x64(x64):
        tx, _ = build(dc.scale_by_staleness, hyperparams)
        state = tx.init(tree.unflatten(data.params(tree)))
        for t in range(3):
            grads = data.grads(tree, wider=wider)
            ages = [int(data.rng.integers(0, 100)) for _ in grads] or [1]
            ages = [ages[0]] * len(grads) if scalar else ages[: len(grads)]
            whole = kind(ages[0]) if ages else 1
            staleness = whole if scalar else tree.unflatten([kind(age) for age in ages])
            updates, state = tx.update(tree.unflatten(grads), state, staleness=staleness)
            for update, g, age in zip(leaves_of(tree, updates), grads, ages, strict=True):
                assert (update is None) == (g is None)
                if g is not None:
                    expected = reference.scale_by_staleness(g, age, hyperparams.at(t)["power"])
                    assert update.dtype == g.dtype
                    check(update, expected, np.abs(expected))
