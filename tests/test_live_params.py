"""`stale_params` that is the current parameters under another name, and so never stale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_dcasgd as dc


def masked(params):
    rule = optax.chain(dc.add_delay_compensation(2.0), optax.sgd(0.1))
    return optax.masked(rule, jax.tree.map(lambda p: p.ndim == 2, params))


OPTIMIZERS = {  # made for these parameters
    "rule": lambda _: optax.chain(dc.add_delay_compensation(2.0, decay=None), optax.sgd(0.1)),
    "gap": lambda _: optax.chain(dc.scale_by_gap(), optax.sgd(0.1)),
    "dcasgd": lambda _: dc.dcasgd(0.1, lamda=2.0, store=None),
    "masked": masked,
    "remembered": lambda _: dc.remember_params(dc.dcasgd(0.1, store=None), num_workers=2),
    "masters": lambda _: dc.with_master_weights(dc.dcasgd(0.1, lamda=2.0, store=None)),
}
COPIES = {
    "copies": lambda model: jax.tree.map(jnp.copy, nnx.state(model, nnx.Param)),
    "pure": lambda model: nnx.as_pure(nnx.state(model, nnx.Param)),  # holds the very arrays
    "clone": lambda model: nnx.state(nnx.clone(model), nnx.Param),  # and so does this
}
LIVE = {
    "state": lambda model: nnx.state(model, nnx.Param),
    "split": lambda model: nnx.split(model, nnx.Param, ...)[1],
}


def refused():
    return pytest.raises(
        ValueError, match=r"stale_params.*nnx\.Variables.*jax\.tree\.map\(jnp\.copy, nnx\.state"
    )


def start(name):
    """A model, its optimizer, gradients, and the extra arguments that it takes otherwise."""
    dtype = jnp.bfloat16 if name == "masters" else jnp.float32
    model = nnx.Linear(2, 1, param_dtype=dtype, rngs=nnx.Rngs(0))
    params = nnx.as_pure(nnx.state(model))
    optimizer = nnx.Optimizer(model, OPTIMIZERS[name](params), wrt=nnx.Param)
    grads = nnx.grad(lambda model: jnp.sum(model(jnp.array([[1.0, -2.0]])) - 1.0))(model)
    return model, optimizer, grads, {"worker": 0} if name == "remembered" else {}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_live_variables_are_refused_and_copies_are_not(name):
    model, optimizer, grads, extra = start(name)
    optimizer.update(model, grads, stale_params=LIVE["state"](model), **extra)  # w_s = w at first
    for copied in COPIES.values():
        stale = copied(model)
        for _ in range(2):  # just pulled, and one update old
            optimizer.update(model, grads, stale_params=stale, **extra)
    for live in LIVE.values():
        stale = live(model)
        optimizer.update(model, grads, stale_params=COPIES["copies"](model), **extra)
        before = nnx.as_pure(nnx.state((model, optimizer)))
        if extra:  # of the worker that pushed last they would be the current ones
            extra["worker"] = 1 - extra["worker"]
        with refused():
            optimizer.update(model, grads, stale_params=stale, **extra)
        after = nnx.as_pure(nnx.state((model, optimizer)))
        jax.tree.map(np.testing.assert_array_equal, before, after)
        optimizer.update(model, grads, stale_params=stale, staleness=0, **extra)  # as is said


def test_they_are_refused_inside_nnx_jit_too():
    model, optimizer, grads, _ = start("rule")

    @nnx.jit
    def step(model, optimizer, grads, stale):
        optimizer.update(model, grads, stale_params=stale)

    for copied in COPIES.values():
        step(model, optimizer, grads, copied(model))
    with refused():
        step(model, optimizer, grads, LIVE["state"](model))


@pytest.mark.parametrize("name", ["rule", "dcasgd", "gap", "remembered"])
@pytest.mark.parametrize("inside", [lambda state: state, lambda state: {"a": (state,)}])
def test_they_are_refused_without_an_nnx_optimizer(name, inside):
    model, _, grads, extra = start(name)
    params, stale, grads = inside(nnx.state(model)), inside(nnx.state(model)), inside(grads)
    tx = OPTIMIZERS[name](params)
    tx = optax.GradientTransformationExtraArgs(tx.init, functools.partial(tx.update, **extra))
    _, state = tx.update(grads, tx.init(params), params, stale_params=stale)
    tx.update(grads, state, params, stale_params=params)  # the same tree: it is meant
    tx.update(grads, state, params, stale_params=jax.tree.map(jnp.copy, stale))
    with refused():
        tx.update(grads, state, params, stale_params=stale)


def test_what_holds_no_variables_may_share_its_arrays():
    """Of one worker, or of the one that has pulled just now, they are the current ones."""
    params = {"w": jnp.ones(3)}
    tx = dc.add_delay_compensation()
    for make in (dict, lambda tree: jax.tree.map(np.asarray, tree)):
        state, shared = tx.init(params), make(params)
        for _ in range(2):
            updates, state = tx.update(params, state, shared, stale_params=dict(shared))
            np.testing.assert_array_equal(updates["w"], params["w"])
