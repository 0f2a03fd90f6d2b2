"""On a mesh of eight devices, with parameters sharded in every way that two axes allow.

An update is elementwise, so it must leave everything where it is, talk to no other device, and
compute what one device alone computes.
"""

import functools
import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import random_tree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from transformation_cases import make_step

import optax_dcasgd as dc

NUM_WORKERS = 3
WORKERS = [1, 0, 1, 2, 0]
STEPS = 5
SHAPES = {"bias": (8,), "kernel": (4, 3, 2), "scale": ()}
SPECS = {"bias": P(("x", "y")), "kernel": P("x", None, "y"), "scale": P()}
KINDS = ("auto", "explicit")


# --- Meshes ---


@functools.cache
def mesh_of(kind):
    axis_type = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[kind]
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))


def sharded(tree, kind):
    return {
        name: jax.device_put(leaf, NamedSharding(mesh_of(kind), SPECS[name]))
        for name, leaf in tree.items()
    }


# --- Optimizers ---


class Mode(NamedTuple):
    init: Any
    step: Any  # (params, state, grads, extra_args) -> (params, state)
    extra_args: Any = None  # "worker", "stale_params" or None
    dtype: Any = jnp.float32


def optimizer(tx, *args):
    return Mode(tx.init, make_step(tx), *args)


def rule(rule, **kwargs):
    tx = dc.remember_params(optax.chain(rule, optax.sgd(0.1)), **kwargs)
    return optimizer(tx, "worker" if kwargs else None)


DELAYS = {"bias": 0, "kernel": 2, "scale": 1}
given_dcasgd = dc.dcasgd(0.1, 0.9, 0.5, decay=0.9, clip=0.5, store=None)
MODES = {
    "dcasgd": optimizer(dc.dcasgd(0.1, 0.9, 0.5)),
    "dcasgd-updates": optimizer(dc.dcasgd(0.1, 0.9, 0.5, store="updates")),
    "dcasgd-given": optimizer(given_dcasgd, "stale_params"),
    "dcasgd-workers": optimizer(
        dc.remember_params(given_dcasgd, num_workers=NUM_WORKERS), "worker"
    ),
    "fused": optimizer(dc.fused_dcasgd(0.1, 0.9, 0.5, decay=0.9)),
    "add_delay_compensation": rule(dc.add_delay_compensation(0.5, decay=0.9)),
    "scale_by_gap": rule(dc.scale_by_gap(0.9)),
    "scale_by_gap-workers": rule(dc.scale_by_gap(0.9), num_workers=NUM_WORKERS),
    "delay_gradients": optimizer(dc.delay_gradients(given_dcasgd, 2)),
    "delay_gradients-tree": optimizer(dc.delay_gradients(given_dcasgd, DELAYS)),
    "with_master_weights": optimizer(
        dc.with_master_weights(dc.dcasgd(0.1, 0.9, 0.5)), None, jnp.bfloat16
    ),
}
# Each optimizer on one mesh, and those with the most intricate states on both.
ON_BOTH = ("dcasgd", "dcasgd-workers", "delay_gradients-tree")
EACH = [
    pytest.param(
        mode, kind, marks=[pytest.mark.slow] * (kind != KINDS[i % 2] and mode not in ON_BOTH)
    )
    for i, mode in enumerate(MODES)
    for kind in KINDS
]
each = pytest.mark.parametrize(("mode", "kind"), EACH)
on_both = pytest.mark.parametrize(
    ("mode", "kind"), [(mode, kind) for mode in ON_BOTH for kind in KINDS]
)


def inputs(mode, kind=None):
    """Parameters, and the gradients and extra arguments of every step; on one device or a mesh."""
    _, _, extra, dtype = MODES[mode]

    def tree(seed):
        tree = random_tree(seed, shapes=SHAPES, dtype=dtype)
        return tree if kind is None else sharded(tree, kind)

    extras = {
        None: lambda t: {},
        "worker": lambda t: {"worker": np.int32(WORKERS[t])},
        "stale_params": lambda t: {"stale_params": tree(200 + t)},
    }[extra]
    return tree(0), [tree(100 + t) for t in range(STEPS)], [extras(t) for t in range(STEPS)]


@functools.cache
def compiled_step(mode, kind=None):
    params, grads, extras = inputs(mode, kind)
    step = jax.jit(MODES[mode].step)
    return step.lower(params, MODES[mode].init(params), grads[0], extras[0]).compile()


# --- Where the state lives ---


def assert_sharded_like_params(tree, kind):
    """By the name of the parameter; an axis in front of its own is not sharded."""
    found = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        where = jax.tree_util.keystr(path)
        if names:
            in_front = leaf.ndim - len(SHAPES[names[-1]])
            wanted = NamedSharding(mesh_of(kind), P(*[None] * in_front, *SPECS[names[-1]]))
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (where, leaf.sharding)
            found.add(names[-1])
        else:  # a count has one value wherever it is
            assert leaf.sharding.is_fully_replicated, (where, leaf.sharding)
    assert found == set(SHAPES)


COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)"
)


@each
def test_a_sharded_step_is_that_of_one_device_without_a_collective(mode, kind):
    """And leaves parameters and state where they are."""
    params, grads, extras = inputs(mode)
    first, state = params, MODES[mode].init(params)
    on_mesh, grads_on_mesh, extras_on_mesh = inputs(mode, kind)
    with jax.set_mesh(mesh_of(kind)):
        # Compiled without a word about the shardings of the results.
        for init in (MODES[mode].init, jax.jit(MODES[mode].init)):
            state_on_mesh = init(on_mesh)
            assert_sharded_like_params(state_on_mesh, kind)
        program = compiled_step(mode, kind).as_text()
    assert "num_partitions=8" in program
    assert COLLECTIVE.findall(program) == []
    for t in range(STEPS):
        params, state = compiled_step(mode)(params, state, grads[t], extras[t])
        with jax.set_mesh(mesh_of(kind)):
            on_mesh, state_on_mesh = compiled_step(mode, kind)(
                on_mesh, state_on_mesh, grads_on_mesh[t], extras_on_mesh[t]
            )
        assert_sharded_like_params((on_mesh, state_on_mesh), kind)
        assert_within_one_ulp((on_mesh, state_on_mesh), (params, state))
        on_mesh = sharded(params, kind)  # so that roundings do not add up
    assert max(np.max(np.abs(params[n] - first[n])) for n in SHAPES) > 0.1


def assert_within_one_ulp(actual, expected):
    """Of the largest component: what a sum may lose is relative to its terms, not to itself."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        ulp = 0 if a.dtype == jnp.int32 else float(jnp.finfo(a.dtype).eps)
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=0, atol=ulp * np.max(np.abs(e)))


def test_a_collective_would_be_found():
    """What the test above rests on."""
    kernel = sharded(random_tree(0, shapes=SHAPES), "auto")["kernel"]
    program = jax.jit(lambda x: x - jnp.mean(x)).lower(kernel).compile().as_text()
    assert "num_partitions=8" in program
    assert COLLECTIVE.findall(program) != []


@on_both
def test_buffers_are_donated_shard_by_shard(mode, kind):
    """Warnings are errors, and a donated shard that cannot be reused would be one."""
    params, grads, extras = inputs(mode, kind)
    with jax.set_mesh(mesh_of(kind)):
        state = MODES[mode].init(params)
        step = jax.jit(MODES[mode].step, donate_argnums=(0, 1))
        old = jax.tree.leaves((params, state))
        shards = [shard.data for leaf in old for shard in leaf.addressable_shards]
        # Before they are donated: one buffer donated twice ends the process, not the test.
        assert len({shard.unsafe_buffer_pointer() for shard in shards}) == len(shards)
        step(params, state, grads[0], extras[0])
    assert all(leaf.is_deleted() for leaf in old)


# --- shard_map ---


def train(mode, params, grads, extras):
    state = MODES[mode].init(params)
    for g, extra_args in zip(grads, extras, strict=True):
        params, state = MODES[mode].step(params, state, g, extra_args)
    return params


@pytest.mark.parametrize(
    ("mode", "kind"), [(m, "auto") for m in MODES] + [(m, "explicit") for m in ON_BOTH]
)
def test_inside_shard_map(mode, kind):
    """Each device runs the optimizer, init and all, on its own block of the parameters."""
    specs = {"stale_params": {"stale_params": SPECS}}.get(MODES[mode].extra_args, P())
    train_blocks = jax.shard_map(
        functools.partial(train, mode),
        mesh=mesh_of(kind),
        in_specs=(SPECS, [SPECS] * 3, [specs] * 3),
        out_specs=SPECS,
    )
    params, grads, extras = inputs(mode, kind)
    with jax.set_mesh(mesh_of(kind)):
        actual = jax.jit(train_blocks)(params, grads[:3], extras[:3])
    params, grads, extras = inputs(mode)
    state = MODES[mode].init(params)
    for grad, extra in list(zip(grads, extras, strict=True))[:3]:
        params, state = compiled_step(mode)(params, state, grad, extra)
    for name, expected in params.items():  # of size 1, each update rounded at most by half an ulp
        np.testing.assert_allclose(
            np.asarray(actual[name], np.float64), np.asarray(expected, np.float64), 1e-6, 2e-7
        )
