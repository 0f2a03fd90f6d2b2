"""Wrong uses raise an error naming the argument and, in a tree, the leaf; odd legal ones do not.

The messages are matched for the names that a user needs to find the mistake, not for their wording.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_dcasgd import (
    add_delay_compensation,
    dcasgd,
    delay_gradients,
    fused_dcasgd,
    mxnet,
    scale_by_gap,
    scale_by_staleness,
    with_master_weights,
)

PARAMS = {
    "dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones((3,))},
    "scales": [jnp.ones(()), jnp.ones((2,))],
}
GRADS = jax.tree.map(lambda p: p / 2, PARAMS)

FACTORIES = {
    "add_delay_compensation": add_delay_compensation,
    "dcasgd": dcasgd,
    "fused_dcasgd": fused_dcasgd,
}

# One of every kind that keeps parameters, momenta or gradients; all take the same calls.
TRANSFORMATIONS = {
    "add_delay_compensation": lambda: add_delay_compensation(0.5, decay=0.9),
    "dcasgd": lambda: dcasgd(0.1, 0.9, decay=0.9),
    "dcasgd, updates": lambda: dcasgd(0.1, 0.9, store="updates"),
    "fused_dcasgd": lambda: fused_dcasgd(0.1, 0.9, decay=0.9),
    "delay_gradients": lambda: delay_gradients(dcasgd(0.1, 0.9, store=None), 1),
    "delay_gradients, tree": lambda: delay_gradients(
        dcasgd(0.1, 0.9, store=None), {"dense": 1, "scales": [2, 1]}
    ),
    "scale_by_gap": scale_by_gap,
    "with_master_weights": lambda: with_master_weights(dcasgd(0.1, 0.9)),
    "mxnet.DCASGD": lambda: mxnet.DCASGD(0.1, 0.9, wd=0.1),
    "mxnet.DCASGD, multipliers": lambda: mxnet.DCASGD(
        0.1, 0.9, wd=0.1, wd_mult={"dense": 1.0, "scales": 0.0}, lr_mult={"dense": 1.0, "scales": 2}
    ),
    "mxnet.DCASGD, multi_precision": lambda: mxnet.DCASGD(0.1, 0.9, multi_precision=True),
}
transformations = pytest.mark.parametrize("name", TRANSFORMATIONS)


def call(tx, grads, params, state=None, **extra_args):
    """``update``, or ``step`` of a fused optimizer, which is called alike."""
    state = tx.init(PARAMS) if state is None else state
    return (tx.step if hasattr(tx, "step") else tx.update)(grads, state, params, **extra_args)


def gradients_of(tx):
    """What the tree of gradients is called in the signature of what ``call`` calls."""
    return "grads" if hasattr(tx, "step") else "updates"


def raises(error, *parts):
    """``pytest.raises`` for a message in which these texts occur, in order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in parts))


def without(tree, *path):
    """The tree without what is at the path."""
    return changed(tree, *path, value=without)


def changed(tree, *path, value):
    """A copy of the tree with something else at the path; ``value=without`` takes it away."""
    tree = jax.tree.map(lambda x: x, tree)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    if value is without:
        del parent[path[-1]]
    elif isinstance(parent, list) and path[-1] == len(parent):
        parent.append(value)
    else:
        parent[path[-1]] = value
    return tree


# Hyperparameters --------------------------------------------------------------------------------

NOT_NUMBERS = {
    "string": "0.1",
    "bool": True,
    "numpy bool": np.True_,
    "complex": 0.5j,
    "numpy complex": np.complex64(0.5),
    "list": [0.5],
    "tuple": (0.5,),
    "numpy string": np.str_("0.5"),
    "array of bool": jnp.asarray(True),
}
NOT_FINITE = {
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": -np.inf,
    "numpy nan": np.float32("nan"),
    "0-d numpy inf": np.array(np.inf),
}
SHAPED = {"numpy vector": np.full(2, 0.5), "jax vector": jnp.full(1, 0.5)}
NEGATIVE = {"-1": -1, "-0.1": -0.1, "numpy -0.1": np.float32(-0.1), "0-d numpy": np.array(-0.1)}
NOT_BELOW_ONE = {"1": 1, "1.0": 1.0, "1.5": 1.5, "numpy 1": np.float64(1.0)}

COMPENSATION = ["lamda", "decay", "eps", "clip"]
HYPERPARAMETERS = {
    **{
        f"{name}.{arg}": (factory, arg)
        for name, factory in FACTORIES.items()
        for arg in COMPENSATION
    },
    "dcasgd.learning_rate": (dcasgd, "learning_rate"),
    "dcasgd.momentum": (dcasgd, "momentum"),
    "fused_dcasgd.learning_rate": (fused_dcasgd, "learning_rate"),
    "fused_dcasgd.momentum": (fused_dcasgd, "momentum"),
    "scale_by_gap.decay": (scale_by_gap, "decay"),
    "scale_by_gap.eps": (scale_by_gap, "eps"),
    "scale_by_staleness.power": (scale_by_staleness, "power"),
    **{
        f"mxnet.DCASGD.{arg}": (mxnet.DCASGD, arg)
        for arg in ("learning_rate", "momentum", "lamda", "wd", "rescale_grad", "clip_gradient")
    },
}
hyperparameters = pytest.mark.parametrize("which", HYPERPARAMETERS)
OPTIONAL = {"momentum", "decay", "clip", "clip_gradient"}


@hyperparameters
@pytest.mark.parametrize("value", NOT_NUMBERS.values(), ids=NOT_NUMBERS)
def test_a_hyperparameter_that_is_no_number_is_refused(which, value):
    factory, argument = HYPERPARAMETERS[which]
    with raises(TypeError, argument):
        factory(**{argument: value})


@hyperparameters
@pytest.mark.parametrize("value", (NOT_FINITE | SHAPED).values(), ids=NOT_FINITE | SHAPED)
def test_a_hyperparameter_that_is_not_one_finite_number_is_refused(which, value):
    factory, argument = HYPERPARAMETERS[which]
    with raises(ValueError, argument):
        factory(**{argument: value})


@hyperparameters
def test_an_integer_beyond_all_floats_is_refused(which):
    factory, argument = HYPERPARAMETERS[which]
    with raises(ValueError, argument):
        factory(**{argument: 10**400})


@pytest.mark.parametrize(
    "which",
    [
        which
        for which, (_, argument) in HYPERPARAMETERS.items()
        if argument not in {"learning_rate", "wd", "rescale_grad"}
    ],
)
@pytest.mark.parametrize("value", NEGATIVE.values(), ids=NEGATIVE)
def test_a_negative_hyperparameter_is_refused(which, value):
    factory, argument = HYPERPARAMETERS[which]
    with raises(ValueError, argument, "at least 0"):
        factory(**{argument: value})


@pytest.mark.parametrize(
    "which",
    [
        which
        for which, (_, argument) in HYPERPARAMETERS.items()
        if argument in {"momentum", "decay"}
    ],
)
@pytest.mark.parametrize("value", NOT_BELOW_ONE.values(), ids=NOT_BELOW_ONE)
def test_a_decay_or_momentum_of_one_or_more_is_refused(which, value):
    factory, argument = HYPERPARAMETERS[which]
    with raises(ValueError, argument, "below 1"):
        factory(**{argument: value})


@pytest.mark.parametrize(
    "which",
    [
        which
        for which, (factory, argument) in HYPERPARAMETERS.items()
        if argument not in OPTIONAL or factory is scale_by_gap
        if which != "mxnet.DCASGD.learning_rate"
    ],
)
def test_none_is_refused_where_it_means_nothing(which):
    factory, argument = HYPERPARAMETERS[which]
    with raises(TypeError, argument):
        factory(**{argument: None})


def test_mxnet_has_no_momentum_of_none():
    with raises(TypeError, "momentum"):
        mxnet.DCASGD(momentum=None)


def test_the_power_of_a_staleness_is_no_schedule():
    with raises(TypeError, "power"):
        scale_by_staleness(lambda count: 1.0)
    with pytest.raises(TypeError, match="power") as error:
        scale_by_staleness("1.0")
    assert "schedule" not in str(error.value)  # it must not be offered either


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize(
    "value",
    [int, "int32", jnp.int32, bool, complex, "complex64", object, "no such dtype", 3, [1]],
    ids=str,
)
def test_an_accumulator_dtype_that_is_no_floating_point_dtype_is_refused(name, value):
    with raises(TypeError, "accumulator_dtype"):
        FACTORIES[name](accumulator_dtype=value)
    with raises(TypeError, "accumulator_dtype"):
        scale_by_gap(accumulator_dtype=value)


# Choices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("store", ["x", "Params", "", True, 1, b"params", ["params"], {}], ids=repr)
def test_an_unknown_store_is_refused(name, store):
    with raises(ValueError, "store", "'params'", repr(store)):
        FACTORIES[name](store=store)


def test_a_compensation_alone_cannot_remember_updates():
    with raises(ValueError, "store='updates'", "dcasgd"):
        add_delay_compensation(store="updates")


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("store", ["updates", None], ids=repr)
def test_workers_need_remembered_parameters(name, store):
    if (name, store) == ("add_delay_compensation", "updates"):
        with raises(ValueError, "store='updates'"):
            add_delay_compensation(num_workers=2, store="updates")
        return
    with raises(ValueError, "num_workers=2", f"store={store!r}"):
        FACTORIES[name](num_workers=2, store=store)


WITH_WORKERS = {**FACTORIES, "scale_by_gap": scale_by_gap}


@pytest.mark.parametrize("name", WITH_WORKERS)
@pytest.mark.parametrize("value", [0, -1, np.int64(0)], ids=repr)
def test_a_number_of_workers_below_one_is_refused(name, value):
    with raises(ValueError, "num_workers", "at least 1"):
        WITH_WORKERS[name](num_workers=value)


@pytest.mark.parametrize("name", WITH_WORKERS)
@pytest.mark.parametrize(
    "value", [2.0, True, "2", [2], 2j, np.float32(2), jnp.asarray(2)], ids=repr
)
def test_a_number_of_workers_that_is_no_python_integer_is_refused(name, value):
    with raises(TypeError, "num_workers"):
        WITH_WORKERS[name](num_workers=value)


def test_an_injected_number_of_workers_is_refused_with_the_way_out():
    # inject_hyperparams makes an array of every number that is not named as static.
    with raises(TypeError, "num_workers", 'static_args=("num_workers",)'):
        optax.inject_hyperparams(dcasgd)(0.1, num_workers=2).init(PARAMS)
    tx = optax.inject_hyperparams(dcasgd, static_args=("num_workers",))(0.1, num_workers=2)
    tx.update(GRADS, tx.init(PARAMS), PARAMS, worker=1)


@pytest.mark.parametrize("factory", [dcasgd, fused_dcasgd])
@pytest.mark.parametrize("value", ["x", "XLA", True, 1, []], ids=repr)
def test_an_unknown_implementation_is_refused(factory, value):
    with raises(ValueError, "implementation", "'xla'", repr(value)):
        factory(implementation=value)


@pytest.mark.parametrize("factory", [dcasgd, fused_dcasgd])
def test_a_kernel_that_cannot_run_here_is_refused_with_the_reason(factory):
    with raises(NotImplementedError, "implementation='pallas'", " "):
        tx = factory(implementation="pallas")
        call(tx, GRADS, PARAMS)


# Delays -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [-1, np.int64(-2)], ids=repr)
def test_a_negative_delay_is_refused(delay):
    with raises(ValueError, "delay", "at least 0"):
        delay_gradients(optax.sgd(0.1), delay)


@pytest.mark.parametrize(
    "delay", [1.0, True, None, "1", np.float32(1), jnp.asarray(1), np.array([1, 2])], ids=repr
)
def test_a_delay_that_is_no_python_integer_is_refused(delay):
    with raises(TypeError, "delay"):
        delay_gradients(optax.sgd(0.1), delay)


@pytest.mark.parametrize(
    ("leaf", "error"),
    [
        (-1, ValueError),
        (1.0, TypeError),
        (True, TypeError),
        ("1", TypeError),
        (np.ones(2), TypeError),
    ],
    ids=repr,
)
def test_a_wrong_delay_in_a_tree_is_named_by_its_path(leaf, error):
    with raises(error, "delay['scales'][1]"):
        delay_gradients(optax.sgd(0.1), {"dense": 1, "scales": [0, leaf]})


def test_a_delay_of_none_is_refused_where_there_is_a_parameter():
    # It is right where the parameter is None too: what jax.tree.map makes of the parameters.
    with raises((TypeError, ValueError), "delay", "['scales'][1]"):
        delay_gradients(optax.sgd(0.1), {"dense": 1, "scales": [0, None]}).init(PARAMS)


NO_PREFIXES = {
    "missing key": ({"dense": 1}, []),
    "extra key": ({"dense": 1, "scales": 1, "more": 1}, []),
    "missing element": ({"dense": 1, "scales": [1]}, ["['scales']"]),
    "extra element": ({"dense": 1, "scales": [1, 1, 1]}, ["['scales']"]),
    "a tuple for a list": ({"dense": 1, "scales": (1, 1)}, ["['scales']"]),
    "a subtree for a leaf": ({"dense": {"kernel": [1], "bias": 1}, "scales": 1}, ["['kernel']"]),
    "empty dict": ({}, []),
    "empty list": ([], []),
}


@pytest.mark.parametrize("case", NO_PREFIXES)
def test_a_tree_of_delays_that_is_no_prefix_is_refused(case):
    delay, path = NO_PREFIXES[case]
    with raises(ValueError, "delay", "prefix", *path):
        delay_gradients(optax.sgd(0.1), delay).init(PARAMS)


WRAPPERS = {
    "delay_gradients": lambda inner: delay_gradients(inner, 1),
    "delay_gradients, no delay": lambda inner: delay_gradients(inner, 0),
    "with_master_weights": with_master_weights,
}
NO_TRANSFORMATIONS = {
    "None": None,
    "number": 0.1,
    "factory": optax.sgd,
    "tuple": (optax.sgd(0.1), optax.sgd(0.1)),
    "fused optimizer": fused_dcasgd(),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("inner", NO_TRANSFORMATIONS)
def test_a_wrapped_optimizer_that_is_none_is_refused(wrapper, inner):
    with raises(TypeError, "inner"):
        WRAPPERS[wrapper](NO_TRANSFORMATIONS[inner])


# Parameters -------------------------------------------------------------------------------------

NO_PARAMETERS = {
    "int32": jnp.ones(3, jnp.int32),
    "uint8": jnp.ones(3, jnp.uint8),
    "bool": jnp.ones(3, bool),
    "Python int": 1,
    "numpy int": np.ones(3, int),
    "key": jax.random.key(0),
    "string": "abc",
    "object": object(),
}


@transformations
@pytest.mark.parametrize("leaf", NO_PARAMETERS)
def test_a_parameter_that_cannot_be_trained_is_named_by_its_path(name, leaf):
    tx = TRANSFORMATIONS[name]()
    with raises(TypeError, "params['dense']['bias']"):
        tx.init(changed(PARAMS, "dense", "bias", value=NO_PARAMETERS[leaf]))


def test_a_parameter_that_cannot_be_trained_can_be_masked():
    params = changed(PARAMS, "dense", "bias", value=jnp.arange(3))
    trained = jax.tree.map(lambda p: jnp.issubdtype(p.dtype, jnp.floating), params)
    tx = optax.masked(dcasgd(0.1), trained)
    tx.update(changed(GRADS, "dense", "bias", value=jnp.arange(3)), tx.init(params), params)


def message_of_optax():
    tx = optax.add_decayed_weights(0.1)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is what is asked for)
        tx.update(GRADS, tx.init(PARAMS), None)
    return str(error.value)


@transformations
def test_missing_parameters_are_what_optax_says_they_are(name):
    tx = TRANSFORMATIONS[name]()
    state, message = tx.init(PARAMS), message_of_optax()
    with pytest.raises(ValueError, match=re.escape(message)):
        call(tx, GRADS, None, state)
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.jit(lambda state: call(tx, GRADS, None, state))(state)
    if hasattr(tx, "update"):  # where the argument may also be left out
        with pytest.raises(ValueError, match=re.escape(message)):
            tx.update(GRADS, state)


# Trees ------------------------------------------------------------------------------------------

ONES = jnp.ones(())
# The tree, and the path at which it differs from PARAMS.
WRONG_STRUCTURES = {
    "missing leaf": (without(PARAMS, "scales", 1), "['scales'][1]"),
    "missing key": (without(PARAMS, "dense", "bias"), "['dense']['bias']"),
    "missing subtree": (without(PARAMS, "dense"), "['dense']"),
    "extra leaf": (changed(PARAMS, "scales", 2, value=ONES), "['scales'][2]"),
    "extra key": (changed(PARAMS, "dense", "more", value=ONES), "['dense']['more']"),
    "leaf for subtree": (changed(PARAMS, "scales", value=ONES), "['scales']"),
    "subtree for leaf": (changed(PARAMS, "scales", 1, value=[jnp.ones(2)]), "['scales'][1]"),
    "tuple for list": (changed(PARAMS, "scales", value=tuple(PARAMS["scales"])), "['scales']"),
    "masked leaf": (changed(PARAMS, "scales", 1, value=optax.MaskedNode()), "['scales'][1]"),
    "empty": ({}, "['dense']"),
    "list": ([1.0, 2.0], ""),  # wrong at the root, whose path is empty
    "bare array": (jnp.ones(3), ""),
}
WRONG_SHAPES = {
    "transposed": (changed(PARAMS, "dense", "kernel", value=jnp.ones((3, 2))), "['kernel']"),
    "longer": (changed(PARAMS, "scales", 1, value=jnp.ones(3)), "['scales'][1]"),
    # These would broadcast, so that nothing else would notice.
    "length 1": (changed(PARAMS, "dense", "bias", value=jnp.ones(1)), "['dense']['bias']"),
    "scalar": (changed(PARAMS, "dense", "kernel", value=ONES), "['dense']['kernel']"),
    "Python number": (changed(PARAMS, "dense", "kernel", value=1.0), "['dense']['kernel']"),
    "more axes": (changed(PARAMS, "scales", 1, value=jnp.ones((1, 2))), "['scales'][1]"),
    "vector for scalar": (changed(PARAMS, "scales", 0, value=jnp.ones(1)), "['scales'][0]"),
}


@transformations
@pytest.mark.parametrize("case", WRONG_STRUCTURES | WRONG_SHAPES)
def test_gradients_that_do_not_fit_the_parameters_are_refused(name, case):
    tree, path = (WRONG_STRUCTURES | WRONG_SHAPES)[case]
    tx = TRANSFORMATIONS[name]()
    with raises(ValueError, gradients_of(tx), path):
        call(tx, tree, PARAMS)


@transformations
@pytest.mark.parametrize("case", WRONG_STRUCTURES | WRONG_SHAPES)
def test_stale_parameters_that_do_not_fit_the_parameters_are_refused(name, case):
    tree, path = (WRONG_STRUCTURES | WRONG_SHAPES)[case]
    with raises(ValueError, "stale_params", path):
        call(TRANSFORMATIONS[name](), GRADS, PARAMS, stale_params=tree)


@transformations
def test_a_stale_parameter_of_none_is_refused_where_there_is_a_parameter(name):
    stale = changed(PARAMS, "dense", "bias", value=None)
    with raises(ValueError, "stale_params", "['dense']['bias']"):
        call(TRANSFORMATIONS[name](), GRADS, PARAMS, stale_params=stale)


@transformations
@pytest.mark.parametrize(
    "case", ["missing leaf", "extra key", "tuple for list", "transposed", "length 1"]
)
def test_parameters_that_do_not_fit_the_state_are_refused(name, case):
    # The gradients fit the parameters, but the state was made for others.
    tree, path = (WRONG_STRUCTURES | WRONG_SHAPES)[case]
    with raises(ValueError, "params", path):
        call(TRANSFORMATIONS[name](), tree, tree)


def test_bare_arrays_are_named_by_the_argument_alone():
    tx = dcasgd(0.1)
    params = jnp.ones(3)
    state = tx.init(params)
    with raises(ValueError, "updates has shape (2,)", "(3,)"):
        tx.update(jnp.ones(2), state, params)
    with raises(ValueError, "stale_params has shape ()", "(3,)"):
        tx.update(params, state, params, stale_params=1.0)
    with raises(TypeError, "params has dtype int32"):
        tx.init(jnp.ones(3, jnp.int32))


@transformations
def test_a_complex_gradient_of_a_real_parameter_is_refused(name):
    grads = changed(GRADS, "dense", "bias", value=jnp.ones(3, jnp.complex64))
    tx = TRANSFORMATIONS[name]()
    with raises(TypeError, f"{gradients_of(tx)}['dense']['bias']", "complex"):
        call(tx, grads, PARAMS)


@transformations
def test_a_complex_stale_parameter_of_a_real_one_is_refused(name):
    stale = changed(PARAMS, "dense", "bias", value=jnp.ones(3, jnp.complex64))
    with raises(TypeError, "stale_params['dense']['bias']", "complex"):
        call(TRANSFORMATIONS[name](), GRADS, PARAMS, stale_params=stale)


@transformations
@pytest.mark.parametrize("path", [("dense", "bias"), ("scales",)], ids=str)
def test_a_parameter_without_a_gradient_is_legal(name, path):
    tx = TRANSFORMATIONS[name]()
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = call(tx, changed(GRADS, *path, value=None), PARAMS, state)


# Where the stale parameters come from -----------------------------------------------------------


@pytest.mark.parametrize("name", FACTORIES)
def test_without_memory_stale_parameters_are_required(name):
    tx = FACTORIES[name](store=None)
    for extra_args in ({}, {"stale_params": None}, {"worker": 0}):
        with raises(ValueError, "stale_params", "store=None"):
            call(tx, GRADS, PARAMS, **extra_args)


@pytest.mark.parametrize("name", WITH_WORKERS)
def test_with_workers_one_must_be_named(name):
    tx = WITH_WORKERS[name](num_workers=3)
    for extra_args in ({}, {"worker": None}):
        with raises(ValueError, "worker", "num_workers=3"):
            call(tx, GRADS, PARAMS, **extra_args)


@pytest.mark.parametrize("name", WITH_WORKERS)
@pytest.mark.parametrize("worker", [-1, 3, 2**40, np.int64(3), np.int32(-1), np.array(3)], ids=repr)
def test_a_worker_out_of_range_is_refused(name, worker):
    tx = WITH_WORKERS[name](num_workers=3)
    for extra_args in ({}, {"stale_params": PARAMS}):
        with raises(ValueError, "worker", "num_workers=3", str(worker)):
            call(tx, GRADS, PARAMS, worker=worker, **extra_args)


NO_WORKERS = {
    "float": 1.0,
    "numpy float": np.float32(1),
    "jax float": jnp.asarray(1.0),
    "bool": True,
    "numpy bool": np.True_,
    "string": "1",
    "list": [1],
    "tuple": (1,),
    "dict": {},
    "numpy vector": np.array([1]),
    "jax vector": jnp.asarray([1, 2]),
    "object": object(),
}


@pytest.mark.parametrize("name", WITH_WORKERS)
@pytest.mark.parametrize("worker", NO_WORKERS)
def test_a_worker_that_is_no_single_integer_is_refused(name, worker):
    with raises(TypeError, "worker"):
        call(WITH_WORKERS[name](num_workers=3), GRADS, PARAMS, worker=NO_WORKERS[worker])


@pytest.mark.parametrize("name", WITH_WORKERS)
@pytest.mark.parametrize(
    "worker", [2, np.int64(2), np.int8(2), np.array(2), jnp.asarray(2), jnp.uint32(2)], ids=repr
)
def test_a_worker_may_be_any_single_integer(name, worker):
    tx = WITH_WORKERS[name](num_workers=3)
    expected = call(tx, GRADS, PARAMS, worker=2)
    jax.tree.map(np.testing.assert_array_equal, call(tx, GRADS, PARAMS, worker=worker), expected)
    compiled = jax.jit(lambda worker: call(tx, GRADS, PARAMS, worker=worker))(worker)
    assert jax.tree.structure(compiled) == jax.tree.structure(expected)


# Staleness --------------------------------------------------------------------------------------


def test_a_staleness_is_required():
    tx = scale_by_staleness()
    for extra_args in ({}, {"staleness": None}):
        with raises(ValueError, "staleness"):
            tx.update(GRADS, tx.init(PARAMS), PARAMS, **extra_args)


@pytest.mark.parametrize("case", NO_PREFIXES)
def test_a_tree_of_stalenesses_that_is_no_prefix_is_refused(case):
    staleness, path = NO_PREFIXES[case]
    tx = scale_by_staleness()
    with raises(ValueError, "staleness", *path):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, staleness=staleness)


NO_STALENESSES = {
    "string": "2",
    "complex": 2j,
    "vector": jnp.ones(2),
    # As long as the parameter, which would broadcast.
    "one for each component": jnp.ones(3),
    "object": object(),
}


@pytest.mark.parametrize("staleness", NO_STALENESSES)
@pytest.mark.parametrize("in_a_tree", [False, True], ids=["alone", "in a tree"])
def test_a_staleness_that_is_no_number_is_refused(staleness, in_a_tree):
    tx = scale_by_staleness()
    updates = {"w": jnp.ones(3)}
    value = NO_STALENESSES[staleness]
    with raises((TypeError, ValueError), "staleness", *(["['w']"] if in_a_tree else [])):
        tx.update(updates, tx.init(updates), staleness={"w": value} if in_a_tree else value)


@pytest.mark.parametrize(
    "staleness", [0, 3, 2.5, np.int64(3), jnp.asarray(3), {"dense": 1, "scales": [2, 3]}], ids=repr
)
def test_a_staleness_may_be_any_number_or_prefix(staleness):
    tx = scale_by_staleness()
    updates, _ = tx.update(GRADS, tx.init(PARAMS), staleness=staleness)
    assert jax.tree.structure(updates) == jax.tree.structure(GRADS)


# mxnet.DCASGD -----------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["learning_rate", "momentum", "lamda"])
@pytest.mark.parametrize("value", ["0.1", True, [0.1], np.ones(2), float("nan")], ids=repr)
def test_the_rule_of_mxnet_1_refuses_what_that_of_mxnet_2_refuses(argument, value):
    with raises((TypeError, ValueError), argument):
        mxnet.DCASGD(**{argument: value}, version=1)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("value", ["0.1", True, [0.1], float("nan")], ids=repr)
def test_a_learning_rate_is_checked_beside_a_scheduler(value, version):
    with raises((TypeError, ValueError), "learning_rate"):
        mxnet.DCASGD(value, lr_scheduler=lambda num_update: 0.1, version=version)


@pytest.mark.parametrize("argument", ["rescale_grad", "clip_gradient", "lr_mult", "wd_mult"])
def test_what_mxnet_cannot_schedule_is_no_function(argument):
    with raises(TypeError, argument):
        mxnet.DCASGD(wd=0.1, **{argument: lambda count: 1.0})


def test_what_cannot_be_scheduled_in_a_combination_is_refused_in_it():
    with raises(TypeError, "wd"):
        mxnet.DCASGD(wd=lambda count: 0.1, wd_mult=2.0)
    with raises(TypeError, "momentum"):
        mxnet.DCASGD(momentum=lambda count: 0.9, version=1)


@pytest.mark.parametrize("value", ["x", 0.1, [1]], ids=repr)
def test_a_scheduler_must_be_a_function(value):
    with raises(TypeError, "lr_scheduler"):
        mxnet.DCASGD(None, lr_scheduler=value)


class Scheduler:
    base_lr = 0.05

    def __call__(self, num_update):
        return self.base_lr / num_update


def test_a_scheduler_must_not_contradict_the_learning_rate():
    with raises(ValueError, "learning_rate=0.1", "base_lr=0.05"):
        mxnet.DCASGD(0.1, lr_scheduler=Scheduler())
    for learning_rate in (0.05, None):
        call(mxnet.DCASGD(learning_rate, lr_scheduler=Scheduler()), GRADS, PARAMS)


@pytest.mark.parametrize(
    ("value", "error"),
    [(-1, ValueError), (1.0, TypeError), (None, TypeError), (True, TypeError), ("1", TypeError)],
    ids=repr,
)
def test_updates_are_counted_from_a_natural_number(value, error):
    with raises(error, "begin_num_update"):
        mxnet.DCASGD(begin_num_update=value)


@pytest.mark.parametrize("value", [0, 3, "2", None, True, 1.0], ids=repr)
def test_an_unknown_version_is_refused(value):
    with raises((TypeError, ValueError), "version"):
        mxnet.DCASGD(version=value)


@pytest.mark.parametrize("argument", ["lr_mult", "wd_mult"])
@pytest.mark.parametrize("value", ["x", True, np.ones(2), float("inf")], ids=repr)
def test_a_wrong_multiplier_is_named_by_its_path(argument, value):
    with raises((TypeError, ValueError), f"{argument}['scales'][1]"):
        mxnet.DCASGD(wd=0.1, **{argument: {"dense": 1.0, "scales": [1.0, value]}})
    with raises((TypeError, ValueError), argument):
        mxnet.DCASGD(wd=0.1, **{argument: value})


@pytest.mark.parametrize("case", NO_PREFIXES)
@pytest.mark.parametrize("argument", ["lr_mult", "wd_mult"])
@pytest.mark.parametrize("wd", [0.1, 0.0])
def test_multipliers_that_are_no_prefix_are_refused(case, argument, wd):
    # Also those of a weight decay of zero: the mistake will be there when it is no longer zero.
    mult, path = NO_PREFIXES[case]
    with raises(ValueError, argument, "prefix", *path):
        call(mxnet.DCASGD(wd=wd, **{argument: mult}), GRADS, PARAMS)


def test_what_mxnet_has_and_what_it_has_not_is_told_apart():
    with raises(TypeError, "param_dict", "lr_mult"):
        mxnet.DCASGD(param_dict={})
    with raises(TypeError, "nesterov"):
        mxnet.DCASGD(nesterov=True)
    with raises(NotImplementedError, "use_fused_step", "fused_dcasgd"):
        mxnet.DCASGD(use_fused_step=True)


# After an error ---------------------------------------------------------------------------------

FAILING_CALLS = {
    "wrong gradients": lambda tx, state: call(tx, {"dense": 1.0}, PARAMS, state),
    "wrong stale parameters": lambda tx, state: call(tx, GRADS, PARAMS, state, stale_params=[]),
    "no parameters": lambda tx, state: call(tx, GRADS, None, state),
    "while tracing": lambda tx, state: jax.jit(lambda s: call(tx, GRADS, None, s))(state),
}


@transformations
@pytest.mark.parametrize("failing", FAILING_CALLS)
def test_a_failed_call_leaves_the_state_as_it_was(name, failing):
    def train(*, with_failures):
        tx = TRANSFORMATIONS[name]()
        state, outputs = tx.init(PARAMS), []
        for i in range(3):
            if with_failures:
                with pytest.raises(ValueError, match="params"):
                    FAILING_CALLS[failing](tx, state)
            output, state = call(tx, GRADS, jax.tree.map(lambda p, i=i: p + i, PARAMS), state)
            outputs.append(output)
        return outputs, state

    expected, found = train(with_failures=False), train(with_failures=True)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_failed_call_names_no_worker_the_last():
    tx = add_delay_compensation(num_workers=2)
    state = tx.init(PARAMS)
    _, state = tx.update(GRADS, state, PARAMS, worker=1)
    with raises(ValueError, "worker"):
        tx.update(GRADS, state, PARAMS, worker=2)
    assert int(state.last_worker) == 1


# Legal, if unusual ------------------------------------------------------------------------------

UNUSUAL = {
    "decay 0": {"decay": 0.0},
    "integer decay 0": {"decay": 0},
    "clip 0": {"clip": 0.0},
    "large clip": {"clip": 1e6},
    "lamda 0": {"lamda": 0},
    "large lamda": {"lamda": 1e6, "clip": 1.0},
    "large eps": {"eps": 10, "decay": 0.5},
    "no eps": {"eps": 0.0, "decay": 0.5},
    "numpy scalars": {"lamda": np.float64(1), "decay": np.float32(0.5), "eps": np.float16(0.1)},
    "numpy integers": {"lamda": np.int64(1), "clip": np.int8(1), "decay": np.uint8(0)},
    "0-d numpy arrays": {"lamda": np.array(0.5), "clip": np.array(1)},
    "jax scalars": {"lamda": jnp.asarray(0.5), "decay": jnp.asarray(0.5), "clip": jnp.asarray(1)},
    "schedules": {
        "lamda": optax.linear_schedule(0.0, 1.0, 3),
        "decay": lambda count: 0.5,
        "clip": optax.constant_schedule(1.0),
        "eps": lambda count: jnp.exp(-count.astype(float)),
    },
    "accumulator": {"decay": 0.5, "accumulator_dtype": "bfloat16"},
    "numpy accumulator": {"decay": 0.5, "accumulator_dtype": np.float32},
    "one worker": {"num_workers": 1},
    "numpy number of workers": {"num_workers": np.int64(2)},
}


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("unusual", UNUSUAL)
def test_unusual_hyperparameters_are_legal(name, unusual):
    tx = FACTORIES[name](**UNUSUAL[unusual])
    state, params = tx.init(PARAMS), PARAMS
    for _ in range(3):
        output, state = call(tx, GRADS, params, state, worker=0)
        params = jax.tree.map(lambda p: p + 0.125, params)
    for leaf in jax.tree.leaves((output, state)):
        assert np.all(np.isfinite(np.asarray(leaf, np.float32)))


@pytest.mark.parametrize("factory", [dcasgd, fused_dcasgd])
def test_unusual_learning_rates_and_momenta_are_legal(factory):
    for learning_rate in (0, 1, -0.1, np.float32(0.1), jnp.asarray(0.1), lambda count: 0.1):
        for momentum in (None, 0, 0.0, np.float64(0.9), jnp.asarray(0.9), lambda count: 0.9):
            call(factory(learning_rate, momentum), GRADS, PARAMS)


def test_other_extra_arguments_are_ignored():
    for name, make in TRANSFORMATIONS.items():
        output, _ = call(make(), GRADS, PARAMS, value=1.0, worker=7, staleness=3, loss_fn=print)
        assert jax.tree.structure(output) == jax.tree.structure(PARAMS), name


TRACED = {"lamda": 0.5, "decay": 0.5, "eps": 1e-3, "clip": 0.5}


@pytest.mark.parametrize("name", FACTORIES)
def test_traced_hyperparameters_are_legal(name):
    factory = FACTORIES[name]
    tx = factory(**TRACED)
    _, state = call(tx, GRADS, PARAMS)
    expected, _ = call(tx, GRADS, jax.tree.map(jnp.zeros_like, PARAMS), state)

    def two_updates(hyperparams):
        tx = factory(**hyperparams)
        _, state = call(tx, GRADS, PARAMS)
        return call(tx, GRADS, jax.tree.map(jnp.zeros_like, PARAMS), state)[0]

    for transformed in (
        jax.jit(two_updates)(TRACED),
        jax.tree.map(
            lambda x: x[1],
            jax.vmap(two_updates)(jax.tree.map(lambda x: jnp.asarray([0.25, 1.0]) * x, TRACED)),
        ),
    ):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), transformed, expected
        )


def test_injected_hyperparameters_are_legal_and_can_be_changed():
    for factory in (add_delay_compensation, dcasgd):
        tx = optax.inject_hyperparams(factory)(**TRACED)
        state = tx.init(PARAMS)
        for name in TRACED:
            state.hyperparams[name] = state.hyperparams[name] / 2
        _, state = jax.jit(tx.update)(GRADS, state, PARAMS)
        assert {name: float(state.hyperparams[name]) for name in TRACED} == pytest.approx(
            {name: value / 2 for name, value in TRACED.items()}
        )
    tx = optax.inject_hyperparams(scale_by_gap)(decay=0.9)
    tx.update(GRADS, tx.init(PARAMS), PARAMS)
    tx = optax.inject_hyperparams(scale_by_staleness)(power=0.5)
    tx.update(GRADS, tx.init(PARAMS), PARAMS, staleness=2)
    injected = optax.inject_hyperparams(mxnet.DCASGD, static_args=("begin_num_update", "version"))
    tx = injected(0.1, 0.9, wd=0.1)
    tx.update(GRADS, tx.init(PARAMS), PARAMS)


@transformations
@pytest.mark.parametrize(
    "tree",
    [{}, [], (), {"a": None}, {"a": optax.MaskedNode()}],
    ids=["dict", "list", "tuple", "absent", "masked"],
)
def test_there_may_be_no_parameters_at_all(name, tree):
    tx = TRANSFORMATIONS[name]()
    state = tx.init(tree)
    for _ in range(2):
        output, state = call(tx, tree, tree, state)
        assert output == tree


@transformations
def test_numpy_arrays_and_python_floats_are_legal_parameters(name):
    tx = TRANSFORMATIONS[name]()
    params = jax.tree.map(np.asarray, PARAMS)
    params["scales"][0] = 1.0
    state = tx.init(params)
    for _ in range(3):
        output, state = call(tx, params, params, state)
    for leaf, p in zip(jax.tree.leaves(output), jax.tree.leaves(params), strict=True):
        assert isinstance(leaf, jax.Array)
        assert leaf.shape == np.shape(p)
        assert leaf.dtype == jnp.float32
