"""`overlap_reduction`: what its program does, what it keeps where, bad input, and its page."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from overlap_cases import PARAMS, X, Y, assert_close, mesh_of, overlap, start, train

from optax_dcasgd import OverlapReductionState, overlap_reduction

# --- What the program does, and what it keeps where ---


def test_the_only_collective_is_the_sum_of_the_gradients():
    mesh = mesh_of()
    for case in ("updates", "DC-ASGD-a"):
        init, step = start(overlap(case), mesh)
        state = jax.eval_shape(init, PARAMS)
        program = step.lower(PARAMS, state, (X[0], Y[0])).compile().as_text()
        assert "num_partitions=8" in program
        collectives = re.findall(
            r"= (.*?) (all-reduce|all-gather|all-to-all|collective-\w+|reduce-scatter)[\w-]*\(",
            program,
        )
        assert {kind for _, kind in collectives} == {"all-reduce"}
        summed = [
            math.prod(int(n) for n in dims.split(",") if n)
            for shape, _ in collectives
            for dims in re.findall(r"f32\[([\d,]*)\]", shape)
        ]
        assert sorted(summed) == sorted(leaf.size for leaf in PARAMS.values())


def test_the_state_is_one_gradient_a_device_beyond_that_of_the_inner_optimizer():
    mesh = mesh_of()
    _, state = train(overlap("updates"))
    for name, grads in state.grads.items():
        assert grads.shape == (8, *PARAMS[name].shape)
        assert grads.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), grads.ndim)
    own = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    params = sum(leaf.nbytes for leaf in PARAMS.values())
    assert own == 3 * params + 8  # gradients, momentum, stale parameters, two counts


def test_buffers_are_donated():
    """Warnings are errors, and a donated buffer that cannot be reused would be one."""
    mesh = mesh_of()
    init, step = start(overlap("params"), mesh)
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    state = init(params)
    jax.jit(step, donate_argnums=(0, 1))(params, state, (X[0], Y[0]))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((params, state)))


# --- Extra arguments and bad input ---


def on_mesh(function, *args):
    """Calls a function of replicated arguments inside shard_map."""
    return jax.jit(jax.shard_map(function, mesh=mesh_of(), in_specs=P(), out_specs=P()))(*args)


def test_the_inner_optimizer_is_told_how_old_gradients_are():
    seen = []

    def update(updates, state, params, *, staleness, other):
        seen.append((staleness, other))
        return updates, state

    tx = overlap_reduction(optax.GradientTransformationExtraArgs(lambda params: (), update), "data")

    def step(params):
        state = tx.init(params)
        grads = jax.lax.pcast(params, "data", to="varying")
        return tx.update(grads, state, params, other="as it is")[0]

    on_mesh(step, PARAMS)
    assert seen == [(1, "as it is")]


def test_gradients_that_are_none_count_as_zero():
    tx = overlap_reduction(optax.sgd(0.1), "data")
    params = {"frozen": jnp.ones(3), "trained": jnp.ones(2)}

    def two_steps(params):
        state = tx.init(params)
        grads = {"frozen": None, "trained": jax.lax.pcast(jnp.ones(2), "data", to="varying")}
        _, state = tx.update(grads, state, params)
        return tx.update(grads, state, params)[0]

    assert_close(on_mesh(two_steps, params), {"frozen": np.zeros(3), "trained": np.full(2, -0.1)})


def test_outside_shard_map_it_says_what_to_do():
    tx = overlap_reduction(optax.sgd(0.1), "data")
    message = r"axis_name='data'.*inside jax\.shard_map"
    with pytest.raises(ValueError, match=message):
        tx.init(PARAMS)
    with pytest.raises(ValueError, match=message):
        tx.update(PARAMS, OverlapReductionState(0, PARAMS, ()), PARAMS)


def test_gradients_that_were_summed_already_are_refused():
    tx = overlap_reduction(optax.sgd(0.1), "data")

    def step(params):
        return tx.update(params, tx.init(params), params)[0]

    with pytest.raises(ValueError, match=r"updates\['bias'\].*summed already.*pcast"):
        on_mesh(step, PARAMS)


def test_stale_parameters_that_differ_between_devices_are_refused():
    tx = overlap_reduction(optax.sgd(0.1), "data")

    def step(params):
        local = jax.lax.pcast(params, "data", to="varying")
        return tx.update(local, tx.init(params), params, stale_params=local)[0]

    with pytest.raises(ValueError, match=r"stale_params\['bias'\] differs between the devices"):
        on_mesh(step, PARAMS)


def test_other_bad_input():
    tx = overlap_reduction(optax.sgd(0.1), "data")
    with pytest.raises(TypeError, match=r"params\['n'\] has dtype int32"):
        on_mesh(tx.init, {"n": jnp.arange(3)})
    with pytest.raises(ValueError, match="not passing `params`"):
        on_mesh(lambda p: tx.update(p, tx.init(p))[0], PARAMS)


# --- What users read ---
