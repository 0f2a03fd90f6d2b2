"""`optax.MultiSteps`, `optax.apply_if_finite`, and gradients that are not finite."""

import jax
import numpy as np
import optax
import pytest
from common import assert_bit_equal
from transformation_cases import CASES, GRADS, PARAMS, assert_close, run

# --- MultiSteps ---

EVERY = 3


@pytest.mark.parametrize(
    "name",
    [
        "dcasgd-updates",
        "dcasgd-given",
        pytest.param("adaptive-remembered", marks=pytest.mark.slow),
        pytest.param("workers", marks=pytest.mark.slow),
        "delay_gradients",
    ],
)
def test_multi_steps_is_the_optimizer_on_the_mean_gradient(name):
    """With the extra arguments of the last gradient; one that is not finite is dropped."""
    tx, extras = CASES[name].make(), CASES[name].extras
    expected, _ = run(
        tx,
        lambda step: extras(EVERY * step + EVERY - 1),
        grads=[
            jax.tree.map(lambda *g: sum(g) / EVERY, *GRADS[i : i + EVERY]) for i in (0, EVERY, 6)
        ],
    )
    tx = optax.MultiSteps(tx, EVERY, should_skip_update_fn=optax.skip_not_finite)
    grads = [*GRADS[:4], jax.tree.map(lambda g: g / 0, GRADS[0]), *GRADS[4:]]
    actual, state = run(tx, lambda t: extras(t - (t > 3)), grads=grads)
    assert int(state.gradient_step) == EVERY
    assert_bit_equal(actual[:2], [PARAMS] * 2)
    # The dropped gradient is the fifth, so that the second step is the seventh call.
    assert_close([actual[i] for i in (2, 6, 9)], expected, rtol=1e-5)


# --- Gradients that are not finite ---


def spoiled(tree, value):
    """One component of one leaf becomes ``value``."""
    kernel = tree["dense"]["kernel"].at[1, 0].set(value)
    return {**tree, "dense": {**tree["dense"], "kernel": kernel}}


STATEFUL = [
    "dcasgd-updates",
    "adaptive-remembered",
    "workers",
    "delay_gradients-tree",
    "scheduled-staleness-given",
    "track_velocity",
]


@pytest.mark.parametrize("name", STATEFUL)
def test_apply_if_finite_keeps_the_whole_state_unharmed(name):
    case = CASES[name]
    tx = optax.apply_if_finite(case.make(), 5)
    update = jax.jit(tx.update)
    params, state, trajectory = PARAMS, tx.init(PARAMS), []
    for t, bad_ones in enumerate([[np.nan], [], [np.inf, -np.inf], [np.nan], []]):
        for bad in bad_ones:
            updates, after = update(spoiled(GRADS[t], bad), state, params, **case.extras(t))
            assert_bit_equal(optax.apply_updates(params, updates), params)
            assert_bit_equal(after.inner_state, state.inner_state)
            state = after
        updates, state = update(GRADS[t], state, params, **case.extras(t))
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    assert_close(trajectory, run(case.make(), case.extras, grads=GRADS[:5])[0])


@pytest.mark.parametrize(
    "name",
    ["dcasgd-updates", "dcasgd-adaptive", "adaptive-remembered", "gap-remembered", "mxnet-1"],
)
def test_a_component_that_is_not_finite_spoils_its_own_update_and_nothing_else(name):
    case = CASES[name]
    params, state = run(case.make(), case.extras, grads=GRADS[:3])
    params, update = params[-1], jax.jit(case.make().update)
    clean, _ = update(GRADS[3], state, params, **case.extras(3))
    for bad in (np.nan, np.inf, -np.inf):
        updates, _ = update(spoiled(GRADS[3], bad), state, params, **case.extras(3))
        assert not np.isfinite(updates["dense"]["kernel"][1, 0])
        assert_bit_equal(spoiled(updates, 0.0), spoiled(clean, 0.0))
