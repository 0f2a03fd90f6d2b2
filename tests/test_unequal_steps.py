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
    by_hand = dataclasses.replace(arrivals, batch=None, num_steps=None)
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
            "For mode=.sync. make the arrivals",
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
