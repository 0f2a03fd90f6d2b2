"""Arbitrary trees, dtypes, data and hyperparameters, and how exact results have to be."""

from typing import Any, NamedTuple

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference
from hypothesis import strategies as st


def examples(number):
    """Hypothesis settings: the same examples in every run, and none too slow."""
    return hypothesis.settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


# Trees ------------------------------------------------------------------------------------------


class Spec(NamedTuple):
    """Shape and dtype of a parameter. Only ever an element of `Tree.specs`, never of a tree."""

    shape: tuple[int, ...]
    dtype: str


class Pair(NamedTuple):
    first: Any
    second: Any


class Tree(NamedTuple):
    """Parameters to be: the structure of the tree, and its leaves in order."""

    treedef: Any
    specs: list[Spec]

    def unflatten(self, leaves):
        return self.treedef.unflatten(leaves)


# A few fixed shapes, since every new one has to be compiled for; those with elements more often.
SHAPES = [(3,), (3,), (3,), (), (2, 0)]
NARROW = ["float32", "float16", "bfloat16", "complex64"]
WIDE = ["float64", "complex128", "float32", "float16", "bfloat16", "complex64"]
HALF = ["bfloat16", "float16"]


@st.composite
def trees(draw, dtypes):
    """Nested dicts, lists, tuples and NamedTuples with absent and masked leaves among others."""
    specs = []

    def leaf():
        specs.append(Spec(draw(st.sampled_from(SHAPES)), draw(st.sampled_from(dtypes))))
        return 0.0

    def build(depth):
        kind = draw(st.sampled_from([*["leaf"] * 5, "container", "container", "none", "masked"]))
        if kind == "none":
            return None
        if kind == "masked":
            return optax.MaskedNode()
        if kind == "leaf" or depth == 2:
            return leaf()
        return container(depth + 1)

    def container(depth):
        kind = draw(st.sampled_from(["dict", "list", "tuple", "named tuple"]))
        if kind == "named tuple":
            return Pair(build(depth), build(depth))
        children = [build(depth) for _ in range(draw(st.sampled_from([3, 2, 1, 0])))]
        if kind == "dict":
            return {f"key{i}": child for i, child in enumerate(children)}
        return children if kind == "list" else tuple(children)

    tree = draw(st.sampled_from([lambda: container(0)] * 4 + [leaf]))()
    # Parameters in the order of the leaves; a dict's keys are already sorted.
    return Tree(jax.tree.structure(tree), specs)


class Data:
    """Numbers for a test, from one seed: a failing example shrinks in structure, not in them."""

    def __init__(self, seed):
        self.seed, self.rng = seed, np.random.default_rng(seed)

    def __repr__(self):
        return f"Data({self.seed})"

    def array(self, spec, largest=1.0):
        """Both signs, eight orders of magnitude in base 2, every tenth component zero."""

        def real():
            exponent = self.rng.uniform(-8, 0, spec.shape)
            sign = self.rng.choice([-1.0, 1.0, 0.0], spec.shape, p=[0.45, 0.45, 0.1])
            return largest * sign * 2.0**exponent

        x = real() + 1j * real() if spec.dtype.startswith("complex") else real()
        return jnp.asarray(np.asarray(x), spec.dtype)

    def params(self, tree):
        return [self.array(spec) for spec in tree.specs]

    def grads(self, tree, *, wider, absent=True):
        """Gradients; ``wider`` gives half-precision parameters float32 ones, ``absent`` none."""
        return [
            None
            if absent and self.rng.random() < 0.1
            else self.array(spec._replace(dtype="float32") if wider and is_half(spec) else spec)
            for spec in tree.specs
        ]

    def perturbed(self, params):
        """Stale parameters near the given ones, some of them equal."""
        return [
            jnp.where(
                self.rng.random(p.shape) < 0.2, p, p + self.array(Spec(p.shape, p.dtype.name), 0.5)
            )
            for p in params
        ]


def is_half(spec):
    return jnp.dtype(spec.dtype) in (jnp.bfloat16, jnp.float16)


def is_complex(x):
    return jnp.issubdtype(x.dtype, jnp.complexfloating)


def apply(params, updates):
    """``optax.apply_updates`` on a list in which an update may be absent."""
    return [
        p if u is None else optax.apply_updates(p, u) for p, u in zip(params, updates, strict=True)
    ]


def leaves_of(tree, updates):
    """Updates as a list with ``None`` where there was no gradient; checks their structure."""
    leaves = tree.treedef.flatten_up_to(updates)
    assert jax.tree.structure(tree.unflatten([0] * len(leaves))) == tree.treedef
    return leaves


# Comparisons ------------------------------------------------------------------------------------


def unit_roundoff(dtype):
    """Half its `eps`: one operation is off by at most so much of its result."""
    return float(jnp.finfo(dtype).eps) / 2


def check(actual, expected, terms, rounded=0.0):
    """``actual`` is off by its own rounding, and by 40 roundings of the arithmetic on ``terms``.

    No formula here takes 40 operations. They are counted relative to the terms that are added,
    because terms of opposite sign may cancel. The arithmetic is in float32 at least. ``rounded`` is
    what has been rounded to the dtype of the result before.
    """
    compute = unit_roundoff(jnp.promote_types(jnp.float32, actual.dtype))
    # float16 has subnormal numbers here; in the other dtypes all values used are normal.
    allowed = 2.0**-24 if actual.dtype == jnp.float16 else 0.0
    allowed += 1.02 * unit_roundoff(actual.dtype) * (np.abs(expected) + np.abs(rounded))
    allowed += 40 * compute * terms
    off = np.abs(reference.wide(actual) - expected)
    assert np.all(off <= allowed), f"off by {off}, allowed {allowed}: {actual}"


def signature(tree):
    """Everything by which jit tells two trees apart."""
    return jax.tree.structure(tree), [
        (x.shape, x.dtype, x.weak_type, type(x)) for x in jax.tree.leaves(tree)
    ]


def initialise(tx, params):
    """``tx.init``, which owes its users to copy, and to say in advance what it will return."""
    state = tx.init(params)
    assert not buffers(state) & buffers(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, params), state)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    return state


def buffers(tree):
    return {x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) if x.size}


# Hyperparameters --------------------------------------------------------------------------------


def around(low, high):
    """Numbers from ``low`` on, but none so small that products of them would be subnormal."""
    return st.floats(max(2.0**-10, low), high)


COMPENSATION = {
    "lamda": st.sampled_from([0.04, 2.0, 0.0, 1.0]) | around(0, 4),
    "decay": st.none() | st.sampled_from([0.95, 0.0, 0.5, 0.99]) | around(0, 0.95),
    "eps": st.sampled_from([1e-7, 1e-3, 1.0]),
    "clip": st.none() | st.sampled_from([0.0, 1.0, 0.1]) | around(0, 2),
}
OPTIMIZER = {
    "learning_rate": st.sampled_from([0.1, 1.0, 0.01]) | around(0, 1),
    "momentum": st.none() | st.sampled_from([0.9, 0.0, 0.5]) | around(0, 0.95),
    **COMPENSATION,
}


class Hyperparameters(NamedTuple):
    """The same values twice, and whether ``optax.inject_hyperparams`` is to hold the first."""

    ours: dict[str, Any]
    reference: dict[str, Any]  # numbers, or functions of the update count
    injected: bool

    def at(self, count):
        """The reference's values for one update."""
        return {name: reference.at(value, count) for name, value in self.reference.items()}


@st.composite
def hyperparameters(draw, strategies):
    """Python numbers, JAX arrays, schedules, or injected ones.

    A Python number means what it says, and reaches the arithmetic by one rounding. The others are
    of float32, and the reference gets what is in them.
    """
    how = draw(st.sampled_from(["float", "float", "array", "schedule", "injected"]))
    values = {name: draw(strategy) for name, strategy in strategies.items()}
    library, theirs = dict(values), dict(values)
    for name, value in values.items():
        if value is None or how == "float":
            continue
        value = float(np.float32(value))
        if how == "schedule":  # different at every count, and exact in float32
            table = [value / 2**i for i in range(8)]
            library[name] = lambda count, table=table: jnp.asarray(table, jnp.float32)[count]
            theirs[name] = lambda count, table=table: table[count]
        else:
            library[name] = value if how == "injected" else jnp.float32(value)
            theirs[name] = value
    return Hyperparameters(library, theirs, how == "injected")


def build(factory, hyperparams, **options):
    """The transformation, and what finds its own state in the state of the injected one."""
    if not hyperparams.injected:
        return factory(**hyperparams.ours, **options), lambda state: state
    # Left alone, Optax gives hyperparameters the dtype of the first gradient, be it bfloat16.
    factory = optax.inject_hyperparams(
        factory, static_args=tuple(options), hyperparam_dtype=jnp.float32
    )
    return factory(**hyperparams.ours, **options), lambda state: state.inner_state


@st.composite
def cases(draw, strategies, dtypes_of_x64=((False, NARROW), (True, WIDE))):
    """What most properties are about: x64 or not, a tree, hyperparameters, and data."""
    x64, dtypes = draw(st.sampled_from(dtypes_of_x64))
    return (
        x64,
        draw(trees(dtypes)),
        draw(hyperparameters(strategies)),
        Data(draw(st.integers(0, 2**32 - 1))),
    )
