"""`optax.inject_hyperparams`: numbers, schedules, and values set in the state."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from wrapper_cases import (
    GRADS,
    NUM_WORKERS,
    PARAMS,
    STALENESS,
    STEPS,
    assert_close,
    assert_same,
    assert_trajectory,
    extras_of,
    no_extras,
    run,
)

import optax_dcasgd as dc

# --- inject_hyperparams ---

# An injected decay is a float32, and so 1 − decay is a difference of float32 numbers: equal to that
# of the Python number only if binary fractions are subtracted.
NUMBERS = {
    "learning_rate": 0.1,
    "momentum": 0.9,
    "lamda": 0.8,
    "decay": 0.875,
    "eps": 0.02,
    "clip": 0.5,
}


OTHERS = {
    "learning_rate": 0.05,
    "momentum": 0.5,
    "lamda": 0.3,
    "decay": 0.5,
    "eps": 0.3,
    "clip": 0.02,
}


SCHEDULES = {
    "learning_rate": lambda t: 0.2 / (1 + t),
    "momentum": lambda t: 1 - 1 / (2.0 + t),
    "lamda": lambda t: 0.3 + 0.2 * t,
    "decay": lambda t: 0.9 - 0.1 * t,
    "eps": lambda t: 0.1 / (1 + t),
    "clip": lambda t: jnp.where(t < 3, 0.2, 2.0),
}


COMPENSATION = ("lamda", "decay", "eps", "clip")


# (factory, what can be injected, what cannot, extra arguments of step t)
INJECTABLE = {
    "dcasgd": (dc.dcasgd, tuple(NUMBERS), {}, no_extras),
    "dcasgd-updates": (dc.dcasgd, tuple(NUMBERS), {"store": "updates"}, no_extras),
    "dcasgd-workers": (
        dc.dcasgd,
        tuple(NUMBERS),
        {"num_workers": NUM_WORKERS},
        lambda t: extras_of("worker", t),
    ),
    "add_delay_compensation": (
        dc.add_delay_compensation,
        COMPENSATION,
        {"store": None},
        lambda t: extras_of("given", t),
    ),
    "add_delay_compensation-workers": (
        dc.add_delay_compensation,
        COMPENSATION,
        {"num_workers": NUM_WORKERS},
        lambda t: extras_of("worker", t),
    ),
    "scale_by_gap": (
        dc.scale_by_gap,
        ("decay", "eps"),
        {"num_workers": NUM_WORKERS},
        lambda t: extras_of("worker", t),
    ),
}


def with_hyperparams(name, values, *, inject):
    factory, names, fixed, _ = INJECTABLE[name]
    if inject:
        factory = optax.inject_hyperparams(factory, static_args=set(fixed) & {"num_workers"})
    return factory(**{name: values[name] for name in names}, **fixed)


def run_injectable(name, tx, changes=None):
    """Like `run`; what is no optimizer gets one behind it; the state is changed at the start."""
    state, params, trajectory = tx.init(PARAMS), PARAMS, []
    for hyperparam, value in (changes or {}).items():
        state.hyperparams[hyperparam] = jnp.asarray(value)
    for t in range(STEPS):
        updates, state = tx.update(GRADS[t], state, params, **INJECTABLE[name][3](t))
        if not name.startswith("dcasgd"):
            updates = jax.tree.map(lambda g: -0.1 * g, updates)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory


@pytest.mark.parametrize("values", [NUMBERS, SCHEDULES], ids=["numbers", "schedules"])
@pytest.mark.parametrize("name", INJECTABLE)
def test_injected_equals_not_injected(name, values):
    tx = with_hyperparams(name, values, inject=True)
    assert set(tx.init(PARAMS).hyperparams) == set(INJECTABLE[name][1])  # none is left out
    bare = with_hyperparams(name, values, inject=False)
    assert_same(run_injectable(name, tx), run_injectable(name, bare))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        (name, changed)
        for name in ("dcasgd", "add_delay_compensation", "scale_by_gap")
        for changed in INJECTABLE[name][1]
    ],
)
def test_a_hyperparameter_set_in_the_state_takes_effect(name, changed):
    tx = with_hyperparams(name, NUMBERS, inject=True)
    other = with_hyperparams(name, {**NUMBERS, changed: OTHERS[changed]}, inject=False)
    actual = run_injectable(name, tx, {changed: OTHERS[changed]})
    assert_same(actual, run_injectable(name, other))
    gaps = reference.subtract(actual[-1], run_injectable(name, tx)[-1])
    assert max(np.max(np.abs(gap)) for gap in jax.tree.leaves(gaps)) > 1e-3


def test_schedules_are_of_the_number_of_updates_so_far():
    actual, _ = run(dc.dcasgd(**SCHEDULES))
    hyperparams = {**SCHEDULES, "lr": SCHEDULES["learning_rate"]}
    del hyperparams["learning_rate"]
    expected = reference.one_update_old(lambda stale, t: GRADS[t], PARAMS, STEPS, **hyperparams)
    assert_trajectory(actual, expected)


@pytest.mark.parametrize("power", [0.5, lambda t: 1 / (1 + t)], ids=["number", "schedule"])
def test_injected_staleness_power(power):
    tx = optax.inject_hyperparams(dc.scale_by_staleness)(power)
    state = tx.init(PARAMS)
    for t in range(3):
        updates, state = tx.update(GRADS[t], state, PARAMS, staleness=STALENESS[t])
        now = reference.at(power, t)
        assert_close(updates, reference.scale_by_staleness(GRADS[t], STALENESS[t], now))


def test_num_workers_injected_by_mistake_says_what_to_do():
    tx = optax.inject_hyperparams(dc.dcasgd)(num_workers=3)
    with pytest.raises(TypeError, match=r"num_workers.*static_args"):
        tx.init(PARAMS)


def test_a_scheduler_of_mxnet_beside_injected_numbers():
    class Scheduler:
        base_lr = 0.1

        def __call__(self, num_update):
            return self.base_lr / num_update

    def train(make):
        tx = make(0.1, momentum=0.5, lamda=2.0, lr_scheduler=Scheduler())
        update, w = jax.jit(tx.update), jnp.array([1.0, -2.0])
        state, trajectory = tx.init(w), []
        for _ in range(3):
            updates, state = update(jnp.cos(w), state, w)
            w = w + updates
            trajectory.append(w)
        return trajectory

    integers = ("begin_num_update", "version")
    injected = optax.inject_hyperparams(dc.mxnet.DCASGD, static_args=(*integers, "lr_scheduler"))
    np.testing.assert_allclose(train(injected), train(dc.mxnet.DCASGD), rtol=1e-6)
