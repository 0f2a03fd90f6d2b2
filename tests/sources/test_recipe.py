"""Prediction, robust compensation and extrapolation together, against a loop over a real FIFO.

The loop is written out in float64, with gradients by hand.
"""

import functools

import jax
import numpy as np
import optax
import pytest
import reference
from overlap_cases import PARAMS, UPDATES, X, Y, assert_close, exact_grads, loss, mesh_of, start

from optax_dcasgd import (
    delay_gradients,
    overlap_reduction,
    predict_params,
    robust_delay_compensation,
    track_velocity,
)

LR, MOMENTUM = 0.05, 0.9
IDEAS = {"predicted", "robust", "extrapolated"}
STAGES = {"kernel": 2, "bias": 1, "scale": 0}
BETA, MOST = 1.5, 1  # of extrapolation, and the most updates that are predicted


def recipe(beta=1.0):
    return optax.chain(
        robust_delay_compensation(),
        optax.sgd(LR, MOMENTUM),
        optax.scale_by_optimistic_gradient(beta=beta),  # u + β (u − the previous u)
        track_velocity(0.0),
    )


def written_out(delays, *, until_full, ideas=IDEAS, beta=1.0, most=9):
    """The parameters after each update, in float64.

    ``until_full``: whether nothing at all happens until there is a gradient for every parameter.
    Otherwise a parameter without one goes on with a zero gradient, and stays where it is.
    """
    w = reference.wide(PARAMS)
    lines = {name: reference.DelayLine(delay) for name, delay in delays.items()}
    robust, zeros = reference.Robust(), reference.zeros(w)
    momentum, velocity, last = zeros, zeros, None
    trajectory = []
    for t in range(UPDATES):
        ahead = {name: min(delay, most) * ("predicted" in ideas) for name, delay in delays.items()}
        at = {name: w[name] + ahead[name] * velocity[name] for name in w}
        arrived = {name: lines[name](g, at[name]) for name, g in exact_grads(at, t).items()}
        missing = {name for name, entry in arrived.items() if entry is None}
        if until_full and missing:
            trajectory.append(w)
            continue
        g = {name: zeros[name] if name in missing else arrived[name][0] for name in w}
        computed_at = {name: w[name] if name in missing else arrived[name][1] for name in w}
        if "robust" in ideas:
            g = robust(g, w, computed_at, delays)
        momentum = {name: MOMENTUM * momentum[name] + g[name] for name in w}
        update = {name: -LR * momentum[name] for name in w}
        velocity = update
        if "extrapolated" in ideas and last is not None:
            velocity = {n: (1 + beta) * update[n] - beta * last[n] for n in w}
        last = update
        w = {name: w[name] + (name not in missing) * velocity[name] for name in w}
        trajectory.append(w)
    return trajectory, robust


@functools.cache
def expected(case):
    delays = {"overlapped": dict.fromkeys(PARAMS, 1), "one delay": dict.fromkeys(PARAMS, 2)}
    delays = delays.get(case, STAGES)
    loop = functools.partial(written_out, delays, until_full=delays is not STAGES)
    if case == "strong":
        loop = functools.partial(loop, beta=BETA, most=MOST)
    trajectory, robust = loop()
    assert robust.shrunk
    for idea in IDEAS:  # or the test would pass without it
        without = reference.subtract(loop(ideas=IDEAS - {idea})[0][-1], trajectory[-1])
        assert max(np.max(np.abs(gap)) for gap in without.values()) > 0.01, idea
    return trajectory


@pytest.mark.parametrize("case", ["one delay", "stages", "strong"])
def test_under_a_known_delay(case):
    delay = ahead = 2 if case == "one delay" else STAGES
    tx = delay_gradients(recipe(), delay)
    if case == "strong":
        tx = delay_gradients(recipe(BETA), delay)
        ahead = jax.tree.map(lambda d: min(d, MOST), delay)

    @jax.jit
    def step(params, state, batch):
        at = predict_params(params, state, ahead)
        updates, state = tx.update(jax.grad(loss)(at, batch), state, params, stale_params=at)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for t, wanted in enumerate(expected(case)):
        params, state = step(params, state, (X[t], Y[t]))
        assert_close(params, wanted, rtol=1e-4)


def test_under_an_overlapped_reduction():
    tx = overlap_reduction(recipe(), "data")

    def predict(params, state, t):
        return predict_params(params, state, 1)

    init, step = start(tx, mesh_of(), elsewhere=predict)
    params, state = PARAMS, init(PARAMS)
    for t, wanted in enumerate(expected("overlapped")):
        params, state = jax.block_until_ready(step(params, state, (X[t], Y[t]), np.float32(t)))
        assert_close(params, wanted, rtol=1e-4)
