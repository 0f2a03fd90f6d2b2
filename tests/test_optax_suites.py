"""Optax's own generic tests, run on this library's optimizers."""

import collections
import functools
import os
import sys
import unittest
import warnings

import jax
import jax.numpy as jnp
import optax
import optax_suites
import pytest
from absl.testing import parameterized
from optax._src import alias
from optax_suites import Variant

import optax_dcasgd as dc


def of_a_worker(inner):
    """One backup per worker. The suites do not name the worker, so it is always the same one."""
    tx = dc.remember_params(inner, num_workers=3)
    return optax.GradientTransformationExtraArgs(tx.init, functools.partial(tx.update, worker=1))


def dcasgd_of_a_worker(learning_rate: optax.ScalarOrSchedule, momentum=None):
    return of_a_worker(dc.dcasgd(learning_rate, momentum, store=None))


def dcasgd_of_the_last_update(learning_rate: optax.ScalarOrSchedule, momentum=None):
    return dc.remember_params(dc.dcasgd(learning_rate, momentum, store=None))


def dcasgd_of_fresh_gradients(learning_rate: optax.ScalarOrSchedule, momentum=None):
    return dc.delay_gradients(dc.dcasgd(learning_rate, momentum, store=None), 0)


def delay_compensated_sgd(learning_rate: optax.ScalarOrSchedule, momentum=None):
    rule = dc.add_delay_compensation(0.04, decay=None, clip=None)
    return dc.remember_params(optax.chain(rule, optax.sgd(learning_rate, momentum)))


def delay_compensated_adam(learning_rate: optax.ScalarOrSchedule):
    return dc.remember_params(optax.chain(dc.add_delay_compensation(), optax.adam(learning_rate)))


def gap_aware_sgd(learning_rate: optax.ScalarOrSchedule, momentum=None):
    return dc.remember_params(optax.chain(dc.scale_by_gap(), optax.sgd(learning_rate, momentum)))


def robust_sgd(learning_rate: optax.ScalarOrSchedule, momentum=None):
    rule = dc.robust_delay_compensation()
    return dc.remember_params(optax.chain(rule, optax.sgd(learning_rate, momentum)))


def remembering(rule):
    """A rule by itself, told the parameters of the last update."""
    return lambda **kwargs: dc.remember_params(rule(**kwargs))


def wrapped(wrapper, *args):
    return lambda: wrapper(optax.sgd(1e-3, 0.9), *args)


def sgd(learning_rate, momentum=None, **_):
    return optax.sgd(learning_rate, momentum)


def adam(learning_rate, **_):
    return optax.adam(learning_rate)


def identity(**_):
    return optax.identity()


# The learning rates are those of `optax.sgd` and `optax.adam` in Optax's lists.
LR = {"learning_rate": 1e-3}
MOMENTUM = LR | {"momentum": 0.9}
CLIPPED = {"lamda": 2.0, "decay": 0.95, "clip": 1.0}

OPTIMIZERS = [
    Variant("dcasgd", dc.dcasgd, LR, sgd),
    Variant("dcasgd_updates", dc.dcasgd, LR | {"store": "updates"}, sgd),
    Variant("dcasgd_momentum", dc.dcasgd, MOMENTUM, sgd),
    Variant("dcasgd_momentum_updates", dc.dcasgd, MOMENTUM | {"store": "updates"}, sgd),
    Variant("dcasgd_adaptive", dc.dcasgd, MOMENTUM | {"decay": 0.95}, sgd),
    Variant("delay_compensated_sgd", delay_compensated_sgd, MOMENTUM, sgd),
    Variant("delay_compensated_adam", delay_compensated_adam, {"learning_rate": 1e-1}, adam),
]

# The two large suites overlap. For these, one of them has to do.
MORE_OPTIMIZERS = [
    Variant("dcasgd_clipped", dc.dcasgd, MOMENTUM | CLIPPED | {"store": "updates"}, sgd),
    Variant(
        "dcasgd_bfloat16",
        dc.dcasgd,
        MOMENTUM | {"decay": 0.95, "accumulator_dtype": "bfloat16"},
        sgd,
    ),
    Variant("dcasgd_of_a_worker", dcasgd_of_a_worker, MOMENTUM, sgd),
    Variant("dcasgd_of_the_last_update", dcasgd_of_the_last_update, MOMENTUM, sgd),
    Variant("dcasgd_of_fresh_gradients", dcasgd_of_fresh_gradients, MOMENTUM, sgd),
    Variant("gap_aware_sgd", gap_aware_sgd, MOMENTUM, sgd),
    Variant("robust_sgd", robust_sgd, MOMENTUM, sgd),
]

# Not optimizers by themselves, or not meant to do as well as those they wrap. The suites that do
# not look at convergence have room for them.
TRANSFORMATIONS = [
    Variant("add_delay_compensation", remembering(dc.add_delay_compensation), {}, identity),
    Variant("scale_by_gap", remembering(dc.scale_by_gap), {}, identity),
    Variant("scale_by_staleness", remembering(dc.scale_by_staleness), {}, identity),
    Variant("robust", remembering(dc.robust_delay_compensation), {}, identity),
    Variant("with_master_weights", wrapped(dc.with_master_weights), {}, identity),
    Variant("delay_gradients", wrapped(dc.delay_gradients, 2), {}, identity),
    Variant("track_velocity", dc.track_velocity, {}, identity),
]

# How many cases Optax's own parameters make of each of its tests, for one optimizer.
CASES = {
    "ContribTest": {
        "test_optimizers_accept_extra_args": 2,
        "test_optimizers": 4,
        "test_optimizers_can_be_wrapped_in_inject_hyperparams": 1,
        "test_preserve_dtype": 2,
        "test_gradient_accumulation": 2,
        "test_state_shape_dtype_shard_stability": 4,
        "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such": 1,
    },
    "AliasTest": {
        "test_optimization": 4,
        "test_optimizers_accept_extra_args": 1,
        "test_optimizers_can_be_wrapped_in_inject_hyperparams": 1,
        "test_preserve_dtype": 2,
        "test_state_shape_dtype_shard_stability": 6,
        "test_gradient_accumulation": 2,
    },
    "Float64Test": {"test_mixed_dtype_input_outputs": 1},
    "ShardingTest": {
        "test_init_with_abstract_input": 1,
        "test_state_sharding_type_init_match_update": 1,
        "test_state_sharding_type_preserved_with_jit": 1,
    },
}

VARIANTS = {
    "ContribTest": OPTIMIZERS,
    "AliasTest": OPTIMIZERS + MORE_OPTIMIZERS,
    "Float64Test": OPTIMIZERS + MORE_OPTIMIZERS + TRANSFORMATIONS,
    "ShardingTest": OPTIMIZERS + MORE_OPTIMIZERS + TRANSFORMATIONS,
}

# Tests in the same classes, and classes in the same modules, that are given no optimizer: they name
# `optax.sgd`, `optax.adam`, `optax.lbfgs` or no optimizer at all.
OTHER_TESTS = {
    "ContribTest": set(),
    "AliasTest": {"test_explicit_dtype"},
    "Float64Test": set(),
    "ShardingTest": {"test_microbatch_with_explicit_sharding"},
}
OTHER_CLASSES = {
    "ContribTest": set(),
    "AliasTest": {"LBFGSTest"},
    "Float64Test": set(),
    "ShardingTest": set(),
}

_TOO_SLOW = "10,000 steps at this learning rate are too few without momentum"

# Cases in which Optax's optimizer with the same hyperparameters fails too, and why. Nothing else
# may be left out, see `test_what_is_left_out_fails_for_optax_too`.
LEFT_OUT = {
    "AliasTest.test_optimization_dcasgd_rosenbrock_complex64": _TOO_SLOW,
    "AliasTest.test_optimization_dcasgd_updates_rosenbrock_complex64": _TOO_SLOW,
}

SUITES = {
    name: optax_suites.load(name, VARIANTS[name], keep=lambda case_id: case_id not in LEFT_OUT)
    for name in optax_suites.MODULES
}

ContribTest = SUITES["ContribTest"].test_class
AliasTest = SUITES["AliasTest"].test_class
Float64Test = SUITES["Float64Test"].test_class
ShardingTest = SUITES["ShardingTest"].test_class


@pytest.fixture(autouse=True)
def _x64_as_before():
    # Optax's float64 suite switches it on, and where it fails it does not switch it off.
    before = jax.config.jax_enable_x64
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize("name", SUITES)
def test_every_case_is_there(name):
    suite = SUITES[name]
    expected = {
        (test, variant.name): count
        for test, count in CASES[name].items()
        for variant in VARIANTS[name]
    }
    cases = suite.cases + suite.left_out
    assert collections.Counter((case.test, case.variant) for case in cases) == expected
    # Pytest, too, asks unittest's loader.
    collected = unittest.TestLoader().getTestCaseNames(suite.test_class)
    assert sorted(collected) == sorted(case.method for case in suite.cases)
    assert not hasattr(suite.test_class, "__unittest_skip__")
    assert suite.other_tests == OTHER_TESTS[name]
    assert suite.other_classes == OTHER_CLASSES[name]


def test_what_is_left_out_exists():
    left_out = [case.id for suite in SUITES.values() for case in suite.left_out]
    assert sorted(left_out) == sorted(LEFT_OUT)


@pytest.mark.parametrize("case_id", LEFT_OUT)
def test_what_is_left_out_fails_for_optax_too(case_id):
    class_name = case_id.partition(".")[0]
    (name,) = (case.variant for case in SUITES[class_name].left_out if case.id == case_id)
    (ours,) = (variant for variant in VARIANTS[class_name] if variant.name == name)
    for variant in (ours, ours._replace(factory=ours.twin)):
        suite = optax_suites.load(class_name, [variant], keep=lambda each: each == case_id)
        (case,) = suite.cases
        (failure,) = optax_suites.run_case(suite, case)
        assert "Not equal to tolerance" in failure


def test_loading_leaves_nothing_behind():
    def everything():
        return (
            dict(os.environ),
            list(warnings.filters),
            set(sys.modules),
            *(dict(vars(module)) for module in (parameterized, alias, optax.contrib, jax)),
        )

    before = everything()
    for name in SUITES:
        optax_suites.load(name, OPTIMIZERS)
    assert everything() == before


# What follows makes sure that the suites, run in this way, notice something. Each of Optax's tests
# gets an optimizer with a fault that it is there to find.


def _broken(init=None, update=None):
    """A factory of `optax.sgd`, with one of its functions wrapped."""

    def factory(learning_rate: optax.ScalarOrSchedule, momentum=None):
        inner = optax.with_extra_args_support(optax.sgd(learning_rate, momentum))
        return optax.GradientTransformationExtraArgs(
            functools.partial(init, inner.init) if init else inner.init,
            functools.partial(update, inner.update) if update else inner.update,
        )

    return factory


def _ascends(update, grads, state, params, **extra):
    updates, state = update(grads, state, params, **extra)
    return jax.tree.map(jnp.negative, updates), state


def _returns_float32(update, grads, state, params, **extra):
    updates, state = update(grads, state, params, **extra)
    return jax.tree.map(lambda u: u.astype(jnp.float32), updates), state


def _returns_float32_state(update, grads, state, params, **extra):
    updates, state = update(grads, state, params, **extra)
    return updates, jax.tree.map(lambda s: s.astype(jnp.float32), state)


def _grows_its_state(update, grads, state, params, **extra):
    updates, state = update(grads, state, params, **extra)
    return updates, (*state, 0.0)


def _takes_no_extra_args(update, grads, state, params):
    return update(grads, state, params)


def _starts_weakly_typed(init, params):
    return init(params), 0.0


def _ends_strongly_typed(update, grads, state, params, **extra):
    updates, inner = update(grads, state[0], params, **extra)
    return updates, (inner, jnp.asarray(state[1], jnp.float32))


def _needs_arrays(init, params):
    return init(jax.tree.map(jnp.copy, params))


def _forgets_sharding(init, params):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), init(params))


def _forgets_sharding_under_jit(init, params):
    state = init(params)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params)):
        state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state)
    return state


def _branches_on_a_number(learning_rate: optax.ScalarOrSchedule, momentum=0.0):
    return optax.sgd(learning_rate, momentum if momentum > 0 else None)


def _has_no_annotation(learning_rate, momentum=None):
    return optax.sgd(learning_rate, momentum)


def _takes_no_schedule(learning_rate: optax.ScalarOrSchedule, momentum=None):
    return optax.sgd(float(learning_rate), momentum)


_recompiles = _broken(_starts_weakly_typed, _ends_strongly_typed)

FAULTS = [
    ("ContribTest.test_optimizers_parabola_float32", _broken(update=_ascends), "tolerance"),
    (
        "ContribTest.test_optimizers_accept_extra_args_wrapFalse",
        _broken(update=_takes_no_extra_args),
        "unexpected keyword argument",
    ),
    (
        "ContribTest.test_optimizers_can_be_wrapped_in_inject_hyperparams",
        _branches_on_a_number,
        "TracerBoolConversionError",
    ),
    ("ContribTest.test_preserve_dtype_bfloat16", _broken(update=_returns_float32), "!="),
    (
        "ContribTest.test_gradient_accumulation_bfloat16",
        _broken(update=_grows_its_state),
        "different lengths of tuple",
    ),
    (
        "ContribTest.test_state_shape_dtype_shard_stability_float64",
        _broken(update=_returns_float32_state),
        "float32",
    ),
    (
        "ContribTest.test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such",
        _takes_no_schedule,
        "TypeError",
    ),
    (
        "ContribTest.test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such",
        _has_no_annotation,
        "UnexpectedSkipError",
    ),
    ("AliasTest.test_optimization_parabola_float32", _broken(update=_ascends), "tolerance"),
    ("AliasTest.test_optimization_parabola_float32", _recompiles, "recompiles"),
    (
        "AliasTest.test_optimizers_accept_extra_args",
        _broken(update=_takes_no_extra_args),
        "unexpected keyword argument",
    ),
    (
        "AliasTest.test_optimizers_can_be_wrapped_in_inject_hyperparams",
        _branches_on_a_number,
        "TracerBoolConversionError",
    ),
    ("AliasTest.test_preserve_dtype_bfloat16", _broken(update=_returns_float32), "!="),
    (
        "AliasTest.test_gradient_accumulation_bfloat16",
        _broken(update=_grows_its_state),
        "different lengths of tuple",
    ),
    (
        "AliasTest.test_state_shape_dtype_shard_stability_complex128",
        _broken(update=_returns_float32_state),
        "float32",
    ),
    (
        "Float64Test.test_mixed_dtype_input_outputs",
        _broken(update=_returns_float32_state),
        "float32",
    ),
    ("ShardingTest.test_init_with_abstract_input", _broken(init=_needs_arrays), "TypeError"),
    (
        "ShardingTest.test_state_sharding_type_init_match_update",
        _broken(init=_forgets_sharding),
        "Mismatch",
    ),
    (
        "ShardingTest.test_state_sharding_type_preserved_with_jit",
        _broken(init=_forgets_sharding_under_jit),
        "Mismatch",
    ),
]


@pytest.mark.parametrize(("test", "factory", "message"), FAULTS, ids=[test for test, *_ in FAULTS])
def test_faults_are_found(test, factory, message):
    class_name, _, method = test.partition(".")
    kwargs = {"learning_rate": 1e-3, "momentum": 0.9}
    suite = optax_suites.load(class_name, [Variant("X", factory, kwargs, sgd)])
    # The name of the variant stands in the middle of the names of the cases.
    (case,) = (case for case in suite.cases if case.method.replace("_X", "") == method)
    failures = optax_suites.run_case(suite, case)
    assert any(message in failure for failure in failures), failures


def test_each_test_has_a_fault_to_find():
    found = {test for test, *_ in FAULTS}
    for class_name, tests in CASES.items():
        for test in tests:
            assert any(each.startswith(f"{class_name}.{test}") for each in found)
