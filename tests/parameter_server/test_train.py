"""`parameter_server.train` with Ray: what is trained, in which order, and how it is called."""

import dataclasses
import doctest
import json
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import parameter_server_cases as cases
import pytest
from parameter_server_cases import PARAMS, TX, X, Y, grad_fn
from parameter_server_runs import (
    LARGE,
    ON_RAY,
    assert_sound,
    kinds,
    meanwhile,
    run_python,
    train,
    wait_for_server,
)

from optax_dcasgd import add_delay_compensation, parameter_server, simulation

pytestmark = ON_RAY
PROJECT = pathlib.Path(__file__).parents[2]


def test_a_recorded_run_is_replayed_from_its_file(tmp_path):
    slow = cases.Batches(0.001, str(tmp_path / "slow"))
    result = train(400, batches=slow, num_workers=4, compensation_every=7)
    history = result.history
    assert history.staleness.max() > 3
    assert len(set(history.staleness.tolist())) > 3
    np.testing.assert_array_equal(history.version, np.arange(400) - history.staleness)
    assert np.all(np.diff(history.time) >= 0)
    assert set(history.worker.tolist()) == {0, 1, 2, 3}
    assert list(np.flatnonzero(np.isfinite(history.compensation))) == list(range(0, 400, 7))
    assert 0 < np.nanmax(history.compensation) <= 1  # by its clip
    assert not result.events

    result.arrivals.save(tmp_path / "arrivals")
    loaded = simulation.Arrivals.load(tmp_path / "arrivals")
    assert_sound(result._replace(arrivals=loaded))
    fresh = dataclasses.replace(loaded, staleness=np.zeros(400, int))
    in_order = simulation.run(grad_fn, PARAMS, TX, (X, Y), fresh)
    assert abs(in_order.params["out"] - result.params["out"]).max() > 1e-4  # it does matter


def test_the_slow_worker_is_reported(tmp_path, caplog):
    result = train(500, batches=cases.Batches(0.004, str(tmp_path / "slow")))
    slow = int(np.bincount(result.history.worker).argmin())
    (straggler,) = result.stragglers()
    assert straggler.worker == slow
    assert straggler.ratio > 5
    assert f"worker {slow} takes" in caplog.text


def test_large_parameters_go_through_the_object_store():
    assert_sound(train(100, num_workers=2, **LARGE), **LARGE)


def test_one_worker_is_sequential_training():
    result = train(60, num_workers=1)
    assert not result.history.staleness.any()
    assert result.history.batch.tolist() == list(range(60))
    plain = optax.sgd(0.02, momentum=0.9)
    params, state = PARAMS, plain.init(PARAMS)
    for i in range(60):
        _, grads = grad_fn(params, (X[i % 64], Y[i % 64]), None)
        updates, state = plain.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(result.params, params, rtol=1e-5, atol=1e-6)


def test_sync_is_the_simulations_sync():
    result = train(40, mode="sync", tx=optax.sgd(0.1), num_workers=3)
    assert result.arrivals is None
    arrivals = simulation.arrivals(jax.random.key(0), 3, 120)
    batches = X[np.arange(120) % 64], Y[np.arange(120) % 64]
    want = simulation.run(grad_fn, PARAMS, optax.sgd(0.1), batches, arrivals, mode="sync")
    chex.assert_trees_all_close(result.params, want.params, rtol=1e-5, atol=1e-6)
    assert result.history.batch.tolist() == list(range(0, 120, 3))


def test_narrow_transport_rounds_the_gradient():
    def rounded_grad_fn(params, batch, key):
        value, grads = grad_fn(params, batch, key)
        return value, jax.tree.map(
            lambda g: jax.lax.reduce_precision(g, exponent_bits=8, mantissa_bits=7), grads
        )

    result = train(60, transport_dtype=jnp.bfloat16)

    def distance(grad_fn):
        replayed = simulation.run(grad_fn, PARAMS, TX, (X, Y), result.arrivals)
        return optax.tree.norm(optax.tree.sub(replayed.params, result.params))

    # Not to the bit: what is off by a rounding may be rounded to another bfloat16.
    assert distance(rounded_grad_fn) < 0.5 * distance(grad_fn)


def test_an_optimizer_with_a_random_key_in_its_state(tmp_path):
    tx = optax.chain(optax.add_noise(0.01, 0.5, jax.random.key(3)), optax.sgd(0.05))
    for num_updates in (30, 60):
        result = train(num_updates, tx=tx, checkpoint_dir=tmp_path, checkpoint_every=10)
        assert_sound(result, tx=tx)


def test_compensation_of_plain_sgd_is_that_of_the_gradient():
    """By the formula: λ g ⊙ g ⊙ (w − w_s), over g."""
    lamda, rate = 3.0, 0.3
    tx = optax.chain(add_delay_compensation(lamda, decay=None, clip=None), optax.sgd(rate))
    result = train(40, tx=tx, compensation_every=1)
    versions, history = [PARAMS], result.history
    for t in range(40):
        stale, batch = versions[history.version[t]], history.batch[t] % 64
        _, grads = grad_fn(stale, (X[batch], Y[batch]), None)
        added = jax.tree.map(lambda g, w, s: lamda * g * g * (w - s), grads, versions[-1], stale)
        ratio = optax.tree.norm(added) / optax.tree.norm(grads)
        np.testing.assert_allclose(history.compensation[t], ratio, 1e-3, 1e-5)
        versions.append(
            jax.tree.map(lambda w, g, c: w - rate * (g + c), versions[-1], grads, added)
        )


# Bounded staleness.


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_fast_workers_wait(max_staleness, tmp_path):
    slow = cases.Batches(0.002, str(tmp_path / "slow"))
    result = train(150, batches=slow, max_staleness=max_staleness)
    assert result.history.staleness.max() == max_staleness
    assert not result.events
    assert_sound(result)


def test_stale_gradients_are_dropped_and_their_batches_kept(tmp_path, caplog):
    slow = cases.Batches(0.002, str(tmp_path / "slow"))
    result = train(600, batches=slow, max_staleness=3, on_stale="drop")
    assert result.history.staleness.max() <= 3
    assert kinds(result)["dropped"] > 0
    last = {}
    for event in result.events:
        batch = event.message.rpartition("batch ")[2]
        assert last.get(batch) != event.worker  # it would be as late with it again
        last[batch] = event.worker
    assert "1 by now" in caplog.text  # and then after twice as many
    assert caplog.text.count("dropped") < kinds(result)["dropped"]
    assert_sound(result)


# What is passed.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_workers": 0}, ValueError, "num_workers must be at least 1"),
        ({"num_workers": 2.0}, TypeError, "num_workers must be a Python integer"),
        ({"num_updates": 0}, ValueError, "num_updates must be at least 1"),
        ({"mode": "eager"}, ValueError, "mode must be one of 'async', 'sync'"),
        ({"on_stale": "ignore"}, ValueError, "on_stale must be one of 'wait', 'drop'"),
        ({"max_staleness": -1}, ValueError, "max_staleness must be at least 0"),
        ({"max_staleness": 1, "mode": "sync"}, ValueError, "max_staleness has no meaning"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1"),
        ({"max_bad_pushes": -1}, ValueError, "max_bad_pushes must be at least 0"),
        ({"compensation_every": 0}, ValueError, "compensation_every must be at least 1"),
        ({"key": 3}, TypeError, "key must be one JAX random key"),
        ({"grad_fn": 3}, TypeError, "grad_fn must be a function"),
        ({"tx": 3}, TypeError, "tx must be an optax.GradientTransformation"),
        ({"batches": (X, Y[:5])}, ValueError, r"batches\[1\] has shape \(5, 16, 3\)"),
        ({"grad_fn": lambda p, b, k: p}, TypeError, r"grad_fn must return \(loss, grads\)"),
        ({"grad_fn": lambda p, b, k: (jnp.zeros(()), p["out"])}, ValueError, "grads"),
        ({"checkpoint_dir": "gs://bucket/run"}, ValueError, "checkpoint_dir must be a directory"),
        ({"tx": optax.polyak_sgd()}, TypeError, "value"),
        ({"address": "auto"}, ValueError, "address has no effect: Ray is initialised already"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        train(**options)


def test_a_name_that_is_taken():
    """Nothing that was started for it stays."""

    def again():
        wait_for_server()
        with pytest.raises(ValueError, match="name='taken' is that of a run under way"):
            train(10, name="taken")

    with meanwhile(again):
        train(1500, batches=cases.Batches(0.005), name="taken")


# What users read.


def test_the_example_of_the_docstring():
    """Without the mark that keeps the default suite from starting Ray."""
    train_doc = parameter_server.train.__doc__
    assert "# doctest: +SKIP" in train_doc
    code = train_doc.replace("# doctest: +SKIP", "")
    # By this name of the module, functions are sent to the workers by value.
    example = doctest.DocTestParser().get_doctest(code, {"__name__": "__main__"}, "train", None, 0)
    results = doctest.DocTestRunner().run(example)
    assert results.failed == 0 < results.attempted


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    page = (PROJECT / "docs" / "parameter_server.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}  # so that functions are sent to the workers by value
    exec(compile(code, "docs/parameter_server.md", "exec"), names)
    result = names["result"]
    assert result.history.loss[-100:].mean() < 0.1 * result.history.loss[:10].mean()
    assert (tmp_path / "run" / "1000").is_dir()


def test_the_example(tmp_path):
    example = str(PROJECT / "examples" / "ray_parameter_server.py")
    options = ["--gradients", 120, "--compute-time", 0.005, "--out", tmp_path]
    printed, errors = run_python(example, *options, timeout=300)
    assert "unstable API" not in errors  # each run starts Ray with what the first was given
    assert {p.name for p in tmp_path.iterdir()} == {
        *("asgd.npz", "dc-asgd.npz", "results.json", "staleness.png"),
    }
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows["SSGD"]["updates"] == 30
    assert rows["SSGD"]["largest staleness"] == 0 < rows["ASGD"]["largest staleness"]
    for method in ("SSGD", "ASGD", "DC-ASGD"):
        assert re.search(rf"^{method} +[\d.]+%", printed, re.MULTILINE)
    arrivals = simulation.Arrivals.load(tmp_path / "asgd.npz")
    assert len(arrivals.worker) == 120
