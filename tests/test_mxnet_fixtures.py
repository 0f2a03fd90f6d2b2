"""The MXNet fixtures: a float64 formula reproduces them, and the data make a fault show."""

import numpy as np
import pytest
from mxnet_cases import (
    CASES,
    allowances,
    follow_formula,
    names_of,
    recorded_weights,
    worst_error,
)


def check_formula(case):
    for name in case["dtypes"]:
        trajectory, velocity, previous = follow_formula(case, name)
        assert worst_error(case, name, trajectory) <= 1
        # MXNet's own state at the end: the weights of one step before, and the momentum.
        close = np.max(allowances(case, name))
        np.testing.assert_allclose(case["final_previous_weight"][name], previous, 0, close)
        if case["args"]["momentum"]:
            np.testing.assert_allclose(case["final_momentum"][name], velocity, 0, close)
        else:
            assert case["final_momentum"][name] is None


def check_float16_weights_are_rounded_masters(case):
    halves = names_of(case, "float16")
    assert bool(halves) == ("multi_precision" in case["args"])
    for name in halves:
        weights = np.asarray([step[name] for step in case["weights"]], np.float16)
        masters = np.asarray([step[name] for step in case["masters"]], np.float32)
        np.testing.assert_array_equal(weights, masters.astype(np.float16))


def check_it_compensates_and_clips_noticeably(case):
    args = case["args"]
    assert len(case["weights"]) == len(case["gradients"]) >= 6
    for name in case["dtypes"]:
        g = np.asarray([step[name] for step in case["gradients"]]) * args.get("rescale_grad", 1.0)
        w = [np.asarray(case["initial_weights"][name]), *recorded_weights(case, name)[:-1]]
        compensation = args["lamda"] * g[1:] ** 2 * np.diff(w, axis=0)
        if args["lamda"] >= 1:
            assert np.linalg.norm(compensation) >= 0.01 * np.linalg.norm(g)
        if "clip_gradient" in args:
            assert np.mean(np.abs(g) > args["clip_gradient"]) >= 0.2


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_fixture_is_what_the_formula_gives_in_float64(case):
    check_formula(case)
    check_float16_weights_are_rounded_masters(case)
    check_it_compensates_and_clips_noticeably(case)
