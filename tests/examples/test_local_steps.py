"""examples/local_steps.py: a small run, and what becomes of its cells."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from example_cases import load, refuses
from flax import nnx

TINY = ["--workers", "2", "--steps", "4", "--speeds", "1:4", "1:4-balanced", "--seeds", "2"]
TINY += ["--methods", "SSGD", "ASGD", "--rates", "0.5", "1", "--batches", "80"]
TINY += ["--evaluations", "4"]


@pytest.fixture(scope="module")
def script():
    return load("local_steps")


@pytest.mark.slow
def test_a_small_run_is_that_of_a_loop(script, tmp_path):
    """The last cell, whose workers take four steps and one."""
    trainers = []

    class Trainer(script.LocalTrainer):
        def __init__(self, args):
            super().__init__(args)
            trainers.append(self)

    script.run_all(script.parse_args([*TINY, f"--out={tmp_path}"]), Trainer)
    script.main([*TINY, f"--out={tmp_path}"])  # nothing is left to train
    assert len(trainers) == 1
    assert (tmp_path / "error_over_time_H4_1-4.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "tables.md").read_text()
    assert "| H=4 ASGD |" in text
    assert "virtual time to the target: M=2" in text

    cells = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert [cell["pushes"][-1] for cell in cells[::2]] == [20, 20, 32, 32]
    # A round of four batches: 4 s, and of the slower worker 16. Balanced, both take 4 s.
    for cell, seconds in zip(
        cells[::2], [16 * 10, 20 / (1 / 4 + 1 / 16), 4 * 16, 4 * 16], strict=True
    ):
        assert 0.6 < np.mean(cell["seconds"], 0)[-1] / seconds < 1.6

    found, trainer, seed = cells[-1], trainers[0], 1
    assert (found["speeds"], found["method"], found["learning_rate"]) == (
        "1:4-balanced", "ASGD", 1,
    )  # fmt: skip
    arrivals = jax.tree.map(lambda x: x[seed], trainer.arrivals(2, 4, "1:4-balanced"))
    images, labels = trainer.data["train"]
    gradient = jax.jit(jax.grad(trainer._loss))
    used, versions = 0, [nnx.split(script.PROBLEMS["digits"].model(nnx.Rngs(seed)), nnx.Param)[1]]
    for t, worker in enumerate(np.asarray(arrivals.worker)):
        start = params = versions[t - int(arrivals.staleness[t])]
        for _ in range([4, 1][worker]):
            index = trainer.orders[seed][used % 80]
            grads = gradient(params, (images[index], labels[index]))
            params = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
            used += 1
        versions.append(jax.tree.map(lambda w, a, b: w - (a - b), versions[-1], start, params))
    assert abs(used - 80) <= 4
    loss = trainer._evaluate(versions[-1], trainer.data)["training_loss"]
    np.testing.assert_allclose(found["training_loss"][seed][-1], loss, rtol=1e-3)


def test_an_interrupted_run_goes_on(script, tmp_path, monkeypatch):
    calls = []

    def trainer(args):
        def train(kind, rates):
            if len(calls) == fail_at:
                raise KeyboardInterrupt
            calls.append((kind, rates))
            curve = np.full((2, 3), 0.5)
            return [script.LocalCell(*kind, r, np.arange(3), *[curve] * 4) for r in rates]

        return train

    args, fail_at = script.parse_args([*TINY, f"--out={tmp_path}"]), 1
    with pytest.raises(KeyboardInterrupt):
        script.run_all(args, trainer)
    fail_at = None
    cells = script.run_all(args, trainer)
    kinds = [("1:4", 4, 2, "SSGD"), ("1:4", 4, 2, "ASGD")]
    kinds += [("1:4-balanced", 4, 2, "SSGD"), ("1:4-balanced", 4, 2, "ASGD")]
    assert calls == [(kind, [0.5, 1.0]) for kind in kinds]
    assert [cell.name for cell in cells] == [(*kind, r) for kind in kinds for r in (0.5, 1.0)]
    # With another text, that of another Python, none of these is used.
    other = dataclasses.replace(script.PROBLEMS["digits"], settings={"text": "another"})
    monkeypatch.setitem(script.PROBLEMS, "digits", other)
    script.run_all(args, trainer)
    assert len(calls) == 2 * len(kinds)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--workers", ["3"]),
        ("--workers", ["2", "2"]),
        ("--steps", ["0"]),
        ("--speeds", ["fast"]),
        ("--methods", ["SGD"]),
        ("--batches", ["7"]),  # two workers with four steps
        ("--batch-size", ["1078"]),
    ],
)
def test_refuses(script, capsys, tmp_path, monkeypatch, option, values):
    monkeypatch.chdir(tmp_path)
    refuses(lambda argv: script.parse_args([*TINY, *argv]), capsys, option, *values)


def test_one_outer_rate_for_all_is_counted_against_the_barrier_at_its_best(script):
    def cell(method, workers, rate, errors):
        curve = np.array(errors)[:, None]
        counts = np.ones(1)
        return script.LocalCell(
            "equal", 4, workers, method, rate, counts, *[np.ones_like(curve)] * 2, curve, curve
        )

    cells = [
        *(cell("SSGD", m, rate, np.array([0.1, 0.12]) + rate) for m in (2, 4) for rate in (0, 0.5)),
        cell("ASGD", 2, 0, [0.11, 0.11]),
        cell("ASGD", 4, 0, [0.3, 0.31]),
        cell("ASGD", 2, 0.5, [0.02, 0.03]),
        cell("ASGD", 4, 0.5, [0.1, np.nan]),
    ]
    table = load("local_steps_report").everywhere("SSGD", cells)
    rows = [[x.strip() for x in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0] == ["outer rate", "0", "0.5"]
    assert rows[2:] == [["SSGD", "2 of 2", "0 of 2"], ["ASGD", "1 of 2", "1 of 2"]]
