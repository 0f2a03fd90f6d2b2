"""Runs Optax's own generic test suites on optimizers that Optax does not know.

Optax's wheel contains its test modules. Which optimizers they test is fixed by decorators while
the module is being imported, so the modules are imported here once more, privately, with decorators
that put other optimizers into the place of Optax's. Nothing of Optax is copied or changed: its own
modules, if they are imported anywhere else, are not the ones made here. Tests that are given no
optimizer are left out: all they can show is whether Optax works.
"""

import contextlib
import importlib.util
import itertools
import os
import types
import unittest
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import jax
import optax
from absl.testing import parameterized

MODULES = {
    "ContribTest": "optax.contrib._common_test",
    "AliasTest": "optax._src.alias_test",
    "Float64Test": "optax._src.float64_test",
    "ShardingTest": "optax._src.sharding_test",
}


class Variant(NamedTuple):
    """An optimizer under test."""

    name: str  # not that of an optimizer in Optax, as the suites make exceptions for some of those
    factory: Callable[..., optax.GradientTransformation]
    kwargs: Mapping[str, Any]  # the hyperparameters that the suites give to the factory


class Case(NamedTuple):
    """One test of Optax's with one variant; the label stands for the other parameters."""

    class_name: str
    test: str
    variant: str
    label: str

    @property
    def method(self) -> str:
        return "_".join(filter(None, (self.test, self.variant, self.label)))

    @property
    def id(self) -> str:
        return f"{self.class_name}.{self.method}"


class Suite(NamedTuple):
    """A test class of Optax's for pytest to collect, and what it should contain."""

    test_class: type[unittest.TestCase]
    cases: list[Case]


class _NoSkips(parameterized.TestCase):
    def skipTest(self, reason):
        self.fail(f"skipped: {reason}")


class _Jax(types.ModuleType):
    """JAX of a version that is above all others: as strings, '0.10.2' is below '0.7.2'."""

    __version__ = "1"

    def __getattr__(self, name):
        return getattr(jax, name)


def _label(value):
    """The part of a case's name that stands for the value of one parameter."""
    return (getattr(value, "__name__", None) or str(value)).removeprefix("_setup_")


class _Decorators:
    """What stands in for `absl.testing.parameterized` while a suite is imported."""

    def __init__(self, class_name, variants, keep):
        self._class_name, self._variants, self._keep = class_name, variants, keep
        self._named_parameters = parameterized.named_parameters
        self.cases = []

    def product(self, *sequences, **grid):
        """Optax's parameters are (optimizers, one=(...), another=(...))."""
        if not any("opt_name" in keys for sequence in sequences for keys in sequence):
            return lambda test: None
        (optimizers,) = sequences
        names = [name if isinstance(values[0], bool) else "" for name, values in grid.items()]

        def parameters(variant):
            # The lists differ in whether they speak of wrappers. Nothing is wrapped here.
            given = dict.fromkeys(optimizers[0], None)
            given |= {"opt_name": variant.name, "opt_kwargs": dict(variant.kwargs)}
            for values in itertools.product(*grid.values()):
                labels = [f"{name}{_label(x)}" for name, x in zip(names, values, strict=True)]
                yield labels, given | dict(zip(grid, values, strict=True))

        return lambda test: self._decorate(test, parameters)

    def named_parameters(self, *cases):
        """Optax's parameters are either one list of optimizers, or several single cases."""
        if len(cases) != 1:
            return lambda test: None
        (first, *_) = cases[0]

        def parameters(variant):
            # The float64 suite wants (name, factory, kwargs), the sharding suite (name, optimizer).
            if len(first) == 3:
                yield [], (variant.factory, dict(variant.kwargs))
            else:
                yield [], (variant.factory(**variant.kwargs),)

        return lambda test: self._decorate(test, parameters)

    def _decorate(self, test, parameters):
        kept = []
        for variant in self._variants:
            for labels, values in parameters(variant):
                case = Case(self._class_name, test.__name__, variant.name, "_".join(labels))
                if self._keep(case):
                    self.cases.append(case)
                    name = "_".join([variant.name, *labels])
                    as_dict = isinstance(values, dict)
                    kept.append({"testcase_name": name} | values if as_dict else (name, *values))
        return self._named_parameters(*kept)(test) if kept else None


@contextlib.contextmanager
def _import_shims(decorators):
    with (
        mock.patch.object(parameterized, "product", decorators.product),
        mock.patch.object(parameterized, "named_parameters", decorators.named_parameters),
        # The sharding suite overwrites XLA_FLAGS when it is imported.
        mock.patch.dict(os.environ),
        # It also makes one optimizer of each kind that Optax has, one of them in a deprecated way.
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Specifying a key will be required", UserWarning)
        yield


def load(class_name, variants, keep=lambda case: True) -> Suite:
    """Makes one of Optax's test classes with `variants` in the place of Optax's optimizers.

    Args:
      class_name: A key of `MODULES`.
      variants: The optimizers to test.
      keep: Whether a case is to be in the class.
    """
    spec = importlib.util.find_spec(MODULES[class_name])
    # The module's own name would make it a second owner of what belongs to Optax's module.
    spec = importlib.util.spec_from_file_location(f"{__name__}.{class_name}", spec.origin)
    module = importlib.util.module_from_spec(spec)
    decorators = _Decorators(class_name, variants, keep)
    with _import_shims(decorators):
        spec.loader.exec_module(module)

    # Where the tests look optimizers up by name. Nothing of Optax is left there, so that none of
    # its optimizers can be tested by mistake.
    factories = {variant.name: variant.factory for variant in variants}
    for namespace in ("alias", "contrib"):
        if hasattr(module, namespace):
            setattr(module, namespace, types.SimpleNamespace(**factories))
    module.jax = _Jax("jax")
    bases = (_NoSkips, getattr(module, class_name))
    return Suite(type(class_name, bases, {"__module__": module.__name__}), decorators.cases)


def run_case(suite: Suite, case: Case) -> list[str]:
    """Runs one case outside pytest and returns the tracebacks of what failed in it."""
    result = unittest.TestResult()
    suite.test_class(case.method).run(result)
    assert result.testsRun == 1
    return [traceback for _, traceback in result.failures + result.errors]
