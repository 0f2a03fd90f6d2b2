"""Wrong arguments of a constructor raise an error that names them."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from validation_cases import FACTORIES, GRADS, NO_PREFIXES, PARAMS, WITH_WORKERS, call, raises

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
