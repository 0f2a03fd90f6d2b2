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
from optax_variants import BY_DEFAULT, CASES, LEFT_OUT, LR, MOMENTUM, OPTIMIZERS, VARIANTS


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
    suites = [suites[name] for suites in (SUITES, SLOW) if name in suites]
    for suite in suites:
        # Pytest, too, asks unittest's loader.
        collected = unittest.TestLoader().getTestCaseNames(suite.test_class)
        assert sorted(collected) == sorted(case.method for case in suite.cases)
    cases = [case for suite in suites for case in suite.cases]
    found = collections.Counter((case.test, case.variant) for case in cases)
    for left_out in LEFT_OUT if name == "AliasTest" else ():
        variant = left_out.removeprefix("AliasTest.test_optimization_").partition("_rosen")[0]
        found["test_optimization", variant] += 1
    assert found == {
        (test, variant.name): count
        for test, count in CASES[name].items()
        for variant in VARIANTS[name]
    }
    assert {case.variant for case in SUITES[name].cases} == {v.name for v in VARIANTS[name]}


@pytest.mark.slow
def test_what_is_left_out_fails_for_optax_too():
    factories = {variant.name: variant.factory for variant in OPTIMIZERS}
    for factory in (optax.sgd, factories["dcasgd"]):
        suite = optax_suites.load("AliasTest", [Variant("dcasgd", factory, LR)])
        (case,) = (case for case in suite.cases if case.id == LEFT_OUT[0])
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


# The suites, run in this way, notice something: each class gets an optimizer with a fault.


def _broken(init=None, update=None):
    """A factory of `optax.sgd`, with one of its functions wrapped."""

    def factory(learning_rate: optax.ScalarOrSchedule, momentum=None):
        inner = optax.with_extra_args_support(optax.sgd(learning_rate, momentum))
        return optax.GradientTransformationExtraArgs(
            functools.partial(init, inner.init) if init else inner.init,
            functools.partial(update, inner.update) if update else inner.update,
        )

    return factory


def _takes_no_extra_args(update, grads, state, params):
    return update(grads, state, params)


def _returns_float32(update, grads, state, params, **extra):
    updates, state = update(grads, state, params, **extra)
    return jax.tree.map(lambda u: u.astype(jnp.float32), updates), state


def _returns_float32_state(update, grads, state, params, **extra):
    updates, state = update(grads, state, params, **extra)
    return updates, jax.tree.map(lambda s: s.astype(jnp.float32), state)


def _forgets_sharding(init, params):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), init(params))


def _has_no_annotation(learning_rate, momentum=None):
    return optax.sgd(learning_rate, momentum)


SCHEDULE = "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such"


@pytest.mark.parametrize(
    ("test", "factory", "message"),
    [
        (
            "ContribTest.test_optimizers_accept_extra_args_X_wrapFalse",
            _broken(update=_takes_no_extra_args),
            "unexpected keyword argument",
        ),
        (f"ContribTest.{SCHEDULE}_X", _has_no_annotation, "skipped"),
        ("AliasTest.test_preserve_dtype_X_bfloat16", _broken(update=_returns_float32), "!="),
        (
            "Float64Test.test_mixed_dtype_input_outputs_X",
            _broken(update=_returns_float32_state),
            "float32",
        ),
        (
            "ShardingTest.test_state_sharding_type_init_match_update_X",
            _broken(init=_forgets_sharding),
            "Mismatch",
        ),
    ],
)
def test_faults_are_found(test, factory, message):
    suite = optax_suites.load(test.partition(".")[0], [Variant("X", factory, MOMENTUM)])
    (case,) = (case for case in suite.cases if case.id == test)
    failures = optax_suites.run_case(suite, case)
    assert any(message in failure for failure in failures), failures
