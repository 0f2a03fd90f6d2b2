"""The state of every transformation: as it starts, saved and restored, pickled, donated."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import reference
from host_cases import (
    GRADS,
    MODES,
    NUM_WORKERS,
    PARAMS,
    STEPS,
    assert_close,
    assert_same,
    each_mode,
    jitted_step,
    make_step,
    no_extras,
    plain_run,
    start,
    worker,
)

import optax_dcasgd as dc

# --- What a user may read in the state ---

OLD_PARAMETERS = {"prev_params", "backups", "params", "master"}


@each_mode
def test_every_memory_of_parameters_starts_at_the_initial_ones(mode):
    """As the caller of dcasgd may compute the first gradient at state.prev_params."""
    tx, _, params, _ = start(mode)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tx.init(params)):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        fields = [entry.name for entry in path if isinstance(entry, jax.tree_util.GetAttrKey)]
        if fields[-1] in OLD_PARAMETERS:
            param = functools.reduce(lambda tree, name: tree[name], names, params)
            np.testing.assert_array_equal(leaf, jnp.broadcast_to(param, leaf.shape))
        elif fields[-1] != "last_worker":  # NUM_WORKERS there: nobody yet
            assert not np.any(leaf)


# --- Checkpoints ---


def save_and_restore(path, tree, target):
    """What a new process would read, into a tree that has nothing but the right shapes."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, jax.tree.map(ocp.utils.to_shape_dtype_struct, target))


@each_mode
def test_orbax_resumes_to_the_same_bits(mode, tmp_path):
    tx, extras, params, grads = start(mode)
    state, half = tx.init(params), STEPS // 2
    step = jitted_step(mode)
    for t in range(half):
        params, state = step(params, state, grads[t], extras(t))

    other = jax.tree.map(lambda p: 2 * p + 1, params)
    target = {"params": other, "state": tx.init(other)}
    saved = {"params": params, "state": state}
    restored = save_and_restore(tmp_path / "checkpoint", saved, target)
    assert_same(restored, saved)

    params, state = restored["params"], restored["state"]
    for t in range(half, STEPS):
        params, state = step(params, state, grads[t], extras(t))
    assert_same((params, state), plain_run(mode))


@pytest.mark.parametrize("first", ["dcasgd", "fused_dcasgd"])
def test_a_checkpoint_of_one_loads_in_the_other(first, tmp_path):
    tx = dc.dcasgd(0.1, 0.9, 0.5, decay=0.9)
    fused = dc.fused_dcasgd(0.1, 0.9, 0.5, decay=0.9)
    steps = {
        "dcasgd": make_step(tx),
        "fused_dcasgd": lambda params, state, grads, extra_args: fused.step(grads, state, params),
    }
    second = ({*steps} - {first}).pop()
    inits = {"dcasgd": tx.init, "fused_dcasgd": fused.init}

    params, state = PARAMS, inits[first](PARAMS)
    for t in range(3):
        params, state = steps[first](params, state, GRADS[t], {})
    saved = {"params": params, "state": state}
    target = {"params": PARAMS, "state": inits[second](PARAMS)}
    restored = save_and_restore(tmp_path / "checkpoint", saved, target)
    assert_same(restored, saved)
    params, state = restored["params"], restored["state"]
    for t in range(3, STEPS):
        params, state = steps[second](params, state, GRADS[t], {})

    expected = reference.one_update_old(
        lambda stale, t: GRADS[t], PARAMS, STEPS, lr=0.1, momentum=0.9, lamda=0.5, decay=0.9
    )
    assert_close(params, expected[-1])


@each_mode
def test_the_state_can_be_pickled(mode):
    _, extras, params, grads = start(mode)
    _, state = plain_run(mode)
    restored = pickle.loads(pickle.dumps(state))
    assert_same(restored, state)
    step = jitted_step(mode)
    assert_same(
        step(params, restored, grads[0], extras(0)), step(params, state, grads[0], extras(0))
    )


# --- Donation ---


def buffers(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def assert_no_shared_buffer(state, *others):
    mine = buffers(state)
    assert len(set(mine)) == len(mine)  # donating the same buffer twice is an error too
    for other in others:
        assert not {*mine} & {*buffers(other)}


@each_mode
def test_the_state_shares_no_buffer_with_what_the_caller_holds(mode):
    tx, extras, params, grads = start(mode)
    assert_no_shared_buffer(jax.jit(tx.init)(params), params)
    state = tx.init(params)
    assert_no_shared_buffer(state, params)
    for step in (make_step(tx), jitted_step(mode)):
        for t in range(3):  # a delay of 2 is over only then
            extra_args = extras(t)
            after, state = step(params, state, grads[t], extra_args)
            assert_no_shared_buffer(state, params, after, grads[t], extra_args.get("stale_params"))
            params = after


ORDERS = {"params-first": (0, 1), "state-first": (1, 0)}


@pytest.mark.parametrize(
    ("mode", "order"),
    [(mode, "params-first") for mode in MODES]
    + [(mode, "state-first") for mode in ("previous", "updates", "workers", "delay")],
)
def test_a_donated_step_reuses_every_buffer(mode, order):
    """Warnings are errors, so a donated buffer that XLA could not use would be one."""
    tx, extras, params, grads = start(mode)
    step = make_step(tx)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def donated(params, state, grads, extra_args):
        results = step(params, state, grads, extra_args)
        return tuple(results[i] for i in ORDERS[order])

    params = jax.tree.map(jnp.array, params)
    state = tx.init(params)
    for t in range(STEPS):
        old = jax.tree.leaves((params, state))
        results = donated(params, state, grads[t], extras(t))
        params, state = (results[i] for i in ORDERS[order])
        assert all(leaf.is_deleted() for leaf in old)
    assert_close((params, state), plain_run(mode), rtol=1e-6)


@pytest.mark.parametrize("store", ["params", "updates", "workers"])
def test_a_donated_fused_step_reuses_every_buffer(store):
    kept = {"num_workers": NUM_WORKERS} if store == "workers" else {"store": store}
    extras = worker if store == "workers" else no_extras
    optimizer = dc.fused_dcasgd(0.1, 0.9, 0.5, decay=0.9, **kept)
    expected_tx = dc.dcasgd(0.1, 0.9, 0.5, decay=0.9, **kept)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def donated(params, state, grads, extra_args):
        return optimizer.step(grads, state, params, **extra_args)

    params = jax.tree.map(jnp.array, PARAMS)
    state = optimizer.init(params)
    assert_no_shared_buffer(state, params)
    expected, expected_state = PARAMS, expected_tx.init(PARAMS)
    for t in range(STEPS):
        old = jax.tree.leaves((params, state))
        params, state = donated(params, state, GRADS[t], extras(t))
        assert all(leaf.is_deleted() for leaf in old)
        assert_no_shared_buffer(state, params)
        updates, expected_state = expected_tx.update(
            GRADS[t], expected_state, expected, **extras(t)
        )
        expected = optax.apply_updates(expected, updates)
    assert_close((params, state), (expected, expected_state), rtol=1e-6)
