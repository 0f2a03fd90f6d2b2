"""`implementation="pallas"` under JAX's transformations and on a mesh, beside that by XLA.

The TPU kernel, in its interpreter, stands in the table of kernels for the machine of this test.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kernel_cases import MODES, SETTINGS, arguments, assert_same, make

from optax_dcasgd.kernels import mosaic_tpu, pallas, reference

IMPLEMENTATIONS = ("pallas", "xla")


@pytest.fixture(autouse=True)
def shapes(monkeypatch):
    """The shapes that the kernel was given."""
    given = []

    def update(arrays, *args, step):
        given.extend(operands.param.shape for operands in arrays)
        return [mosaic_tpu.update(x, *args, step=step, interpret=True) for x in arrays]

    kernel = pallas.Kernel(update, lambda _: None, lambda: None)
    monkeypatch.setitem(pallas.KERNELS, "cpu", kernel)
    pallas._per_platform.clear_cache()  # of traces with another table
    yield given
    pallas._per_platform.clear_cache()


def by_pallas(operands, *args, step):
    return pallas.update([operands], *args, step=step)[0]


def params_of(dtype):
    kernel = np.linspace(-1, 1, 33 * 70).reshape(33, 70)
    return {"kernel": jnp.asarray(kernel, dtype), "scale": jnp.asarray(0.5, dtype)}


def assert_near(actual, expected, rtol=1e-6):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(e, np.float64), rtol=rtol, atol=rtol
        ),
        actual,
        expected,
    )


def test_vmap_runs_the_kernel_once_a_member(shapes):
    """In each mode, over arrays; and over update counts or hyperparameters alone."""
    args = {name: arguments(mode, (3, 8, 130)) for name, mode in MODES.items()}
    operands, count, numbers = args["stored, DC-a, clip"]
    counts = jnp.asarray([3, 0, 1], jnp.int32)
    schedules = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x, 0.25 * x]), numbers)

    @jax.jit
    def run(args):
        results = []
        for update in (by_pallas, reference.update):

            def step(*args, update=update):
                return update(*args, step=True)

            over_arrays = [jax.vmap(step, in_axes=(0, None, None))(*a) for a in args.values()]
            over_counts = jax.vmap(step, in_axes=(0, 0, None))(operands, counts, numbers)
            of_one = jax.tree.map(lambda x: x[0], operands)
            over_numbers = jax.vmap(step, in_axes=(None, None, 0))(of_one, count, schedules)
            results.append([*over_arrays, over_counts, over_numbers])
        return results

    actual, expected = run(args)
    for what, a, e in zip([*args, "counts", "numbers"], actual, expected, strict=True):
        one = what == "numbers"
        param = args[what][0].param if what in args else operands.param
        param = jnp.broadcast_to(param[:1], param.shape) if one else param
        assert_same(a, e, param, what)
    assert set(shapes) == {(8, 130)}


def test_derivatives_are_those_of_the_reference():
    """Of the kernel, and of its `jax.vmap`."""
    operands, count, numbers = arguments(MODES["stored, DC-a, clip"], (3, 8, 130))

    def loss(update, operands, learning_rate):
        def one(operands):
            return update(operands, count, numbers | {"learning_rate": learning_rate}, step=True)

        out = jax.vmap(one)(operands)
        return sum(jnp.sum(x**2) for x in [*out, *one(jax.tree.map(lambda x: x[0], operands))])

    @jax.jit
    def run(operands):
        return [
            jax.grad(loss, argnums=(1, 2))(update, operands, jnp.float32(0.1))
            for update in (by_pallas, reference.update)
        ]

    actual, expected = run(operands)
    assert_near(actual, expected, 1e-5)
    assert all(np.any(x != 0) for x in jax.tree.leaves(expected))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fifty_fused_steps_are_fifty_updates(dtype):
    """With a schedule; from each state of the fused run, so that roundings do not add up.

    The state is identical, the parameters are within one rounding.
    """
    schedule = optax.linear_schedule(0.1, 0.01, 50)
    params = params_of(dtype)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(50, *p.shape)), dtype), params)
    ways = [
        (
            make("fused_dcasgd", implementation=implementation, learning_rate=schedule, **settings),
            make("dcasgd", implementation="xla", learning_rate=schedule, **settings),
        )
        for settings in SETTINGS.values()
        for implementation in IMPLEMENTATIONS
    ]

    def one(carry, grad):
        fused = [o.step(grad, s, p) for (o, _), (p, s) in zip(ways, carry, strict=True)]
        expected = []
        for (_, tx), (params, state) in zip(ways, carry, strict=True):
            updates, state = tx.update(grad, state, params)
            expected.append((optax.apply_updates(params, updates), state))
        return fused, (fused, expected)

    start = [(params, optimizer.init(params)) for optimizer, _ in ways]
    (final, (fused, expected)) = jax.jit(lambda *args: jax.lax.scan(one, *args))(start, grads)
    ulp = float(jnp.finfo(dtype).eps)
    for (new, state), (expected_new, expected_state) in zip(fused, expected, strict=True):
        assert_near(new, expected_new, ulp)
        # A compiler may contract a multiply-add in one of them and not in the other.
        assert_near(state, expected_state)
    assert [int(state.count) for _, state in final] == [50] * len(ways)
    assert jax.tree.structure(final) == jax.tree.structure(start)


@pytest.mark.parametrize("kind", ["explicit", "inside shard_map"])
def test_on_a_mesh_it_computes_what_xla_does(kind, shapes):
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, P("x"))
    rows = np.random.default_rng(0).normal(size=(16, 130))
    results = []
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(jnp.asarray(rows, jnp.float32), sharding)}
        for implementation in IMPLEMENTATIONS:
            optimizer = make("fused_dcasgd", decay=0.9, implementation=implementation)
            step, state = optimizer.step, optimizer.init(params)
            if kind == "inside shard_map":
                specs = jax.tree.map(lambda x: P("x") if x.ndim else P(), (params, state))
                step = jax.shard_map(
                    step,
                    in_specs=(specs[0], specs[1], specs[0]),
                    out_specs=specs,
                    check_vma=False,  # the interpreter mixes in values of its own
                )
            step, new = jax.jit(step), params
            for _ in range(3):
                new, state = step(new, state, new)
            results.append((new, state))
            for array in (new["w"], state.prev_params["w"]):
                assert array.sharding.is_equivalent_to(sharding, 2)
    assert_near(*results)
    assert set(shapes) == {(2, 130)}


def test_schedules_compile_once(shapes):
    optimizer = make(
        "fused_dcasgd",
        learning_rate=optax.linear_schedule(0.1, 0.0, 10),
        momentum=optax.linear_schedule(0.0, 0.9, 10),
        lamda=optax.linear_schedule(0.0, 2.0, 10),
        implementation="pallas",
    )
    step = jax.jit(lambda params, state: optimizer.step(params, state, params))
    params = jnp.ones(5)
    state = optimizer.init(params)
    for _ in range(5):
        params, state = step(params, state)
    assert step._cache_size() == 1
    assert shapes == [(5,)]


def test_a_branch_that_is_not_taken_changes_nothing():
    optimizer = make("fused_dcasgd", implementation="pallas")
    params = params_of("float32")
    state = optimizer.init(params)

    def loss(params):
        new, _ = jax.lax.cond(
            params["scale"] > 10,
            lambda p: optimizer.step(p, state, p),
            lambda p: (p, state),
            params,
        )
        return jnp.sum(new["kernel"])

    grads = jax.jit(jax.grad(loss))(params)
    np.testing.assert_array_equal(grads["kernel"], 1)
