"""`implementation="pallas"`: which kernel runs where, and under which transformations of JAX.

No machine here has a TPU or a GPU: programs are lowered for those platforms, and where one has to
run, the TPU kernel stands in, in its interpreter.
"""

import functools
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kernel_cases import DTYPES, MODES, arguments, assert_same

import optax_dcasgd as dc
from optax_dcasgd.kernels import mosaic_gpu, mosaic_tpu, pallas, reference

SETTINGS = {
    "stored": {},
    "updates": {"store": "updates"},
    "adaptive": {"decay": 0.9, "clip": 0.5},
    "no momentum": {"momentum": None},
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
PARAMS = {"kernel": np.linspace(-1, 1, 33 * 70).reshape(33, 70), "scale": np.float64(0.5)}


def tree(dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), PARAMS)


def make(name, **settings):
    arguments = {"learning_rate": 0.1, "momentum": 0.9, "lamda": 0.5} | settings
    return getattr(dc, name)(**arguments)


def lowered(platform, step, *args, **options):
    return jax.jit(step, **options).trace(*args).lower(lowering_platforms=(platform,))


def custom_calls(lowering):
    """What the program calls, beside the allocation of an output that a kernel then writes."""
    return set(re.findall(r"custom_call @(\w+)", lowering.as_text())) - {"AllocateBuffer"}


@pytest.fixture
def kernel_runs_here(monkeypatch):
    """The TPU kernel, interpreted, whatever the platform."""

    def run(operands, count, scalars, step):
        return mosaic_tpu.leaf(operands, count, scalars, step=step, interpret=True)

    monkeypatch.setattr(pallas, "_per_platform", run)
    pallas._batched.cache_clear()
    pallas._differentiable.cache_clear()
    yield
    pallas._batched.cache_clear()
    pallas._differentiable.cache_clear()


# --- Which kernel ---


@each_setting
@pytest.mark.parametrize("form", ["dcasgd", "fused_dcasgd"])
def test_a_gpu_gets_the_mosaic_gpu_kernel(form, settings):
    tx = make(form, implementation="pallas", **settings)
    update = tx.update if form == "dcasgd" else tx.step
    params = tree()
    calls = custom_calls(lowered("cuda", update, params, tx.init(params), params))
    assert calls == {"mosaic_gpu_v2"}


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("step", [False, True], ids=["update", "step"])
def test_the_gpu_kernel_lowers(mode, dtypes, step):
    args = arguments(mode, (5000,), *dtypes)
    function = functools.partial(mosaic_gpu.leaf, step=step)
    assert custom_calls(lowered("cuda", function, *args)) == {"mosaic_gpu_v2"}


def test_the_gpu_kernel_writes_over_what_it_replaces():
    optimizer = make("fused_dcasgd", implementation="pallas")
    params = {"w": jnp.ones(1 << 12)}
    args = (params, optimizer.init(params), params)
    text = lowered("cuda", optimizer.step, *args, donate_argnums=(1, 2)).as_text()
    aliases = re.findall(r"output_tuple_indices = \[(\d)\], operand_index = (\d)", text)
    assert [output for output, _ in aliases] == ["0", "1", "2"]
    assert len({operand for _, operand in aliases}) == 3


def test_leaves_of_one_shape_share_a_kernel():
    tx = make("dcasgd", implementation="pallas")
    params = [jnp.ones((40, 50))] * 6 + [jnp.ones(5000)] * 3
    text = lowered("cuda", tx.update, params, tx.init(params), params).as_text()
    assert text.count("custom_call @mosaic_gpu_v2") == 2
    assert len(re.findall(r"call @_per_platform", text)) == 9


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_the_default_is_xla(implementation, platform):
    optimizer = make("fused_dcasgd", implementation=implementation)
    params = tree()
    calls = custom_calls(lowered(platform, optimizer.step, params, optimizer.init(params), params))
    assert calls == set()


# --- Where none can run ---


@pytest.mark.parametrize("platform", ["cpu", "rocm"])
def test_a_platform_without_a_kernel_is_named(platform):
    optimizer = make("fused_dcasgd", implementation="pallas")
    params = tree()
    with pytest.raises(NotImplementedError, match=f"no kernel for the platform {platform}.*None"):
        lowered(platform, optimizer.step, params, optimizer.init(params), params)


def test_running_it_on_this_machine_names_the_platform():
    tx = make("dcasgd", implementation="pallas")
    params = tree()
    with pytest.raises(NotImplementedError, match="no kernel for the platform cpu"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("dtype", ["float64", "complex64"])
def test_a_dtype_without_a_kernel_is_named(dtype):
    with jax.enable_x64(True):
        params = {"w": jnp.ones(3, dtype)}
        tx = make("dcasgd", implementation="pallas")
        with pytest.raises(NotImplementedError, match=f"grad has dtype {dtype}"):
            lowered("tpu", tx.update, params, tx.init(params), params)


def test_a_tpu_has_no_kernel_for_float16():
    params = tree("float16")
    tx = make("dcasgd", implementation="pallas")
    with pytest.raises(NotImplementedError, match=r"TPU kernel.*float16"):
        lowered("tpu", tx.update, params, tx.init(params), params)
    assert custom_calls(lowered("cuda", tx.update, params, tx.init(params), params))


def mesh_of(kind):
    return jax.make_mesh(
        (8,), ("x",), axis_types=({"auto": AxisType.Auto}.get(kind, AxisType.Explicit),)
    )


def sharded(mesh):
    return {"w": jax.device_put(jnp.ones((16, 1024)), NamedSharding(mesh, P("x")))}


def test_an_auto_mesh_is_refused_and_no_shard_is_gathered():
    params = sharded(mesh_of("auto"))
    optimizer = make("fused_dcasgd", implementation="pallas")
    with pytest.raises(NotImplementedError, match=r"partitioned automatically.*jax\.shard_map"):
        lowered("cuda", optimizer.step, params, optimizer.init(params), params)


def test_a_mesh_with_axes_of_both_kinds_is_refused():
    """What the Auto axis shards would be gathered."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit, AxisType.Auto))
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(jnp.ones((16, 1024)), NamedSharding(mesh, P("x", "y")))}
        optimizer = make("fused_dcasgd", implementation="pallas")
        with pytest.raises(NotImplementedError, match=r"partitioned automatically.*jax\.shard_map"):
            lowered("cuda", optimizer.step, params, optimizer.init(params), params)


def test_a_gpu_before_hopper_is_refused(monkeypatch):
    class Ampere:
        compute_capability = "8.0"

    devices = jax.devices
    monkeypatch.setattr(jax, "devices", lambda *a: [Ampere()] if a == ("cuda",) else devices(*a))
    optimizer = make("fused_dcasgd", implementation="pallas")
    params = tree()
    with pytest.raises(NotImplementedError, match=r"9\.0.*8\.0"):
        lowered("cuda", optimizer.step, params, optimizer.init(params), params)


# --- On a mesh ---


def test_an_explicit_mesh_runs_the_kernel_on_each_shard():
    mesh = mesh_of("explicit")
    with jax.set_mesh(mesh):
        params = sharded(mesh)
        optimizer = make("fused_dcasgd", implementation="pallas")
        text = lowered("cuda", optimizer.step, params, optimizer.init(params), params).as_text()
    assert "mosaic_gpu_v2" in text
    assert re.search(r"mosaic_gpu_v2\(.*tensor<2048xf32>", text), "a shard has 2 of 16 rows"


@pytest.mark.parametrize("kind", ["explicit", "inside shard_map"])
def test_on_a_mesh_the_kernel_computes_what_xla_does(kind, kernel_runs_here):
    mesh = mesh_of("auto" if kind == "inside shard_map" else kind)
    with jax.set_mesh(mesh):
        params = sharded(mesh)
        results = []
        for implementation in ("pallas", "xla"):
            optimizer = make("fused_dcasgd", decay=0.9, implementation=implementation)
            step, state = optimizer.step, optimizer.init(params)
            if kind == "inside shard_map":
                specs = jax.tree.map(lambda x: P("x") if x.ndim else P(), (params, state))
                step = jax.shard_map(
                    step,
                    in_specs=(specs[0], specs[1], specs[0]),
                    out_specs=specs,
                    # The interpreter mixes in values of its own that do not vary.
                    check_vma=False,
                )
            new = params
            for _ in range(3):
                new, state = jax.jit(step)(new, state, new)
            results.append((new, state))
            assert new["w"].sharding.is_equivalent_to(NamedSharding(mesh, P("x")), 2)
            assert state.prev_params["w"].sharding.is_equivalent_to(new["w"].sharding, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *results)


@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map_on_an_auto_mesh(check_vma):
    mesh = mesh_of("auto")
    params = sharded(mesh)
    optimizer = make("fused_dcasgd", implementation="pallas")
    state = optimizer.init(params)
    specs = jax.tree.map(lambda x: P("x") if x.ndim else P(), (params, state))
    step = jax.shard_map(
        optimizer.step,
        mesh=mesh,
        in_specs=(specs[0], specs[1], specs[0]),
        out_specs=specs,
        check_vma=check_vma,
    )
    if check_vma:
        with pytest.raises(NotImplementedError, match="check_vma=False"):
            lowered("cuda", step, params, state, params)
    else:
        assert custom_calls(lowered("cuda", step, params, state, params)) == {"mosaic_gpu_v2"}


def test_shard_map_over_some_axes_is_refused():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto, AxisType.Auto))
    optimizer = make("fused_dcasgd", implementation="pallas")
    params = sharded(mesh)
    state = optimizer.init(params)
    specs = jax.tree.map(lambda x: P("x") if x.ndim else P(), (params, state))
    step = jax.shard_map(
        optimizer.step,
        mesh=mesh,
        in_specs=(specs[0], specs[1], specs[0]),
        out_specs=specs,
        axis_names={"x"},
        check_vma=False,
    )
    with pytest.raises(NotImplementedError, match=r"over all of them"):
        lowered("cuda", step, params, state, params)


# --- Under JAX's transformations ---


def assert_leaves_match(mode, transform):
    operands, count, scalars = arguments(mode, (4, 8, 130))
    actual = transform(pallas.leaf)(operands, count, scalars)
    expected = transform(reference.leaf)(operands, count, scalars)
    assert_same(actual, expected, operands.param)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_vmap_over_leaves(mode, kernel_runs_here):
    def transform(leaf):
        axes = (0, None, None)
        return jax.jit(jax.vmap(functools.partial(leaf, step=True), in_axes=axes))

    operands, count, scalars = arguments(mode, (4, 8, 130))
    text = str(jax.make_jaxpr(transform(pallas.leaf))(operands, count, scalars))
    assert "pallas_call" in text
    assert_leaves_match(mode, transform)


def test_vmap_over_states(kernel_runs_here):
    """Each member has an update count of its own."""
    params = jax.tree.map(lambda p: jnp.stack([p, p + 0.25, p - 0.5]), tree())
    results = []
    for implementation in ("pallas", "xla"):
        tx = make("dcasgd", decay=0.9, implementation=implementation)
        state = jax.vmap(tx.init)(params)
        update = jax.jit(jax.vmap(tx.update))
        assert ("pallas_call" in str(jax.make_jaxpr(update)(params, state, params))) == (
            implementation == "pallas"
        )
        moved = params
        for _ in range(3):
            updates, state = update(jax.tree.map(jnp.cos, moved), state, moved)
            moved = optax.apply_updates(moved, updates)
            state = state._replace(count=state.count.at[1].set(0))
        results.append((moved, state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)


def test_vmap_over_hyperparameters(kernel_runs_here):
    operands, count, scalars = arguments(MODES["stored, DC-a, clip"], (8, 130))
    many = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), scalars)

    def run(leaf):
        return jax.jit(jax.vmap(functools.partial(leaf, step=True), in_axes=(None, None, 0)))(
            operands, count, many
        )

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        run(pallas.leaf),
        run(reference.leaf),
    )


def test_the_derivative_is_that_of_the_reference(kernel_runs_here):
    operands, count, scalars = arguments(MODES["stored, DC-a, clip"], (8, 130))

    def loss(leaf, grad):
        return jnp.sum(leaf(operands._replace(grad=grad), count, scalars, step=True).out ** 2)

    actual, expected = (
        jax.jit(jax.grad(functools.partial(loss, leaf)))(operands.grad)
        for leaf in (pallas.leaf, reference.leaf)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert np.any(expected != 0)


@each_setting
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fifty_fused_steps_are_fifty_updates(settings, implementation, dtype, kernel_runs_here):
    """In one scan, with a schedule; the state identical, the parameters within one rounding."""
    schedule = optax.linear_schedule(0.1, 0.01, 50)
    settings = {"learning_rate": schedule, **settings}
    optimizer = make("fused_dcasgd", implementation=implementation, **settings)
    tx = make("dcasgd", implementation="xla", **settings)
    params = tree(dtype)
    grads = jax.tree.map(
        lambda p: jnp.asarray(np.random.default_rng(0).normal(size=(50, *p.shape)), dtype), params
    )

    def fused(carry, grad):
        new, state = optimizer.step(grad, carry[1], carry[0])
        return (new, state), (new, state)

    (final, state), trajectory = jax.jit(lambda p, s, g: jax.lax.scan(fused, (p, s), g))(
        params, optimizer.init(params), grads
    )

    @jax.jit
    def one(grad, state, params):
        updates, new_state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), new_state

    # From each state of the fused run, so that roundings of bfloat16 do not add up.
    ulp = float(jnp.finfo(dtype).eps)
    before, state_before = params, optimizer.init(params)
    for t in range(50):
        now = functools.partial(jax.tree.map, operator.itemgetter(t))
        expected, expected_state = one(now(grads), state_before, before)
        before, state_before = now(trajectory)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(
                np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=ulp, atol=ulp
            )
        # A kernel's compiler may contract a multiply-add that XLA does not; so may XLA itself, of ν
        # and its root, in a loop or out of one.
        rtol = 0 if implementation == "xla" and "decay" not in settings else 1e-6
        jax.tree.map(
            lambda a, b, rtol=rtol: np.testing.assert_allclose(
                np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=rtol / 10
            ),
            state_before,
            expected_state,
        )
    assert int(state.count) == 50
    assert jax.tree.structure(final) == jax.tree.structure(params)


def test_a_schedule_compiles_once(kernel_runs_here):
    optimizer = make(
        "fused_dcasgd",
        learning_rate=optax.linear_schedule(0.1, 0.0, 10),
        momentum=optax.linear_schedule(0.0, 0.9, 10),
        lamda=optax.linear_schedule(0.0, 2.0, 10),
        implementation="pallas",
    )
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(None)
        return optimizer.step(params, state, params)

    params = tree()
    state = optimizer.init(params)
    for _ in range(5):
        params, state = step(params, state)
    assert len(traces) == 1


def test_a_branch_that_is_not_taken_costs_nothing(kernel_runs_here):
    optimizer = make("fused_dcasgd", implementation="pallas")
    params = tree()
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


# --- In place, by XLA ---

SIZE = 1 << 16


def memory(step, *args):
    with jax.log_compiles(False):
        return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile().memory_analysis()


BFLOAT16_NEEDS_COPIES = jax.__version_info__ < (0, 11)  # in XLA's CPU compiler of that time


@pytest.mark.parametrize("leaves", [1, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"store": "updates"},
        {"store": "updates", "momentum": None},
        {"decay": 0.9, "clip": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["fused_dcasgd", "dcasgd"])
def test_a_donated_step_is_in_place(form, settings, dtype, leaves):
    optimizer = make(form, **settings)
    params = [jnp.ones((1 << 8, 1 << 8), dtype)] * leaves
    state = optimizer.init(params)

    def step(params, state, grads):
        if form == "fused_dcasgd":
            return optimizer.step(grads, state, params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    used = memory(step, params, state, params)
    assert used.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves((params, state)))
    if dtype == "float32" or not BFLOAT16_NEEDS_COPIES:
        assert used.temp_size_in_bytes < params[0].nbytes


@pytest.mark.parametrize("arguments_first", ["params", "state"])
def test_a_donated_step_that_returns_the_state_first_is_in_place(arguments_first):
    optimizer = make("fused_dcasgd")
    params = jnp.ones(SIZE)
    state = optimizer.init(params)

    def step(params, state, grads):
        return optimizer.step(grads, state, params)[::-1]

    if arguments_first == "params":
        used = memory(step, params, state, params)
    else:
        used = memory(lambda s, p, g: step(p, s, g), state, params, params)
    assert used.alias_size_in_bytes >= 3 * 4 * SIZE
    assert used.temp_size_in_bytes < 4 * SIZE
