"""What users hand over that is no tree of parameters or batches: the message names the remedy."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transformation_cases import CASES, PARAMS, inputs

from optax_dcasgd import diagnostics, parameter_server, simulation

each_case = pytest.mark.parametrize("name", CASES)
OF_EQUINOX = "eqx.filter(model, eqx.is_inexact_array)"


def raises(error, *parts):
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in parts))


# --- Parameters ---


@functools.cache
def equinox_model():
    """The whole model, and what of it can be trained."""
    model = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    return model, eqx.filter(model, eqx.is_inexact_array)


# Those that never look at a parameter leave it to the other links of their chain.
READ_NO_PARAMS = ["staleness-given", "scheduled-staleness-given"]
READ_PARAMS = [name for name in CASES if name not in READ_NO_PARAMS]


@pytest.mark.parametrize("name", READ_PARAMS)
def test_no_leaf_but_a_parameter_is_initialised(name):
    others = {"whole": equinox_model()[0], "integer": {"a": jnp.arange(3)}}
    others["key"] = {"a": jax.random.key(0)}
    for tree in others.values():
        with raises(TypeError, "params", "optax.masked", OF_EQUINOX):
            CASES[name].make().init(tree)
    with raises(TypeError, "params['a'] is a Ref", "ref[...]"):
        CASES[name].make().init({"a": jax.new_ref(jnp.ones(2))})


# Those with a tree of delays or multipliers are of another model; of the others some keep nothing
# like the parameters, or read them at init alone.
KEEP = [
    name
    for name in READ_PARAMS
    if name not in ("delay_gradients-tree", "constant-given", "track_velocity")
    and not name.startswith("mxnet")
]


@pytest.mark.parametrize("name", KEEP)
def test_the_whole_model_is_refused_in_the_update_too(name):
    whole, params = equinox_model()
    tx, extras = CASES[name].make(), dict(CASES[name].extras(0))
    if "stale_params" in extras:
        extras["stale_params"] = params
    update = getattr(tx, "step", None) or tx.update
    arguments = {"params": params, **({"stale_params": params} if len(extras) == 2 else {})}
    for argument in arguments:
        trees = {**arguments, argument: whole}
        more = {**extras, **({"stale_params": trees["stale_params"]} if len(trees) == 2 else {})}
        with raises(ValueError, argument, "activation", OF_EQUINOX):
            update(params, tx.init(params), trees["params"], **more)


def big_endian(tree):
    return jax.tree.map(lambda x: np.asarray(x).astype(np.asarray(x).dtype.newbyteorder(">")), tree)


@each_case
def test_a_byte_order_that_jax_does_not_take_is_named(name):
    params, grads, extras = inputs(name, 0)
    tx = CASES[name].make()
    if CASES[name].has_masters:  # bfloat16 has no byte order in NumPy
        params, grads = (jax.tree.map(lambda x: x.astype(jnp.float32), t) for t in (params, grads))
    message = "byte order", ".newbyteorder('=')"
    if name not in READ_NO_PARAMS:
        with raises(TypeError, "params['dense']['bias'] has dtype >f4", *message):
            tx.init(big_endian(params))
    state, update = tx.init(params), getattr(tx, "step", None) or tx.update
    if name == "track_velocity":
        return  # a link of Optax's stands before it, and it reads no parameters in the update
    with raises(TypeError, "['dense']['bias'] has dtype >f4", *message):
        update(big_endian(grads), state, params, **extras)
    if "stale_params" in extras and name not in READ_NO_PARAMS:
        with raises(TypeError, "stale_params['dense']['bias'] has dtype >f4", *message):
            update(grads, state, params, **{**extras, "stale_params": big_endian(params)})
    if name not in READ_NO_PARAMS:
        with raises(TypeError, "params['dense']['bias'] has dtype >f4", *message):
            update(grads, state, big_endian(params), **extras)


# --- Batches, and the parameters beside them ---

GRAD_FN = jax.value_and_grad(lambda w, batch, key: jnp.sum(batch[0] @ w - batch[1]))
LIST = [(np.ones((4, 3), np.float32), np.ones(4, np.float32)) for _ in range(4)]
STACKED = jax.tree.map(lambda *x: np.stack(x), *LIST)


class Loader:
    def __iter__(self):
        return iter(LIST)

    def __len__(self):
        return len(LIST)


def simulate(batches, params=PARAMS):
    arrivals = simulation.arrivals(jax.random.key(0), num_workers=2, num_updates=4)
    return simulation.run(GRAD_FN, params, optax.sgd(0.1), batches, arrivals)


def train(batches, params=PARAMS):
    return parameter_server.train(
        GRAD_FN, params, optax.sgd(0.1), batches, num_workers=1, num_updates=4, progress=False
    )


def pairs(batches, params=PARAMS):
    arrivals = simulation.arrivals(jax.random.key(0), num_workers=2, num_updates=4)
    return diagnostics.collect(GRAD_FN, params, optax.sgd(0.1), batches, arrivals, num_pairs=2)


each_user = pytest.mark.parametrize("call", [simulate, train, pairs])
NO_BATCHES = {
    "list": (lambda: LIST, "a list of 4 batches"),
    "list of one": (lambda: LIST[:1], "a list of 1 batches"),
    "list, the last one shorter": (lambda: [*LIST, (np.ones((2, 3)), np.ones(2))], "a list of 5"),
    "list of arrays": (lambda: [x for x, _ in LIST], "a list of 4 batches"),
    "generator": (lambda: (batch for batch in LIST), "is a generator"),
    "iterator": (lambda: iter(LIST), "is a list_iterator"),
    "of generators": (lambda: (iter(STACKED[0]), STACKED[1]), "is a"),
    "data loader": (Loader, "is a Loader"),
    "strings": (lambda: (STACKED[0], np.array(["a"] * 4)), "has dtype <U1"),
    "path": (lambda: "batches.npz", "is a str"),
}


@each_user
@pytest.mark.parametrize("kind", NO_BATCHES)
def test_what_is_no_tree_of_batches_is_refused(call, kind):
    batches, found = NO_BATCHES[kind]
    with pytest.raises(TypeError) as error:
        call(batches())
    for part in ("batches", found, "lambda i: batches[i]", "jnp.stack(x), *batches"):
        assert part in str(error.value)


@each_user
def test_batches_and_parameters_in_another_byte_order_are_refused(call):
    with raises(TypeError, "batches[0] has dtype >f4", "byte order"):
        call(big_endian(STACKED))
    with raises(TypeError, "params['w'] has dtype >f4", "byte order"):
        call(STACKED, {"w": np.ones(3, ">f4")})


@each_user
def test_a_whole_equinox_model_cannot_be_trained_anywhere(call):
    with raises(TypeError, "params.activation", OF_EQUINOX):
        call(STACKED, equinox_model()[0])


@pytest.mark.parametrize("call", [simulate, pairs])
def test_a_list_cannot_be_indexed_in_a_compiled_loop(call):
    with raises(TypeError, "batches", "traced int32", "jnp.stack(x), *batches"):
        call(lambda i: LIST[i])


def test_a_list_of_arrays_of_several_shapes_is_one_pytree():
    simulate([*STACKED], jnp.zeros(3))
