"""Training can be differentiated: what hyperparameters and the start do to the loss at the end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_dcasgd as dc

# name: (optimizer for a learning rate, extra arguments)
OPTIMIZERS = {
    "add_delay_compensation": (
        lambda lr: optax.chain(dc.add_delay_compensation(0.5, decay=0.9, clip=1.0), optax.sgd(lr)),
        {},
    ),
    "add_delay_compensation, eps=0": (
        lambda lr: optax.chain(dc.add_delay_compensation(lr, decay=0.9, eps=0.0), optax.sgd(lr)),
        {},
    ),
    "dcasgd": (lambda lr: dc.dcasgd(lr, 0.9, 0.5, decay=0.9), {}),
    "dcasgd, updates": (lambda lr: dc.dcasgd(lr, 0.9, 0.5, store="updates"), {}),
    "dcasgd, workers": (lambda lr: dc.dcasgd(lr, 0.9, 0.5, num_workers=2), {"worker": 1}),
    "mxnet.DCASGD": (lambda lr: dc.mxnet.DCASGD(lr, 0.9, 0.5, wd=0.1), {}),
    "delay_gradients": (lambda lr: dc.delay_gradients(dc.dcasgd(lr, store=None), 1), {}),
    "with_master_weights": (lambda lr: dc.with_master_weights(dc.dcasgd(lr, 0.9)), {}),
    "scale_by_staleness": (
        lambda lr: optax.chain(dc.scale_by_staleness(0.5), optax.sgd(lr)),
        {"staleness": 3},
    ),
    "scale_by_gap": (lambda lr: optax.chain(dc.scale_by_gap(0.9), optax.sgd(lr)), {}),
    "scale_by_gap, eps=0": (lambda lr: optax.chain(dc.scale_by_gap(eps=0.0), optax.sgd(lr)), {}),
    "robust": (lambda lr: optax.chain(dc.robust(1.0), optax.sgd(lr)), {"staleness": 3}),
    "robust, eps=0": (
        lambda lr: optax.chain(dc.robust(lr, eps=0.0), optax.sgd(lr)),
        {"staleness": 3},
    ),
}


@pytest.mark.parametrize("direction", [1.0, 0.8 + 0.6j], ids=["real", "complex"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_derivatives_are_finite_differences(name, direction):
    make, extra_args = OPTIMIZERS[name]
    # One component and one unit (a column) start at the minimum and never have a gradient.
    start = np.array([[0.5, 0.0, -0.3], [0.0, 0.0, 0.8]]) * direction

    def loss(w):
        of_parts = [
            jnp.sum(1 - jnp.cos(x)) + 0.1 * jnp.sum(x) ** 2 * jnp.sum(x[:, 0])
            for x in (w.real, w.imag)
        ]
        return sum(of_parts)

    @jax.jit
    def trained(lr, scale):
        params, tx = scale * start, make(lr)
        state = tx.init(params)
        for _ in range(4):
            grads = (start != 0) * jax.grad(loss)(params).conj()
            updates, state = tx.update(grads, state, params, **extra_args)
            params = optax.apply_updates(params, updates)
        return loss(params)

    with jax.enable_x64(True):
        at = (jnp.float64(0.2), jnp.float64(1.0))
        found = jax.jit(jax.grad(trained, (0, 1)))(*at)
        for i, step in enumerate(np.eye(2) * 1e-6):
            lr, scale = at
            above, below = (trained(lr + s[0], scale + s[1]) for s in (step, -step))
            np.testing.assert_allclose(found[i], (above - below) / 2e-6, rtol=1e-5)
