"""The scripts under examples/, run as a user would run them, with small settings."""

import importlib
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
SMALL = ["--epochs=1", "--batch-size=80", "--seeds=2"]  # 50 updates
NAN = math.nan


def run_script(name, *options, cwd):
    env = dict(os.environ)
    env.pop("XLA_FLAGS", None)  # the virtual devices of conftest.py
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    # -W error: no warning reaches a user, that of a donated buffer which cannot be used included.
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / name), *options]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")  # as it is for a script
        module = importlib.import_module("train_flax")
    data = module.load_data()
    module.load_data = lambda: data  # reading the images takes seconds
    return module


def run_main(script, capsys, out, *options):
    script.main([*SMALL, f"--out={out}", *options])
    return capsys.readouterr().out, json.loads((out / "results.json").read_text())


def rows(output):
    """The cells of the table, by method."""
    lines = [line.split() for line in output.splitlines()]
    return {
        cells[0]: cells[1:]
        for cells in lines
        if cells and cells[0] in ("fresh", "stale", "compensated") and len(cells) > 4
    }


def test_train_flax_as_a_user_runs_it(script, tmp_path):
    run = run_script("train_flax.py", *SMALL, "--delay=3", "--out=new/folder", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert list(rows(run.stdout)) == ["fresh", "stale", "compensated"]
    assert "seed 1" in run.stdout
    assert f"JAX {jax.__version__} on cpu" in run.stdout
    assert "test accuracy" in run.stderr  # the progress bars'
    assert "100/100" in run.stderr

    out = tmp_path / "new" / "folder"
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text())
    assert results["options"]["delay"] == 3
    final = {}
    for method, runs in results["curves"].items():
        assert [curves["updates"] for curves in runs] == [[25, 50]] * 2
        assert np.isfinite([curves["training loss"] for curves in runs]).all()
        final[method] = [curves["test accuracy"][-1] for curves in runs]
        assert [f"{100 * value:.1f}" for value in final[method]] == rows(run.stdout)[method][4::2]
    assert min(final["fresh"]) > 0.5  # it learns: chance is 0.1
    assert final["fresh"] != final["stale"] != final["compensated"]
    words = script.verdict(final, delay=3)
    assert words == results["verdict"]
    assert words in run.stdout


def test_train_flax_without_delay(script, capsys, tmp_path):
    output, results = run_main(script, capsys, tmp_path, "--delay=0")
    fresh, stale, compensated = results["curves"].values()
    assert fresh == stale == compensated
    assert "all three rows are the same training" in output


def test_train_flax_reports_divergence(script, capsys, tmp_path):
    # Stale gradients do well at this rate; a huge constant lamda without a limit blows up.
    options = ["--seeds=1", "--learning-rate=0.03", "--lamda=1e6", "--decay=none", "--clip=none"]
    output, results = run_main(script, capsys, tmp_path, *options)
    assert rows(output)["compensated"] == ["1", "of", "1", "diverged", "diverged"]
    assert results["curves"]["compensated"][0]["test accuracy"][-1] is None
    words = "it made no clear difference: 1 of 1 runs failed, 0 without, but one seed cannot tell"
    assert f"Compensation did not help, {words}" in output
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--delay", "-1"),
        ("--delay", "1.5"),
        ("--delay", "50"),  # as long as the training: no gradient would ever arrive
        ("--learning-rate", "0"),
        ("--learning-rate", "nan"),
        ("--learning-rate", "inf"),
        ("--learning-rate", "none"),
        ("--momentum", "1"),
        ("--epochs", "0"),
        ("--batch-size", "0"),
        ("--batch-size", "4001"),
        ("--lamda", "-1"),
        ("--decay", "1"),
        ("--decay", "-0.1"),
        ("--clip", "-1"),
        ("--clip", "wide"),
        ("--seeds", "0"),
        ("--out", "a_file"),
        ("--out", "a_file/folder"),
    ],
)
def test_train_flax_refuses(script, capsys, tmp_path, monkeypatch, option, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    monkeypatch.setattr(script, "load_data", lambda: pytest.fail("training was prepared"))
    with pytest.raises(SystemExit) as exit_info:
        script.main([*SMALL, option, value])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"error: argument {option}: " in message
    assert value in message


@pytest.mark.parametrize("option", ["--decay", "--clip"])
def test_train_flax_takes_none(script, tmp_path, option):
    args = script.parse_args([option, "none", f"--out={tmp_path}"])
    assert getattr(args, option[2:]) is None


@pytest.mark.parametrize(
    ("before", "after", "effect"),
    [
        ([0.10, 0.11, 0.09], [0.93, 0.95, 0.94], "helped"),
        ([0.93, 0.95, 0.94], [0.10, 0.11, 0.09], "hurt"),
        ([0.93, 0.95, 0.94], [0.94, 0.96, 0.94], "made no clear difference"),
        ([0.93, 0.95, 0.94], [0.93, 0.95, 0.94], "made no clear difference"),
        # Wide, but five of five runs were worse by far; then wider than the gain.
        ([0.75, 0.34, 0.21, 0.67, 0.78], [0.94, 0.95, 0.94, 0.96, 0.94], "helped"),
        ([0.30, 0.95, 0.94], [0.94, 0.95, 0.94], "made no clear difference"),
        # The means are 2.0 points apart; three standard errors are 1.96 and then 2.03 points.
        ([0.912, 0.92, 0.928], [0.932, 0.94, 0.948], "helped"),
        ([0.9117, 0.92, 0.9283], [0.9317, 0.94, 0.9483], "made no clear difference"),
        # Runs that failed, diverged or at chance, count before any mean does.
        ([NAN, 0.10, NAN, 0.95, 0.95], [0.60, 0.61, 0.62, 0.61, 0.60], "helped"),
        ([0.60, 0.61, 0.62, 0.61, 0.60], [NAN, 0.10, NAN, 0.95, 0.95], "hurt"),
        ([NAN, 0.10, 0.95], [0.94, 0.94, 0.94], "made no clear difference"),
        ([NAN, 0.90, 0.90], [0.95, 0.95, 0.10], "made no clear difference"),
        ([NAN, NAN, NAN], [NAN, NAN, NAN], "made no clear difference"),
        ([0.90], [0.95], "made no clear difference"),  # that one seed could tell
        ([0.10], [0.95], "made no clear difference"),
    ],
)
def test_verdict_on_compensation(script, before, after, effect):
    assert script.judge(before, after)[0] == effect
    words = script.verdict(
        {"fresh": [0.95] * len(before), "stale": before, "compensated": after}, delay=8
    )
    line = next(line for line in words.splitlines() if line.startswith("Compensation "))
    expected = "helped" if effect == "helped" else f"did not help, it {effect}"
    assert line.startswith(f"Compensation {expected}: ")


def test_verdict_on_staleness(script):
    good, bad, diverged = [0.94, 0.95, 0.96], [0.10, 0.11, 0.12], [NAN] * 3

    def words(fresh, stale, compensated):
        return script.verdict(
            {"fresh": fresh, "stale": stale, "compensated": compensated}, delay=8
        ).splitlines()

    hurt, _, left, legend = words(good, bad, good)
    assert hurt.startswith("Staleness alone hurt: 3 of 3 runs failed, 0 without.")
    assert left.startswith(
        "With compensation, staleness made no clear difference: from 95.0 % to 95.0"
    )
    assert "under 20 %" in legend
    harmless, _, _, advice = words(good, good, good)
    assert harmless.startswith("Staleness alone made no clear difference")
    assert "raise --learning-rate or --delay" in advice
    for failed in (bad, diverged):
        assert "try another --learning-rate" in words(failed, failed, failed)[-2]


def test_table_hides_no_divergence(script):
    text = script.table(
        {"fresh": [0.9, 0.94], "stale": [NAN, 0.94], "compensated": [0.901, 0.901]}
    ).splitlines()
    assert [" ".join(line.split()) for line in text] == [
        "gradients mean ± std seed 0 seed 1",
        "fresh 92.0 ± 2.8 % 90.0 % 94.0 %",
        "stale 1 of 2 diverged diverged 94.0 %",
        "compensated 90.1 ± 0.0 % 90.1 % 90.1 %",
    ]
    assert len({len(line) for line in text}) == 1


def test_split_is_stratified(script):
    (train_images, train_labels), (test_images, test_labels) = script.load_data()
    assert train_images.shape == (4000, 28, 28, 1)
    assert test_images.shape == (1000, 28, 28, 1)
    assert (train_images.min(), train_images.max()) == (0, 1)
    np.testing.assert_array_equal(np.bincount(train_labels), [400] * 10)
    np.testing.assert_array_equal(np.bincount(test_labels), [100] * 10)
    together = np.concatenate([train_images, test_images]).reshape(5000, -1)
    assert len(np.unique(together, axis=0)) == 5000  # no image is in both


def test_train_step_donates(script, tmp_path):
    args = script.parse_args([f"--out={tmp_path}", "--momentum=0.9"])
    tx = script.make_optimizers(args)["compensated"]
    (images, labels), _ = script.load_data()
    graphdef, params = nnx.split(script.CNN(nnx.Rngs(0)), nnx.Param)
    opt_state = tx.init(params)
    script.train_step(tx, graphdef, params, opt_state, images[:80], labels[:80])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((params, opt_state)))


def test_optimizers_differ_in_delay_and_compensation_alone(script, tmp_path):
    options = ["--delay=1", "--learning-rate=0.5", "--lamda=3", "--decay=none"]
    args = script.parse_args([*options, f"--out={tmp_path}"])
    params = {"w": np.float32([1.0, -2.0])}
    grads = [{"w": np.float32(g)} for g in ([1.0, 0.5], [0.25, 2.0], [-1.0, 4.0])]
    final = {}
    for method, tx in script.make_optimizers(args).items():
        w, state = jax.tree.map(jax.numpy.asarray, params), tx.init(params)
        for g in grads:
            updates, state = tx.update(g, state, w)
            w = optax.apply_updates(w, updates)
        final[method] = w["w"]
    two_steps = np.float32([1.0, -2.0]) - 0.5 * np.float32([1.25, 2.5])
    np.testing.assert_allclose(final["fresh"], two_steps - 0.5 * grads[2]["w"], rtol=1e-6)
    np.testing.assert_allclose(final["stale"], two_steps, rtol=1e-6)
    # The second gradient was computed at the start and is applied half the first one later; the
    # limit (the default, as large as the gradient) takes hold of its second component.
    ratio = np.clip(3 * np.float32([0.25, 2.0]) * np.float32([-0.5, -0.25]), -1, 1)
    expected = two_steps - 0.5 * np.float32([0.25, 2.0]) * ratio
    np.testing.assert_allclose(final["compensated"], expected, rtol=1e-6)


def test_linen_train_state_resumes(tmp_path):
    run = run_script("linen_train_state.py", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    saved, final, resumed = run.stdout.splitlines()
    assert float(final.split()[-1]) < float(saved.split()[3].rstrip(","))
    assert resumed.endswith("the same parameters and optimizer state, bit for bit")
    assert not list(tmp_path.iterdir())  # the checkpoint was temporary


def test_overlapped_data_parallel_as_a_user_runs_it(tmp_path):
    options = ["--learning-rates=0.02", "--epochs=1", "--batch-size=400", "--seeds=1", "--out=out"]
    run = run_script("overlapped_data_parallel.py", *options, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "| learning rate | synchronous | overlapped | compensated |" in run.stdout
    assert "0.02: the update of delay made no clear difference" in run.stdout  # one seed
    assert "10/10" in run.stderr  # the progress bars'
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["options"]["learning_rates"] == [0.02]
    accuracies = [runs[0][0] for runs in results["accuracies"].values()]
    assert len(set(accuracies)) == 3
    assert f"| {100 * accuracies[2]:.1f} % |" in run.stdout
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_pipeline_delay_as_a_user_runs_it(tmp_path):
    options = ["--blocks=1", "--stages=2", "--updates=50", "--seeds=1", "--out=out"]
    options += ["--sgd-rates=0.1", "--adam-rates", "--methods=both"]
    run = run_script("pipeline_delay.py", *options, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "2 stages, delays 1 to 0, 50 updates, 1 seeds" in run.stdout
    words = "SGD 0.1: the delays made no clear difference; both made no clear difference."
    assert words in run.stdout  # one seed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["curves"]) == ["SGD"]
    (methods,) = results["curves"]["SGD"].values()
    assert sorted(methods) == ["both", "fresh", "stale"]
    losses = {method: runs[0][-1] for method, runs in methods.items()}
    assert max(losses.values()) < 4  # it learns: a uniform guess costs 4.5
    assert len(set(losses.values())) == 3
    for method, loss in losses.items():
        assert f"| {method} | {loss:.2f} |" in run.stdout
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("overlapped_data_parallel.py", "--batch-size", "30"),  # not a multiple of 8
        ("overlapped_data_parallel.py", "--out", "a_file"),
        ("pipeline_delay.py", "--stages", "9"),  # of a model with eight halves of blocks
        ("pipeline_delay.py", "--updates", "60"),
        ("pipeline_delay.py", "--methods", "fresh"),
    ],
)
def test_examples_on_several_devices_refuse(name, option, value, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    module = importlib.import_module(name.removesuffix(".py"))
    with pytest.raises(SystemExit) as exit_info:
        module.parse_args([option, value])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"error: argument {option}: " in message
    assert value in message
