"""What `simulation.run` trains, against float64 NumPy, and what it must reduce to."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import simulation_cases as cases
from simulation_cases import BATCHES, LEARNING_RATE, NUM_UPDATES, NUM_WORKERS, PARAMS

from optax_dcasgd import add_delay_compensation, dcasgd, remember_params, simulation
from optax_dcasgd.simulation import Arrivals

CONSTANT = {"lamda": 2.0}  # DC-ASGD-c
CLIPPED = {"lamda": 8.0, "decay": 0.95, "clip": 1.0}  # the defaults of add_delay_compensation
CHAIN = optax.chain(add_delay_compensation(), optax.sgd(LEARNING_RATE, 0.9))


def run(tx, arrivals=None, batches=None, **options):
    arrivals = cases.arrivals() if arrivals is None else arrivals
    batches = cases.as_jax(BATCHES) if batches is None else batches
    return simulation.run(cases.grad_fn, cases.as_jax(PARAMS), tx, batches, arrivals, **options)


@pytest.mark.parametrize(
    ("tx", "momentum", "rule"),
    [
        (dcasgd(LEARNING_RATE, None, store=None, **CONSTANT), None, CONSTANT),
        (CHAIN, 0.9, CLIPPED),
    ],
    ids=["DC-c, fused", "DC-a, in a chain"],
)
@pytest.mark.usefixtures("x64")
def test_async_is_a_parameter_server(tx, momentum, rule):
    arrivals = cases.arrivals()
    staleness = np.asarray(arrivals.staleness)
    assert len(set(staleness)) > 5  # else this would test little
    versions, losses = cases.numpy_run(cases.one_push_each(staleness), momentum=momentum, **rule)
    result = run(tx, arrivals)
    cases.assert_close(result.params, versions[-1], 1e-12)
    np.testing.assert_allclose(result.history.loss, losses, 1e-12)
    np.testing.assert_array_equal(result.history.time, arrivals.time)
    assert result.history.num_finite == NUM_UPDATES


@pytest.mark.usefixtures("x64")
def test_remember_params_agrees_with_the_arrivals(tmp_path):
    """Algorithm 2 is what workers do that pull after their own push; the file replays it."""
    cases.arrivals(all_present=True).save(tmp_path / "arrivals.npz")
    arrivals = Arrivals.load(tmp_path / "arrivals.npz")
    alone = remember_params(CHAIN, num_workers=NUM_WORKERS)
    untold = optax.GradientTransformationExtraArgs(
        alone.init, lambda g, state, params, *, worker, **_: alone.update(
            g, state, params, worker=worker
        ),
    )  # fmt: skip
    versions, _ = cases.numpy_run(cases.one_push_each(arrivals.staleness), momentum=0.9, **CLIPPED)
    cases.assert_close(run(untold, arrivals).params, versions[-1], 1e-12)


@pytest.mark.parametrize("barrier", [True, False])
@pytest.mark.usefixtures("x64")
def test_sync_is_the_mean_of_a_round(barrier):
    arrivals = cases.arrivals(all_present=not barrier)
    takes_part = np.isfinite(arrivals.barrier)
    assert takes_part.shape == (NUM_UPDATES // NUM_WORKERS, NUM_WORKERS)
    assert takes_part.all() != barrier
    rounds = [
        [(r * NUM_WORKERS + i, 0) for i in np.flatnonzero(row)] for r, row in enumerate(takes_part)
    ]
    versions, losses = cases.numpy_run(rounds, momentum=0.9, **CLIPPED)
    time = np.where(takes_part, arrivals.barrier, 0).max(1)
    if not barrier:  # as a real run records them
        arrivals, time = dataclasses.replace(arrivals, barrier=None), np.full(time.shape, np.nan)
    result = run(CHAIN, arrivals, mode="sync")
    cases.assert_close(result.params, versions[-1], 1e-12)
    np.testing.assert_allclose(result.history.loss, losses, 1e-12)
    np.testing.assert_array_equal(result.history.time, time)


@pytest.mark.usefixtures("x64")
def test_sequential_is_never_stale_and_takes_the_sum_of_the_times():
    versions, losses = cases.numpy_run([[(t, 0)] for t in range(NUM_UPDATES)], momentum=0.9)
    arrivals = simulation.arrivals(jax.random.key(0), 3, NUM_UPDATES, compute_time=0.5)
    result = run(CHAIN, arrivals, mode="sequential")
    cases.assert_close(result.params, versions[-1], 1e-12)
    np.testing.assert_allclose(result.history.loss, losses, 1e-12)
    np.testing.assert_allclose(result.history.time, 0.5 * np.arange(1, NUM_UPDATES + 1), 1e-12)


def test_one_worker_is_sequential():
    """Whatever the compensation is."""
    arrivals = simulation.arrivals(jax.random.key(0), 1, NUM_UPDATES)
    assert not np.any(arrivals.staleness)
    inner = optax.adam(1e-2)
    alone = run(optax.chain(add_delay_compensation(), inner), arrivals)
    sequential = run(inner, arrivals, mode="sequential")
    chex.assert_trees_all_equal(alone.params, sequential.params)
    np.testing.assert_allclose(alone.history.time, sequential.history.time, 1e-5)


def test_the_extra_args_reach_the_optimizer():
    arrivals = cases.arrivals()

    def update(updates, state, params=None, *, stale_params, worker, staleness):
        seen = {"stale": stale_params, "params": params, "worker": worker, "staleness": staleness}
        count, kept = state
        kept = jax.tree.map(lambda all_, x: all_.at[count].set(x), kept, seen)
        return jax.tree.map(lambda g: -LEARNING_RATE * g, updates), (count + 1, kept)

    def init(params):
        rows = jax.tree.map(lambda p: jnp.zeros((NUM_UPDATES, *p.shape)), params)
        numbers = jnp.zeros(NUM_UPDATES, jnp.int32)
        seen = {"stale": rows, "params": rows, "worker": numbers, "staleness": numbers}
        return jnp.zeros((), jnp.int32), seen

    _, seen = run(optax.GradientTransformationExtraArgs(init, update), arrivals).state
    np.testing.assert_array_equal(seen["worker"], arrivals.worker)
    np.testing.assert_array_equal(seen["staleness"], arrivals.staleness)
    version = np.arange(NUM_UPDATES) - np.asarray(arrivals.staleness)
    for name in PARAMS:
        np.testing.assert_array_equal(seen["stale"][name], seen["params"][name][version])


def test_vmapped_is_looped_over_seeds_learning_rates_and_lamda():
    """To rounding: a batched program is another program."""

    def train(key, learning_rate, lamda):
        arrivals = simulation.arrivals(key, NUM_WORKERS, NUM_UPDATES)
        tx = optax.chain(add_delay_compensation(lamda), optax.sgd(learning_rate))
        evaluate = functools.partial(jax.tree.map, jnp.sum)
        return run(tx, arrivals, key=key, evaluate=evaluate, evaluate_every=15)

    keys = jax.random.split(jax.random.key(1), 3)
    rates, lamdas = jnp.array([0.1, 0.2, 0.4]), jnp.array([0.0, 1.0, 2.0])
    together = jax.jit(jax.vmap(train))(keys, rates, lamdas)
    train_one = jax.jit(train)
    for i in range(3):
        alone = train_one(keys[i], rates[i], lamdas[i])
        chex.assert_trees_all_close(
            alone, jax.tree.map(lambda x, i=i: x[i], together), rtol=1e-4, atol=1e-5
        )
    assert len({float(x) for x in together.params["bias"][:, 0]}) == 3


def test_batches_may_be_a_function_and_keys_are_those_of_the_batch():
    data = cases.as_jax(BATCHES)

    def noisy(params, batch, key):
        value, grads = cases.grad_fn(params, batch, key)
        return value, jax.tree.map(lambda g: g + jax.random.normal(key, g.shape), grads)

    def trained(batches, grad_fn, **options):
        arrivals, params = cases.arrivals(), cases.as_jax(PARAMS)
        return simulation.run(grad_fn, params, optax.sgd(0.1), batches, arrivals, **options).params

    by_function = jax.jit(
        lambda key: trained(lambda t: jax.tree.map(lambda x: x[t], data), noisy, key=key)
    )
    key = jax.random.key(7)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(NUM_UPDATES))
    explicit = trained((data, keys), lambda params, batch, _: noisy(params, *batch))
    seeded = by_function(key)
    cases.assert_close(seeded, explicit, 1e-6)
    assert not np.allclose(by_function(jax.random.key(0))["bias"], seeded["bias"])


@pytest.mark.parametrize("batches", [np.arange(5), lambda i: i % 5], ids=["array", "function"])
def test_a_push_may_be_on_another_batch_than_its_own_number(batches):
    """As in a real run, where a slow worker's batch arrives late. The key is that of the batch."""
    batch, none = np.array([7, 0, 3]), np.zeros(3, int)
    arrivals = Arrivals(none, none, np.arange(3.0), batch=batch)

    def grad_fn(params, batch, key):
        return batch.astype(float) + 0 * params, jax.random.normal(key)

    key = jax.random.key(2)
    result = simulation.run(grad_fn, jnp.zeros(()), optax.sgd(1.0), batches, arrivals, key=key)
    np.testing.assert_array_equal(result.history.loss, batch % 5)
    expected = -sum(jax.random.normal(jax.random.fold_in(key, i)) for i in batch)
    np.testing.assert_allclose(result.params, expected, 1e-6)
