"""In Flax: linen's TrainState and nnx.Optimizer, against `reference` and the plainest loop."""

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from flax.training.train_state import TrainState
from host_cases import (
    NUM_WORKERS,
    STEPS,
    WORKERS,
    assert_close,
    assert_same,
    largest_gap,
    make_step,
    plain_run,
    start,
    tree_cast,
)

import optax_dcasgd as dc

# --- Flax linen ---


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(4)(x)))


INPUTS = jnp.asarray(np.random.default_rng(1).normal(size=(STEPS, 16, 3)), jnp.float32)
TARGETS = jnp.sin(INPUTS.sum(-1, keepdims=True))


@jax.jit
def linen_grads(params, t):
    def loss(params):
        return jnp.mean((Model().apply({"params": params}, INPUTS[t]) - TARGETS[t]) ** 2)

    return jax.grad(loss)(params)


HYPERPARAMS = {"momentum": 0.9, "lamda": 2.0, "decay": 0.9}


def expected_run(kind, grads_fn, params):
    """The float64 reference on gradients of the model at its own stale parameters."""

    def grads(stale, t):
        return grads_fn(tree_cast(stale, jnp.float32), t)

    def follow(**hyperparams):
        if kind == "workers":
            return reference.algorithm_2(
                grads, params, WORKERS[:STEPS], NUM_WORKERS, lr=0.1, **hyperparams
            )[-1]
        return reference.one_update_old(grads, params, STEPS, lr=0.1, **hyperparams)[-1]

    result = follow(**HYPERPARAMS)
    # Else the case would pass with the compensation removed.
    assert largest_gap(result, follow(**{**HYPERPARAMS, "lamda": 0.0})) > 0.01
    return result


def linen_params():
    return Model().init(jax.random.key(0), INPUTS[0])["params"]


@pytest.mark.parametrize("store", ["params", "updates"])
def test_linen_train_state(store):
    params = linen_params()
    tx = dc.dcasgd(0.1, store=store, **HYPERPARAMS)
    state = TrainState.create(apply_fn=Model().apply, params=params, tx=tx)

    @jax.jit
    def train_step(state, stale_params, t):
        return state.apply_gradients(grads=linen_grads(stale_params, t))

    stale_params = params
    for t in range(STEPS):
        before, state = state.params, train_step(state, stale_params, t)
        stale_params = before
    assert state.step == STEPS
    assert_close(state.params, expected_run("previous", linen_grads, params))


class ExtraArgsTrainState(TrainState):
    """TrainState.apply_gradients hands nothing on to the optimizer; this does."""

    def apply_gradients(self, *, grads, **extra_args):
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params, **extra_args)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state)


@pytest.mark.parametrize("memory", ["worker", "stale_params"])
def test_linen_train_state_that_passes_extra_arguments(memory):
    params = linen_params()
    kept = {"num_workers": NUM_WORKERS} if memory == "worker" else {"store": None}
    state = ExtraArgsTrainState.create(
        apply_fn=Model().apply, params=params, tx=dc.dcasgd(0.1, **kept, **HYPERPARAMS)
    )

    @jax.jit
    def train_step(state, pulled, t, worker):
        extra_args = {"worker": worker} if memory == "worker" else {"stale_params": pulled}
        return state.apply_gradients(grads=linen_grads(pulled, t), **extra_args)

    pulled = [params] * NUM_WORKERS
    for t, worker in enumerate(WORKERS[:STEPS]):
        state = train_step(state, pulled[worker], t, worker)
        pulled[worker] = state.params
    assert_close(state.params, expected_run("workers", linen_grads, params))


def test_a_frozen_dict_is_a_dict():
    tx, _, params, grads = start("previous")
    expected, _ = plain_run("previous")
    params = flax.core.freeze(params)
    state = tx.init(params)
    step = jax.jit(make_step(tx))
    for t in range(STEPS):
        params, state = step(params, state, flax.core.freeze(grads[t]), {})
    assert isinstance(state.prev_params, flax.core.FrozenDict)
    assert_same(flax.core.unfreeze(params), expected)


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


NNX_MODES = {
    "previous": {},
    "updates": {"store": "updates"},
    "stale_params": {"store": None},
    "worker": {"num_workers": NUM_WORKERS},
    "stale_params-in-chain": {"store": None},
    "stale_params-masters": {"store": None},
}


@pytest.mark.parametrize("mode", NNX_MODES)
def test_nnx_optimizer(mode):
    """The optimizer's state and the stale parameters are nnx.State trees here."""
    hyperparams = {**HYPERPARAMS, **NNX_MODES[mode]}
    if mode.endswith("chain"):
        compensation = {k: v for k, v in hyperparams.items() if k != "momentum"}
        tx = optax.chain(dc.add_delay_compensation(**compensation), optax.sgd(0.1, momentum=0.9))
    else:
        tx = dc.dcasgd(0.1, **hyperparams)
    tx = dc.with_master_weights(tx) if mode.endswith("masters") else tx
    model = NNXModel(nnx.Rngs(0))
    params = trained(model)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, pulled, t, worker):
        grads = nnx.grad(nnx_loss)(pulled, t)
        extra_args = {}
        if mode.startswith("stale_params"):
            extra_args = {"stale_params": nnx.state(pulled, nnx.Param)}
        elif mode == "worker":
            extra_args = {"worker": worker}
        optimizer.update(model, grads, **extra_args)

    by_worker = mode not in ("previous", "updates")
    pulled = [nnx.clone(model) for _ in range(NUM_WORKERS)]
    for t, worker in enumerate(WORKERS[:STEPS]):
        before = nnx.clone(model)
        train_step(model, optimizer, pulled[worker if by_worker else 0], t, worker)
        pulled[worker if by_worker else 0] = nnx.clone(model) if by_worker else before
    assert optimizer.step[...] == STEPS
    expected = expected_run("workers" if by_worker else "previous", nnx_grads, params)
    assert_close(trained(model), expected)


@pytest.mark.parametrize("mode", ["delay", "masters"])
def test_nnx_optimizer_steps_as_a_loop_over_dicts_does(mode):
    """Half-precision leaves beside others, and ring buffers with one more axis than the model."""
    tx = {
        "delay": dc.delay_gradients(dc.dcasgd(0.1, 0.9, 2.0, store=None), 2),
        "masters": dc.with_master_weights(dc.dcasgd(0.1, 0.9, 2.0)),
    }[mode]
    model = NNXModel(nnx.Rngs(0))
    model.first.kernel[...] = model.first.kernel[...].astype(jnp.bfloat16)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = trained(model)
    state = tx.init(params)
    grads_of = nnx.jit(nnx.grad(nnx_loss))
    for t in range(4):
        grads = grads_of(model, t)
        updates, state = tx.update(jax.tree.map(jnp.array, nnx.to_pure_dict(grads)), state, params)
        params = optax.apply_updates(params, updates)
        optimizer.update(model, grads)
        assert_same(trained(model), params)
    assert_same(jax.tree.leaves(nnx.as_pure(optimizer.opt_state)), jax.tree.leaves(state))
