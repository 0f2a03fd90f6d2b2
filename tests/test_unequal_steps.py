"""Workers that take unequal numbers of local steps, in the simulator."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_dcasgd import LocalBatches, local_updates, simulation

KEY = jax.random.key(7)


def test_every_batch_is_used_once_whatever_the_workers_steps():
    """The gradient counts: batch i adds one to entry i."""
    steps, slowdown = np.array([6, 3, 1]), np.array([1.0, 2.0, 6.0])
    arrivals = simulation.arrivals(KEY, 3, 20, compute_time=1.0, slowdown=slowdown, local_steps=6)
    t = np.arange(20)
    np.testing.assert_array_equal(arrivals.time, 6 * (1 + t // 3))  # all push equally often
    np.testing.assert_array_equal(arrivals.num_steps, steps[t % 3])
    by_hand = dataclasses.replace(arrivals, batch=None, num_steps=None, local_steps=None)
    total = int(arrivals.num_steps.sum())

    def grad_fn(params, batch, key):
        return jnp.zeros(()), jax.nn.one_hot(batch, params.size)

    def rounds(first, num_steps):
        return first + jnp.arange(6)

    def rounds_by_hand(t):
        return LocalBatches(rounds(arrivals.batch[t], None), arrivals.num_steps[t])

    for batches, order in [(rounds, arrivals), (rounds_by_hand, by_hand)]:
        result = simulation.run(
            local_updates(grad_fn, optax.sgd(1.0), 6), jnp.zeros(total + 6), optax.sgd(1.0),
            batches, order,
        )  # fmt: skip
        np.testing.assert_array_equal(-result.params, np.arange(total + 6) < total)


def test_a_barrier_waits_for_every_workers_own_number_of_steps():
    """Against rounds that a user makes, of arrivals whose times are those of whole rounds."""
    steps, slowdown = np.array([6, 3, 1]), np.array([1.0, 2.5, 6.0])
    arrivals = simulation.arrivals(KEY, 3, 20, slowdown=slowdown, local_steps=6)
    np.testing.assert_array_equal(arrivals.local_steps, [6, 2, 1])
    arrivals = simulation.arrivals(KEY, 3, 20, slowdown=slowdown, local_steps=steps)
    plain = simulation.arrivals(KEY, 3, 20, slowdown=slowdown * steps)
    targets = jax.random.normal(KEY, (100, 4))
    grad_fn = jax.value_and_grad(lambda p, x, key: jnp.sum(jnp.cos(p - x)))
    local = local_updates(grad_fn, optax.adam(0.1), 6)

    def rounds(first, num_steps):
        return targets[first + jnp.arange(6)]

    def rounds_by_hand(t):
        first = t // 3 * 10 + jnp.array([0, 6, 9])[t % 3]
        return LocalBatches(rounds(first, None), jnp.array(steps)[t % 3])

    tx = optax.sgd(0.7, 0.9, nesterov=True)
    result, by_hand = (
        simulation.run(local, jnp.zeros(4), tx, batches, order, mode="sync")
        for batches, order in [(rounds, arrivals), (rounds_by_hand, plain)]
    )
    jax.tree.map(np.testing.assert_array_equal, result, by_hand)
    assert result.history.loss.shape == (6,)


def test_a_barrier_uses_every_batch_once():
    """From the first of the arrivals on, and none for a worker that takes no part."""
    arrivals = simulation.arrivals(
        KEY, 3, 12, compute_time=1.0, slowdown=[1.0, 2.0, 6.0], local_steps=6, stop={1: 7.0}
    )
    arrivals = dataclasses.replace(arrivals, batch=arrivals.batch + 40)

    def grad_fn(params, batch, key):
        return jnp.zeros(()), jax.nn.one_hot(batch, params.size)

    local = local_updates(grad_fn, optax.sgd(1.0), 6)

    def train(arrivals):
        return simulation.run(
            local, jnp.zeros(80), optax.sgd(1.0), lambda first, num_steps: first + jnp.arange(6),
            arrivals, mode="sync",
        ).params  # fmt: skip

    used = np.repeat([0, 1 / 3, 1 / 2, 0], [40, 10, 3 * 7, 9])  # one of three workers, one of two
    np.testing.assert_allclose(-train(arrivals), used, rtol=1e-7)

    # What is known is checked inside jax.jit too; what is not must not pass for fewer steps.
    too_many = dataclasses.replace(arrivals, local_steps=np.array([7, 3, 1]))
    with pytest.raises(ValueError, match="num_steps=7 it returned shape"):
        jax.jit(lambda: train(too_many))()
    loss = jax.jit(local)(jnp.zeros(80), LocalBatches(jnp.arange(6), 7), KEY)[0]
    assert np.isnan(loss)


IN_ROUNDS = {"batch": np.arange(3) * 2, "num_steps": np.full(3, 2)}


@pytest.mark.parametrize(
    ("batches", "recorded", "error", "message"),
    [
        (jnp.ones((3, 2)), {}, TypeError, r"batches must be a function \(first, num_steps\)"),
        (lambda t: jnp.ones(2), {}, TypeError, r"batches must be a function \(first, num_steps\)"),
        (lambda i, n: LocalBatches(jnp.ones(2), n), {}, TypeError, "stacked batches alone"),
        (lambda i, n: jnp.ones(1), {}, ValueError, r"of num_steps=2 it returned shape \(1,\)"),
        (lambda i, n: jnp.ones(3), {}, ValueError, "leading axis of size num_steps=2"),
        (None, {"batch": None}, ValueError, "arrivals.num_steps needs arrivals.batch"),
        (
            None,
            {"num_steps": np.array([2, 0, 2])},
            ValueError,
            r"num_steps\[1\] must be at least 1",
        ),
        (None, {"num_steps": np.ones(3)}, TypeError, "arrivals.num_steps must be of integer"),
        (
            lambda i, n: jnp.ones(2),
            {"mode": "sync"},
            ValueError,
            "mode=.sync. needs arrivals.local_steps",
        ),
        (None, {"local_steps": np.ones(2, int)}, ValueError, r"have shape \(1,\).*; got \(2,\)"),
        (None, {"local_steps": np.ones(1)}, TypeError, "local_steps must be of integer dtype"),
        (
            None,
            {"local_steps": np.ones(1, int), "num_steps": None},
            ValueError,
            "local_steps needs arrivals.num_steps",
        ),
        (
            None,
            {"local_steps": np.zeros(1, int)},
            ValueError,
            r"local_steps\[0\] must be at least 1",
        ),
    ],
)
def test_a_wrong_round_is_told(batches, recorded, error, message):
    mode = recorded.pop("mode", "async")
    t = np.arange(3)
    arrivals = simulation.Arrivals(0 * t, 0 * t, 1.0 * t, **{**IN_ROUNDS, **recorded})
    local = local_updates(lambda p, b, key: (jnp.sum(p), p), optax.sgd(0.1), 2)
    with pytest.raises(error, match=message):
        simulation.run(local, jnp.ones(2), optax.sgd(1.0), batches, arrivals, mode=mode)
