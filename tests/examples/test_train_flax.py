"""examples/train_flax.py: a small run, its optimizers, and what it says."""

import json
import math

import jax
import numpy as np
import optax
import pytest
from example_cases import load, refuses
from flax import nnx

SMALL = ["--epochs=1", "--batch-size=80", "--seeds=1"]  # 50 updates
NAN = math.nan


@pytest.fixture(scope="module")
def script():
    module = load("train_flax")
    data = module.load_data()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_data", lambda: data)  # reading the images takes seconds
        yield module


def test_a_run_that_diverges_is_reported(script, capsys, tmp_path, monkeypatch):
    """With made-up curves: NaN is null in the numbers, and cuts off a plotted line."""
    ends = iter([0.9, 0.9, NAN])

    def train(tx, data, args, seed, bar):
        end = next(ends)
        return {"updates": [25, 50], "test accuracy": [0.5, end], "training loss": [1.0, end]}

    monkeypatch.setattr(script, "train", train)
    script.main([*SMALL, f"--out={tmp_path}"])
    words = "it made no clear difference: 1 of 1 runs failed, 0 without, but one seed cannot tell"
    assert f"Compensation did not help, {words}" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["curves"]["compensated"][0]["test accuracy"] == [0.5, None]
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--delay", "-1"),
        ("--delay", "1000"),  # as long as the training: no gradient would ever arrive
        ("--learning-rate", "nan"),
        ("--learning-rate", "none"),
        ("--momentum", "1"),
        ("--epochs", "0"),
        ("--batch-size", "4001"),
        ("--lamda", "-1"),
        ("--decay", "1"),
        ("--clip", "wide"),
        ("--seeds", "0"),
        ("--out", "a_file/folder"),
    ],
)
def test_refuses(script, capsys, tmp_path, monkeypatch, option, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    monkeypatch.setattr(script, "load_data", lambda: pytest.fail("training was prepared"))
    refuses(script.main, capsys, option, value)


def test_takes_none(script, tmp_path):
    args = script.parse_args(["--decay=none", "--clip=none", f"--out={tmp_path}"])
    assert args.decay is args.clip is None


@pytest.mark.parametrize(
    ("before", "after", "effect"),
    [
        ([0.10, 0.11, 0.09], [0.93, 0.95, 0.94], "helped"),
        ([0.93, 0.95, 0.94], [0.10, 0.11, 0.09], "hurt"),
        ([0.93, 0.95, 0.94], [0.94, 0.96, 0.94], "made no clear difference"),
        # The means are 2.0 points apart; three standard errors are 1.96 and then 2.03 points.
        ([0.912, 0.92, 0.928], [0.932, 0.94, 0.948], "helped"),
        ([0.9117, 0.92, 0.9283], [0.9317, 0.94, 0.9483], "made no clear difference"),
        # Runs that failed, diverged or at chance, count before any mean does.
        ([NAN, 0.10, NAN, 0.95, 0.95], [0.60, 0.61, 0.62, 0.61, 0.60], "helped"),
        ([NAN, NAN, NAN], [NAN, NAN, NAN], "made no clear difference"),
        ([0.10], [0.95], "made no clear difference"),  # that one seed could tell
    ],
)
def test_verdict_on_compensation(script, before, after, effect):
    """The rule is that of compare_async_report.py; here three standard errors, and its words."""
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
    same = script.verdict({"fresh": good, "stale": good, "compensated": good}, delay=0)
    assert "all three rows are the same training" in same


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
    lowered = script.train_step.lower(tx, graphdef, params, opt_state, images[:80], labels[:80])
    (params, opt_state, images, labels), _ = lowered.args_info
    for tree in (params, opt_state):
        assert all(leaf.donated for leaf in jax.tree.leaves(tree))
    assert not images.donated
    assert not labels.donated


GRADS = [{"w": np.float32(g)} for g in ([1.0, 0.5], [0.25, 2.0], [-1.0, 4.0])]


def final_params(script, out, *options):
    """The parameters after three given gradients, by method."""
    args = script.parse_args(["--learning-rate=0.5", *options, f"--out={out}"])
    params = {"w": np.float32([1.0, -2.0])}
    final = {}
    for method, tx in script.make_optimizers(args).items():
        w, state, update = params, tx.init(params), jax.jit(tx.update)
        for g in GRADS:
            updates, state = update(g, state, w)
            w = optax.apply_updates(w, updates)
        final[method] = w["w"]
    return final


def test_optimizers_differ_in_delay_and_compensation_alone(script, tmp_path):
    final = final_params(script, tmp_path, "--delay=1", "--lamda=3", "--decay=none")
    two_steps = np.float32([1.0, -2.0]) - 0.5 * np.float32([1.25, 2.5])
    np.testing.assert_allclose(final["fresh"], two_steps - 0.5 * GRADS[2]["w"], rtol=1e-6)
    np.testing.assert_allclose(final["stale"], two_steps, rtol=1e-6)
    # The second gradient was computed at the start and is applied half the first one later; the
    # limit (the default, as large as the gradient) takes hold of its second component.
    ratio = np.clip(3 * np.float32([0.25, 2.0]) * np.float32([-0.5, -0.25]), -1, 1)
    expected = two_steps - 0.5 * np.float32([0.25, 2.0]) * ratio
    np.testing.assert_allclose(final["compensated"], expected, rtol=1e-6)


def test_without_delay_all_methods_are_the_same(script, tmp_path):
    final = final_params(script, tmp_path, "--delay=0")
    np.testing.assert_array_equal(final["fresh"], final["stale"])
    np.testing.assert_array_equal(final["fresh"], final["compensated"])
