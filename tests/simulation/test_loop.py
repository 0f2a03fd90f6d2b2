"""The loop of `simulation.run`: evaluation, versions, replay, non-finite runs, progress, errors."""

import dataclasses
import sys
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import simulation_cases as cases
from simulation_cases import BATCHES, LEARNING_RATE, NUM_UPDATES, PARAMS

from optax_dcasgd import add_delay_compensation, simulation
from optax_dcasgd.simulation import Arrivals, _progress, _steps

KEY = jax.random.key(0)
TX = optax.chain(add_delay_compensation(), optax.sgd(LEARNING_RATE))
RULE = {"lamda": 8.0, "decay": 0.95, "clip": 1.0}
SGD = optax.sgd(0.1)


def run(tx=TX, arrivals=None, grad_fn=cases.grad_fn, params=PARAMS, batches=BATCHES, **options):
    arrivals = cases.arrivals() if arrivals is None else arrivals
    batches = batches if callable(batches) else cases.as_jax(batches)
    return simulation.run(grad_fn, cases.as_jax(params), tx, batches, arrivals, **options)


def by_hand(staleness, num_workers=None):
    staleness = np.asarray(staleness)
    worker = np.zeros_like(staleness)
    return Arrivals(worker, staleness, np.arange(1.0, staleness.size + 1), None, num_workers)


# A worker that pulls its next parameters before it pushes holds two versions; one that is dropped
# pulls again, without a push.
AHEAD = np.minimum(np.arange(NUM_UPDATES), 2)
AGAIN = np.where(np.arange(NUM_UPDATES) % 7 == 0, 0, np.minimum(np.arange(NUM_UPDATES), 5))
NEVER = np.arange(NUM_UPDATES)


@pytest.mark.parametrize(("every", "when"), [(15, [15, 30, 40]), (None, [40])])
def test_evaluation_after_every_so_many_updates_and_at_the_end(every, when):
    calls = []

    def evaluate(params):
        jax.debug.callback(lambda: calls.append(1))
        return {"params": params, "norm": optax.tree.norm(params)}

    result = run(evaluate=evaluate, evaluate_every=every)
    jax.effects_barrier()
    assert len(calls) == len(when)
    history = result.history
    np.testing.assert_array_equal(history.evaluated, when)
    assert history.loss.shape == history.time.shape == (NUM_UPDATES,)
    assert history.evaluation["norm"].shape == (len(when),)
    versions, losses = cases.numpy_run(
        cases.one_push_each(cases.arrivals().staleness), momentum=None, **RULE
    )
    for row, update in enumerate(when):
        at = {k: v[row] for k, v in history.evaluation["params"].items()}
        cases.assert_close(at, versions[update - 1], 1e-4)
    np.testing.assert_allclose(history.loss, losses, 1e-4)


def test_no_evaluation_in_between_under_vmap():
    calls = []

    def train(learning_rate):
        def evaluate(params):
            jax.debug.callback(lambda x: calls.append(x), params["bias"][0])
            return ()

        return run(optax.sgd(learning_rate), evaluate=evaluate, evaluate_every=10).params

    jax.vmap(train)(jnp.array([0.1, 0.2]))
    jax.effects_barrier()
    assert len(calls) == 2 * NUM_UPDATES // 10


# --- Versions ---


def test_recorded_arrivals_of_any_order():
    with jax.enable_x64(True):
        traced = jax.jit(lambda arrivals: run(arrivals=arrivals).params)
        for staleness in (AHEAD, AGAIN, NEVER):
            params = traced(by_hand(staleness, num_workers=NUM_UPDATES))
            versions, _ = cases.numpy_run(cases.one_push_each(staleness), **RULE)
            cases.assert_close(params, versions[-1], 1e-12)


def test_traced_arrivals_that_need_more_versions_than_workers_are_not_trained_wrongly():
    """How many they need is not known while tracing: NaN, and not another run's result."""

    def grad_fn(params, batch, key):
        return jnp.zeros(()), {"w": params["w"], "n": jnp.zeros_like(params["n"])}

    tx = optax.masked(SGD, {"w": True, "n": False})
    params = {"w": jnp.ones(()), "n": jnp.array(3, jnp.int32)}
    traced = jax.jit(lambda arrivals: run(tx, arrivals, grad_fn, params))
    result = traced(by_hand(AHEAD, num_workers=2))
    assert np.isnan(result.history.loss).all()
    assert np.isnan(result.params["w"])
    assert result.history.num_finite == 0
    assert (result.params["n"].dtype, int(result.params["n"])) == (jnp.int32, 3)


def test_as_few_versions_as_the_arrivals_need():
    rng, plan = np.random.default_rng(0), jax.jit(_steps.plan_slots, static_argnums=1)
    for _ in range(100):
        staleness = np.array([rng.integers(t + 1) for t in range(8)])
        version = np.arange(staleness.size) - staleness
        # Kept while push t writes: what is still to be read, and what it makes.
        kept = [
            len({v for v in version[t + 1 :] if v <= t} | {t + 1}) for t in range(staleness.size)
        ]
        slots = _steps.num_slots(staleness)
        assert slots == max(kept)
        assert plan(staleness, slots).fits
        if slots > 1:
            assert not plan(staleness, slots - 1).fits
    for num_workers in [1, 2, 8]:  # that take turns
        staleness = np.minimum(np.arange(100), num_workers - 1)
        assert _steps.num_slots(staleness) == num_workers


def test_the_versions_are_updated_in_place():
    """With a copy of them in the loop, the temporaries would hold all versions twice."""
    size, num_workers = 100_000, 16
    arrivals = by_hand(np.minimum(np.arange(64), num_workers - 1), num_workers)

    def train(params, arrivals):
        def grad_fn(params, batch, key):
            return jax.value_and_grad(lambda w: jnp.sum((w - batch) ** 2))(params)

        batches = jnp.arange(64.0)
        return simulation.run(grad_fn, params, TX, batches, arrivals).params

    compiled = jax.jit(train).lower(jnp.ones(size), arrivals).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 1.5 * num_workers * size * 4


def test_versions_are_kept_in_the_dtypes_of_the_parameters():
    params = {"kernel": jnp.asarray(PARAMS["kernel"], jnp.bfloat16), "bias": np.zeros(2)}
    result = run(params=params, evaluate=lambda params: 1.0)
    assert result.params["kernel"].dtype == jnp.bfloat16
    assert result.params["bias"].dtype == jnp.float32


def test_a_run_that_is_not_finite_says_since_when():
    """It stays finite; it does not; only its last parameters are not."""

    def train(learning_rate, only_parameters):
        def steep(params, batch, key):
            loss, grad = jax.value_and_grad(lambda w: w**4)(params)
            return jnp.where(only_parameters, 0, loss), jnp.where(only_parameters, jnp.nan, grad)

        return run(optax.sgd(learning_rate), grad_fn=steep, params=1.0).history

    history = jax.vmap(train)(jnp.array([1e-4, 10.0, 0.1]), jnp.array([False, False, True]))
    first = int(np.argmin(np.isfinite(history.loss[1])))
    assert 0 < first < NUM_UPDATES - 1
    np.testing.assert_array_equal(history.num_finite, [NUM_UPDATES, first, NUM_UPDATES - 1])


# --- Progress ---


@pytest.fixture
def bar(monkeypatch):
    """Stands in for the bar that tqdm makes; ``total`` is what it was made with."""
    bar = mock.Mock(n=0, total=None)
    bar.update.side_effect = lambda n: setattr(bar, "n", bar.n + n)

    def make(total, unit):
        bar.total = total
        return bar

    monkeypatch.setitem(sys.modules, "tqdm", mock.Mock(tqdm=make))
    return bar


def quadratic(tx=SGD, **options):
    """A cheap run."""
    return run(tx, grad_fn=lambda w, batch, key: (w**2, 2 * w), params=1.0, **options)


@pytest.mark.parametrize("interval", [0.0, 1000.0])
def test_progress(monkeypatch, bar, interval):
    """One report an interval: at every update if it is zero, and hardly any if it is long."""
    monkeypatch.setattr(_progress, "_INTERVAL", interval)
    result = quadratic(progress=True)
    chex.assert_trees_all_equal(result, quadratic())
    bar.close.assert_called_once_with()
    assert bar.n == bar.total == NUM_UPDATES
    reports = bar.update.call_count
    assert reports >= NUM_UPDATES if interval == 0 else reports < 8


def test_no_progress_where_python_does_not_run(bar):
    jax.eval_shape(jax.jit(lambda: quadratic(progress=True)))
    jax.eval_shape(jax.vmap(lambda key: quadratic(progress=True, key=key)), jax.random.split(KEY))
    assert bar.total is None


def test_progress_ends_when_the_run_fails(bar):
    def update(updates, state, params=None, **extra_args):
        raise RuntimeError("in the optimizer")

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    with pytest.raises(RuntimeError, match="in the optimizer"):
        quadratic(tx, progress=True)
    bar.close.assert_called_once_with()
    assert bar.n == 0


def test_progress_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="progress=True needs tqdm"):
        quadratic(progress=True)


# --- Errors ---


def _with(**changes):
    return {"arrivals": dataclasses.replace(by_hand(AHEAD), **changes)}


def _gives(returned):
    return {"grad_fn": lambda params, batch, key: returned(params)}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "asynchronous"}, ValueError, "mode must be one of 'async', 'sync'"),
        ({"tx": 0.1}, TypeError, "tx must be an optax.GradientTransformation"),
        ({"grad_fn": None}, TypeError, "grad_fn must be a function"),
        (_gives(lambda p: p), TypeError, r"grad_fn must return \(loss, grads\)"),
        (_gives(lambda p: ((0.0, 1), p)), TypeError, "return a scalar loss"),
        (_gives(lambda p: (p["bias"], p)), TypeError, "return a scalar loss"),
        (_gives(lambda p: (0.0, {"bias": p["bias"]})), ValueError, r"grads\['kernel'\]"),
        (_gives(lambda p: (0.0, p | {"bias": jnp.ones(3)})), ValueError, r"has shape \(3,\)"),
        ({"batches": {"x": np.ones((39, 2))}}, ValueError, r"batches\['x'\] has shape \(39, 2\)"),
        ({"evaluate": 3}, TypeError, "evaluate must be a function"),
        ({"evaluate_every": 3}, ValueError, "evaluate_every has no meaning without evaluate"),
        ({"evaluate": len, "evaluate_every": 0}, ValueError, "evaluate_every must be at least 1"),
        ({"key": 0}, TypeError, "key must be one JAX random key"),
        ({"arrivals": (AHEAD, AHEAD)}, TypeError, "arrivals must be a simulation.Arrivals"),
        (_with(worker=np.int32(0)), ValueError, r"arrivals.worker must have shape"),
        (_with(time=[1.0, 2.0]), TypeError, r"arrivals.time must be an array; got"),
        (_with(worker=AHEAD - 1), ValueError, r"arrivals.worker\[0\] must be at least 0"),
        (_with(worker=AHEAD, num_workers=2), ValueError, r"worker\[2\] .* at most 1"),
        (_with(staleness=AHEAD + 1), ValueError, r"staleness\[0\] .* at most 0"),
        (_with(staleness=AHEAD[1:]), ValueError, r"staleness has shape \(39,\)"),
        (_with(time=AHEAD), TypeError, "time must be of floating dtype"),
        (_with(batch=AHEAD - 1), ValueError, r"batch\[0\] must be at least 0"),
        (_with(barrier=np.ones((2, 2))), ValueError, "barrier must have shape"),
        (_with(num_workers=0), ValueError, "num_workers must be at least 1"),
        (_with(num_workers=41) | {"mode": "sync"}, ValueError, "40 pushes, too few for one round"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        run(**arguments)


def test_the_number_of_workers_must_be_known_where_the_arrivals_are_traced():
    with pytest.raises(ValueError, match=r"arrivals.num_workers is required"):
        jax.jit(lambda arrivals: run(arrivals=arrivals))(by_hand(AHEAD))
