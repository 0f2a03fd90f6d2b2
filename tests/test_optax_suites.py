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
from optax_variants import (
    BY_DEFAULT,
    CASES,
    LEFT_OUT,
    OPTIMIZERS,
    OTHER_CLASSES,
    OTHER_TESTS,
    VARIANTS,
    sgd,
)


def is_default(case):
    return case.label in BY_DEFAULT[case.class_name].get(case.test, [])


SUITES = {
    name: optax_suites.load(
        name, VARIANTS[name], lambda case: is_default(case) and case.id not in LEFT_OUT
    )
    for name in optax_suites.MODULES
}
SLOW = {
    name: optax_suites.load(
        name, VARIANTS[name], lambda case: not is_default(case) and case.id not in LEFT_OUT
    )
    for name in ("ContribTest", "AliasTest")
}

ContribTest = SUITES["ContribTest"].test_class
AliasTest = SUITES["AliasTest"].test_class
Float64Test = SUITES["Float64Test"].test_class
ShardingTest = SUITES["ShardingTest"].test_class
SlowContribTest = pytest.mark.slow(SLOW["ContribTest"].test_class)
SlowAliasTest = pytest.mark.slow(SLOW["AliasTest"].test_class)


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
    parts = [suite, SLOW[name]] if name in SLOW else [suite]
    run = [case.id for part in parts for case in part.cases]
    left_out = [case_id for case_id in LEFT_OUT if case_id.startswith(f"{name}.")]
    assert sorted(run + left_out) == sorted(case.id for case in cases)
    for part in parts:
        # Pytest, too, asks unittest's loader.
        collected = unittest.TestLoader().getTestCaseNames(part.test_class)
        assert sorted(collected) == sorted(case.method for case in part.cases)
        assert not hasattr(part.test_class, "__unittest_skip__")
    assert {case.variant for case in suite.cases} == {variant.name for variant in VARIANTS[name]}
    assert suite.other_tests == OTHER_TESTS[name]
    assert suite.other_classes == OTHER_CLASSES[name]


@pytest.mark.slow
@pytest.mark.parametrize("case_id", LEFT_OUT)
def test_what_is_left_out_fails_for_optax_too(case_id):
    class_name = case_id.partition(".")[0]
    (name,) = (case.variant for case in SUITES[class_name].left_out if case.id == case_id)
    (ours,) = (variant for variant in VARIANTS[class_name] if variant.name == name)
    for variant in (ours, ours._replace(factory=ours.twin)):
        suite = optax_suites.load(class_name, [variant], lambda case: case.id == case_id)
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


def _marks(test):
    """The same fault of the same test in the other suite, or in a case that is slow itself."""
    twin = test.replace("ContribTest", "AliasTest").partition("_wrap")[0]
    return [pytest.mark.slow] if twin != test and any(t == twin for t, *_ in FAULTS) else []


@pytest.mark.parametrize(
    ("test", "factory", "message"),
    [pytest.param(*fault, marks=_marks(fault[0])) for fault in FAULTS],
    ids=[test for test, *_ in FAULTS],
)
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
