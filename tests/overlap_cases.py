"""A model, its gradient by hand, and training it with `overlap_reduction` on a mesh."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_dcasgd as dc
from optax_dcasgd import OverlapReductionState, overlap_reduction

UPDATES = 8
BATCH = 16  # examples, over all devices
SPECS = OverlapReductionState(count=P(), grads=P("data"), inner_state=P())
_rng = np.random.default_rng(0)
PARAMS = {
    "bias": _rng.normal(size=2).astype(np.float32),
    "kernel": _rng.normal(size=(3, 2)).astype(np.float32),
    "scale": np.float32(0.7),
}
X = _rng.normal(size=(UPDATES, BATCH, 3)).astype(np.float32)
Y = np.sin(X.sum(-1, keepdims=True)) * np.float32([1, -1])


def loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["kernel"] + params["bias"])
    return jnp.mean(jnp.sum((params["scale"] * hidden - y) ** 2, axis=-1))


def exact_grads(params, t):
    """The gradient of `loss` on the whole batch t, by hand in float64."""
    x, y = X[t].astype(np.float64), Y[t].astype(np.float64)
    hidden = np.tanh(x @ params["kernel"] + params["bias"])
    d_out = 2 * (params["scale"] * hidden - y) / BATCH
    d_hidden = params["scale"] * d_out * (1 - hidden**2)
    return {"bias": d_hidden.sum(0), "kernel": x.T @ d_hidden, "scale": np.sum(d_out * hidden)}


def mesh_of(devices=8):
    return jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])


def start(tx, mesh, elsewhere=None, **options):
    """The jitted ``init`` and ``step(params, state, batch)`` on a mesh.

    With ``elsewhere(params, state, t)`` gradients are computed there, and step takes t too.
    """

    def step(params, state, batch, *t):
        at = params if elsewhere is None else elsewhere(params, state, *t)
        extra = {} if elsewhere is None else {"stale_params": at}
        grads = jax.grad(loss)(jax.lax.pcast(at, "data", to="varying"), batch)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    shard_map = functools.partial(jax.shard_map, mesh=mesh, **options)
    init = shard_map(tx.init, in_specs=P(), out_specs=SPECS)
    in_specs = (P(), SPECS, P("data"), *([] if elsewhere is None else [P()]))
    step = shard_map(step, in_specs=in_specs, out_specs=(P(), SPECS))
    return jax.jit(init), jax.jit(step)


@functools.cache
def train(tx, devices=8, num_updates=UPDATES, **options):
    """All parameters, from the initial ones on, and the last state."""
    init, step = start(tx, mesh_of(devices), **options)
    params, state = PARAMS, init(PARAMS)
    trajectory = [params]
    for t in range(num_updates):
        # One step at a time: virtual devices share their threads, and with several steps under way
        # they can wait for each other forever.
        params, state = jax.block_until_ready(step(params, state, (X[t], Y[t])))
        trajectory.append(params)
    return trajectory, state


def assert_close(actual, expected, rtol=1e-5):
    expected = jax.tree.map(np.float32, expected)
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=rtol)


HYPERPARAMS = {"lr": 0.1, "momentum": 0.9, "lamda": 2.0}
ADAPTIVE = {**HYPERPARAMS, "decay": 0.9, "clip": 0.5}
CHAIN = optax.chain(
    dc.add_delay_compensation(2.0, decay=0.9, clip=0.5), optax.sgd(0.1, momentum=0.9)
)
CASES = {
    "params": (dc.dcasgd(0.1, 0.9, 2.0), HYPERPARAMS),
    "updates": (dc.dcasgd(0.1, 0.9, 2.0, store="updates"), HYPERPARAMS),
    "DC-ASGD-a": (dc.remember_params(CHAIN), ADAPTIVE),
    "uncompensated": (optax.sgd(0.1, 0.9), {**HYPERPARAMS, "lamda": 0.0}),
}


@functools.cache
def overlap(case):
    return overlap_reduction(CASES[case][0], "data")
