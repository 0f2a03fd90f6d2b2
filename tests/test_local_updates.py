"""`local_updates`: against loops in float64 NumPy, in the engines, with rounds of unequal size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import overlap_cases as overlapped
import pytest
import reference
import simulation_cases as cases
from common import assert_bit_equal
from jax.sharding import PartitionSpec as P

from optax_dcasgd import (
    LocalBatches,
    add_delay_compensation,
    dcasgd,
    diagnostics,
    local_updates,
    overlap_reduction,
    simulation,
)

H, ROUNDS = 4, 10
STACKS = jax.tree.map(lambda x: x.reshape(ROUNDS, H, *x.shape[1:]), cases.BATCHES)
KEY = jax.random.key(7)


class SGD:
    """Plain gradient descent."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, w, grads):
        return {name: w[name] - self.rate * g for name, g in grads.items()}


class Adam:
    """Kingma and Ba's Algorithm 1."""

    def __init__(self, rate):
        self.rate, self.t = rate, 0
        self.m, self.v = {}, {}

    def __call__(self, w, grads):
        self.t += 1
        after = {}
        for name, g in grads.items():
            self.m[name] = 0.9 * self.m.get(name, 0) + 0.1 * g
            self.v[name] = 0.999 * self.v.get(name, 0) + 0.001 * g**2
            m = self.m[name] / (1 - 0.9**self.t)
            v = self.v[name] / (1 - 0.999**self.t)
            after[name] = w[name] - self.rate * m / (np.sqrt(v) + 1e-8)
        return after


def numpy_round(w, t, inner, num_steps=H):
    """The mean loss and the pseudo-gradient of round t, step by step."""
    start, losses = w, []
    for h in range(num_steps):
        value, grads = cases.numpy_grad_fn(w, STACKS["x"][t, h], STACKS["y"][t, h])
        losses.append(value)
        w = inner(w, grads)
    return np.mean(losses), {name: start[name] - w[name] for name in w}


INNER = {"sgd": (optax.sgd, SGD), "adam": (optax.adam, Adam)}


@pytest.mark.parametrize("inner", INNER)
def test_a_round_is_a_loop_of_steps_and_starts_anew(inner):
    optimizer, by_hand = INNER[inner]
    local = jax.jit(local_updates(cases.grad_fn, optimizer(0.1), H))
    params = cases.as_jax(cases.PARAMS)
    for t in (0, 1):
        stack = jax.tree.map(lambda x, t=t: jnp.asarray(x[t]), STACKS)
        expected = numpy_round(reference.wide(params), t, by_hand(0.1))
        cases.assert_close(local(params, stack, KEY), cases.as_jax(expected), 2e-5)
        for count in (1, 3, H):
            expected = numpy_round(reference.wide(params), t, by_hand(0.1), count)
            found = local(params, LocalBatches(stack, jnp.int32(count)), KEY)
            cases.assert_close(found, cases.as_jax(expected), 2e-5)


@pytest.mark.parametrize(
    ("dtype", "compiled"),
    [(jnp.float32, lambda f: f), (jnp.float32, jax.jit), (jnp.bfloat16, jax.jit)],
    ids=["op-by-op", "float32", "bfloat16"],
)
def test_one_step_of_sgd_is_the_gradient_to_the_bit(dtype, compiled):
    """Where both are −0 too."""
    params, batches = jax.tree.map(lambda x: jnp.asarray(x, dtype), (cases.PARAMS, cases.BATCHES))
    params["bias"] = -jnp.zeros_like(params["bias"])
    some = jax.tree.map(lambda x: x[0], batches)
    zeros = {"x": jnp.zeros_like(some["x"]), "y": -jnp.zeros_like(some["y"])}

    def step(grad_fn, tx, params, batch):
        _, grads = grad_fn(params, batch, KEY)
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    local = local_updates(cases.grad_fn, optax.sgd(0.37), 1)
    plain = compiled(functools.partial(step, cases.grad_fn, optax.sgd(0.37)))
    found = compiled(functools.partial(step, local, optax.sgd(1.0)))
    for batch in (zeros, some):
        stack = jax.tree.map(lambda x: x[None], batch)
        assert_bit_equal(found(params, stack), plain(params, batch))


def test_one_step_of_sgd_in_the_simulator_is_the_gradient_to_the_bit():
    params = cases.as_jax(cases.PARAMS)
    grad_fn = lambda p, b, key: cases.grad_fn(  # noqa: E731
        p, {**b, "y": b["y"] + jax.random.normal(key, b["y"].shape)}, key
    )
    plain = simulation.run(grad_fn, params, optax.sgd(0.3), cases.BATCHES, cases.arrivals())
    local = local_updates(grad_fn, optax.sgd(0.3), 1)
    stacks = jax.tree.map(lambda x: x[:, None], cases.BATCHES)
    found = simulation.run(local, params, optax.sgd(1.0), stacks, cases.arrivals())
    assert_bit_equal((found.params, found.history.loss), (plain.params, plain.history.loss))


def test_one_worker_that_adds_its_rounds_trains_as_without_rounds():
    params = cases.as_jax(cases.PARAMS)
    arrivals = simulation.arrivals(KEY, 1, ROUNDS)
    local = local_updates(cases.grad_fn, optax.sgd(0.3), H)
    found = simulation.run(local, params, optax.sgd(1.0), STACKS, arrivals)
    expected, losses = cases.numpy_run(cases.one_push_each(np.zeros(ROUNDS * H, int)))
    cases.assert_close(found.params, cases.as_jax(expected[-1]), 2e-5)
    np.testing.assert_allclose(found.history.loss, losses.reshape(ROUNDS, H).mean(1), rtol=1e-5)


def test_asynchronous_rounds_are_those_of_numpy_under_vmap():
    """With a compensated outer optimizer; every member of the batch has its inner rate."""
    arrivals = simulation.arrivals(KEY, 3, ROUNDS, slowdown={0: 3.0})
    staleness = np.asarray(arrivals.staleness)
    assert staleness.max() > 1
    params = cases.as_jax(cases.PARAMS)
    rates = np.array([0.05, 0.2])

    @jax.vmap
    def found(rate):
        local = local_updates(cases.grad_fn, optax.sgd(rate), H)
        return simulation.run(local, params, dcasgd(0.7, 0.5, 2.0, store=None), STACKS, arrivals)

    trained = found(jnp.asarray(rates, jnp.float32)).params
    for i, rate in enumerate(rates):
        outer = reference.DCASGD(lr=0.7, momentum=0.5, lamda=2.0)
        versions = [reference.wide(cases.PARAMS)]
        for t in range(ROUNDS):
            stale = versions[t - staleness[t]]
            _, pseudo = numpy_round(stale, t, SGD(rate))
            step = outer(pseudo, w=versions[-1], w_s=stale)
            versions.append(reference.add(versions[-1], step))
        one = jax.tree.map(lambda x, i=i: x[i], trained)
        cases.assert_close(one, cases.as_jax(versions[-1]), 5e-5)


def test_each_step_has_a_key_of_its_own():
    def grad_fn(params, batch, key):
        return jax.random.uniform(key), params

    def loss(num_steps):
        return local_updates(grad_fn, optax.sgd(0.1), num_steps)(jnp.ones(2), None, KEY)[0]

    assert loss(1) == jax.random.uniform(KEY)
    each = [float(jax.random.uniform(jax.random.fold_in(KEY, h))) for h in range(3)]
    np.testing.assert_allclose(loss(3), np.mean(each), rtol=1e-6)


def test_the_mean_loss_of_a_short_round_does_not_overflow():
    local = local_updates(lambda p, b, key: (jnp.float16(300), p), optax.sgd(0.1), 300)
    assert local(jnp.ones(2), LocalBatches(jnp.ones(300), 299), KEY)[0] == 300


def test_updates_too_small_for_the_parameters_are_sent():
    """In bfloat16 1 − 0.001 is 1, and 0.5 + 0.001 is 0.5."""
    local = local_updates(lambda p, b, key: (p.sum(), jnp.ones_like(p)), optax.sgd(1e-3), 600)
    _, pseudo = local(jnp.ones(2, jnp.bfloat16), None, KEY)
    assert pseudo.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(pseudo, float), 0.6, rtol=0.01)


def test_under_overlap_reduction():
    """Each device takes its own steps; the mean of what they did is applied one update late."""
    mesh = overlapped.mesh_of(2)
    tx = overlap_reduction(optax.sgd(1.0), "data")
    local = local_updates(cases.grad_fn, optax.adam(0.1), H)
    params = cases.as_jax(cases.PARAMS)
    stacks = jax.tree.map(lambda x: jnp.asarray(x[:2], jnp.float32), STACKS)

    def two_updates(params, stack):
        state = tx.init(params)
        stack = LocalBatches(jax.tree.map(lambda x: x[0], stack), 3)
        for _ in range(2):
            _, grads = local(jax.lax.pcast(params, "data", to="varying"), stack, KEY)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    specs = {"in_specs": (P(), P("data")), "out_specs": P()}
    found = jax.jit(jax.shard_map(two_updates, mesh=mesh, **specs))(params, stacks)
    pseudo = [numpy_round(reference.wide(params), t, Adam(0.1), 3)[1] for t in (0, 1)]
    mean = {name: (pseudo[0][name] + pseudo[1][name]) / 2 for name in params}
    expected = {name: reference.wide(params)[name] - mean[name] for name in params}
    cases.assert_close(found, cases.as_jax(expected), 2e-5)


@pytest.mark.parametrize("used", [H, 3])
def test_diagnostics_take_it(used):
    """With fewer steps than H, of rounds that overlap: their numbers are as they please."""
    arrivals = simulation.arrivals(KEY, 3, ROUNDS)
    batches, numbers = STACKS, np.arange(ROUNDS)
    if used < H:
        numbers = numbers[::-1].astype(np.int32)
        of_three = {"batch": numbers, "num_steps": np.full(ROUNDS, used)}
        arrivals = dataclasses.replace(arrivals, **of_three)
        stacks = cases.as_jax(STACKS)
        batches = lambda t, num_steps: jax.tree.map(lambda x: x[t], stacks)  # noqa: E731
    local = local_updates(cases.grad_fn, optax.sgd(0.1), H)
    params = cases.as_jax(cases.PARAMS)
    outer = optax.chain(add_delay_compensation(), optax.sgd(0.5))
    pairs = diagnostics.collect(local, params, outer, batches, arrivals, num_pairs=2)
    last = jax.tree.map(lambda x: x[-1], pairs)
    for at, found in [(last.stale_params, last.stale_grads), (last.params, last.grads)]:
        expected = numpy_round(reference.wide(at), numbers[-1], SGD(0.1), used)[1]
        cases.assert_close(found, cases.as_jax(expected), 2e-5)


# --- Mistakes ---


def needs_value(updates, state, params=None, *, value, **extra_args):
    return updates, state


VALUE = optax.GradientTransformationExtraArgs(lambda params: None, needs_value)
W, BATCH = jnp.ones(2), jnp.ones((3, 2))


def call(params=W, batches=BATCH, key=KEY, **arguments):
    default = {"grad_fn": lambda p, b, key: (jnp.sum(p), p), "tx": optax.sgd(0.1), "num_steps": 3}
    return local_updates(**{**default, **arguments})(params, batches, key)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1"),
        ({"num_steps": 2.0}, TypeError, "num_steps must be a Python integer"),
        ({"tx": 0.1}, TypeError, "tx must be an optax.GradientTransformation"),
        ({"tx": VALUE}, TypeError, "tx .*'value'.*no other arguments"),
        ({"grad_fn": 3}, TypeError, "grad_fn must be a function"),
        ({"grad_fn": lambda p, b, key: jnp.sum(p)}, TypeError, r"grad_fn must return \(loss, gra"),
        ({"grad_fn": lambda p, b, key: (0.0 * p[0], p[:1])}, ValueError, "grads has shape"),
        ({"params": jnp.ones(2, int)}, TypeError, "params has dtype int32"),
        ({"batches": {"x": jnp.ones((2, 3))}}, ValueError, r"batches\['x'\].*size num_steps=3"),
        ({"batches": jnp.ones(())}, ValueError, r"batches has shape \(\).*LocalBatches"),
        ({"batches": LocalBatches(jnp.ones(4), 2)}, ValueError, "batches has shape .*num_steps=3"),
        ({"batches": LocalBatches(BATCH, 0)}, ValueError, "batches.num_steps must be at least 1"),
        ({"batches": LocalBatches(BATCH, np.int32(4))}, ValueError, "at most num_steps=3; got 4"),
        ({"batches": LocalBatches(BATCH, jnp.array(4))}, ValueError, "at most num_steps=3; got 4"),
        ({"batches": LocalBatches(BATCH, 1.5)}, TypeError, "batches.num_steps must be one integer"),
        ({"key": 3}, TypeError, "key must be one JAX random key"),
    ],
)
def test_a_wrong_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        call(**arguments)
