"""examples/compare_async.py, run as a user would, with small settings and made-up numbers."""

import csv
import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "compare_async.py"
# Four cells, one of them at a learning rate at which every seed diverges.
TINY = ["--quick", "--workers", "1", "2", "--methods", "SGD", "ASGD", "--seeds", "2"]
TINY += ["--pushes", "50", "--learning-rates", "0.2", "1e30"]
NAN = math.nan


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPT.parent))  # as it is for a script: it imports its neighbour
    spec = importlib.util.spec_from_file_location("compare_async", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPT.parent))
    return module


@pytest.fixture(scope="module")
def text(script):
    return sys.modules["compare_async_report"]


@pytest.fixture(scope="module")
def plots(script):
    return sys.modules["compare_async_plots"]


@pytest.fixture(scope="module")
def problems(script):
    return sys.modules["compare_async_problems"]


@pytest.fixture(scope="module")
def user_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    env = dict(os.environ)
    env.pop("XLA_FLAGS", None)  # the virtual devices of conftest.py
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error", str(SCRIPT), *TINY, "--out=new/folder"]
    run = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    return run, folder / "new" / "folder"


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_as_a_user_runs_it(user_run):
    run, out = user_run
    assert "4/4" in run.stderr  # the progress bar's
    assert f"JAX {jax.__version__} on cpu" in run.stdout
    assert (out / "tables.md").read_text() in run.stdout
    for name in ("error_over_time_momentum_0.png", "stable_region_momentum_0.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")

    lines = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    assert [(c["workers"], c["method"], c["learning_rate"]) for c in lines] == [
        (1, "SGD", 0.2), (1, "SGD", 1e30), (2, "ASGD", 0.2), (2, "ASGD", 1e30),
    ]  # fmt: skip
    for cell in lines:
        assert cell["pushes"] == [25, 50]
        assert np.shape(cell["test_error"]) == (2, 2)
        # Two workers need half the time, less what they compute in vain at the end.
        assert 15 < cell["seconds"][0][1] * cell["workers"] < 80
    assert lines[1]["test_error"] == lines[3]["test_error"] == [[None, None]] * 2
    assert max(lines[0]["test_error"][0][1], lines[2]["test_error"][0][1]) < 0.8  # it learns
    assert lines[0]["test_error"] != lines[2]["test_error"]  # and staleness changes something

    assert [row["learning_rate"] for row in rows(out / "test_error.csv")] == ["0.2", "0.2"]
    grid = rows(out / "grid.csv")
    assert [row["diverged"] for row in grid] == ["0", "2", "0", "2"]
    assert [row["test_error_mean"] == "" for row in grid] == [False, True, False, True]
    assert float(grid[2]["test_error_mean"]) == pytest.approx(
        np.mean(lines[2]["test_error"]), rel=1e-3
    )
    assert "Staleness (ASGD against sequential SGD), test error: " in run.stdout


def test_a_finished_run_is_not_run_again(script, user_run, tmp_path, monkeypatch, capsys):
    _, out = user_run
    lines = (out / "cells.jsonl").read_text()
    (tmp_path / "cells.jsonl").write_text(lines)
    monkeypatch.setattr(script, "Trainer", lambda args: pytest.fail("it trained again"))
    script.main([*TINY, f"--out={tmp_path}"])
    for name in ("tables.md", "grid.csv"):
        assert (tmp_path / name).read_text() == (out / name).read_text()

    # What an interrupted run leaves: a missing program, and half a line of it.
    first, second, third, _ = lines.splitlines(keepends=True)
    (tmp_path / "cells.jsonl").write_text(first + second + third[:100])
    (tmp_path / "tables.md").unlink()
    settings = json.loads(first)["settings"]
    cells = script.CellFile(out / "cells.jsonl", settings).cells

    def again(workers, method, momentum, rates):
        assert (workers, method) == (2, "ASGD")  # the other program has all its cells
        return [cells[workers, method, momentum, rate] for rate in rates]

    monkeypatch.setattr(script, "Trainer", lambda args: again)
    script.main([*TINY, f"--out={tmp_path}"])
    assert (tmp_path / "cells.jsonl").read_text() == lines
    assert (tmp_path / "tables.md").read_text() == (out / "tables.md").read_text()
    capsys.readouterr()


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


def cell(script, workers, method, momentum, rate, test, validation=None, loss=None):
    test = np.array(test, float)
    validation = test if validation is None else np.array(validation, float)
    loss = np.full((len(test), 2), 1.0) if loss is None else np.array(loss, float)
    return script.Cell(
        workers, method, momentum, rate, np.array([25, 50]), np.tile([10.0, 20.0], (len(test), 1)),
        loss, np.stack([validation] * 2, 1), np.stack([test] * 2, 1),
    )  # fmt: skip


def test_an_interrupted_run_loses_one_program(script, tmp_path, monkeypatch, capsys):
    options = ["--workers", "1", "2", "4", "--methods", "SGD", "SSGD", "ASGD"]
    options += ["--momentum", "0", "0.9", "--learning-rates", "0.1", "0.2", "--seeds", "2"]
    whole, parts = [], []
    monkeypatch.setattr(script, "Trainer", made_up(script, whole))
    script.main([*options, f"--out={tmp_path / 'whole'}"])
    assert len(whole) == len(set(whole)) == 10  # 1 + 2 · 2, for two momenta
    assert whole[0] == (1, "SGD", 0.0, (0.1, 0.2))
    assert whole[-1] == (4, "ASGD", 0.9, (0.01, 0.02))  # 1 − 0.9 times the rates
    assert len(list((tmp_path / "whole").glob("*.png"))) == 4
    monkeypatch.setattr(script, "plot_all", lambda *args: None)  # once is enough

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
    capsys.readouterr()


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--workers", ["0"]),
        ("--workers", ["1.5"]),
        ("--workers", ["2", "2"]),
        ("--workers", []),
        ("--methods", ["adam"]),
        ("--methods", ["SGD"]),  # with --workers 2 nothing would be left to run
        ("--momentum", ["1"]),
        ("--momentum", ["-0.1"]),
        ("--learning-rates", ["0"]),
        ("--learning-rates", ["0.1", "nan"]),
        ("--learning-rates", ["fast"]),
        ("--seeds", ["0"]),
        ("--pushes", ["0"]),
        ("--pushes", ["1"]),  # two workers
        ("--batch-size", ["0"]),
        ("--batch-size", ["1078"]),
        ("--compute-time", ["never"]),
        ("--problem", ["imagenet"]),
        ("--target", ["0"]),
        ("--out", ["a_file"]),
        ("--out", ["a_file/folder"]),
    ],
)
def test_refuses(script, capsys, tmp_path, monkeypatch, option, values):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    monkeypatch.setattr(script, "run_all", lambda args: pytest.fail("it began"))
    with pytest.raises(SystemExit) as exit_info:
        script.main(["--workers", "2", option, *values])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"error: argument {option}: " in message
    assert not values or values[-1] in message


def test_help_names_the_defaults(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "[1 4 8 16 32; with --quick 1 4 16]" in shown
    assert f"[{' '.join(f'{r:g}' for r in script.FULL['learning_rates'])}; with" in shown


@pytest.mark.parametrize(
    ("before", "after", "effect"),
    [
        ([5.0, 5.1, 4.9], [3.0, 3.1, 2.9], "helped"),
        ([3.0, 3.1, 2.9], [5.0, 5.1, 4.9], "hurt"),
        ([3.0, 3.1, 2.9], [3.0, 3.1, 2.9], "made no clear difference"),
        ([3.0, 3.0, 3.0], [3.0, 3.0, 3.0], "made no clear difference"),
        # Standard errors 1/√2 and so 2 of the difference's are 2.0: means apart by 1.9, then 2.1.
        ([4.0, 6.0, 4.0, 6.0, 5.0, 5.0], [2.1, 4.1, 2.1, 4.1, 3.1, 3.1], "helped"),
        ([9.0, 1.0], [6.0, 0.0], "made no clear difference"),
        ([5.0, 5.0 + math.sqrt(8)], [3.1, 3.1 + math.sqrt(8)], "made no clear difference"),
        ([5.0, 5.0 + math.sqrt(2)], [2.9, 2.9 + math.sqrt(2)], "helped"),
        ([5.0, 5.0 + math.sqrt(2)], [3.1, 3.1 + math.sqrt(2)], "made no clear difference"),
        # Failed seeds count before any mean does, where chance does not explain their numbers.
        ([NAN, NAN, NAN, 1.0, 1.0], [5.0, 5.0, 5.0, 5.0, 5.0], "helped"),  # 1 in 12
        ([5.0, 5.0, 5.0, 5.0, 5.0], [NAN, NAN, NAN, 1.0, 1.0], "hurt"),
        ([NAN, NAN, NAN, 1.0], [5.0, 5.0, 5.0, 5.0], "helped"),  # 1 in 14
        ([NAN, NAN, NAN], [5.0, 5.0, 5.0], "helped"),  # 1 in 20
        ([NAN, NAN, 1.0], [5.0, 5.0, 5.0], "made no clear difference"),  # 1 in 5
        ([NAN, NAN, 1.0, 1.0, 1.0], [5.0, 5.0, 5.0, 5.0, 5.0], "made no clear difference"),
        ([NAN, 5.0, 5.0], [NAN, 1.0, 1.0], "made no clear difference"),
        (
            [NAN, NAN, NAN, NAN, 1.0],
            [NAN, 5.0, 5.0, 5.0, 5.0],
            "made no clear difference",
        ),  # 10.3 %
        ([5.0], [1.0], "made no clear difference"),  # that one seed could tell
        ([NAN], [1.0], "made no clear difference"),
    ],
)
def test_rule_for_a_clear_difference(text, before, after, effect):
    assert text.compare(np.array(before), np.array(after), standard_errors=2) == effect


def test_chance_is_seldom_called_a_difference(text):
    """Both methods are the same, and a seed gets there as likely as not, or as the seeds want."""
    rng = np.random.default_rng(0)
    for seeds, reach in [(3, 1.0), (5, 1.0), (3, 0.5), (5, 0.2), (5, 0.5), (5, 0.8)]:
        called = 0
        for _ in range(300):
            runs = rng.normal(1000, 100, (2, seeds))
            runs[rng.random(runs.shape) >= reach] = NAN
            called += text.compare(*runs, standard_errors=2) != "made no clear difference"
        assert called < 0.17 * 300


def test_words(script, text):
    def cells(method, workers, errors, pushes):
        loss = [[0.01 if p <= 25 else 1.0, 0.01 if p <= 50 else 1.0] for p in pushes]
        return [cell(script, workers, method, 0.0, 0.1, errors, loss=loss)]

    groups = {
        ("SGD", 1): cells("SGD", 1, [0.02, 0.021, 0.019], [25, 25, 25]),
        ("ASGD", 4): cells("ASGD", 4, [0.02, 0.021, 0.019], [50, 50, 50]),
        ("DC-a", 4): cells("DC-a", 4, [0.021, 0.02, 0.019], [25, 25, 25]),
        ("ASGD", 8): cells("ASGD", 8, [0.10, 0.11, 0.12], [50, 50, 50]),
        ("DC-a", 8): cells("DC-a", 8, [0.05, 0.051, 0.049], [99, 99, 99]),
        ("ASGD", 16): cells("ASGD", 16, [NAN, 0.9, 0.95], [99, 99, 99]),
        ("DC-a", 16): cells("DC-a", 16, [0.05, 0.051, 0.049], [99, 99, 99]),
    }
    assert text.words(groups, good=0.06, target=0.05).splitlines() == [
        "Staleness (ASGD against sequential SGD), test error: hurt at M=8 (2.0 → 11.0 %), "
        "M=16 (0 of 3 → 3 of 3 seeds failed); no clear difference at M=4.",
        "Against ASGD, test error, each at its own best learning rate:",
        "- DC-a: helped at M=8 (11.0 → 5.0 %), M=16 (3 of 3 → 0 of 3 seeds failed); "
        "no clear difference at M=4.",
        "Against ASGD, pushes to a training loss of 0.05, each at its fastest:",
        "- DC-a: helped at M=4 (0.50 times as many); hurt at M=8 (3 of 3 → 0 of 3 seeds reach it); "
        "no clear difference at M=16.",
        "Stable region: of 3 cells (M × learning rate), this many have every seed under 6 % test "
        "error: DC-a 3, ASGD 1.",
    ]
    assert "no clear difference at every M" in text.words(
        {k: v for k, v in groups.items() if k[1] in (1, 4)}, good=0.06, target=0.05
    )


def test_learning_rate_is_chosen_by_validation(script, text):
    low = cell(script, 4, "ASGD", 0.0, 0.1, test=[0.02, 0.02], validation=[0.05, 0.05])
    high = cell(script, 4, "ASGD", 0.0, 0.2, test=[0.03, 0.03], validation=[0.04, 0.04])
    fails = cell(script, 4, "ASGD", 0.0, 0.4, test=[0.01, 0.01], validation=[0.01, NAN])
    stuck = cell(script, 4, "ASGD", 0.0, 0.8, test=[0.01, 0.01], validation=[0.01, 0.9])
    cells = [low, high, fails, stuck]
    assert text.choose(cells) is high
    assert text.choose([*cells[::-1], dataclasses.replace(high, learning_rate=0.3)]) is high
    table = text.error_table({("ASGD", 4): cells})
    assert "3.0 ± 0.0 (0.2)" in table
    assert "2.0" not in table
    assert "(0.1*)" in text.error_table({("ASGD", 4): [low, fails, stuck]})  # the grid's edge


def test_no_mean_hides_a_failed_seed(script, text, tmp_path):
    assert text.describe(np.array([0.02, 0.04])) == "3.0 ± 1.4"
    assert text.describe(np.array([0.02])) == "2.0"
    assert text.describe(np.array([NAN, 0.04, NAN])) == "2 of 3 seeds diverged"
    assert text.describe(np.array([0.9, 0.04, 0.02])) == "1 of 3 seeds stuck"
    assert text.describe(np.array([0.9, NAN, 0.02])) == "1 of 3 seeds diverged, 1 stuck"
    bad = cell(script, 4, "DC-a", 0.0, 0.1, test=[NAN, 0.03])
    report = text.report([bad], "made up: nothing", good=0.05, target=0.05, out=tmp_path)
    assert "1 of 2 seeds diverged (0.1)" in report
    assert rows(tmp_path / "test_error.csv")[0]["test_error_mean"] == ""


def test_errors_at_the_end_are_means_of_the_last_evaluations(text, plots):
    errors = np.array([[9.0, 1, 2, 3, 4, 5], [9, 1, 2, NAN, 4, 5]])
    np.testing.assert_array_equal(text.final(errors), [3, NAN])
    np.testing.assert_array_equal(plots.running_mean(errors[0])[[0, 1, 4, 5]], [9, 5, 3.8, 3])


def test_fastest_learning_rate_and_pushes(script, text):
    def with_loss(rate, loss):
        return cell(script, 4, "ASGD", 0.0, rate, [0.1, 0.1], loss=loss)

    slow = with_loss(0.1, [[1.0, 0.05], [1.0, 0.05]])
    fast = with_loss(0.2, [[0.04, 1.0], [1.0, 0.04]])
    half = with_loss(0.4, [[0.04, 0.01], [NAN, NAN]])
    np.testing.assert_array_equal(text.pushes_to(fast, 0.05), [25, 50])
    np.testing.assert_array_equal(text.seconds_to(fast, 0.05), [10, 20])
    np.testing.assert_array_equal(text.pushes_to(half, 0.05), [25, NAN])
    assert text.fastest([slow, fast, half], 0.05) is fast
    assert "38, 15 s (0.2)" in text.target_table({("ASGD", 4): [slow, fast, half]}, 0.05)
    assert "1 of 2 seeds (0.4)" in text.target_table({("ASGD", 4): [half]}, 0.05)


def test_methods_that_were_added_have_looks_of_their_own(script, plots, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda self, path, dpi: seen.append(self))
    groups = {(m, 4): [cell(script, 4, m, 0.0, 0.1, [0.1])] for m in ("mine", "ASGD", "yours")}
    plots.plot_error_over_time(groups, "made up", tmp_path / "none.png")
    mine, asgd, yours = seen[0].axes[0].lines
    assert asgd.get_color() == plots.LOOKS["ASGD"][0]
    assert len({(x.get_color(), x.get_linestyle()) for x in (mine, asgd, yours)}) == 3


@pytest.fixture(scope="module")
def trained(script, tmp_path_factory):
    """Cells of a Trainer that has room for four workers."""
    options = ["--workers", "2", "4", "--pushes", "50", "--seeds", "2", f"--out={tmp_path_factory}"]
    trainer = script.Trainer(parse(script, tmp_path_factory.mktemp("trained"), options[:-1]))
    return trainer, {m: trainer(2, m, 0.9, [0.01, 0.02]) for m in ("SSGD", "DC-a-clipped")}


def parse(script, out, options):
    return script.parse_args([*options, f"--out={out}"])


def test_cells_are_plain_simulated_runs(script, problems, trained):
    """One learning rate and seed of a cell, against `simulation.run` without vmap or room."""
    trainer, cells = trained
    tx = script.METHODS["DC-a-clipped"](0.02, 0.9)
    # Those of the second seed.
    arrivals, other = (jax.tree.map(lambda x, i=i: x[i], trainer.arrivals(2)) for i in (1, 0))
    assert not np.allclose(arrivals.time, other.time)
    images, labels = trainer.data["train"]
    history = script.simulation.run(
        jax.value_and_grad(trainer._loss),
        nnx.split(problems.MLP(nnx.Rngs(1)), nnx.Param)[1],
        tx,
        jax.tree.map(lambda x: x[trainer.orders[1]], (images, labels)),
        arrivals,
        evaluate=lambda params: trainer._evaluate(params, trainer.data),
    ).history
    cell = cells["DC-a-clipped"][1]
    loss, error = (history.evaluation[name][-1] for name in ("training_loss", "test_error"))
    np.testing.assert_allclose(cell.training_loss[1, -1], loss, rtol=1e-3)
    np.testing.assert_allclose(cell.test_error[1, -1], error, atol=0.006)
    np.testing.assert_allclose(cell.seconds[1], arrivals.time[24::25], rtol=1e-6)
    assert not np.allclose(cell.training_loss[1], cells["DC-a-clipped"][0].training_loss[1])
    assert not np.allclose(cell.training_loss[1], cell.training_loss[0])


def test_synchronous_cells_count_pushes_and_wait(trained):
    trainer, cells = trained
    cell = cells["SSGD"][0]
    assert cell.pushes[-1] == 50
    assert (cell.pushes % 2 == 0).all()
    assert (cell.seconds[:, -1] > cells["DC-a-clipped"][0].seconds[:, -1]).all()
    np.testing.assert_allclose(
        cell.seconds[0, -1], trainer.arrivals(2).barrier[0].max(-1)[-1], rtol=1e-6
    )


def test_convolution_by_matmul(problems):
    model = nnx.eval_shape(lambda: problems.CNN(nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 28, 28, 1)).astype(np.float32)
    graphdef, shapes = nnx.split(model, nnx.Param)
    params = jax.tree.map(lambda s: np.float32(rng.normal(0, 0.2, s.shape)), shapes)
    for conv in (model.conv1, model.conv2):
        conv.conv_general_dilated = jax.lax.conv_general_dilated
    plain, _ = nnx.split(model, nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 9098

    def value_and_grad(graphdef):
        def loss(params):
            return (nnx.merge(graphdef, params)(images) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss))(params)

    (value, grads), (expected, expected_grads) = value_and_grad(graphdef), value_and_grad(plain)
    assert float(value) != 0
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-3, atol=1e-3), grads, expected_grads
    )


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
        state = tx.init(params)
        for _ in range(6):  # `robust` shortens the first five of all gradients
            extra = {"stale_params": params, "worker": 0, "staleness": 0}
            updates, state = tx.update(params, state, params, **extra)
        # A fresh gradient is never changed.
        np.testing.assert_allclose(updates, -0.1 * params, rtol=1e-6, err_msg=name)
