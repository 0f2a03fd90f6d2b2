"""Around and inside Optax's wrappers, with w ≠ w_s and with every extra argument there is."""

import itertools

import jax
import jax.flatten_util
import numpy as np
import optax
import pytest
import reference
from common import WORKERS
from transformation_cases import (
    GRADS,
    NUM_WORKERS,
    PARAMS,
    accumulated,
    assert_close,
    given,
    no_extras,
    run,
    worker,
)

import optax_dcasgd as dc

STEPS = 6


# --- Hosts that must not change a thing ---


def two_rules():
    """One of them needs ``stale_params``, the other one ``staleness``."""
    compensation = dc.add_delay_compensation(0.8, decay=0.9, clip=None)
    return optax.chain(dc.scale_by_staleness(0.5), compensation, optax.scale(-0.2))


CHANGES_NOTHING = {
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "named_chain": lambda tx: optax.named_chain(("first", optax.identity()), ("second", tx)),
    "masked": lambda tx: optax.masked(tx, jax.tree.map(lambda _: True, PARAMS)),
    "masked-extra-args": lambda tx: optax.masked(tx, True, mask_compatible_extra_args=True),
    "partition": lambda tx: optax.partition({"all": tx}, "all"),
    "MultiSteps": lambda tx: accumulated(tx, 1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_mask": lambda tx: optax.transforms.conditionally_mask(
        tx, lambda step: step >= 0
    ),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda scale: optax.chain(optax.scale(scale), tx)
    )(1.0),
    "with_master_weights": dc.with_master_weights,
}
INSIDE = {**CHANGES_NOTHING, "delay_gradients-0": lambda tx: dc.delay_gradients(tx, 0)}
SOURCES = {  # what makes an optimizer of the rules, and what its caller passes
    "given": (lambda rules: rules, given),
    "previous": (dc.remember_params, no_extras),
    "workers": (lambda rules: dc.remember_params(rules, num_workers=NUM_WORKERS), worker),
    "delay": (lambda rules: dc.delay_gradients(rules, 2), no_extras),
}


@pytest.fixture(scope="module")
def bare():
    """The parameters after each step without a host, from each source."""
    return {name: run(make(two_rules()), e)[0] for name, (make, e) in SOURCES.items()}


@pytest.mark.parametrize("source", ["given", "workers"])
@pytest.mark.parametrize("host", CHANGES_NOTHING)
def test_a_host_that_does_nothing_changes_nothing(host, source, bare):
    """Around the source of w_s; the extra argument ``loss`` is known to nobody."""
    make, extras = SOURCES[source]
    tx = CHANGES_NOTHING[host](make(two_rules()))
    actual, _ = run(tx, lambda t: {**extras(t), "loss": 0.5})
    assert_close(actual, bare[source])


@pytest.mark.parametrize("host", INSIDE)
def test_a_host_hands_on_what_the_source_around_it_says(host, bare):
    actual, _ = run(dc.delay_gradients(INSIDE[host](two_rules()), 2))
    assert_close(actual, bare["delay"])


def test_each_extra_argument_of_one_step_matters(bare):
    """What the tests above rest on."""
    for name in ("stale_params", "staleness"):
        changed, _ = run(
            two_rules(), lambda t, name=name: {**given(t), name: given(min(t, 4))[name]}
        )
        gaps = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), changed[-1], bare["given"][-1])
        assert min(jax.tree.leaves(gaps)) > 1e-3
    ends = [trajectory[-1]["dense"]["kernel"] for trajectory in bare.values()]
    assert all(np.max(np.abs(a - b)) > 1e-3 for a, b in itertools.pairwise(ends))


# --- What is compensated, by hand ---


class Compensation:
    """`reference.compensate` with its ν, and a record of whether it did anything."""

    def __init__(self, lamda, **hyperparams):
        self.hyperparams, self.nu, self.largest = {"lamda": lamda, **hyperparams}, None, 0.0

    def __call__(self, grads, params, stale):
        corrected, self.nu = reference.compensate(
            grads, params, stale, nu=self.nu, **self.hyperparams
        )
        changes = jax.tree.leaves(reference.subtract(corrected, grads))
        self.largest = max(self.largest, *(np.max(np.abs(change)) for change in changes))
        return corrected


@pytest.mark.parametrize("reset_state", [False, True], ids=["keep", "reset"])
def test_lookahead_synchronisation_is_part_of_what_is_compensated(reset_state):
    """The fast parameters jump at a synchronisation, and w − w_s has to include the jump."""
    period, slow_step = 3, 0.4
    inner = dc.remember_params(
        optax.chain(dc.add_delay_compensation(0.5, decay=0.9, clip=None), optax.scale(-0.2))
    )
    tx = optax.lookahead(inner, period, slow_step, reset_state=reset_state)
    actual, _ = run(tx, grads=GRADS[:8], params=optax.LookaheadParams.init_synced(PARAMS))

    fast = slow = previous = reference.wide(PARAMS)
    correct = Compensation(0.5, decay=0.9)
    for t in range(8):
        corrected = correct(GRADS[t], fast, previous)
        previous, fast = fast, jax.tree.map(lambda w, g: w - 0.2 * g, fast, corrected)
        if t % period == period - 1:
            slow = fast = jax.tree.map(lambda s, f: s + slow_step * (f - s), slow, fast)
            if reset_state:  # a new optimizer: no ν, and w_s = w
                correct, previous = Compensation(0.5, decay=0.9), fast
        assert_close(reference.wide(actual[t].fast), fast, rtol=2e-5)
        assert_close(reference.wide(actual[t].slow), slow, rtol=2e-5)


def test_schedule_free():
    lr, b1 = 0.3, 0.9
    rule = dc.add_delay_compensation(0.8, decay=0.9, clip=None)
    inner = dc.remember_params(optax.chain(rule, optax.sgd(lr)), num_workers=NUM_WORKERS)
    actual, _ = run(optax.contrib.schedule_free(inner, lr, b1), worker)

    # Defazio et al.: gradients at y, steps on z, and x is the mean of all z.
    x = y = z = reference.wide(PARAMS)
    memory, correct = reference.Backups(y, NUM_WORKERS), Compensation(0.8, decay=0.9)
    for t in range(STEPS):
        grads = correct(GRADS[t], y, memory.stale(WORKERS[t]))
        z = jax.tree.map(lambda z, g: z - lr * g, z, grads)
        x = jax.tree.map(lambda x, z, n=t + 1: x + (z - x) / n, x, z)
        before, y = y, jax.tree.map(lambda x, z: b1 * x + (1 - b1) * z, x, z)
        memory.applied(before, y, WORKERS[t])
        assert_close(reference.wide(actual[t]), y, rtol=2e-5)
    assert correct.largest > 0.05
