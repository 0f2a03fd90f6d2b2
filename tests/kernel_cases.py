"""The shapes, dtypes and modes that every kernel is tested with, and how it is compared."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

import optax_dcasgd as dc
from optax_dcasgd._hyperparameters import cast
from optax_dcasgd.kernels import Operands, Results, reference

# Below, at and beyond a tile and a GPU's piece; odd in every dimension; one dimension to four.
SHAPES = [
    (0,),
    (3, 0),
    (),
    (1,),
    (7,),
    (1024,),
    (2048 + 5,),
    (3, 5),
    (8, 128),
    (33, 70),
    (5, 3, 130),
    (3, 3, 9, 20),
]
SHAPES_WITH_NUMBERS = [shape for shape in SHAPES if 0 not in shape]  # others are left to XLA
DTYPES = [  # of the parameters, of their momentum and ν
    ("float32", "float32"),
    ("float32", "bfloat16"),
    ("bfloat16", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float32"),
]
TPU_DTYPES = [dtypes for dtypes in DTYPES if "float16" not in dtypes]


class Mode(NamedTuple):
    """Which arrays and hyperparameters an update has."""

    remembers: bool = True  # prev
    knows: bool = False  # stale
    momentum: Any = 0.9  # μ; None: no buffer; "update": the buffer of the last update alone
    decay: float | None = None
    clip: float | None = None
    first: bool = False
    lamda: float = 0.5


MODES = {
    "stored": Mode(),
    "stored, first update": Mode(first=True),
    "stored, DC-a, clip": Mode(decay=0.95, clip=0.5),
    "stored, no momentum": Mode(momentum=None),
    "stored, no momentum, DC-a": Mode(momentum=None, decay=0.95),
    "stored, and known": Mode(knows=True),
    "known": Mode(remembers=False, knows=True),
    "known, DC-a": Mode(remembers=False, knows=True, decay=0.95),
    "known, no momentum, clip": Mode(remembers=False, knows=True, momentum=None, clip=1.0),
    "updates": Mode(remembers=False),
    "updates, no momentum": Mode(remembers=False, momentum="update"),
    "λ is zero": Mode(lamda=0.0, decay=0.95),
}


class Case(NamedTuple):
    """One update of one array."""

    mode: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str] = ("float32", "float32")
    step: bool = True


EACH_MODE = [Case(mode, (1100,), step=step) for mode in MODES for step in (False, True)]
EACH_SHAPE = [Case("stored, DC-a, clip", shape) for shape in SHAPES]
EACH_DTYPE = [
    Case(mode, (33, 70), dtypes, step)
    for dtypes in DTYPES
    for mode, step in (("updates", True), ("stored, no momentum, DC-a", False))
]
ALL = [
    Case(mode, shape, dtypes, step)
    for mode in MODES
    for shape in [(2048 + 5,), (33, 70)]
    for dtypes in DTYPES
    for step in (False, True)
]


def hyperparams(mode: Mode) -> dict[str, float | None]:
    """What `kernels.update` takes of that mode."""
    return {
        "learning_rate": 0.1,
        "momentum": None if mode.momentum == "update" else mode.momentum,
        "lamda": mode.lamda,
        "decay": mode.decay,
        "eps": 1e-7,
        "clip": mode.clip,
    }


def arguments(mode: Mode, shape, dtype="float32", state_dtype="float32"):
    """Operands of that mode, the update count, and its numbers."""
    rng = np.random.default_rng(len(shape) + sum(shape))

    def array(scale, dtype=dtype):
        return jnp.asarray(scale * rng.normal(size=shape), dtype)

    param, near = array(1.0), array(0.1)
    operands = Operands(
        grad=array(1.0),
        param=param,
        stale=param + near if mode.knows else None,
        prev=param - near if mode.remembers else None,
        momentum=None if mode.momentum is None else array(0.1, state_dtype),
        nu=None if mode.decay is None else jnp.abs(array(1.0, state_dtype)),
    )
    numbers = cast(hyperparams(mode), jnp.float32)
    return operands, jnp.asarray(0 if mode.first else 3, jnp.int32), numbers


def assert_same(actual: Results, expected: Results, param, what="") -> None:
    """The same structure, shapes and dtypes, and values within one rounding of what was added."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    # The compilers contract multiply-adds differently: an error of an ulp of the terms.
    scale = float(jnp.max(jnp.abs(param).astype(jnp.float32), initial=1.0))
    for name, a, e in zip(Results._fields, actual, expected, strict=True):
        if e is not None:
            np.testing.assert_allclose(
                np.asarray(a, np.float64),
                np.asarray(e, np.float64),
                rtol=2 * float(jnp.finfo(e.dtype).eps),
                atol=4 * float(jnp.finfo(jnp.float32).eps) * scale,
                err_msg=f"{what} {name}",
            )
    if expected.prev is not None:
        np.testing.assert_array_equal(np.asarray(actual.prev), np.asarray(param), "prev")


def check(kernel, cases) -> None:
    """Compares a kernel, called like `reference.update`, with it; one program for all cases."""
    given = [arguments(MODES[case.mode], case.shape, *case.dtypes) for case in cases]

    @jax.jit
    def run(given):
        return [
            [update(*args, step=case.step) for update in (kernel, reference.update)]
            for args, case in zip(given, cases, strict=True)
        ]

    for case, (operands, *_), (actual, expected) in zip(cases, given, run(given), strict=True):
        assert_same(actual, expected, operands.param, case)


def make(name, **settings):
    """`dcasgd` or `fused_dcasgd`, with momentum unless it is given."""
    return getattr(dc, name)(**{"learning_rate": 0.1, "momentum": 0.9, "lamda": 0.5} | settings)


SETTINGS = {
    "stored": {},
    "updates": {"store": "updates"},
    "adaptive": {"decay": 0.9, "clip": 0.5},
    "no momentum": {"momentum": None},
}
