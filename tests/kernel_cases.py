"""The shapes, dtypes and modes that every kernel is tested with, and the test that each runs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_dcasgd.kernels import reference
from optax_dcasgd.kernels.reference import Hyperparameters, Leaf, Operands

# Below, at and beyond a tile, a block and a piece; odd in every dimension; one dimension to four.
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
    (300, 1100),
    (5, 3, 130),
    (3, 3, 9, 40),
]
SHAPES_WITH_NUMBERS = [shape for shape in SHAPES if 0 not in shape]  # others are left to XLA
FEW_SHAPES = [(2048 + 5,), (33, 70)]
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


def arguments(mode: Mode, shape, dtype="float32", state_dtype="float32"):
    """Operands of that mode, the update count, and its scalars."""
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
    hyperparams = Hyperparameters(
        learning_rate=0.1,
        momentum=None if mode.momentum == "update" else mode.momentum,
        lamda=mode.lamda,
        decay=mode.decay,
        eps=1e-7,
        clip=mode.clip,
    )
    count = jnp.asarray(0 if mode.first else 3, jnp.int32)
    return operands, count, reference.scalars(hyperparams, jnp.float32)


def assert_same(actual: Leaf, expected: Leaf, param) -> None:
    """The same structure, shapes and dtypes, and values within one rounding of what was added."""
    for name in Leaf._fields:
        a, e = getattr(actual, name), getattr(expected, name)
        assert (a is None) == (e is None), name
        if e is None:
            continue
        assert (a.shape, a.dtype) == (e.shape, e.dtype), name
        ulp = float(jnp.finfo(e.dtype).eps)
        # The compilers contract multiply-adds differently: an error of an ulp of the terms.
        scale = float(jnp.max(jnp.abs(param).astype(jnp.float32), initial=1.0))
        np.testing.assert_allclose(
            np.asarray(a, np.float64),
            np.asarray(e, np.float64),
            rtol=2 * ulp,
            atol=4 * float(jnp.finfo(jnp.float32).eps) * scale,
            err_msg=name,
        )
    if expected.prev is not None:
        np.testing.assert_array_equal(np.asarray(actual.prev), np.asarray(param), "prev")


class KernelTests:
    """What a kernel has to do; a subclass per kernel says how it runs here."""

    kernel: Any  # like reference.leaf

    def check(self, mode: Mode, shape, dtype, state_dtype, step):
        """Compares one call of the kernel, compiled, with the reference."""
        operands, count, scalars = arguments(mode, shape, dtype, state_dtype)
        actual = jax.jit(lambda *args: type(self).kernel(*args, step=step))(
            operands, count, scalars
        )
        expected = reference.leaf(operands, count, scalars, step=step)
        assert_same(actual, expected, operands.param)
