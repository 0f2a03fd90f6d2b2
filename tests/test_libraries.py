"""The programs of docs/libraries.md, as they stand there, against the float64 reference."""

import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from common import assert_bit_equal
from flax import nnx

import optax_dcasgd as dc

DOCS = Path(__file__).parents[1] / "docs"
PROGRAMS = dict(
    re.findall(
        r"^## (.+?)\n.*?```python\n(.*?)```", (DOCS / "libraries.md").read_text(), re.M | re.S
    )
)
ORDER = [i % 3 for i in range(9)]
HYPERPARAMS = {"lr": 0.1, "decay": 0.95, "clip": 1.0}


def pure(model):
    return jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def nnx_grads(space):
    def grads(params, x):
        def loss(params):
            outputs = x @ params["kernel"] + params["bias"]
            return jnp.mean((outputs[:, 0] - jnp.sin(x.sum(-1))) ** 2)

        return jax.grad(loss)(params)

    return grads


def equinox_grads(space):
    static = eqx.partition(space["model"], eqx.is_inexact_array)[1]
    return lambda params, x: jax.grad(lambda p: space["loss_fn"](eqx.combine(p, static), x))(params)


LIBRARIES = {  # the parameters of the program, and their gradients
    "Flax nnx": (lambda space: pure(space["model"]), nnx_grads),
    "Flax linen": (lambda space: space["state"].params, lambda s: jax.grad(s["loss_fn"])),
    "Equinox": (lambda space: eqx.filter(space["model"], eqx.is_inexact_array), equinox_grads),
    "Haiku": (lambda space: space["params"], lambda space: jax.grad(space["loss_fn"])),
}


def test_every_program_is_tested():
    assert PROGRAMS.keys() == LIBRARIES.keys()


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_programs_compensate(name):
    head, loop = PROGRAMS[name].split("\nfor ", 1)
    params_of, grads_of = LIBRARIES[name]
    space = {"__name__": "program"}
    exec(head, space)
    first, gradient = params_of(space), jax.jit(grads_of(space))
    exec("for " + loop, space)

    def grads(stale, t):
        return gradient(jax.tree.map(jnp.float32, stale), space["x"][t])

    def follow(lamda):
        return reference.algorithm_2(grads, first, ORDER, 3, lamda=lamda, **HYPERPARAMS)[-1]

    expected, actual = follow(8.0), reference.wide(params_of(space))
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    gaps = reference.subtract(expected, follow(0.0))
    assert max(np.max(np.abs(gap)) for gap in jax.tree.leaves(gaps)) > 0.003


# --- Modules as trees of parameters, for every place that keeps some ---


@pytest.mark.parametrize(
    "make",
    [
        lambda: dc.delay_gradients(dc.robust_delay_compensation(unit_axes=0), 2),
        lambda: dc.with_master_weights(dc.remember_params(dc.scale_by_gap())),
        lambda: dc.fused_dcasgd(0.1, 0.9, 0.5, decay=0.9),
    ],
    ids=["delay", "gap", "fused_dcasgd"],
)
def test_an_equinox_model_is_trained_as_its_leaves_are(make):
    """Its parameters have holes (None) where functions and flags stand."""
    model = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    tx = make()
    results = []
    for tree in (params, jax.tree.leaves(params)):
        state, out = tx.init(tree), tree
        update = jax.jit(getattr(tx, "step", None) or tx.update)
        for t in range(3):
            grads = jax.tree.map(lambda p, t=t: jnp.cos(p + t), tree)
            out, state = update(grads, state, tree)
        assert jax.tree.structure(out) == jax.tree.structure(tree)
        results.append(jax.tree.leaves((out, state)))
    assert_bit_equal(*results)
