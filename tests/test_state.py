"""What the state of every transformation promises: it stays as it is, and it can be kept."""

import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import reference
from common import assert_bit_equal
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from transformation_cases import CASES, DISTINCT, GRADS, NUM_WORKERS, PARAMS, inputs, make_step

import optax_dcasgd as dc

STEPS = 4
each_case = pytest.mark.parametrize("name", CASES)


@each_case
def test_nothing_of_the_state_ever_changes_but_values(name):
    params, grads, extras = inputs(name, 0)
    tx = CASES[name].make()
    state = tx.init(params)

    def described(tree):
        leaves, structure = jax.tree.flatten(tree)
        return structure, [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in leaves]

    expected = described(state)
    assert described(jax.eval_shape(tx.init, params)) == expected
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    assert described(jax.eval_shape(tx.init, abstract)) == expected
    _, after = jax.eval_shape(make_step(tx), params, state, grads, extras)
    assert described(after) == expected
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(make_step(tx), params, state, grads, extras)


# --- One compiled run ---


@functools.cache
def compiled(name):
    """The compiled step, which donates, and the number of times that it has been traced."""
    step, traces = make_step(CASES[name].make()), []

    def counted(params, state, grads, extras):
        traces.append(None)
        return step(params, state, grads, extras)

    return jax.jit(counted, donate_argnums=(0, 1)), traces


def buffers(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def assert_no_shared_buffer(state, *others):
    mine = buffers(state)
    assert len(set(mine)) == len(mine)  # donating the same buffer twice is an error too
    for other in others:
        assert not {*mine} & {*buffers(other)}


@pytest.mark.parametrize("name", DISTINCT)
def test_a_run_is_compiled_once_and_reuses_every_buffer(name):
    tx, (step, traces) = CASES[name].make(), compiled(name)
    params, _, _ = inputs(name, 0)
    for initial in (jax.jit(tx.init)(params), tx.init(params)):
        assert_no_shared_buffer(initial, params)
        after, state = jax.tree.map(jnp.array, params), initial
        for t in range(3):
            _, grads, extras = inputs(name, t)
            old = jax.tree.leaves((after, state))
            # Warnings are errors, and a donated buffer that XLA cannot use is a warning.
            after, state = step(after, state, grads, extras)
            assert all(leaf.is_deleted() for leaf in old)
            assert_no_shared_buffer(state, after, grads, extras.get("stale_params"))
    assert len(traces) == 1  # as workers, stalenesses and stale parameters change


SOME = [
    "dcasgd-workers",
    "mxnet-1",
    "scheduled-staleness-given",
    "gap-remembered",
    "workers",
    "delay_gradients-tree",
    "with_master_weights",
]


@pytest.mark.parametrize("name", SOME)
def test_outside_jit_no_buffer_is_shared_and_nothing_is_compiled_after_the_first_updates(
    name, caplog
):
    """A Python number that is baked into an operation would compile it anew for every value."""
    tx = CASES[name].make()
    state = tx.init(inputs(name, 0)[0])
    for t in range(6):
        params, grads, extras = inputs(name, t)
        with jax.log_compiles(t >= 4):  # every history is full
            _, state = tx.update(grads, state, params, **extras)
        assert_no_shared_buffer(state, params, grads, extras.get("stale_params"))
    assert [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()] == []


def test_compilations_are_logged(caplog):
    """What the test above rests on."""
    with jax.log_compiles(True):
        jax.jit(lambda x: x + 1.2345)(jnp.ones(7))
    assert any("ompil" in record.getMessage() for record in caplog.records)


# --- As it starts ---

MEMORIES = {"prev_params", "params", "master", "stale_params"}


@each_case
def test_every_memory_of_parameters_starts_at_the_initial_ones(name):
    """As the caller of dcasgd may compute the first gradient at state.prev_params."""
    params, _, _ = inputs(name, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(CASES[name].make().init(params)):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        field = [entry.name for entry in path if isinstance(entry, jax.tree_util.GetAttrKey)][-1]
        if field in MEMORIES:
            param = functools.reduce(lambda tree, key: tree[key], names, params)
            np.testing.assert_array_equal(leaf, jnp.broadcast_to(param, leaf.shape))
        elif field == "last_worker":  # nobody yet
            assert leaf in (1, NUM_WORKERS)
        else:
            assert not np.any(leaf)


@functools.cache
def sharded_params(dtype):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    shapes = {"matrix": ((4, 6), P("x", "y")), "scalar": ((), P()), "vector": ((8,), P(("x", "y")))}
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in shapes.items()
    }


@each_case
def test_a_state_of_abstract_parameters_is_sharded_as_they_are(name):
    """Zeros where that is what the state starts with, as in Optax; else abstract arrays."""
    case = CASES[name]
    if name == "delay_gradients-tree":
        case = case._replace(
            make=lambda: dc.delay_gradients(
                dc.dcasgd(0.1, 0.9, store=None), {"matrix": 2, "scalar": 1, "vector": 3}
            )
        )
    params = sharded_params(jnp.bfloat16 if case.has_masters else jnp.complex64)
    concrete = case.make().init(jax.tree.map(lambda p: jnp.ones(p.shape, p.dtype), params))
    state = case.make().init(params)
    chex.assert_trees_all_equal_structs(state, concrete)

    def check(path, leaf, like):
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
        fields = [entry.name for entry in path if isinstance(entry, jax.tree_util.GetAttrKey)]
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        assert isinstance(leaf, jax.ShapeDtypeStruct) == (fields[-1] in MEMORIES)
        if isinstance(leaf, jax.Array):
            np.testing.assert_array_equal(leaf, like)
        if names:
            param = params[names[-1]]
            spec = [None] * (leaf.ndim - param.ndim) + [
                # An axis that a rule has summed over is left with one number.
                axis if n == m else None
                for axis, n, m in zip(
                    param.sharding.spec,
                    leaf.shape[leaf.ndim - param.ndim :],
                    param.shape,
                    strict=True,
                )
            ]
            wanted = NamedSharding(param.sharding.mesh, P(*spec))
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (path, leaf.sharding)

    jax.tree_util.tree_map_with_path(check, state, concrete)


def test_copies_of_abstract_parameters_are_in_the_memory_of_the_parameters():
    """Those that are kept on the host, say, where the backups of many workers fit."""
    mesh = jax.make_mesh((8,), ("x",))
    sharding = NamedSharding(mesh, P("x"), memory_kind="pinned_host")
    params = {"w": jax.ShapeDtypeStruct((8, 2), jnp.bfloat16, sharding=sharding)}
    inner = dc.remember_params(dc.add_delay_compensation(decay=None), num_workers=3)
    backups = inner.init(params).prev_params["w"]
    one_copy = dc.with_master_weights(dc.remember_params(optax.identity())).init(params)
    for leaf, spec in [
        (backups, P(None, "x")),
        (one_copy.master["w"], P("x")),
        (one_copy.inner_state.prev_params["w"], P("x")),
    ]:
        assert leaf.sharding == NamedSharding(mesh, spec, memory_kind="pinned_host")


# --- Kept ---


def save_and_restore(path, tree, target):
    """What a new process would read, into a tree that has nothing but the right shapes."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, jax.tree.map(ocp.utils.to_shape_dtype_struct, target))


@pytest.mark.parametrize("name", SOME)
def test_a_saved_or_pickled_state_resumes_to_the_same_bits(name, tmp_path):
    tx, (step, _) = CASES[name].make(), compiled(name)
    params = jax.tree.map(jnp.array, inputs(name, 0)[0])
    state = tx.init(params)
    for t in range(3):
        params, state = step(params, state, *inputs(name, t)[1:])
    saved = {"params": params, "state": state}
    other = jax.tree.map(lambda p: 2 * p + 1, params)
    target = {"params": other, "state": tx.init(other)}
    restored = save_and_restore(tmp_path / "checkpoint", saved, target)
    assert_bit_equal(restored, saved)
    assert_bit_equal(pickle.loads(pickle.dumps(saved)), saved)
    resumed = step(*restored.values(), *inputs(name, 3)[1:])
    assert_bit_equal(resumed, step(params, state, *inputs(name, 3)[1:]))


def test_a_checkpoint_restored_without_its_types_is_not_permuted(tmp_path):
    """Orbax returns dictionaries then, sorted, which lend their leaves to the state's structure."""
    saved = {}
    for name, case in CASES.items():
        state = case.make().init(inputs(name, 0)[0])
        leaves, structure = jax.tree.flatten(state)
        saved[name] = structure.unflatten(jnp.full_like(x, i) for i, x in enumerate(leaves))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint")
    for name, state in saved.items():
        leaves = jax.tree.leaves(restored[name])
        assert_bit_equal(jax.tree.structure(state).unflatten(leaves), state)


@pytest.mark.parametrize("first", ["dcasgd", "fused_dcasgd"])
def test_a_checkpoint_of_one_loads_in_the_other(first, tmp_path):
    tx = getattr(dc, first)(0.1, 0.9, 0.5, decay=0.9)
    second = {"dcasgd": dc.fused_dcasgd, "fused_dcasgd": dc.dcasgd}[first](0.1, 0.9, 0.5, decay=0.9)
    params, state, step = PARAMS, tx.init(PARAMS), jax.jit(make_step(tx))
    for t in range(3):
        params, state = step(params, state, GRADS[t], {})
    saved = {"params": params, "state": state}
    target = {"params": PARAMS, "state": second.init(PARAMS)}
    params, state = save_and_restore(tmp_path / "checkpoint", saved, target).values()
    step = jax.jit(make_step(second))
    for t in range(3, 6):
        params, state = step(params, state, GRADS[t], {})

    expected = reference.one_update_old(
        lambda stale, t: GRADS[t], PARAMS, 6, lr=0.1, momentum=0.9, lamda=0.5, decay=0.9
    )
    chex.assert_trees_all_close(reference.wide(params), expected[-1], rtol=1e-5, atol=1e-6)
