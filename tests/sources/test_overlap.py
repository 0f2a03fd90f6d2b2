"""`overlap_reduction` on a mesh, against a float64 loop that is one update late.

The loop is `reference.one_update_old`, with gradients of the whole batch written out in NumPy.
"""

import functools
import math
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_dcasgd as dc
from optax_dcasgd import OverlapReductionState, overlap_reduction

UPDATES = 8
BATCH = 16  # examples, over all devices
SPECS = OverlapReductionState(count=P(), grads=P("data"), inner_state=P())
_rng = np.random.default_rng(0)
PARAMS = {
    "bias": _rng.normal(size=2).astype(np.float32),
    "kernel": _rng.normal(size=(3, 2)).astype(np.float32),
    "scale": np.float32(0.7),
}
X = _rng.normal(size=(UPDATES, BATCH, 3)).astype(np.float32)
Y = np.sin(X.sum(-1, keepdims=True)) * np.float32([1, -1])


def loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["kernel"] + params["bias"])
    return jnp.mean(jnp.sum((params["scale"] * hidden - y) ** 2, axis=-1))


def exact_grads(params, t):
    """The gradient of `loss` on the whole batch t, by hand in float64."""
    x, y = X[t].astype(np.float64), Y[t].astype(np.float64)
    hidden = np.tanh(x @ params["kernel"] + params["bias"])
    d_out = 2 * (params["scale"] * hidden - y) / BATCH
    d_hidden = params["scale"] * d_out * (1 - hidden**2)
    return {"bias": d_hidden.sum(0), "kernel": x.T @ d_hidden, "scale": np.sum(d_out * hidden)}


def mesh_of(devices=8):
    return jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])


def start(tx, mesh, elsewhere=None, **options):
    """The jitted ``init`` and ``step(params, state, batch)`` on a mesh.

    With ``elsewhere(t, w)`` gradients are computed there, and step takes t too.
    """

    def step(params, state, batch, *t):
        at = params if elsewhere is None else jax.tree.map(lambda w: elsewhere(*t, w), params)
        extra = {} if elsewhere is None else {"stale_params": at}
        grads = jax.grad(loss)(jax.lax.pcast(at, "data", to="varying"), batch)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    shard_map = functools.partial(jax.shard_map, mesh=mesh, **options)
    init = shard_map(tx.init, in_specs=P(), out_specs=SPECS)
    in_specs = (P(), SPECS, P("data"), *([] if elsewhere is None else [P()]))
    step = shard_map(step, in_specs=in_specs, out_specs=(P(), SPECS))
    return jax.jit(init), jax.jit(step)


@functools.cache
def train(tx, devices=8, num_updates=UPDATES, **options):
    """All parameters, from the initial ones on, and the last state."""
    init, step = start(tx, mesh_of(devices), **options)
    params, state = PARAMS, init(PARAMS)
    trajectory = [params]
    for t in range(num_updates):
        # One step at a time: virtual devices share their threads, and with several steps under way
        # they can wait for each other forever.
        params, state = jax.block_until_ready(step(params, state, (X[t], Y[t])))
        trajectory.append(params)
    return trajectory, state


def assert_close(actual, expected, rtol=1e-5):
    expected = jax.tree.map(np.float32, expected)
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=rtol)


HYPERPARAMS = {"lr": 0.1, "momentum": 0.9, "lamda": 2.0}
ADAPTIVE = {**HYPERPARAMS, "decay": 0.9, "clip": 0.5}
CHAIN = optax.chain(
    dc.add_delay_compensation(2.0, decay=0.9, clip=0.5), optax.sgd(0.1, momentum=0.9)
)
CASES = {
    "params": (dc.dcasgd(0.1, 0.9, 2.0), HYPERPARAMS),
    "updates": (dc.dcasgd(0.1, 0.9, 2.0, store="updates"), HYPERPARAMS),
    "DC-ASGD-a": (dc.remember_params(CHAIN), ADAPTIVE),
    "uncompensated": (optax.sgd(0.1, 0.9), {**HYPERPARAMS, "lamda": 0.0}),
}


@functools.cache
def overlap(case):
    return overlap_reduction(CASES[case][0], "data")


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_a_loop_that_is_one_update_late(case):
    hyperparams = CASES[case][1]
    actual, _ = train(overlap(case))
    chex.assert_trees_all_equal(actual[1], PARAMS)  # nothing has been reduced yet
    expected = reference.one_update_old(exact_grads, PARAMS, UPDATES - 1, **hyperparams)
    assert_close(actual[2:], expected)
    if case != "uncompensated":  # else the cases would pass without compensation
        plain = reference.one_update_old(
            exact_grads, PARAMS, UPDATES - 1, **{**hyperparams, "lamda": 0.0}
        )
        gaps = reference.subtract(expected[-1], plain[-1])
        assert max(np.max(np.abs(gap)) for gap in gaps.values()) > 0.01


def test_it_is_the_same_where_shard_map_does_not_check_what_varies():
    tx = overlap("updates")
    chex.assert_trees_all_equal(train(tx, check_vma=False), train(tx))


def test_an_inner_optimizer_with_a_count_of_its_own():
    """Adam's bias correction would be off by one if it saw the first, empty, update."""
    told = optax.chain(dc.add_delay_compensation(0.5), optax.adam(0.1))
    actual, state = train(overlap_reduction(dc.remember_params(told), "data"))
    told_state, history, update = told.init(PARAMS), [PARAMS, PARAMS], jax.jit(told.update)
    for t in range(UPDATES - 1):
        grads = jax.tree.map(jnp.float32, exact_grads(reference.wide(history[-2]), t))
        updates, told_state = update(grads, told_state, history[-1], stale_params=history[-2])
        history.append(optax.apply_updates(history[-1], updates))
    assert_close(actual, history, rtol=1e-4)
    assert state.inner_state.inner_state[1][0].count == UPDATES - 1


def test_gradients_at_parameters_that_the_caller_says():
    """They are handed to the optimizer inside one update later, with the gradients."""
    tx = overlap_reduction(dc.dcasgd(0.1, 0.9, 2.0, store=None), "data")
    init, step = start(tx, mesh_of(), elsewhere=lambda t, w: w + 0.1 * (t + 1))
    params, state = PARAMS, init(PARAMS)
    expected, optimizer, waiting = reference.wide(PARAMS), reference.DCASGD(**HYPERPARAMS), None
    for t in range(4):
        params, state = jax.block_until_ready(step(params, state, (X[t], Y[t]), np.float32(t)))
        if waiting is not None:
            grads, at = waiting
            at_next = jax.tree.map(lambda w, t=t: w + 0.1 * (t + 1), expected)
            waiting = exact_grads(at_next, t), at_next
            expected = reference.add(expected, optimizer(grads, expected, at))
        else:
            at = jax.tree.map(lambda w: w + 0.1, expected)
            waiting = exact_grads(at, t), at
        assert_close(params, expected)
    assert_close(state.stale_params, waiting[1])


def test_the_number_of_devices_changes_nothing_but_rounding():
    tx = overlap("updates")
    assert_close(train(tx, devices=1)[0], train(tx)[0])


def test_an_update_does_not_depend_on_the_batch_of_its_step():
    """So that the reduction can start before the step has computed anything."""
    init, step = start(overlap("params"), mesh_of())
    params, state = jax.block_until_ready(step(PARAMS, init(PARAMS), (X[0], Y[0])))
    expected, _ = jax.block_until_ready(step(params, state, (X[1], Y[1])))
    actual, after = step(params, state, (np.full_like(X[1], np.nan), Y[1]))
    chex.assert_trees_all_equal(actual, expected)
    assert np.isnan(after.grads["kernel"]).all()


def test_it_compiles_once_and_in_a_scan_inside_shard_map():
    tx = overlap("params")

    def run(params, batches):
        def step(carry, batch):
            params, state = carry
            grads = jax.grad(loss)(jax.lax.pcast(params, "data", to="varying"), batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
        return params

    specs = (P(), P(None, "data"))
    run = jax.shard_map(run, mesh=mesh_of(), in_specs=specs, out_specs=P())
    assert_close(jax.jit(run)(PARAMS, (X, Y)), train(tx)[0][-1])


def test_two_axes_of_a_mesh():
    tx = overlap_reduction(dc.dcasgd(0.1, 0.9, 2.0), ("host", "chip"))
    mesh = jax.make_mesh((4, 2), ("host", "chip"), (AxisType.Auto,) * 2)
    specs = OverlapReductionState(P(), P(("host", "chip")), P())

    def step(params, state, batch):
        local = jax.lax.pcast(params, ("host", "chip"), to="varying")
        updates, state = tx.update(jax.grad(loss)(local, batch), state, params)
        return optax.apply_updates(params, updates), state

    init = jax.jit(jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs))
    step = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(P(), specs, P(("host", "chip"))), out_specs=(P(), specs)
        )
    )
    params, state = PARAMS, init(PARAMS)
    for t in range(UPDATES):
        params, state = jax.block_until_ready(step(params, state, (X[t], Y[t])))
    assert_close(params, train(overlap("params"))[0][-1])


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
    with pytest.raises(TypeError, match=r"inner must be an optax\.GradientTransformation"):
        overlap_reduction("sgd", "data")
    tx = overlap_reduction(optax.sgd(0.1), "data")
    with pytest.raises(TypeError, match=r"params\['n'\] has dtype int32"):
        on_mesh(tx.init, {"n": jnp.arange(3)})
    with pytest.raises(ValueError, match="not passing `params`"):
        on_mesh(lambda p: tx.update(p, tx.init(p))[0], PARAMS)


# --- What users read ---


def test_the_code_of_the_page_runs():
    """One block after the other, as a user would go from one step to the other."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "spmd.md").read_text()
    before, after, resumed, pipeline = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(compile(before, "docs/spmd.md", "exec"), names)
    x = np.ones((16, 4), np.float32)
    params, _ = names["step"](names["params"], names["opt_state"], (x, np.ones(16)))
    assert np.all(params["w"] > 0)
    exec(compile(after, "docs/spmd.md", "exec"), names)
    assert np.any(names["params"]["w"] != 0)
    grads = names["opt_state"].grads["w"]
    exec(compile(resumed, "docs/spmd.md", "exec"), names)
    moved = names["opt_state"].grads["w"]
    assert moved.shape == (4, *grads.shape[1:])
    np.testing.assert_allclose(moved.mean(0), grads.mean(0), rtol=1e-6)
    exec(compile(pipeline, "docs/spmd.md", "exec"), names)
