"""`dcasgd` and `fused_dcasgd` on arbitrary trees, against the float64 reference."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
    CLIP,
    DECAY,
    EPS,
    LAMDA,
    LR,
    MOMENTUM,
    OPTIMIZER,
    Data,
    Hyperparameters,
    Spec,
    Tree,
    apply,
    build,
    cases,
    examples,
    leaves_of,
    own_state,
    renamed,
    rounded_to_float32,
)

from optax_dcasgd import dcasgd, fused_dcasgd


def where_from(store, tree, params, backups, data):
    """The stale parameters of the next gradient, and the extra arguments that say so.

    ``stale_params`` is passed where it is needed, and elsewhere now and then: it comes before what
    the state remembers.
    """
    if store is not None and data.rng.random() < 0.8:
        return backups.stale(), {}
    stale = data.perturbed(params)
    return stale, {"stale_params": tree.unflatten(stale)}


def check_nu(nu, tree, bounds):
    """ν against the reference, as far as there is one."""
    if nu is None:
        assert not any(bound.adaptive for bound in bounds)
        return
    for leaf, bound in zip(tree.treedef.flatten_up_to(nu), bounds, strict=True):
        assert bound.adaptive
        assert jnp.issubdtype(leaf.dtype, jnp.floating)
        if bound.formula.nu is not None:
            check(leaf, bound.formula.nu, bound.nu_error(), rounded=True)


STORES = st.sampled_from(["params", "updates", None])


@hypothesis.given(
    case=cases(OPTIMIZER),
    store=STORES,
    accumulator_dtype=st.sampled_from([None, None, None, "bfloat16"]),
    wider=st.booleans(),
)
@examples(30)
def test_dcasgd_follows_the_reference(case, store, accumulator_dtype, wider):
    x64, tree, hyperparams, data = case
    with jax.enable_x64(x64):
        options = {"store": store}
        if accumulator_dtype:
            options["accumulator_dtype"] = accumulator_dtype
        tx = build(dcasgd, hyperparams, **options)
        params = data.params(tree)
        state = initialise(tx, tree.unflatten(params))
        kind = signature(state)
        bounds = [Bounds(p, accumulator_dtype, **renamed(hyperparams)) for p in params]
        backups = reference.Backups(params)
        for t in range(4):
            # Without a gradient a parameter stays where it is, so that the momentum, which does not
            # decay either, is not its last update.
            grads = data.grads(tree, wider=wider, absent=store != "updates")
            stale, extra = where_from(store, tree, params, backups, data)
            from_updates = store == "updates" and "stale_params" not in extra
            updates, state = tx.update(
                tree.unflatten(grads), state, tree.unflatten(params), **extra
            )
            assert signature(state) == kind
            updates = leaves_of(tree, updates)
            for i, (bound, update, g) in enumerate(zip(bounds, updates, grads, strict=True)):
                if g is None:
                    assert update is None
                    bound.formula.count += 1
                    continue
                w, w_s, stale_error = params[i], stale[i], 0.0
                if from_updates:
                    w_s = reference.subtract(w, bound.last_update)
                    stale_error = bound.momentum_error if t else 0.0
                expected, error = bound(g, w, w_s, stale_error)
                bound.last_update = expected
                check_update(update, w, expected, error)
            check_dcasgd_state(own_state(hyperparams, state), tree, bounds, params, store)
            before, params = params, apply(params, updates)
            backups.applied(before, params)


def check_dcasgd_state(state, tree, bounds, params, store):
    check_nu(state.nu, tree, bounds)
    if store == "params":
        assert_bit_equal(state.prev_params, tree.unflatten(params))
    if state.momentum is not None:
        for leaf, bound in zip(tree.treedef.flatten_up_to(state.momentum), bounds, strict=True):
            if bound.formula.mom is not None:
                check(leaf, bound.formula.mom, bound.momentum_error, rounded=True)


FIXED = Tree(
    jax.tree.structure({"a": 0, "b": [0, (0, None)], "c": 0}),
    [Spec((3,), "float32"), Spec((2, 2), "bfloat16"), Spec((), "float16"), Spec((3,), "complex64")],
)


def compiled_update(options):
    """``update`` compiled with its hyperparameters as arguments."""

    def update(hyperparams, grads, state, params):
        return dcasgd(**hyperparams, **options).update(grads, state, params)

    return jax.jit(update)


# One for all examples, so that compiling is paid for once.
COMPILED = {store: compiled_update({"store": store}) for store in ("params", "updates")}


@pytest.mark.parametrize("rule", ["constant", "adaptive and clipped"])
@pytest.mark.parametrize("store", COMPILED)
@hypothesis.given(draw=st.data(), seed=st.integers(0, 2**32 - 1))
@examples(10)
def test_compiled_updates_with_traced_hyperparameters_follow_the_reference(store, rule, draw, seed):
    tree, data = FIXED, Data(seed)
    strategies = {"learning_rate": LR, "momentum": MOMENTUM, "lamda": LAMDA}
    if rule != "constant":
        strategies |= {"decay": DECAY, "eps": EPS, "clip": CLIP}
    values = {name: rounded_to_float32(draw.draw(s)) for name, s in strategies.items()}
    params = data.params(tree)
    state = dcasgd(**values, store=store).init(tree.unflatten(params))
    kind = signature(state)
    bounds = [
        Bounds(p, None, **renamed(Hyperparameters({}, {"decay": None} | values, False)))
        for p in params
    ]
    backups = reference.Backups(params)
    for t in range(4):
        grads = data.grads(tree, wider=False, absent=False)
        stale = backups.stale()
        updates, state = COMPILED[store](
            values,
            tree.unflatten(grads),
            state,
            tree.unflatten(params),
        )
        assert signature(state) == kind
        updates = leaves_of(tree, updates)
        for i, (bound, update, g) in enumerate(zip(bounds, updates, grads, strict=True)):
            w, w_s, stale_error = params[i], stale[i], 0.0
            if store == "updates":
                w_s = reference.subtract(w, bound.last_update)
                stale_error = bound.momentum_error if t else 0.0
            expected, error = bound(g, w, w_s, stale_error)
            bound.last_update = expected
            check_update(update, w, expected, error)
        check_dcasgd_state(state, tree, bounds, params, store)
        before, params = params, apply(params, updates)
        backups.applied(before, params)


@hypothesis.given(case=cases(OPTIMIZER), store=STORES, wider=st.booleans())
@examples(25)
def test_the_fused_step_is_dcasgd_with_its_updates_applied(case, store, wider):
    x64, tree, hyperparams, data = case
    with jax.enable_x64(x64):
        options = {"store": store}
        tx = dcasgd(**hyperparams.ours, **options)
        fused = fused_dcasgd(**hyperparams.ours, **options)
        params = data.params(tree)
        state = tx.init(tree.unflatten(params))
        fused_state = initialise(fused, tree.unflatten(params))
        assert_bit_equal(fused_state, state)
        backups = reference.Backups(params)
        for _ in range(3):
            grads = data.grads(tree, wider=wider)
            _, extra = where_from(store, tree, params, backups, data)
            args = (tree.unflatten(grads), tree.unflatten(params))
            stepped, fused_state = fused.step(args[0], fused_state, args[1], **extra)
            updates, state = tx.update(args[0], state, args[1], **extra)
            assert signature(fused_state) == signature(state)
            assert_bit_equal(fused_state, state)
            updates = leaves_of(tree, updates)
            stepped = leaves_of(tree, stepped)
            for new, p, u in zip(stepped, params, updates, strict=True):
                if u is None:
                    assert_bit_equal(new, p)
                    continue
                # The step rounds w + m once, where a product may be fused into the sum;
                # apply_updates rounds m first.
                expected = reference.add(p, u)
                update_rounding = unit_roundoff(p.dtype) * np.abs(reference.wide(u))
                compute = unit_roundoff(jnp.promote_types(jnp.float32, p.dtype))
                update_rounding += subnormal_rounding(p.dtype) + compute * np.abs(expected)
                check_update(new, p, expected, update_rounding)
            before, params = params, apply(params, updates)
            backups.applied(before, params)
