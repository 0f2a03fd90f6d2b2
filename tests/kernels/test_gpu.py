"""On a real GPU: the kernel against XLA, and this library against NumPy and MXNet.

pytest -m gpu -n 8 tests/kernels/test_gpu.py

Compiling is what takes time, so several processes share the GPU. On a CPU the same functions run
with XLA in place of the kernel, among the slow tests: so that they are right on the day that there
is a GPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import simulation_cases
from kernel_cases import (
    DTYPES,
    EACH_DTYPE,
    EACH_MODE,
    EACH_SHAPE,
    MODES,
    SETTINGS,
    SHAPES,
    Case,
    arguments,
    assert_same,
    hyperparams,
    make,
)
from mxnet_cases import CASES, assert_follows, follow, make_optimizer

from optax_dcasgd import add_delay_compensation, dcasgd, kernels, simulation

# A case of every shape for each mode and form, in two of the dtypes, in turn.
ROTATING = {
    mode: [
        Case(mode, shape, DTYPES[(m + 2 * step + i % 2) % len(DTYPES)], step)
        for step in (False, True)
        for i, shape in enumerate(SHAPES)
    ]
    for m, mode in enumerate(MODES)
}


def why_no_gpu():
    """The reason why the kernel cannot run on this machine, or None."""
    try:
        devices = jax.devices("cuda")
    except RuntimeError as error:
        return f"JAX finds no NVIDIA GPU: {error}"
    oldest = min(float(device.compute_capability) for device in devices)
    return None if oldest >= 9.0 else f"needs Hopper (9.0); the GPU has capability {oldest}"


@pytest.fixture
def implementation(request):
    """The kernel on a GPU; XLA on a CPU."""
    if request.param == "cpu":
        return "xla"
    if reason := why_no_gpu():
        pytest.skip(reason)
    return "pallas"


def each(name, values):
    """Every one of these values, by their names, on a GPU; and the first on a CPU."""
    params = [
        pytest.param(value, "gpu", marks=pytest.mark.gpu, id=label)
        for label, value in values.items()
    ]
    (label, value), *_ = values.items()
    params.append(pytest.param(value, "cpu", marks=pytest.mark.slow, id=f"{label}, on a CPU"))
    return pytest.mark.parametrize((name, "implementation"), params, indirect=["implementation"])


# --- The shared list ---


def run_list(implementation, cases, *, together):
    """Compares with XLA: each case by itself; or all of a mode and form in one call."""
    given = [arguments(MODES[case.mode], case.shape, *case.dtypes) for case in cases]
    groups = {}
    for i, case in enumerate(cases):
        groups.setdefault((case.mode, case.step) if together else i, []).append(i)

    @functools.partial(jax.jit, static_argnums=1)
    def run(given, implementation):
        results = {}
        for members in groups.values():
            case, (_, count, _) = cases[members[0]], given[members[0]]
            new = kernels.update(
                [given[i][0] for i in members],
                count,
                hyperparams(MODES[case.mode]),
                step=case.step,
                implementation=implementation,
            )
            results |= dict(zip(members, new, strict=True))
        return results

    actual, expected = run(given, implementation), run(given, "xla")
    for i, case in enumerate(cases):
        assert_same(actual[i], expected[i], given[i][0].param, case)


@each("cases", {"dtype": EACH_DTYPE, "mode": EACH_MODE, "shape": EACH_SHAPE})
def test_each(cases, implementation):
    run_list(implementation, cases, together=False)


@each("cases", ROTATING)
def test_all_shapes_together(cases, implementation):
    run_list(implementation, cases, together=True)


# --- Fifty steps ---


def mixed_tree(number, repeats):
    """Arrays of so many sizes, from one number to more than a million, two in three float32."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(0, np.log(1 << 15), number)).astype(int)
    sizes = [(1 << 20) + 2, (1 << 20) + 3, 1, *sizes] * repeats
    return {
        f"{i:03}": jnp.asarray(rng.normal(size=size), "bfloat16" if i % 3 == 2 else "float32")
        for i, size in enumerate(sizes)
    }


FORMS = ("fused_dcasgd", "dcasgd")


def roundings(actual, expected):
    """The largest difference, in units of the last place of numbers of size 1 or more."""
    if not jnp.issubdtype(actual.dtype, jnp.floating):
        return jnp.max(jnp.abs(actual - expected)).astype(jnp.float32)
    ulp = float(jnp.finfo(actual.dtype).eps)
    actual, expected = actual.astype(jnp.float32), expected.astype(jnp.float32)
    error = jnp.abs(actual - expected) / (ulp * jnp.maximum(jnp.abs(expected), 1))
    return jnp.max(jnp.where(jnp.isnan(error), jnp.inf, error))


@each("settings", SETTINGS)
def test_fifty_fused_steps_are_fifty_updates(settings, implementation):
    """And the same by XLA: from each state of one run, so that roundings do not add up."""
    # More arrays of one dtype than a launch takes; compiling them takes most of the time.
    params = mixed_tree(*((30, 3) if implementation == "pallas" else (3, 1)))
    fused, update = (make(form, implementation=implementation, **settings) for form in FORMS)
    fused_by_xla, update_by_xla = (make(form, implementation="xla", **settings) for form in FORMS)

    def applied(tx, grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(carry, flat_grads):
        """One step of the fused run, and by how much the others differ, in roundings."""
        params, state = carry
        ends = np.cumsum([p.size for p in params.values()])
        parts = zip(params.items(), jnp.split(flat_grads, ends[:-1]), strict=True)
        grads = {name: part.astype(p.dtype) for (name, p), part in parts}
        new = fused.step(grads, state, params)
        others = [
            applied(update, grads, state, params),
            applied(update_by_xla, grads, state, params),
            fused_by_xla.step(grads, state, params),
        ]
        return new, [jax.tree.map(roundings, new, other) for other in others]

    before = jax.tree.map(np.array, params)
    carry, worst = (params, fused.init(params)), 0
    rng = np.random.default_rng(1)
    size = sum(p.size for p in params.values())
    for _ in range(50):
        carry, errors = advance(carry, rng.normal(size=size).astype(np.float32))
        worst = np.maximum(worst, jnp.stack(jax.tree.leaves(errors)))
    assert np.max(worst) <= 4
    assert int(carry[1].count) == 50
    for name, start in before.items():
        assert np.any(np.asarray(carry[0][name]) != start), name


# --- Memory ---


IN_PLACE = {
    f"{settings}, {by}": (settings, by) for settings in SETTINGS for by in ("kernel", "XLA")
}


@each("case", IN_PLACE)
def test_a_donated_step_is_in_place(case, implementation):
    settings, by = case
    implementation = "xla" if by == "XLA" else implementation
    optimizer = make("fused_dcasgd", implementation=implementation, **SETTINGS[settings])
    shapes = [(1 << 10, 1 << 10), ((1 << 20) + 5,), (7,)] * 3
    params = [jnp.ones(shape) for shape in shapes]
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        return optimizer.step(grads, state, params)

    grads = jax.tree.map(jnp.copy, params)
    used = step.lower(params, state, grads).compile().memory_analysis()
    arrays = jax.tree.leaves((params, state))
    assert used.alias_size_in_bytes >= sum(x.nbytes for x in arrays)
    assert used.temp_size_in_bytes < params[0].nbytes
    step(params, state, grads)
    assert all(x.is_deleted() for x in arrays)


# --- Against what others compute ---


@each("case", CASES)
def test_every_step_is_that_of_mxnet(case, implementation):
    """By XLA, on a GPU too: `mxnet.DCASGD` has no choice of the implementation."""
    assert_follows(case, follow(make_optimizer(case), case))


RULE = {"lamda": 8.0, "decay": 0.95, "clip": 1.0}


@each("form", {form: form for form in ("dcasgd", "chain")})
def test_a_simulated_run_is_that_of_numpy(form, implementation):
    rate = simulation_cases.LEARNING_RATE
    if form == "dcasgd":
        tx = dcasgd(rate, 0.9, store=None, implementation=implementation, **RULE)
    else:
        tx = optax.chain(add_delay_compensation(), optax.sgd(rate, 0.9))
    arrivals = simulation_cases.arrivals()
    versions, losses = simulation_cases.numpy_run(
        simulation_cases.one_push_each(arrivals.staleness), momentum=0.9, **RULE
    )
    with jax.default_matmul_precision("highest"):  # a GPU's default has ten bits
        result = simulation.run(
            simulation_cases.grad_fn,
            simulation_cases.as_jax(simulation_cases.PARAMS),
            tx,
            simulation_cases.as_jax(simulation_cases.BATCHES),
            arrivals,
        )
    # On a CPU 7e-5 and 1e-5, as roundings add up; a run of another λ is off by more than 0.1.
    simulation_cases.assert_close(result.params, versions[-1], 1e-3)
    np.testing.assert_allclose(result.history.loss, losses, 1e-3)
