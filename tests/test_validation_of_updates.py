"""Wrong arguments of init and update raise an error that names them and, in a tree, the leaf."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from validation_cases import (
    FACTORIES,
    GRADS,
    NO_PREFIXES,
    PARAMS,
    TRANSFORMATIONS,
    WITH_WORKERS,
    call,
    changed,
    gradients_of,
    raises,
    transformations,
    without,
)

from optax_dcasgd import add_delay_compensation, dcasgd, fused_dcasgd, scale_by_staleness

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


OTHER_MODES = {  # made with, used with, what the message names
    "no ν": ({}, {"decay": 0.9}, "decay=0.9"),
    "ν": ({"decay": 0.9}, {}, "decay=None"),
    "no parameters": ({"store": None}, {}, "store='params'"),
    "parameters": ({}, {"store": None}, "store=None"),
}


@pytest.mark.parametrize("mode", OTHER_MODES)
@pytest.mark.parametrize("name", FACTORIES)
def test_a_state_made_for_another_mode_is_refused(name, mode):
    made_with, used_with, argument = OTHER_MODES[mode]
    state = FACTORIES[name](**made_with).init(PARAMS)
    with raises(ValueError, argument, "the optimizer state was made with another"):
        call(FACTORIES[name](**used_with), GRADS, PARAMS, state, stale_params=PARAMS)


@pytest.mark.parametrize("factory", [dcasgd, fused_dcasgd])
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_a_state_made_for_another_momentum_is_refused(factory, momentum):
    state = factory(0.1, momentum).init(PARAMS)
    other = None if momentum else 0.9
    with raises(ValueError, f"momentum={other}", "another momentum"):
        call(factory(0.1, other), GRADS, PARAMS, state)


@pytest.mark.parametrize("name", WITH_WORKERS)
@pytest.mark.parametrize("options", [{}, {"num_workers": 2}], ids=str)
def test_a_state_made_for_another_dtype_is_refused(name, options):
    """The fused step would round the parameters to it."""
    tx = WITH_WORKERS[name](**options)
    state = tx.init(jax.tree.map(jnp.bfloat16, PARAMS))
    with raises(ValueError, "params", "['bias'] has dtype float32", "dtype bfloat16"):
        call(tx, GRADS, PARAMS, state, worker=0)


@pytest.mark.parametrize("name", WITH_WORKERS)
@pytest.mark.parametrize(("made_for", "used_for"), [(3, 4), (3, 2), (3, 1), (None, 3), (3, None)])
def test_a_state_made_for_another_number_of_workers_is_refused(name, made_for, used_for):
    state = WITH_WORKERS[name](num_workers=made_for).init(PARAMS)
    tx = WITH_WORKERS[name](num_workers=used_for)
    for extra_args in ({"worker": 0}, {"worker": 0, "stale_params": PARAMS}):
        with raises(ValueError, f"num_workers={used_for}", f"num_workers={made_for}"):
            call(tx, GRADS, PARAMS, state, **extra_args)


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


def test_a_schedule_must_return_a_number():
    for value in (jnp.ones((1,)), None, [0.5]):
        for argument in ("lamda", "decay", "clip", "eps", "momentum", "learning_rate"):
            tx = dcasgd(**{"decay": 0.9, argument: lambda count, value=value: value})
            with raises(ValueError, argument, "must return a scalar"):
                call(tx, GRADS, PARAMS)


@transformations
def test_a_gradient_that_is_no_number_is_refused(name):
    tx = TRANSFORMATIONS[name]()
    for dtype in (bool, jax.dtypes.float0):
        bad = jax.tree.map(lambda p, dtype=dtype: np.zeros(p.shape, dtype), PARAMS)
        with raises(TypeError, f"{gradients_of(tx)}['dense']['bias']", f"dtype {np.dtype(dtype)}"):
            call(tx, bad, PARAMS)


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
