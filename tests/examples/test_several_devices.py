"""examples/overlapped_data_parallel.py and pipeline_delay.py, with models that compile fast."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_cases import load, refuses
from flax import nnx


@pytest.fixture(scope="module")
def overlapped():
    return load("overlapped_data_parallel")


@pytest.fixture(scope="module")
def pipeline():
    return load("pipeline_delay")


class Linear(nnx.Module):
    """Stands in for the CNN."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 10, use_bias=False, rngs=rngs)

    def __call__(self, images):
        return self.linear(images)


def numpy_gradient(kernel, images, labels):
    """Of the mean cross-entropy, by hand."""
    logits = images @ kernel
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return images.T @ (p - np.eye(10)[labels]) / len(labels)


def test_overlapped_steps_are_those_of_one_device_one_update_late(overlapped, tmp_path):
    """SGD with momentum by hand, on the mean over the devices; with the correction, or without."""
    args = overlapped.parse_args([f"--out={tmp_path}"])
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    graphdef, params = nnx.split(Linear(nnx.Rngs(0)), nnx.Param)
    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(16, 3)), rng.integers(10, size=16)) for _ in range(4)]
    for method in overlapped.METHODS:
        init, train_step = overlapped.make_steps(method, graphdef, mesh, args)
        w = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        kernel = np.float64(params["linear"]["kernel"][...])
        state, update, under_way, nu = init(w), 0.0, None, 0.0
        w = jax.tree.map(jnp.copy, w)
        for images, labels in batches:
            batch = (np.float32(images), np.int32(labels))
            batch = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
            w, state = jax.block_until_ready(train_step(w, state, batch, 0.1))
            g, under_way = under_way, numpy_gradient(kernel, images, labels)
            if method == "synchronous":
                g = under_way
            if g is not None:  # the parameters have moved by the last update since
                if method == "compensated":
                    nu = 0.95 * nu + 0.05 * g**2
                    correction = 8 * g * g * update / np.sqrt(nu + 1e-7)
                    g = g + np.clip(correction, -abs(g), abs(g))
                update = 0.9 * update - 0.1 * g
                kernel = kernel + update
        np.testing.assert_allclose(w["linear"]["kernel"][...], kernel, rtol=1e-4, atol=1e-5)


def test_overlapped_table_and_words(overlapped, tmp_path):
    good, bad = [0.9, 0.91, 0.92], [0.1, 0.1, float("nan")]
    accuracies = {"synchronous": [good], "overlapped": [bad], "compensated": [good]}
    assert overlapped.table(accuracies, [0.02]).splitlines() == [
        "| learning rate | synchronous | overlapped | compensated |",
        "|---|---|---|---|",
        "| 0.02 | 91.0 ± 1.0 % | nan ± nan % (3 of 3 failed) | 91.0 ± 1.0 % |",
    ]
    words = overlapped.verdict(accuracies, [0.02]).splitlines()[0]
    assert words.startswith("0.02: the update of delay hurt (3 of 3 runs failed, 0 without)")
    assert "; compensation helped (0 of 3 runs failed, 3 without)." in words
    overlapped.plot(accuracies, [0.02], "made up", tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_small_pipeline(pipeline, capsys, tmp_path, monkeypatch):
    sizes = {"WIDTH": 8, "HEADS": 1, "CONTEXT": 8, "BATCH": 4, "EVALUATE_EVERY": 10}
    for name, value in sizes.items():
        monkeypatch.setattr(pipeline, name, value)
    options = ["--blocks=1", "--stages=2", "--updates=20", "--seeds=1", "--methods=both"]
    pipeline.main([*options, "--sgd-rates=0.1", "--adam-rates", f"--out={tmp_path}"])
    output = capsys.readouterr()
    assert "2 stages, delays 1 to 0, 20 updates, 1 seeds" in output.out
    words = "SGD 0.1: the delays made no clear difference; both made no clear difference."
    assert words in output.out  # one seed
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["curves"]) == ["SGD"]
    (methods,) = results["curves"]["SGD"].values()
    losses = {method: runs[0] for method, runs in methods.items()}
    assert sorted(losses) == ["both", "fresh", "stale"]
    assert len({tuple(curve) for curve in losses.values()}) == 3
    for method, (first, last) in losses.items():
        assert last < first  # it learns
        assert f"| {method} | {last:.2f} |" in output.out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_pipeline_methods_are_what_their_names_say(pipeline, tmp_path):
    """One gradient a stage, two stages; all from the same parameters, but where predicted."""
    args = pipeline.parse_args([f"--out={tmp_path}"])
    params, delays = {"first": jnp.ones(()), "last": jnp.ones(())}, {"first": 1, "last": 0}
    grads = [{"first": g, "last": g} for g in (jnp.array(0.2), jnp.array(0.3), jnp.array(0.1))]
    moved = {}
    for method in pipeline.METHODS:
        tx = pipeline.make_optimizer(method, "SGD", 0.5, delays, args)
        w, state, update = params, tx.init(params), jax.jit(tx.update)
        for g in grads:
            updates, state = update(g, state, w, stale_params=params)
            w = jax.tree.map(jnp.add, w, updates)
        moved[method] = (float(w["first"]), float(w["last"]))
    a, b, c = 0.1, 0.15, 0.05  # what one plain step is
    fresh = 1 - a * (1 + 0.9 + 0.81) - b * (1 + 0.9) - c
    late = 1 - a * (1 + 0.9) - b
    np.testing.assert_allclose(moved["fresh"], (fresh, fresh), rtol=1e-6)
    np.testing.assert_allclose(moved["stale"], (late, fresh), rtol=1e-6)
    np.testing.assert_allclose(moved["scaled"], moved["stale"], rtol=1e-6)  # √1
    np.testing.assert_allclose(moved["predicted"], moved["stale"], rtol=1e-6)
    assert 1 > moved["compensated"][0] > late  # downhill, and less far
    np.testing.assert_array_equal(moved["both"], moved["compensated"])


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("overlapped_data_parallel", "--batch-size", "30"),  # not a multiple of 8
        ("overlapped_data_parallel", "--out", "a_file"),
        ("pipeline_delay", "--stages", "9"),  # of a model with eight halves of blocks
        ("pipeline_delay", "--updates", "60"),
        ("pipeline_delay", "--methods", "fresh"),
    ],
)
def test_refuses(name, option, value, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    refuses(load(name).parse_args, capsys, option, value)
