"""docs/units.md: with these `unit_axes`, a unit is what one neuron is made of, in every library.

What a neuron is made of is asked of the layer itself: the weights of which its output has a
derivative.
"""

import re
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from optax_dcasgd import robust_delay_compensation

DOC = (Path(__file__).parents[2] / "docs/units.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", DOC, re.S)
KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 3))
IMAGE = jax.random.normal(KEY, (2, 4, 4, 3))
TOKENS = jnp.arange(5)


def linen(module, x):
    params = module.init(KEY, x)["params"]
    return params, lambda params: module.apply({"params": params}, x)


def haiku(make, x):
    net = hk.without_apply_rng(hk.transform(lambda x: make()(x)))
    return net.init(KEY, x), lambda params: net.apply(params, x)


def equinox(module, call):
    params, static = eqx.partition(module, eqx.is_inexact_array)
    return params, lambda params: call(eqx.combine(params, static))


def of_nnx(module, call):
    graph, params = nnx.split(module)
    return nnx.as_pure(params), lambda params: call(nnx.merge(graph, params))


class Layer(nn.Module):
    """One layer of a stack; the derivatives are those of its own weights."""

    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(3, name="dense")(lax.stop_gradient(x))
        return y, y


def scanned():
    stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
    params = stack.init(KEY, X, None)["params"]
    return params, lambda params: jnp.moveaxis(stack.apply({"params": params}, X, None)[1], 0, 1)


def nnx_stack():
    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=0)
    def create(rngs):
        return nnx.Linear(3, 3, rngs=rngs)

    each = nnx.vmap(lambda layer: layer(X), in_axes=0, out_axes=1)
    return of_nnx(create(nnx.Rngs(0)), each)


def haiku_stack():
    def stack(x):
        return hk.experimental.layer_stack(2, with_per_layer_inputs=True)(
            lambda x: (lax.stop_gradient(x), hk.Linear(3, name="linear")(lax.stop_gradient(x)))
        )(x)[1]

    params, call = haiku(lambda: stack, X)
    return params, lambda params: jnp.moveaxis(call(params), 0, 1)


def equinox_stack():
    layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 2, key=key))(jax.random.split(KEY))
    each = eqx.filter_vmap(lambda layer, x: layer(x), in_axes=(eqx.if_array(0), None))
    return equinox(layers, lambda m: jax.vmap(lambda x: each(m, x))(X))


def equinox_conv(kind):
    image = jnp.moveaxis(IMAGE, -1, 1)
    layer = kind(3, 2, 2, key=KEY)
    return equinox(layer, lambda m: jnp.moveaxis(jax.vmap(m)(image), 1, -1))


def transposed(path, parameter):
    return -1 if parameter.ndim == 1 else -2


SPACE: dict = {}
exec(BLOCKS[0], SPACE)
LAYERS = {  # parameters and outputs, (batch, neurons...); unit_axes; how many axes of neurons
    "flax Dense": (lambda: linen(nn.Dense(2), X), None, 1),
    "flax Conv": (lambda: linen(nn.Conv(2, (2, 2)), IMAGE), None, 1),
    "flax ConvTranspose": (lambda: linen(nn.ConvTranspose(2, (2, 2)), IMAGE), None, 1),
    "flax ConvTranspose, transposed": (
        lambda: linen(nn.ConvTranspose(2, (2, 2), transpose_kernel=True), IMAGE),
        transposed,
        1,
    ),
    "flax Embed": (lambda: linen(nn.Embed(5, 2), TOKENS), -1, 1),
    "flax attention, query": (
        lambda: linen(nn.DenseGeneral((2, 3)), X),
        (-2, -1),
        2,
    ),
    "flax attention, out": (
        lambda: linen(nn.DenseGeneral(2, axis=(-2, -1)), jnp.ones((2, 2, 3))),
        None,
        1,
    ),
    "nnx attention, query": (
        lambda: of_nnx(nnx.LinearGeneral(3, (2, 3), rngs=nnx.Rngs(0)), lambda m: m(X)),
        (-2, -1),
        2,
    ),
    "nnx Linear": (lambda: of_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), lambda m: m(X)), None, 1),
    "nnx Conv": (
        lambda: of_nnx(nnx.Conv(3, 2, (2, 2), rngs=nnx.Rngs(0)), lambda m: m(IMAGE)),
        None,
        1,
    ),
    "flax scan": (scanned, (0, -1), 2),
    "nnx stack": (nnx_stack, (0, -1), 2),
    "haiku Linear": (lambda: haiku(lambda: hk.Linear(2), X), None, 1),
    "haiku Conv2D": (lambda: haiku(lambda: hk.Conv2D(2, 2), IMAGE), None, 1),
    "haiku Conv2DTranspose": (
        lambda: haiku(lambda: hk.Conv2DTranspose(2, 2), IMAGE),
        transposed,
        1,
    ),
    "haiku Embed": (lambda: haiku(lambda: hk.Embed(5, 2), TOKENS), -1, 1),
    "haiku stack": (haiku_stack, (0, -1), 2),
    "equinox Linear": (
        lambda: equinox(eqx.nn.Linear(3, 2, key=KEY), lambda m: jax.vmap(m)(X)),
        0,
        1,
    ),
    "equinox Conv2d": (lambda: equinox_conv(eqx.nn.Conv2d), 0, 1),
    "equinox ConvTranspose2d": (lambda: equinox_conv(eqx.nn.ConvTranspose2d), 0, 1),
    "equinox Embedding": (
        lambda: equinox(eqx.nn.Embedding(5, 2, key=KEY), lambda m: jax.vmap(m)(TOKENS)),
        -1,
        1,
    ),
    "equinox stack": (equinox_stack, (0, 1), 2),
}


def units_of(params, unit_axes):
    """The number of the unit of every weight, as the state of the rule has it."""
    nu = robust_delay_compensation(unit_axes=unit_axes).init(params)[0].nu
    return jax.tree.map(
        lambda n, p: np.broadcast_to(np.arange(n.size).reshape(n.shape), p.shape), nu, params
    )


@pytest.mark.parametrize("name", LAYERS)
def test_a_unit_is_what_one_neuron_is_made_of(name):
    make, unit_axes, num_axes = LAYERS[name]
    params, outputs = make()

    def neurons(params):
        y = outputs(params)
        return jnp.sum(y, axis=tuple(range(y.ndim - num_axes))).ravel()

    made_of = jax.jit(jax.jacrev(neurons))(params)
    leaves = zip(
        jax.tree.leaves(made_of), jax.tree.leaves(units_of(params, unit_axes)), strict=True
    )
    for derivatives, units in leaves:
        of_neuron = np.asarray(derivatives) != 0
        assert np.all(of_neuron.sum(0) == 1)  # every weight belongs to one neuron
        for mine in of_neuron:
            assert len({*units[mine]}) == 1  # which is one unit
            assert np.array_equal(mine, units == units[mine][0])  # and all of it


def test_the_function_in_the_docs_finds_attention_and_stacks():
    """By the names that Flax gives to its parameters, and as the docs print it."""
    attention = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
    params = {"blocks": attention.init(KEY, X[None], X[None])["params"]}
    params["head"] = {"kernel": jnp.ones((3, 5))}
    nu = robust_delay_compensation(unit_axes=SPACE["unit_axes"]).init(params)[0].nu
    shapes = jax.tree.map(jnp.shape, nu)
    assert shapes["head"]["kernel"] == (1, 5)
    for part in ("query", "key", "value"):
        kernel = params["blocks"][part]["kernel"]
        assert shapes["blocks"][part]["kernel"] == kernel.shape  # no axis is left beside its own
    model = nnx.MultiHeadAttention(2, 6, rngs=nnx.Rngs(0), decode=False)
    for tree in (nnx.state(model, nnx.Param), nnx.as_pure(nnx.state(model, nnx.Param))):
        nu = robust_delay_compensation(unit_axes=SPACE["unit_axes"]).init(tree)[0].nu
        assert jax.tree.leaves(nu["query"]["kernel"])[0].shape == (1, 2, 3)
        assert jax.tree.leaves(nu["out"]["kernel"])[0].shape == (1, 1, 6)


def test_the_docs_print_what_they_say(capsys):
    exec(BLOCKS[1], SPACE)
    assert capsys.readouterr().out.strip() == BLOCKS[1].split("\n# ")[1].strip()
