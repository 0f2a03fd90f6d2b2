"""What `dcasgd` and `fused_dcasgd` promise beside the paper's rule: modes, state, schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_dcasgd

_rng = np.random.default_rng(2)
PARAMS = {"w": jnp.asarray(_rng.normal(size=(5, 3)), jnp.float32), "b": jnp.float32(0.5)}
GRADS = [
    {
        "w": jnp.asarray(_rng.normal(size=(5, 3)), jnp.float32),
        "b": jnp.asarray(_rng.normal(), jnp.float32),
    }
    for _ in range(8)
]
METHODS = {"c": {"lamda": 2.0}, "a": {"lamda": 2.0, "decay": 0.9}, "clip": {"lamda": 8, "clip": 1}}


def train(tx, grads=GRADS, params=PARAMS, **extra_args):
    update = jax.jit(tx.update)
    state = tx.init(params)
    trajectory = []
    for g in grads:
        updates, state = update(g, state, params, **extra_args)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory, state


def assert_close(actual, expected, rtol=1e-6):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol, rtol), actual, expected)


def assert_bit_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("momentum", [None, 0.0, 0.9])
@pytest.mark.parametrize("method", METHODS)
def test_remembering_updates_is_remembering_parameters(method, momentum):
    """The last update *is* w − w_prev, to the rounding of the addition that applied it."""
    by_params, _ = train(optax_dcasgd.dcasgd(0.1, momentum, **METHODS[method]))
    by_updates, _ = train(optax_dcasgd.dcasgd(0.1, momentum, store="updates", **METHODS[method]))
    uncompensated, _ = train(optax_dcasgd.dcasgd(0.1, momentum, 0.0))
    assert_close(by_updates, by_params, rtol=1e-5)
    assert np.abs(uncompensated[-1]["w"] - by_params[-1]["w"]).max() > 1e-2


def test_the_learning_rate_stands_inside_the_momentum():
    """A schedule changes what is added from now on, not what the buffer already holds."""
    schedule = optax.piecewise_constant_schedule(0.1, {3: 0.1})
    actual, _ = train(optax_dcasgd.dcasgd(schedule, 0.9, 0.0))
    w, m = np.asarray(PARAMS["w"], np.float64), 0.0
    for step, g in enumerate(GRADS):
        m = 0.9 * m - (0.1 if step < 3 else 0.01) * np.asarray(g["w"], np.float64)
        w = w + m
    np.testing.assert_allclose(actual[-1]["w"], w, 1e-5)
    rescaled_buffer, _ = train(optax.sgd(schedule, 0.9))
    assert np.abs(rescaled_buffer[-1]["w"] - w).max() > 1e-2


@pytest.mark.parametrize("name", ["learning_rate", "momentum", "lamda", "decay", "eps", "clip"])
def test_every_hyperparameter_may_be_a_schedule(name):
    """The schedule sees 0 on the first update, as every schedule of Optax does."""
    constants = {
        "learning_rate": 0.1, "momentum": 0.9, "lamda": 2.0, "decay": 0.9, "eps": 0.3, "clip": 0.5
    }  # fmt: skip
    values = [constants[name] * (1 - 0.05 * t) for t in range(len(GRADS))]
    schedule = {**constants, name: lambda count: jnp.asarray(values)[count]}
    actual, _ = train(optax_dcasgd.dcasgd(**schedule))

    params, state, expected = PARAMS, optax_dcasgd.dcasgd(**constants).init(PARAMS), []
    for value, g in zip(values, GRADS, strict=True):
        tx = optax_dcasgd.dcasgd(**{**constants, name: value})
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        expected.append(params)
    assert_close(actual, expected)
    constant, _ = train(optax_dcasgd.dcasgd(**constants))
    assert np.abs(constant[-1]["w"] - actual[-1]["w"]).max() > 1e-4


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("store", ["params", "updates", None])
def test_the_state_keeps_only_what_the_mode_needs(store, momentum, decay):
    state = optax_dcasgd.dcasgd(0.1, momentum, decay=decay, store=store).init(PARAMS)
    assert (state.prev_params is None) == (store != "params")
    assert (state.momentum is None) == (momentum is None and store != "updates")
    assert (state.nu is None) == (decay is None)
    assert state.last_worker is None
    workers = optax_dcasgd.dcasgd(num_workers=3).init(PARAMS)
    assert workers.prev_params["w"].shape == (3, 5, 3)


def test_on_the_first_call_w_s_is_w_whatever_init_saw():
    """MXNet copies the weights when it first updates them."""
    loaded = jax.tree.map(lambda p: p + 1, PARAMS)
    for options, extra_args in [({}, {}), ({"num_workers": 2}, {"worker": 1})]:
        tx = optax_dcasgd.dcasgd(0.1, lamda=2.0, **options)
        updates, _ = tx.update(GRADS[0], tx.init(PARAMS), loaded, **extra_args)
        assert_close(updates, jax.tree.map(lambda g: -0.1 * g, GRADS[0]))


def test_an_update_without_a_gradient_is_remembered_as_none():
    """w did not move, so the next gradient, one update old, is fresh."""
    grad, trajectories = jnp.array([1.0, -2.0]), []
    for store in ("params", "updates"):
        tx, w = optax_dcasgd.dcasgd(0.1, None, 2.0, store=store), jnp.array([1.0, 2.0])
        state, trajectory = tx.init(w), []
        for g in (grad, None, grad, grad):
            update, state = tx.update(g, state, w)
            w = w if update is None else w + update
            trajectory.append(w)
        trajectories.append(trajectory)
    np.testing.assert_allclose(*trajectories, rtol=1e-6)
    np.testing.assert_allclose(trajectories[1][2] - trajectories[1][1], -0.1 * grad, rtol=1e-6)


def test_explicit_stale_params_do_not_disturb_the_memory():
    tx = optax_dcasgd.dcasgd(0.1, lamda=2.0)
    state, params, elsewhere = tx.init(PARAMS), PARAMS, jax.tree.map(jnp.zeros_like, PARAMS)
    for g in GRADS[:3]:
        updates, state = tx.update(g, state, params, stale_params=elsewhere)
        assert_bit_equal(state.prev_params, params)
        params = optax.apply_updates(params, updates)


def test_a_push_without_a_worker_still_completes_the_last_workers_backup():
    tx = optax_dcasgd.dcasgd(0.1, lamda=2.0, num_workers=2)
    state = tx.init(PARAMS)
    params = [PARAMS]
    pushes = [{"worker": 1}, {"stale_params": PARAMS}, {"stale_params": PARAMS}, {"worker": 1}]
    for g, push in zip(GRADS, pushes, strict=False):
        updates, state = tx.update(g, state, params[-1], **push)
        params.append(optax.apply_updates(params[-1], updates))
    backups = jax.tree.map(lambda b: b[1], state.prev_params)
    assert_bit_equal(backups, params[1])


@pytest.mark.parametrize(("index", "clamped"), [(7, 2), (3, 2), (-1, 0), (-(2**31), 0)])
def test_a_traced_worker_out_of_range_is_clamped_in_every_respect(index, clamped):
    """Its own backup is completed on the next call too, and it alone."""
    tx = optax_dcasgd.dcasgd(0.1, None, 0.5, num_workers=3)
    update = jax.jit(tx.update)

    def train(worker):
        params, outputs = jnp.ones(2), []
        state = tx.init(params)
        for i in (0, worker, 1, worker, 2):
            updates, state = update(jnp.sin(params), state, params, worker=jnp.int32(i))
            params = params + updates
            outputs.append((params, state))
        return outputs

    jax.tree.map(np.testing.assert_array_equal, train(index), train(clamped))


def test_nu_is_kept_in_float32_for_low_precision_parameters():
    """Fault 10: in bfloat16, 0.999·ν + 0.001·g² stops moving at once."""
    params = jnp.ones(4, jnp.bfloat16)
    grads = jnp.asarray(_rng.normal(size=(200, 4)), jnp.bfloat16)
    for tx in (
        optax_dcasgd.dcasgd(0.0, decay=0.999, momentum=0.9),
        optax_dcasgd.add_delay_compensation(decay=0.999),
    ):

        def scan(state, g, tx=tx):
            return tx.update(g, state, params)[1], None

        state, _ = jax.lax.scan(scan, tx.init(params), grads)
        expected = np.zeros(4)
        for g in np.asarray(grads, np.float64):
            expected = 0.999 * expected + 0.001 * g**2
        assert state.nu.dtype == jnp.float32
        np.testing.assert_allclose(state.nu, expected, 1e-5)


def test_accumulator_dtype_is_that_of_the_momentum_and_nu():
    tx = optax_dcasgd.dcasgd(0.1, 0.9, decay=0.9, accumulator_dtype=jnp.bfloat16)
    params = {"real": jnp.ones(2), "complex": jnp.ones(2, jnp.complex64)}
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    assert state.momentum["real"].dtype == state.nu["real"].dtype == jnp.bfloat16
    assert state.momentum["complex"].dtype == jnp.complex64
    assert state.nu["complex"].dtype == jnp.float32
    assert state.prev_params["real"].dtype == jnp.float32


@pytest.mark.parametrize("store", ["params", "updates"])
@pytest.mark.parametrize("method", METHODS)
def test_the_fused_step_continues_a_run_of_dcasgd_and_back(method, store):
    options = {"learning_rate": 0.1, "momentum": 0.9, "store": store, **METHODS[method]}
    tx, fused = optax_dcasgd.dcasgd(**options), optax_dcasgd.fused_dcasgd(**options)
    expected, expected_state = train(tx)

    update, step = jax.jit(tx.update), jax.jit(fused.step)
    params, state = PARAMS, fused.init(PARAMS)
    for i, g in enumerate(GRADS):
        if i % 2:
            updates, state = update(g, state, params)
            params = optax.apply_updates(params, updates)
        else:
            params, state = step(g, state, params)
    assert_close(params, expected[-1])
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    assert_close(state, expected_state, rtol=1e-5)


def test_complex_gradients_are_squared_by_their_modulus():
    """Rotating g, w and w_s by one phase rotates the update by that phase."""
    g, w, stale = (
        jnp.asarray(_rng.normal(size=6) + 1j * _rng.normal(size=6), jnp.complex64) for _ in range(3)
    )
    phase = jnp.exp(1j * jnp.float32(0.7))
    for options in ({}, {"decay": 0.9}, {"clip": 0.3}):
        tx = optax_dcasgd.dcasgd(0.1, lamda=2.0, store=None, **options)
        plain, _ = tx.update(g, tx.init(w), w, stale_params=stale)
        turned, _ = tx.update(g * phase, tx.init(w), w * phase, stale_params=stale * phase)
        np.testing.assert_allclose(turned, plain * phase, 1e-5)
    formula = -0.1 * (g + 2.0 * np.abs(g) ** 2 * (w - stale))
    tx = optax_dcasgd.dcasgd(0.1, lamda=2.0, store=None)
    np.testing.assert_allclose(
        tx.update(g, tx.init(w), w, stale_params=stale)[0], formula, 1e-5, 1e-6
    )


@pytest.mark.parametrize(
    "tx",
    [
        optax_dcasgd.add_delay_compensation(2.0, decay=0.9, store=None),
        optax_dcasgd.robust(store=None),
        optax_dcasgd.scale_by_gap(),
    ],
    ids=["add_delay_compensation", "robust", "scale_by_gap"],
)
def test_what_is_not_a_number_stays_to_be_seen(tx):
    """A NaN in ν, or in w_s, is not taken for the zero that is allowed there."""
    params, fine = jnp.ones(2), jnp.array([0.1, 0.1])
    given = {"stale_params": params - 0.1, "staleness": 2}
    _, state = tx.update(fine, tx.init(params), params, **given)
    _, with_nan = tx.update(fine.at[0].set(jnp.nan), state, params, **given)
    if isinstance(state, optax_dcasgd.ScaleByGapState):  # its ν is of the parameters
        given["stale_params"], with_nan = given["stale_params"].at[0].set(jnp.nan), state
    updates, _ = tx.update(fine, with_nan, params + 0.1, **given)
    np.testing.assert_array_equal(np.isnan(updates), [True, False])
