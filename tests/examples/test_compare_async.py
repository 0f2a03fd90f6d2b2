"""examples/compare_async.py: a small run, and what becomes of its cells."""

import csv
import dataclasses
import json

import chex
import jax
import numpy as np
import optax
import pytest
from compare_async_cases import cell
from example_cases import load, refuses
from flax import nnx

# Four cells, two of them at a learning rate at which every seed diverges. With momentum 0.9 the
# rates are a tenth of these.
TINY = ["--quick", "--workers", "1", "2", "--methods", "SGD", "ASGD", "--seeds", "2"]
TINY += ["--pushes", "50", "--learning-rates", "0.2", "1e30", "--momentum", "0.9"]


@pytest.fixture(scope="module")
def script():
    return load("compare_async")


@pytest.fixture(scope="module")
def problems(script):
    return load("compare_async_problems")


@pytest.fixture(scope="module")
def small_run(script, tmp_path_factory):
    """The folder of a small run, and its trainer."""
    out = tmp_path_factory.mktemp("run") / "new" / "folder"
    trainers = []

    class Trainer(script.Trainer):
        def __init__(self, args):
            super().__init__(args)
            trainers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "Trainer", Trainer)
        script.main([*TINY, f"--out={out}"])
    return out, trainers[0]


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.slow
def test_a_small_run(small_run):
    out, _ = small_run
    for name in ("error_over_time_momentum_0.9.png", "stable_region_momentum_0.9.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    cells = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    assert [(c["workers"], c["method"]) for c in cells[::2]] == [(1, "SGD"), (2, "ASGD")]
    np.testing.assert_allclose([c["learning_rate"] for c in cells], [0.02, 1e29] * 2)
    for found in cells:
        assert found["pushes"] == [25, 50]
        assert np.shape(found["test_error"]) == (2, 2)
        # M workers need an M-th of the time, less what they compute in vain at the end.
        assert 15 < found["seconds"][0][1] * found["workers"] < 80
    assert [c["test_error"] for c in cells[1::2]] == [[[None, None]] * 2] * 2
    learned = [c["test_error"] for c in cells[::2]]
    assert np.all(np.array(learned)[:, :, 1] < 0.8)
    assert learned[0] != learned[1]  # staleness changes something

    np.testing.assert_allclose(
        [float(row["learning_rate"]) for row in rows(out / "test_error.csv")], 0.02
    )
    grid = rows(out / "grid.csv")
    assert [row["diverged"] for row in grid] == ["0", "2"] * 2
    assert [row["test_error_mean"] == "" for row in grid] == [False, True] * 2
    expected = np.mean(cells[2]["test_error"])
    assert float(grid[2]["test_error_mean"]) == pytest.approx(expected, rel=1e-3)
    text = (out / "tables.md").read_text()
    assert "Staleness (ASGD against sequential SGD), test error: " in text


@pytest.mark.slow
def test_cells_are_plain_simulated_runs(script, problems, small_run):
    """One learning rate and seed of a cell, against `simulation.run` without vmap."""
    out, trainer = small_run
    lines = (out / "cells.jsonl").read_text().splitlines()
    found = json.loads(lines[2])  # ASGD with two workers
    # Those of the second seed.
    arrivals, other = (jax.tree.map(lambda x, i=i: x[i], trainer.arrivals(2)) for i in (1, 0))
    assert not np.allclose(arrivals.time, other.time)
    history = script.simulation.run(
        jax.value_and_grad(trainer._loss),
        nnx.split(problems.MLP(nnx.Rngs(1)), nnx.Param)[1],
        script.METHODS["ASGD"](0.02, 0.9),
        jax.tree.map(lambda x: x[trainer.orders[1]], trainer.data["train"]),
        arrivals,
        evaluate=lambda params: trainer._evaluate(params, trainer.data),
    ).history
    loss, error = (history.evaluation[name][-1] for name in ("training_loss", "test_error"))
    np.testing.assert_allclose(found["training_loss"][1][-1], loss, rtol=1e-3)
    np.testing.assert_allclose(found["test_error"][1][-1], error, atol=0.006)
    np.testing.assert_allclose(found["seconds"][1], arrivals.time[24::25], rtol=1e-4)
    assert not np.allclose(found["training_loss"][1], found["training_loss"][0])


@pytest.mark.slow
def test_synchronous_cells_count_pushes_and_wait(small_run):
    _, trainer = small_run
    (found,) = trainer(2, "SSGD", 0.9, [0.02])
    assert found.pushes[-1] == 50
    assert (found.pushes % 2 == 0).all()
    arrivals = trainer.arrivals(2)
    assert (found.seconds[:, -1] > arrivals.time[:, -1]).all()
    ready = arrivals.barrier[0].max(-1)[-1]
    np.testing.assert_allclose(found.seconds[0, -1], ready, rtol=1e-6)


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(script, small_run, tmp_path, monkeypatch, capsys):
    out, _ = small_run
    monkeypatch.setattr(script, "plot_all", lambda *args: None)
    lines = (out / "cells.jsonl").read_text()
    (tmp_path / "cells.jsonl").write_text(lines)
    monkeypatch.setattr(script, "Trainer", lambda args: pytest.fail("it trained again"))
    script.main([*TINY, f"--out={tmp_path}"])
    assert (out / "tables.md").read_text() in capsys.readouterr().out
    for name in ("tables.md", "grid.csv"):
        assert (tmp_path / name).read_text() == (out / name).read_text()

    # What an interrupted run leaves: a missing program, and half a line of it.
    *first, last, _ = lines.splitlines(keepends=True)
    (tmp_path / "cells.jsonl").write_text("".join(first) + last[:100])
    (tmp_path / "tables.md").unlink()
    settings = json.loads(last)["settings"]
    cells = script.CellFile(out / "cells.jsonl", settings).cells

    def again(workers, method, momentum, rates):
        assert (workers, method) == (2, "ASGD")  # the other program has all its cells
        return [cells[workers, method, momentum, rate] for rate in rates]

    monkeypatch.setattr(script, "Trainer", lambda args: again)
    script.main([*TINY, f"--out={tmp_path}"])
    assert (tmp_path / "cells.jsonl").read_text() == lines
    assert (tmp_path / "tables.md").read_text() == (out / "tables.md").read_text()


def made_up(script, calls, *, fail_at=None):
    """A stand-in for the Trainer: cells that depend on their names alone, and a record of calls."""

    def train(workers, method, momentum, rates):
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        calls.append((workers, method, momentum, tuple(rates)))
        return [
            cell(script, workers, method, momentum, rate, [0.1 * rate + 0.001 * workers] * 2)
            for rate in rates
        ]

    return lambda args: train


def test_an_interrupted_run_loses_one_program(script, tmp_path, monkeypatch, capsys):
    options = ["--workers", "1", "2", "4", "--methods", "SGD", "SSGD", "ASGD"]
    options += ["--momentum", "0", "0.9", "--learning-rates", "0.1", "0.2", "--seeds", "2"]
    monkeypatch.setattr(script, "plot_all", lambda *args: None)
    whole, parts = [], []
    monkeypatch.setattr(script, "Trainer", made_up(script, whole))
    script.main([*options, f"--out={tmp_path / 'whole'}"])
    assert len(whole) == len(set(whole)) == 10  # 1 + 2 · 2, for two momenta
    assert whole[0] == (1, "SGD", 0.0, (0.1, 0.2))
    assert whole[-1] == (4, "ASGD", 0.9, (0.01, 0.02))  # 1 − 0.9 times the rates

    monkeypatch.setattr(script, "Trainer", made_up(script, parts, fail_at=3))
    with pytest.raises(KeyboardInterrupt):
        script.main([*options, f"--out={tmp_path / 'parts'}"])
    assert len((tmp_path / "parts" / "cells.jsonl").read_text().splitlines()) == 6
    monkeypatch.setattr(script, "Trainer", made_up(script, parts))
    script.main([*options, f"--out={tmp_path / 'parts'}"])
    assert parts == whole
    for name in ("tables.md", "grid.csv", "test_error.csv", "pushes_to_target.csv"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()

    # One more learning rate: only that one is run. Other settings: none of these cells is used.
    more, other = [], []
    monkeypatch.setattr(script, "Trainer", made_up(script, more))
    script.main([*options, "--learning-rates", "0.1", "0.2", "0.4", f"--out={tmp_path / 'parts'}"])
    assert [rates for *_, rates in more] == [(0.4,)] * 5 + [(0.04,)] * 5
    monkeypatch.setattr(script, "Trainer", made_up(script, other))
    script.main([*options, "--pushes", "100", f"--out={tmp_path / 'parts'}"])
    assert other == whole
    another_text = dataclasses.replace(script.PROBLEMS["digits"], settings={"text": "another"})
    monkeypatch.setitem(script.PROBLEMS, "digits", another_text)
    script.main([*options, f"--out={tmp_path / 'parts'}"])
    assert other == 2 * whole
    capsys.readouterr()


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--workers", ["1.5"]),
        ("--workers", ["2", "2"]),
        ("--workers", []),
        ("--methods", ["adam"]),
        ("--methods", ["SGD"]),  # with --workers 2 nothing would be left to run
        ("--momentum", ["1"]),
        ("--learning-rates", ["0.1", "nan"]),
        ("--seeds", ["0"]),
        ("--pushes", ["1"]),  # two workers
        ("--batch-size", ["1078"]),
        ("--compute-time", ["never"]),
        ("--problem", ["imagenet"]),
        ("--target", ["0"]),
        ("--out", ["a_file/folder"]),
    ],
)
def test_refuses(script, capsys, tmp_path, monkeypatch, option, values):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    monkeypatch.setattr(script, "run_all", lambda args: pytest.fail("it began"))
    refuses(lambda argv: script.main(["--workers", "2", *argv]), capsys, option, *values)


def test_help_names_the_defaults(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "[1 4 8 16 32; with --quick 1 4 16]" in shown
    assert f"[{' '.join(f'{r:g}' for r in script.FULL['learning_rates'])}; with" in shown


def test_convolution_by_matmul(problems):
    """The layers of the model, on smaller images, as XLA computes them and their gradients."""
    images = np.random.default_rng(0).normal(size=(2, 7, 7, 3)).astype(np.float32)

    def value_and_grad(conv):
        layer = nnx.Conv(3, 4, (3, 3), strides=2, rngs=nnx.Rngs(0), conv_general_dilated=conv)
        graphdef, params = nnx.split(layer, nnx.Param)

        def loss(params, images):
            return (nnx.merge(graphdef, params)(images) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, images)

    expected = value_and_grad(jax.lax.conv_general_dilated)
    actual = value_and_grad(problems.conv_by_matmul)
    chex.assert_trees_all_close(*map(jax.tree.leaves, (actual, expected)), rtol=1e-4, atol=1e-4)
    shapes = nnx.eval_shape(lambda: problems.CNN(nnx.Rngs(0)))
    assert shapes.conv1.conv_general_dilated is problems.conv_by_matmul
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes, nnx.Param))) == 9098


def test_split_shares_no_image(problems):
    parts = problems.split(problems.PROBLEMS["digits"])
    assert [len(y) for _, y in parts.values()] == [1077, 360, 360]
    images = np.concatenate([x for x, _ in parts.values()])
    assert len(np.unique(images, axis=0)) == len(np.unique(problems.digits()[0], axis=0))
    for _, y in parts.values():
        assert np.ptp(np.bincount(y) / len(y)) < 0.02


def test_one_registry_of_methods(script):
    params = np.float32([1.0, -2.0])
    for name, method in script.METHODS.items():
        tx = optax.with_extra_args_support(method(0.1, 0.0))
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(6):  # `robust` shortens the first five of all gradients
            extra = {"stale_params": params, "worker": 0, "staleness": 0}
            updates, state = update(params, state, params, **extra)
        # A fresh gradient is never changed.
        np.testing.assert_allclose(updates, -0.1 * params, rtol=1e-6, err_msg=name)
