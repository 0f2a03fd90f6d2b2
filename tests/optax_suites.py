"""Runs Optax's own generic test suites on optimizers that Optax does not know.

Optax's wheel contains its test modules. Which optimizers they test is fixed by decorators while
the module is being imported, so the modules are imported here once more, privately, with decorators
that put other optimizers into the place of Optax's. Nothing of Optax is copied or changed: its own
modules, if they are imported anywhere else, are not the ones made here.
"""

import contextlib
import importlib.util
import itertools
import os
import sys
import types
import unittest
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """An optimizer under test.

    Attributes:
      name: Part of the names of its test cases. Not the name of any optimizer in Optax, since the
        suites make exceptions for some of those.
      factory: What makes the optimizer.
      kwargs: The hyperparameters that the suites give to the factory.
      twin: Makes, from the same `kwargs`, the optimizer of Optax that this one extends.
    """

    name: str
    factory: Callable[..., optax.GradientTransformation]
    kwargs: Mapping[str, Any]
    twin: Callable[..., optax.GradientTransformation]


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
    """A test class of Optax's that runs on our variants.

    Attributes:
      test_class: The class, for pytest to collect.
      cases: What the class should contain.
      left_out: The cases that `keep` refused.
      other_tests: Tests of the class that are not about the optimizers it is given. They are not
        in `test_class`, because all they can show is whether Optax works.
      other_classes: The same for whole classes of the module.
    """

    test_class: type[unittest.TestCase]
    cases: list[Case]
    left_out: list[Case]
    other_tests: set[str]
    other_classes: set[str]


class UnexpectedSkipError(AssertionError):
    """A test was skipped where Optax has no reason to skip it."""


class _SkipIsFailure:
    """Hands everything on to a test result, but a skip as a failure.

    Wherever the skip comes from: raised in a test or in one of its subtests, or set by a decorator.
    """

    def __init__(self, result):
        self._result = result

    def __getattr__(self, name):
        return getattr(self._result, name)

    def addSkip(self, test, reason):
        try:
            raise UnexpectedSkipError(f"skipped: {reason}")
        except UnexpectedSkipError:
            if isinstance(test, unittest.case._SubTest):
                self._result.addSubTest(test.test_case, test, sys.exc_info())
            else:
                self._result.addFailure(test, sys.exc_info())


class _NoSkips(parameterized.TestCase):
    def run(self, result=None):
        return super().run(_SkipIsFailure(self.defaultTestResult() if result is None else result))


class _Version(str):
    """A version that compares by its numbers."""

    def _numbers(self, version):
        return tuple(int(part) for part in version.split(".") if part.isdecimal())

    def __lt__(self, other):
        return self._numbers(self) < self._numbers(other)


class _Jax(types.ModuleType):
    """JAX, but with a version that can be compared.

    The sharding suite skips where `jax.__version__ < '0.7.2'`, and as a string '0.10.2' is less.
    """

    __version__ = _Version(jax.__version__)

    def __getattr__(self, name):
        return getattr(jax, name)


def _label(value: Any) -> str:
    """The part of a case's name that stands for the value of one parameter."""
    text = getattr(value, "__name__", None) or str(value)
    return text.removeprefix("_setup_")


class _Decorators:
    """What stands in for `absl.testing.parameterized` while a suite is imported."""

    def __init__(self, class_name: str, variants: Sequence[Variant], keep: Callable[[Case], bool]):
        self._class_name = class_name
        self._variants = variants
        self._keep = keep
        self._named_parameters = parameterized.named_parameters
        self.cases: list[Case] = []
        self.left_out: list[Case] = []
        self.other_tests: set[str] = set()

    def product(self, *sequences, **grid):
        """Optax's parameters are (optimizers, one=(...), another=(...))."""
        if not any("opt_name" in keys for sequence in sequences for keys in sequence):
            return self._not_about_optimizers
        (optimizers,) = sequences
        names = [name if isinstance(values[0], bool) else "" for name, values in grid.items()]

        def parameters(variant):
            # The lists differ in whether they speak of wrappers. Nothing is wrapped here.
            given = dict.fromkeys(optimizers[0], None)
            given |= {"opt_name": variant.name, "opt_kwargs": dict(variant.kwargs)}
            for values in itertools.product(*grid.values()):
                labels = [
                    f"{name}{_label(value)}" for name, value in zip(names, values, strict=True)
                ]
                yield labels, given | dict(zip(grid, values, strict=True))

        return lambda test: self._decorate(test, parameters)

    def named_parameters(self, *cases):
        """Optax's parameters are either one list of optimizers, or several single cases."""
        if len(cases) != 1:
            return self._not_about_optimizers
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
                name = "_".join([variant.name, *labels])
                case = Case(self._class_name, test.__name__, variant.name, "_".join(labels))
                if not self._keep(case):
                    self.left_out.append(case)
                    continue
                self.cases.append(case)
                if isinstance(values, dict):
                    kept.append({"testcase_name": name} | values)
                else:
                    kept.append((name, *values))
        return self._named_parameters(*kept)(test) if kept else None

    def _not_about_optimizers(self, test):
        if test.__qualname__.startswith(f"{self._class_name}."):
            self.other_tests.add(test.__name__)


@contextlib.contextmanager
def _import_shims(decorators: _Decorators) -> Iterator[None]:
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


def load(
    class_name: str,
    variants: Sequence[Variant],
    keep: Callable[[Case], bool] = lambda case: True,
) -> Suite:
    """Makes one of Optax's test classes with `variants` in the place of Optax's optimizers.

    Args:
      class_name: A key of `MODULES`.
      variants: The optimizers to test.
      keep: Whether a case is to be in the class.

    Returns:
      The class, and what is in it.
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

    original = getattr(module, class_name)
    test_class = type(class_name, (_NoSkips, original), {"__module__": module.__name__})
    classes = {
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, unittest.TestCase)
    }
    return Suite(
        test_class,
        decorators.cases,
        decorators.left_out,
        decorators.other_tests,
        classes - {class_name},
    )


def run_case(suite: Suite, case: Case) -> list[str]:
    """Runs one case outside pytest and returns the tracebacks of what failed in it."""
    result = unittest.TestResult()
    suite.test_class(case.method).run(result)
    assert result.testsRun == 1
    return [traceback for _, traceback in result.failures + result.errors]
