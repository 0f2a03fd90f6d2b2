"""What examples/compare_async.py says about its runs, of made-up numbers."""

import csv
import dataclasses
import math

import numpy as np
import pytest
from compare_async_cases import cell
from example_cases import load

NAN = math.nan


@pytest.fixture(scope="module")
def script():
    return load("compare_async")


@pytest.fixture(scope="module")
def text(script):
    return load("compare_async_report")


@pytest.fixture(scope="module")
def plots(script):
    return load("compare_async_plots")


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


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
