"""`simulation.run` against float64 NumPy, and what it must reduce to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import simulation_cases as cases
from simulation_cases import BATCHES, LEARNING_RATE, NUM_UPDATES, NUM_WORKERS, PARAMS

import optax_dcasgd
from optax_dcasgd import simulation

KEY = jax.random.key(2)
METHODS = {
    "none": {"lamda": 0.0},
    "c": {"lamda": 2.0},
    "a": {"lamda": 2.0, "decay": 0.95},
    "a clipped": {"lamda": 8.0, "decay": 0.95, "clip": 1.0},
}


def run(tx, arrivals=None, batches=None, **options):
    arrivals = cases.arrivals() if arrivals is None else arrivals
    batches = cases.as_jax(BATCHES) if batches is None else batches
    return simulation.run(cases.grad_fn, cases.as_jax(PARAMS), tx, batches, arrivals, **options)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("x64")
def test_async_is_a_parameter_server(method, momentum):
    arrivals = cases.arrivals()
    staleness = np.asarray(arrivals.staleness)
    assert len(set(staleness)) > 5  # else this would test little
    versions, losses = cases.numpy_run(
        [[(t, tau)] for t, tau in enumerate(staleness)], momentum=momentum, **METHODS[method]
    )
    tx = optax_dcasgd.dcasgd(LEARNING_RATE, momentum, store=None, **METHODS[method])
    result = run(tx, arrivals)
    cases.assert_close(result.params, versions[-1], 1e-12)
    np.testing.assert_allclose(result.history.loss, losses, 1e-12)
    np.testing.assert_array_equal(result.history.time, arrivals.time)
    assert result.state.count == result.history.num_finite == NUM_UPDATES


@pytest.mark.parametrize("store", [{"store": None}, {"num_workers": NUM_WORKERS}], ids=str)
@pytest.mark.usefixtures("x64")
def test_in_a_chain_with_a_memory_of_its_own_or_none(store):
    arrivals = cases.arrivals(all_present=True)
    versions, _ = cases.numpy_run(
        [[(t, tau)] for t, tau in enumerate(np.asarray(arrivals.staleness))],
        momentum=0.9,
        **METHODS["a"],
    )
    link = optax_dcasgd.add_delay_compensation(**METHODS["a"], **store)
    result = run(optax.chain(link, optax.sgd(LEARNING_RATE, 0.9)), arrivals)
    cases.assert_close(result.params, versions[-1], 1e-12)


@pytest.mark.parametrize("absence", [False, True])
@pytest.mark.usefixtures("x64")
def test_sync_is_a_large_batch_step(absence):
    arrivals = cases.arrivals(all_present=not absence)
    takes_part = np.isfinite(arrivals.barrier)
    assert takes_part.shape == (NUM_UPDATES // NUM_WORKERS, NUM_WORKERS)
    assert takes_part.all() != absence
    rounds = [
        [(r * NUM_WORKERS + i, 0) for i in np.flatnonzero(row)] for r, row in enumerate(takes_part)
    ]
    versions, losses = cases.numpy_run(rounds, momentum=0.9, **METHODS["a"])
    tx = optax_dcasgd.dcasgd(LEARNING_RATE, 0.9, store=None, **METHODS["a"])
    result = run(tx, arrivals, mode="sync")
    cases.assert_close(result.params, versions[-1], 1e-12)
    np.testing.assert_allclose(result.history.loss, losses, 1e-12)
    np.testing.assert_array_equal(
        result.history.time, np.where(takes_part, arrivals.barrier, 0).max(1)
    )

    if not absence:  # and in one step of a batch four times as large
        large = {k: v.reshape(-1, 20, *v.shape[2:]) for k, v in BATCHES.items()}
        alone = simulation.Arrivals(*(np.zeros(10, int),) * 2, time=np.arange(10.0))
        at_once = run(tx, alone, cases.as_jax(large), mode="sequential")
        cases.assert_close(result.params, at_once.params, 1e-12)


def test_sync_without_barrier_times_does_not_know_the_time():
    arrivals = cases.arrivals()
    known = run(optax.sgd(0.1), cases.arrivals(all_present=True), mode="sync")
    recorded = simulation.Arrivals(arrivals.worker, arrivals.staleness, arrivals.time)
    result = run(optax.sgd(0.1), recorded, mode="sync")
    assert np.isnan(result.history.time).all()
    cases.assert_close(result.params, known.params, 1e-6)


@pytest.mark.usefixtures("x64")
def test_sequential_is_never_stale_and_takes_the_sum_of_the_times():
    versions, losses = cases.numpy_run([[(t, 0)] for t in range(NUM_UPDATES)], momentum=0.9)
    arrivals = simulation.arrivals(jax.random.key(0), 3, NUM_UPDATES, compute_time=0.5)
    tx = optax_dcasgd.dcasgd(LEARNING_RATE, 0.9, 0.04, store=None)
    result = run(tx, arrivals, mode="sequential")
    cases.assert_close(result.params, versions[-1], 1e-12)
    np.testing.assert_allclose(result.history.loss, losses, 1e-12)
    np.testing.assert_allclose(result.history.time, 0.5 * np.arange(1, NUM_UPDATES + 1), 1e-12)


INNERS = {
    "sgd": optax.sgd(LEARNING_RATE),
    "momentum": optax.sgd(LEARNING_RATE, 0.9),
    "adam": optax.adam(1e-2),
}


@pytest.mark.parametrize("inner", INNERS)
def test_lamda_zero_is_asgd(inner):
    link = optax_dcasgd.add_delay_compensation(0.0, store=None)
    actual, expected = run(optax.chain(link, INNERS[inner])), run(INNERS[inner])
    cases.assert_bit_equal(actual.params, expected.params)
    cases.assert_bit_equal(actual.history, expected.history)


@pytest.mark.parametrize("inner", INNERS)
def test_one_worker_is_sequential(inner):
    """Whatever the compensation, and whoever's batches they are."""
    arrivals = cases.one_worker()
    assert not np.any(arrivals.staleness)
    link = optax_dcasgd.add_delay_compensation(2.0, decay=0.9, store=None)
    tx = optax.chain(link, INNERS[inner])
    alone, sequential = run(tx, arrivals), run(INNERS[inner], arrivals, mode="sequential")
    cases.assert_bit_equal(alone.params, sequential.params)
    np.testing.assert_allclose(alone.history.time, sequential.history.time, 1e-5)


def test_the_extra_args_reach_the_optimizer():
    arrivals = cases.arrivals()

    def update(updates, state, params=None, *, stale_params, worker, staleness):
        seen = {"stale": stale_params, "params": params, "worker": worker, "staleness": staleness}
        state = jax.tree.map(lambda all_, x: all_.at[state["count"]].set(x), state["seen"], seen)
        return jax.tree.map(lambda g: -LEARNING_RATE * g, updates), state

    def counting(updates, state, params=None, **extra_args):
        updates, seen = update(updates, state, params, **extra_args)
        return updates, {"count": state["count"] + 1, "seen": seen}

    def init(params):
        rows = jax.tree.map(lambda p: jnp.zeros((NUM_UPDATES, *p.shape)), params)
        numbers = jnp.zeros(NUM_UPDATES, jnp.int32)
        seen = {"stale": rows, "params": rows, "worker": numbers, "staleness": numbers}
        return {"count": jnp.zeros((), jnp.int32), "seen": seen}

    recorder = optax.GradientTransformationExtraArgs(init, counting)
    seen = run(recorder, arrivals).state["seen"]
    np.testing.assert_array_equal(seen["worker"], arrivals.worker)
    np.testing.assert_array_equal(seen["staleness"], arrivals.staleness)
    version = np.arange(NUM_UPDATES) - np.asarray(arrivals.staleness)
    for name in PARAMS:
        np.testing.assert_array_equal(seen["stale"][name], seen["params"][name][version])


def test_vmapped_is_looped_over_seeds_learning_rates_and_lamda():
    """To rounding: a batched program is another program."""

    def train(key, learning_rate, lamda):
        arrivals = simulation.arrivals(key, NUM_WORKERS, NUM_UPDATES)
        link = optax_dcasgd.add_delay_compensation(lamda, decay=0.95, store=None)
        tx = optax.chain(link, optax.sgd(learning_rate))
        evaluate = functools.partial(jax.tree.map, jnp.sum)
        return run(tx, arrivals, key=key, evaluate=evaluate, evaluate_every=15)

    keys = jax.random.split(jax.random.key(1), 3)
    rates, lamdas = jnp.array([0.1, 0.2, 0.4]), jnp.array([0.0, 1.0, 2.0])
    together = jax.jit(jax.vmap(train))(keys, rates, lamdas)
    train_one = jax.jit(train)
    for i in range(3):
        alone = train_one(keys[i], rates[i], lamdas[i])
        jax.tree.map(
            lambda a, t, i=i: np.testing.assert_allclose(a, t[i], 1e-4, 1e-5), alone, together
        )
    assert len({float(x) for x in together.params["bias"][:, 0]}) == 3


def test_batches_may_be_a_function_and_keys_are_those_of_the_batch():
    data = cases.as_jax(BATCHES)

    def noisy(params, batch, key):
        value, grads = cases.grad_fn(params, batch, key)
        return value, jax.tree.map(lambda g: g + jax.random.normal(key, g.shape), grads)

    def trained(batches, grad_fn, **options):
        arrivals = cases.arrivals()
        params = cases.as_jax(PARAMS)
        return simulation.run(grad_fn, params, optax.sgd(0.1), batches, arrivals, **options).params

    key = jax.random.key(7)
    seeded = trained(data, noisy, key=key)
    by_function = trained(lambda t: jax.tree.map(lambda x: x[t], data), noisy, key=key)
    cases.assert_close(by_function, seeded, 1e-6)

    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(NUM_UPDATES))
    explicit = trained((data, keys), lambda params, batch, _: noisy(params, *batch))
    cases.assert_close(seeded, explicit, 1e-6)
    assert not np.allclose(trained(data, noisy)["bias"], seeded["bias"])


def test_a_push_may_be_on_another_batch_than_its_own_number():
    """As in a real run, where a slow worker's batch arrives late: batch i is leaf[i % n]."""
    arrivals, half = cases.arrivals(), NUM_UPDATES // 2
    batch = np.random.default_rng(3).permutation(2 * NUM_UPDATES)[:NUM_UPDATES]
    few = jax.tree.map(lambda x: x[:half], cases.as_jax(BATCHES))
    reordered = jax.tree.map(lambda x: x[batch % half], cases.as_jax(BATCHES))

    recorded = dataclasses.replace(arrivals, batch=batch)
    tx = optax_dcasgd.dcasgd(LEARNING_RATE, 0.9, store=None)
    got, want = run(tx, recorded, few), run(tx, arrivals, reordered)
    np.testing.assert_array_equal(got.history.loss, want.history.loss)
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
    assert not np.array_equal(got.history.loss, run(tx, arrivals).history.loss)


def test_a_push_has_the_key_of_its_batch():
    batch = np.array([7, 0, 3])
    none = np.zeros(3, int)
    arrivals = simulation.Arrivals(none, none, np.arange(3.0), batch=batch)

    def grad_fn(params, batch, key):
        return batch.astype(float) + 0 * params, jax.random.normal(key)

    tx = optax.sgd(1.0)
    result = simulation.run(grad_fn, jnp.zeros(()), tx, lambda t: t, arrivals, key=KEY)
    np.testing.assert_array_equal(result.history.loss, batch)
    want = -sum(jax.random.normal(jax.random.fold_in(KEY, i)) for i in batch)
    np.testing.assert_allclose(result.params, want, 1e-6)
