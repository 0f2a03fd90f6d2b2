"""`diagnostics.overhead` on curves whose answer is known."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from optax_dcasgd.diagnostics import overhead

T = np.arange(1, 201)


def curve(t):
    return 1.5 + 3 * np.asarray(t, float) ** -0.5


@pytest.mark.parametrize("slower", [0.8, 1.0, 1.2, 2.5])
def test_a_curve_stretched_in_time(slower):
    """stale(t) = fresh(t / s) needs s times as many updates, on either side of 1."""
    found = overhead(curve(T), curve(T / slower))
    np.testing.assert_allclose(found.ratio, slower, rtol=1e-3)
    assert math.isnan(found.standard_error)  # one seed
    np.testing.assert_allclose(max(found.fresh_updates, found.stale_updates), 200, rtol=1e-6)
    np.testing.assert_allclose(found.loss, max(curve(T)[-1], curve(T / slower)[-1]))


def test_updates_between_evaluations_and_a_longer_stale_run():
    """Straight lines, of which linear interpolation knows all."""
    at = np.array([10, 20, 50, 80, 130])
    found = overhead(10 - 0.1 * at[:4], 10 - 0.05 * at, at, loss=4.0)
    assert found == (2.0, found.standard_error, 4.0, 60.0, 120.0)
    found = overhead(10 - 0.1 * at[:4], 10 - 0.05 * at, at)
    np.testing.assert_allclose(found[:3:2] + found[3:], (2.0, 3.5, 65, 130))


def test_noise_and_its_standard_error():
    """More than two standard errors from the truth: rarely. The mean of many: not off."""
    rng = np.random.default_rng(0)
    ratios, errors = [], []
    for _ in range(60):
        runs = [curve(T[9::10] / s) + 0.01 * rng.normal(size=(5, 20)) for s in (1.0, 1.2)]
        found = overhead(*runs, T[9::10])
        ratios.append(found.ratio)
        errors.append(found.standard_error)
    assert abs(np.mean(ratios) - 1.2) < 0.03
    assert np.mean(np.abs(np.array(ratios) - 1.2) > 2 * np.array(errors)) < 0.2
    assert 0.5 < np.std(ratios) / np.median(errors) < 2


def test_single_runs_of_different_speed_and_unequal_numbers_of_seeds():
    """The jackknife by hand: leaving out a run of each in turn."""
    fresh = 10 - np.outer([1.0, 1.1, 1.2], T[:30]) / 10
    stale = 10 - np.outer([0.8, 1.0], T[:30]) / 10
    found = overhead(fresh, stale, loss=8.0)
    np.testing.assert_allclose(found.ratio, 1.1 / 0.9)
    f, s = np.array([1.15, 1.1, 1.05]), np.array([1.0, 0.8])
    variance = 2 * np.var(f / 0.9) + 1 * np.var(1.1 / s)
    np.testing.assert_allclose(found.standard_error, math.sqrt(variance))


def test_a_rise_in_the_middle_is_no_crossing():
    bumpy = np.array([5.0, 4.0, 1.0, 4.0, 3.0, 2.0, 1.0])  # at 1.0 for a moment
    found = overhead(np.linspace(5, 1, 7), bumpy, loss=2.0)
    np.testing.assert_allclose(found.stale_updates, 6.0)
    # The pooled stretch is one point: its mean update and its mean loss.
    assert overhead(bumpy, bumpy, loss=8 / 3).fresh_updates == 4.0


@pytest.mark.parametrize(
    ("fresh", "stale", "loss", "ratio", "words"),
    [
        (
            [3.0, 2.0, 1.0],
            [9.0, 8.0, 7.0],
            None,
            math.inf,
            "The stale runs never reach a loss of 3.",
        ),
        ([3.0, 2.0, 1.0], [math.nan, 1.0, 1.0], None, math.inf, "The stale runs never reach"),
        (
            [3.0, 2.0, 1.0],
            [3.0, 2.5, 2.0],
            1.5,
            math.inf,
            "The stale runs never reach a loss of 1.5",
        ),
        ([9.0, 8.0, 7.0], [3.0, 2.0, 1.0], None, 0.0, "The fresh runs never reach a loss of 3."),
        ([3.0, 2.0, 1.0], [3.0, 2.0, 1.0], 0.5, math.nan, "No runs reach a loss of 0.5."),
    ],
)
def test_what_is_never_reached(fresh, stale, loss, ratio, words):
    found = overhead(fresh, stale, loss=loss)
    np.testing.assert_equal(found.ratio, ratio)
    assert str(found).startswith(words)
    assert found.break_even(1.0, 0.1) == f"{found} There is no break-even."


def test_a_curve_ends_where_one_of_its_runs_diverges():
    fresh = np.stack([10.0 - T, 10.0 - T])
    stale = fresh / 2 + 5
    stale[1, 4:] = [np.inf, *[0.0] * (len(T) - 5)]  # what comes after is not read
    assert overhead(fresh, stale, loss=8.0)[3:] == (2.0, 4.0)
    found = overhead(fresh, stale)  # not where it diverged, at little cost until then
    assert (found.loss, found.stale_updates) == (fresh[0, -1], math.inf)
    assert overhead(stale, fresh).ratio == 0
    assert overhead(stale, stale).loss == stale[0, 3]


def test_losses_and_times_that_are_jax_arrays():
    found = overhead(jnp.array([4, 2], jnp.bfloat16), jnp.array([4.0, 3.0, 2.0]), loss=2.0)
    assert found.ratio == 1.5
    assert "1.5 times as fast" in found.break_even(jnp.array(3.0), np.float32(2.0))
    with pytest.raises(ValueError, match="fresh_step must be"):
        found.break_even(jnp.array(-1.0), 2.0)


def test_break_even_in_words():
    runs = [10 - np.outer([1.0, 1.0], T[:40]) / slower for slower in (10, 12)]
    found = overhead(*runs)
    assert found.standard_error == pytest.approx(0, abs=1e-6)
    assert str(found) == (
        "1.2 ± 0 times as many updates: to a loss of 6.667, 40 stale and 33.33 fresh ones."
    )
    assert found.break_even(fresh_step=3, stale_step=2) == (
        "Staleness pays if a step is more than 1.2 times as fast.\n"
        "It is 1.5 times as fast. To the same loss, training takes 0.8 times as long: "
        "staleness pays."
    )
    assert found.break_even(1.0, 0.9).endswith("1.08 times as long: staleness does not pay.")
    unsure = found._replace(standard_error=0.1)
    assert unsure.break_even(1.3, 1.0).endswith("no clear difference (within two standard errors).")
    assert unsure.break_even(1.5, 1.0).endswith("staleness pays.")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["a"], [1.0]), TypeError, "fresh must be an array of losses; got dtype"),
        (([1.0], np.zeros((1, 1, 1))), ValueError, r"stale must have shape \(seeds, evaluations\)"),
        (([1.0], []), ValueError, "stale must have shape"),
        (([1.0, math.nan], [1.0], [1.0]), ValueError, "updates must be 2 increasing numbers"),
        (([1.0, 0.5], [1.0], [3, 3]), ValueError, "updates must be 2 increasing numbers"),
        (([1.0, 0.5], [1.0], [0, 3]), ValueError, "updates must be 2 increasing numbers"),
        (([math.nan], [1.0]), ValueError, "fresh has a run whose first loss is not finite"),
        (([1.0], [0.5], None, 0.8), ValueError, "loss=0.8 is above the first loss of stale, 0.5"),
        (([1.0], [0.5], None, "low"), TypeError, "loss must be a number or None"),
    ],
)
def test_refuses(arguments, error, message):
    *curves, loss = [*arguments, None, None][:4] if len(arguments) < 4 else arguments
    with pytest.raises(error, match=message):
        overhead(*curves, loss=loss)


@pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, -1.0), (1.0, math.nan)])
def test_break_even_refuses(times):
    with pytest.raises(ValueError, match=r"(fresh|stale)_step must be finite and above 0"):
        overhead([2.0, 1.0], [2.0, 1.5]).break_even(*times)
