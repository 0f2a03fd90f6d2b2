"""In Flax: linen's TrainState and nnx.Optimizer, against `reference` on the model's gradients."""

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from common import WORKERS, assert_bit_equal
from flax import nnx
from flax.training.train_state import TrainState
from transformation_cases import CASES, GRADS, NUM_WORKERS, PARAMS, assert_close, cast

import optax_dcasgd as dc

STEPS = 6
INPUTS = jnp.asarray(np.random.default_rng(1).normal(size=(STEPS, 16, 3)), jnp.float32)
TARGETS = jnp.sin(INPUTS.sum(-1, keepdims=True))
HYPERPARAMS = {"lamda": 2.0, "decay": 0.9}


def compensated():
    rule = dc.add_delay_compensation(**HYPERPARAMS, clip=None)
    return optax.chain(rule, optax.trace(0.9), optax.scale(-0.1))


SOURCES = {  # the optimizer, and whether its gradients come from several workers
    "previous": (lambda: dc.remember_params(compensated()), False),
    "dcasgd": (lambda: dc.dcasgd(0.1, 0.9, store="updates", **HYPERPARAMS), False),
    "workers": (lambda: dc.remember_params(compensated(), num_workers=NUM_WORKERS), True),
    "stale_params": (compensated, True),
    "stale_params-masters": (lambda: dc.with_master_weights(compensated()), True),
}


def extra_args(source, worker, stale_params):
    if source == "workers":
        return {"worker": worker}
    return {"stale_params": stale_params} if source.startswith("stale_params") else {}


def expected_run(grads_fn, params, *, by_worker):
    """The float64 reference on gradients of the model at its own stale parameters."""

    def follow(**hyperparams):
        def grads(stale, t):
            return grads_fn(cast(stale, jnp.float32), t)

        hyperparams = {"lr": 0.1, "momentum": 0.9, **HYPERPARAMS, **hyperparams}
        if by_worker:
            order = WORKERS[:STEPS]
            return reference.algorithm_2(grads, params, order, NUM_WORKERS, **hyperparams)[-1]
        return reference.one_update_old(grads, params, STEPS, **hyperparams)[-1]

    result = follow()
    gaps = jax.tree.leaves(reference.subtract(result, follow(lamda=0.0)))
    assert max(np.max(np.abs(gap)) for gap in gaps) > 0.01  # else it would pass uncompensated
    return result


# --- Flax linen ---


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(4)(x)))


@jax.jit
def linen_grads(params, t):
    def loss(params):
        return jnp.mean((Model().apply({"params": params}, INPUTS[t]) - TARGETS[t]) ** 2)

    return jax.grad(loss)(params)


class ExtraArgsTrainState(TrainState):
    """TrainState.apply_gradients hands nothing on to the optimizer; this does."""

    def apply_gradients(self, *, grads, **extra):
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params, **extra)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state)


@pytest.mark.parametrize("source", ["previous", "dcasgd", "workers", "stale_params"])
def test_linen_train_state(source):
    make, by_worker = SOURCES[source]
    params = Model().init(jax.random.key(0), INPUTS[0])["params"]
    kind = ExtraArgsTrainState if by_worker else TrainState
    state = kind.create(apply_fn=Model().apply, params=params, tx=make())

    @jax.jit
    def train_step(state, pulled, t, worker):
        extra = extra_args(source, worker, pulled)
        return state.apply_gradients(grads=linen_grads(pulled, t), **extra)

    pulled = [params] * NUM_WORKERS
    for t, worker in enumerate(WORKERS[:STEPS]):
        worker = worker if by_worker else 0
        before, state = state.params, train_step(state, pulled[worker], t, worker)
        pulled[worker] = state.params if by_worker else before
    assert state.step == STEPS
    expected = expected_run(linen_grads, params, by_worker=by_worker)
    assert_close(reference.wide(state.params), expected, rtol=1e-5)


def test_a_frozen_dict_is_a_dict():
    tx = CASES["adaptive-remembered"].make()
    update = jax.jit(tx.update)
    params, frozen = PARAMS, flax.core.freeze(PARAMS)
    state, frozen_state = tx.init(params), tx.init(frozen)
    for grads in GRADS[:3]:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, frozen_state = update(flax.core.freeze(grads), frozen_state, frozen)
        frozen = optax.apply_updates(frozen, updates)
    assert isinstance(frozen_state.prev_params, flax.core.FrozenDict)
    assert_bit_equal(flax.core.unfreeze(frozen), params)


# --- Flax nnx ---


class Calls(nnx.Variable):
    """Not trained, and an integer: an optimizer that saw it would refuse it."""


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.second = nnx.Linear(4, 1, rngs=rngs)
        self.calls = Calls(jnp.array(0))

    def __call__(self, x):
        self.calls[...] += 1
        return self.second(nnx.tanh(self.first(x)))


def nnx_loss(model, t):
    return jnp.mean((model(INPUTS[t]) - TARGETS[t]) ** 2)


def trained(model):
    """The parameters of a model, as a plain dict of arrays that no later update can change."""
    return jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


@jax.jit
def nnx_grads(params, t):
    """The gradients of `nnx_loss`, of the model written out."""

    def loss(params):
        hidden = jnp.tanh(INPUTS[t] @ params["first"]["kernel"] + params["first"]["bias"])
        outputs = hidden @ params["second"]["kernel"] + params["second"]["bias"]
        return jnp.mean((outputs - TARGETS[t]) ** 2)

    return jax.grad(loss)(params)


@pytest.mark.parametrize("source", SOURCES)
def test_nnx_optimizer(source):
    """The state of the optimizer, the gradients and the stale parameters are nnx.State trees."""
    make, by_worker = SOURCES[source]
    model = NNXModel(nnx.Rngs(0))
    params = trained(model)
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, pulled, t, worker):
        grads = nnx.grad(nnx_loss)(pulled, t)
        optimizer.update(model, grads, **extra_args(source, worker, nnx.state(pulled, nnx.Param)))

    # A clone is a copy: what `pulled` holds must not move with the model.
    pulled = [nnx.clone(model) for _ in range(NUM_WORKERS)]
    for t, worker in enumerate(WORKERS[:STEPS]):
        worker = worker if by_worker else 0
        before = nnx.clone(model)
        train_step(model, optimizer, pulled[worker], t, worker)
        pulled[worker] = nnx.clone(model) if by_worker else before
    assert optimizer.step[...] == STEPS
    expected = expected_run(nnx_grads, params, by_worker=by_worker)
    assert_close(reference.wide(trained(model)), expected, rtol=1e-5)


def test_nnx_optimizer_steps_as_a_loop_over_dicts_does():
    """Half-precision leaves beside others, and ring buffers with one more axis than the model."""

    def delayed(tree):
        delays = jax.tree.map(lambda p: 2 if p.ndim == 2 else 0, tree)
        return dc.with_master_weights(dc.delay_gradients(compensated(), delays))

    model = NNXModel(nnx.Rngs(0))
    model.first.kernel[...] = model.first.kernel[...].astype(jnp.bfloat16)
    pure = nnx.as_pure(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, delayed(pure), wrt=nnx.Param)
    params = trained(model)
    tx = delayed(params)
    state = tx.init(params)
    grads_of, update, train_step = (
        nnx.jit(nnx.grad(nnx_loss)),
        jax.jit(tx.update),
        nnx.jit(lambda optimizer, model, grads: optimizer.update(model, grads)),
    )
    for t in range(4):
        grads = grads_of(model, t)
        updates, state = update(jax.tree.map(jnp.array, nnx.to_pure_dict(grads)), state, params)
        params = optax.apply_updates(params, updates)
        train_step(optimizer, model, grads)
        assert_close(trained(model), params)
    assert_close(jax.tree.leaves(nnx.as_pure(optimizer.opt_state)), jax.tree.leaves(state))
