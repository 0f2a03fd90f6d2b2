"""examples/overlapped_data_parallel.py and pipeline_delay.py, with models that compile fast."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import random_tree, train
from example_cases import load, refuses
from flax import nnx

import optax_dcasgd as dc

NAN = math.nan


@pytest.fixture(scope="module")
def overlapped():
    return load("overlapped_data_parallel")


@pytest.fixture(scope="module")
def pipeline():
    return load("pipeline_delay")


@pytest.fixture(scope="module")
def methods():
    return load("stale_methods")


@pytest.fixture(scope="module")
def report():
    return load("stale_report")


# --- What is compared ---

PLAIN = {
    "fresh": [],
    "DC-a": [dc.add_delay_compensation()],
    "robust": [dc.robust_delay_compensation()],
    "extrapolated": [optax.sgd(0.1, 0.9), optax.scale_by_optimistic_gradient()],
    "scaled": [optax.sgd(0.1, 0.9), dc.scale_by_staleness(0.5)],
}
OFF = dict.fromkeys(("scaled", "DC-a", "predicted", "extrapolated", "robust"), 0)


def test_what_a_method_does_not_use_is_switched_off(methods):
    """All of them are one chain, whose hyperparameters say which links do anything."""
    params = random_tree(0)
    grads = [random_tree(t) for t in range(1, 5)]
    stale = {"stale_params": random_tree(9), "staleness": 3}

    def run(tx):
        return train(tx, params, grads, lambda t: stale, jit=False)[0][-1]

    final = {}
    for method, links in PLAIN.items():
        final[method] = run(methods.make_optimizer("SGD", 0.1, methods.ideas_of(method, 3)))
        plain = links if len(links) == 2 else [*links, optax.sgd(0.1, 0.9)]
        pair = (final[method], run(optax.chain(*plain)))
        for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert len({float(tree["frozen"]["offset"]) for tree in final.values()}) == len(PLAIN)
    assert methods.METHODS["all-three"] == ("predicted", "extrapolated", "robust")
    assert methods.ideas_of("predicted+robust", 3) == OFF | {"predicted": np.inf, "robust": 1}
    assert methods.ideas_of("strong", 3) == OFF | {"predicted": 2, "extrapolated": 3, "robust": 1}


# --- Overlapped reductions ---


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


def test_overlapped_steps_are_those_of_one_device_some_updates_late(overlapped, methods):
    """SGD with momentum by hand, on the mean over the devices; compensated, predicted or not."""
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    graphdef, params = nnx.split(Linear(nnx.Rngs(0)), nnx.Param)
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(9, 16, 3)), rng.integers(10, size=(9, 16))
    batches = (np.float32(images), np.int32(labels))
    batches = jax.device_put(batches, jax.NamedSharding(mesh, jax.P(None, "data")))
    late = [("stale", 1), ("DC-a", 1), ("predicted", 1), ("DC-a", 3), ("predicted", 3)]
    steps = {d: overlapped.make_steps("SGD", d, graphdef, mesh) for d in (0, 1, 3)}
    for method, delay in [("fresh", 0), *late]:
        init, advance = steps[delay]
        w = jax.tree.map(jnp.copy, params)
        on = methods.ideas_of(method, delay)
        w, _ = jax.block_until_ready(advance(w, init(w), batches, 0.1, on))

        kernel = np.float64(params["linear"]["kernel"][...])
        update, under_way, nu = 0.0, [], 0.0
        for x, y in zip(images, labels, strict=True):
            at = kernel + delay * update if method == "predicted" else kernel
            under_way.append((numpy_gradient(at, x, y), at))
            if len(under_way) > delay:
                g, computed_at = under_way.pop(0)
                if method == "DC-a":
                    nu = 0.95 * nu + 0.05 * g**2
                    correction = 8 * g * g * (kernel - computed_at) / np.sqrt(nu + 1e-7)
                    g = g + np.clip(correction, -abs(g), abs(g))
                update = 0.9 * update - 0.1 * g
                kernel = kernel + update
        np.testing.assert_allclose(w["linear"]["kernel"][...], kernel, rtol=1e-4, atol=1e-5)


def test_a_run_that_learned_nothing_has_failed(overlapped):
    cell = {"accuracy": np.array([[0.9], [0.1], [0.9]]), "loss": np.array([[1.0], [2.3], [NAN]])}
    np.testing.assert_allclose(overlapped.final(cell), [0.1, NAN, NAN])


# --- The pipeline ---


SIZES = {"WIDTH": 8, "HEADS": 1, "CONTEXT": 8, "BATCH": 4, "EVALUATE_EVERY": 10}


def all_three_by_hand(pipeline, seed):
    """The losses of a plain loop with what a user would write; two stages, SGD at 0.1."""
    train, validation = map(jnp.asarray, pipeline.load_text())
    model = pipeline.Transformer(int(train.max()) + 1, 1, nnx.Rngs(seed))
    graphdef, params = nnx.split(model, nnx.Param)
    delays = dc.pipeline_delays(params, pipeline.layers(1), 2)
    links = [dc.robust_delay_compensation(), optax.sgd(0.1, 0.9)]
    links += [optax.scale_by_optimistic_gradient(), dc.track_velocity(0.0)]
    tx = dc.delay_gradients(optax.chain(*links), delays)

    @jax.jit
    def step(params, state, batch):
        at = dc.predict_params(params, state, delays)
        grads = jax.grad(pipeline.loss_fn, argnums=1)(graphdef, at, batch)
        updates, state = tx.update(grads, state, params, stale_params=at)
        return optax.apply_updates(params, updates), state

    state, key, losses = tx.init(params), jax.random.key(seed), []
    for t in range(1, 21):
        key, now = jax.random.split(key)
        first = jax.random.randint(now, (4, 1), 0, len(train) - 8)
        params, state = step(params, state, train[first + jnp.arange(9)])
        if t % 10 == 0:
            held_out = validation[: len(validation) // 512 * 512].reshape(512, -1)[:, :9]
            losses.append(pipeline.loss_fn(graphdef, params, held_out))
    return losses


@pytest.mark.slow
def test_a_small_pipeline_and_going_on_with_it(pipeline, capsys, tmp_path, monkeypatch):
    model = sys.modules[pipeline.Transformer.__module__]
    for name, value in SIZES.items():
        for module in (pipeline, model):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    options = ["--blocks=1", "--stages=2", "--updates=20", "--seeds=2", f"--out={tmp_path}"]
    options += ["--sgd-rates=0.1", "--adam-rates", "--muon-rates", "--methods", "fresh", "stale"]
    pipeline.main(options)
    assert "| stale | 0.1 |" in capsys.readouterr().out
    first = (tmp_path / "cells.jsonl").read_text()
    pipeline.main([*options, "all-three"])
    output = capsys.readouterr()
    assert "60/60" in output.err
    assert (tmp_path / "tables.md").read_text() in output.out
    text = (tmp_path / "cells.jsonl").read_text()
    assert text.startswith(first)  # and only one was run
    cells = [json.loads(line) for line in text.splitlines()]
    assert [cell["name"]["method"] for cell in cells] == ["fresh", "stale", "all-three"]
    losses = [np.array(cell["curves"]["loss"]) for cell in cells]
    assert [loss.shape for loss in losses] == [(2, 2)] * 3
    assert {cell["settings"]["text"] for cell in cells} == {model.TEXT}  # of this Python
    assert all((loss[:, 1] < loss[:, 0]).all() for loss in losses)  # it learns
    assert len({loss[0, 1] for loss in losses} | {loss[1, 1] for loss in losses}) == 6
    np.testing.assert_allclose(losses[2][1], all_three_by_hand(pipeline, 1), rtol=1e-4)
    for name in ("curves.png", "overhead.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(pipeline, "Trainer", None)
    pipeline.main([*options, "all-three", "predicted", "--report"])  # of what there is
    assert (tmp_path / "tables.md").read_text() in output.out


def test_cells_are_kept_by_name_and_settings(methods, tmp_path):
    path, trained = tmp_path / "cells.jsonl", []

    def make(name, bar):
        trained.append(name["n"])
        bar.update(5)
        return {"loss": [[1.23456789, NAN]]}

    names = [{"n": 1}, {"n": 2}]
    methods.Grid(path, {"seeds": 1}).run(names, make, 5)
    path.write_text(path.read_text()[:-10])  # interrupted while it wrote
    methods.Grid(path, {"seeds": 1}).run(names, make, 5)
    methods.Grid(path, {"seeds": 2}).run(names[:1], make, 5)
    assert trained == [1, 2, 2, 1]
    grid = methods.Grid(path, {"seeds": 1})
    cells = grid.finished([*names, {"n": 3}])
    assert [cell["n"] for cell in cells] == [1, 2]
    np.testing.assert_array_equal(cells[1]["loss"], [[1.23457, NAN]])


# --- What is said about it ---


def cell(method, rate, *ends, stages=4):
    """Straight lines from 4 to where each seed ends."""
    loss = np.array([np.linspace(4, end, 11) for end in ends])
    return {
        "stages": stages, "optimizer": "SGD", "method": method, "learning_rate": rate, "loss": loss
    }  # fmt: skip


def test_tables_and_plots(report, pipeline, tmp_path):
    cells = [
        *(cell("fresh", r, *ends) for r, ends in {1: (2.2, 2.2), 2: (2, 2.02), 3: (3, 3)}.items()),
        *(cell("stale", r, *ends) for r, ends in {1: (3, 3.02), 2: (NAN, 2.5), 3: (4, 5)}.items()),
        *(cell("all-three", r, 2.24, 2.26) for r in (1, 2)),
    ]
    text = report.report(cells, np.arange(1, 12), pipeline.MEASURE, "made up", tmp_path)
    lines = text.splitlines()
    assert lines[:3] == ["## made up", "", "### 4 stages, SGD: validation loss, nats a character"]
    assert lines[4:9] == [
        "| learning rate | 1 | 2 | 3 |",
        "|---|---|---|---|",
        "| fresh | 2.200 ± 0.000 | 2.010 ± 0.014 | 3.000 ± 0.000 |",
        "| stale | 3.010 ± 0.014 | 2.500, 1 failed | 4.000, 1 failed |",
        "| all-three | 2.250 ± 0.014 | 2.250 ± 0.014 |  |",
    ]
    # Of the stale runs the rate is the best at which none failed. It is at the edge of the grid.
    none = "made no clear difference"
    assert "| fresh | 2 | 2.010 ± 0.014 |  |  |  |  |" in lines
    (stale,) = [line for line in lines if line.startswith("| stale | 1 (edge) | 3.010 ± 0.014 |")]
    assert stale.endswith("| hurt |")
    (three,) = [line for line in lines if line.startswith("| all-three | 1 (edge) | 2.250")]
    assert three.split(" | ")[3] == "76 %"  # of 1.00, 0.76
    assert three.split(" | ")[5:] == ["helped", "hurt |"]
    # The fresh line falls by 1.99 in ten evaluations, this one by 1.75.
    assert three.split(" | ")[4].startswith(f"{11 / (1 + 17.5 / 1.99):.2f} ± ")
    assert lines[-2:] == [f"| stale | hurt | {none} | {none} |", "| all-three | hurt | hurt |  |"]
    for name in ("curves.png", "overhead.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("overlapped_data_parallel", "--batch-size", "30"),  # not a multiple of 8
        ("overlapped_data_parallel", "--out", "a_file"),
        ("overlapped_data_parallel", "--updates", "30"),
        ("overlapped_data_parallel", "--delay", "1000"),  # no update would be left
        ("pipeline_delay", "--updates", "60"),
        ("pipeline_delay", "--methods", "forgotten"),
        ("pipeline_delay", "--stages", "0"),
    ],
)
def test_refuses(name, option, value, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    refuses(load(name).parse_args, capsys, option, value)
