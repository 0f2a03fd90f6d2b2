"""mxnet.DCASGD against trajectories of the real MXNet 1.9.1 and 2.0.0b1, and its signature."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from mxnet_cases import (
    CASES,
    allowances,
    assert_follows,
    follow,
    follow_formula,
    learning_rate_of,
    make_optimizer,
    names_of,
    recorded_weights,
    worst_error,
)

from optax_dcasgd import mxnet


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


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_step_is_that_of_mxnet(case):
    assert_follows(case, follow(make_optimizer(case), case))


@pytest.mark.parametrize(
    "name", ["1-everything", "2-momentum_everything", "2-momentum_float16_beside_float32"]
)
def test_every_step_is_that_of_mxnet_compiled(name):
    assert_follows(CASES[name], follow(make_optimizer(CASES[name]), CASES[name], compiled=True))


@pytest.mark.parametrize("name", ["2-momentum_lamda_2", "2-momentum_wd", "2-momentum_everything"])
def test_version_1_has_the_momentum_that_mxnet_1_fails_on(name):
    case = {**CASES[name], "version": 1}
    formula = {tensor: follow_formula(case, tensor)[0] for tensor in case["dtypes"]}
    steps = zip(*formula.values(), strict=True)
    case["weights"] = [dict(zip(formula, step, strict=True)) for step in steps]
    assert_follows(case, follow(make_optimizer(case), case))


@pytest.mark.parametrize("version", [1, 2])
def test_the_momentum_may_be_a_schedule(version):
    def momentum(count):
        return 0.5 + 0.1 * count

    tx = mxnet.DCASGD(0.1, momentum, 2.0, version=version)
    w = jnp.array([1.0, -2.0])
    state, prev, buffer = tx.init(w), w, jnp.zeros(2)
    for count in range(4):
        grad = jnp.cos(w)
        updates, state = tx.update(grad, state, w)
        buffer = momentum(count) * buffer - 0.1 * (grad + 2.0 * grad**2 * (w - prev))
        w, prev = w + updates, w
        np.testing.assert_allclose(updates, buffer, rtol=1e-5)


def test_arguments_have_the_order_and_the_defaults_of_mxnet():
    case = CASES["2-momentum_lamda_default"]
    spelled_out = follow(make_optimizer(case, use_fused_step=False), case)
    by_position = follow(mxnet.DCASGD(0.1, 0.9, 0.04, False), case)
    chex.assert_trees_all_equal(spelled_out, by_position)

    case = CASES["2-lamda_default"]
    assert_follows(case, follow(mxnet.DCASGD(), case))


def test_a_multiplier_holds_for_the_whole_subtree_it_stands_at():
    params = {
        "layer": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)},
        "out": jnp.ones(2),
    }
    per_leaf = mxnet.DCASGD(
        0.1,
        wd=0.1,
        lr_mult={"layer": {"kernel": 0.5, "bias": 0.5}, "out": 2.0},
        wd_mult={"layer": {"kernel": 3.0, "bias": 3.0}, "out": 3.0},
    )
    by_prefix = mxnet.DCASGD(0.1, wd=0.1, lr_mult={"layer": 0.5, "out": 2.0}, wd_mult=3.0)
    got = []
    for tx in (per_leaf, by_prefix):
        state, w = tx.init(params), params
        for _ in range(3):
            updates, state = tx.update(jax.tree.map(jnp.cos, w), state, w)
            w = optax.apply_updates(w, updates)
        got.append(w)
    chex.assert_trees_all_equal(*got)
    # Not both without any multiplier.
    assert np.all(np.abs(got[0]["layer"]["bias"] - got[0]["out"][0]) > 0.01)


class SchedulerWithBaseLR:
    """A scheduler in the shape of MXNet's, whose base_lr MXNet overwrites by learning_rate."""

    def __init__(self, formula):
        self.formula, self.base_lr = formula, formula["base_lr"]

    def __call__(self, num_update):
        return learning_rate_of({**self.formula, "base_lr": self.base_lr}, num_update)


@pytest.mark.parametrize("name", ["2-scheduler", "2-scheduler_with_its_own_learning_rate"])
def test_a_scheduler_with_a_base_lr_is_followed_if_learning_rate_is_none_or_equal(name):
    case = CASES[name]
    scheduler = SchedulerWithBaseLR(case["args"]["lr_scheduler"])
    tx = mxnet.DCASGD(**{**case["args"], "lr_scheduler": scheduler})
    assert_follows(case, follow(tx, case))


# Half-precision parameters without masters: arithmetic and momentum in float32 -------------------

versions = pytest.mark.parametrize("version", [1, 2])
halves = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])


@versions
@halves
def test_a_momentum_that_half_precision_cannot_hold_decays(version, dtype):
    # 0.999 is 1 in bfloat16, where a momentum would stay as it is for ever.
    tx = mxnet.DCASGD(1.0, momentum=0.999, version=version)
    params = jnp.ones(3, dtype)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for t in range(200):
        updates, state = update(jnp.full(3, float(t == 0), dtype), state, params)
    assert updates.dtype == dtype
    np.testing.assert_allclose(np.asarray(updates, float), -(0.999**199), rtol=jnp.finfo(dtype).eps)


@versions
@halves
def test_an_update_is_rounded_once_or_behind_the_compensation_of_version_1_twice(version, dtype):
    rng = np.random.default_rng(0)
    params, grads = (jnp.asarray(rng.normal(size=500), dtype) for _ in range(2))
    wd = 0.03 if version == 2 else 0.0  # in version 1 it is added behind the compensation
    tx = mxnet.DCASGD(0.1, 0.9, 2.0, wd=wd, rescale_grad=0.011, version=version)
    updates, _ = tx.update(grads, tx.init(params), params)
    exact = -0.1 * (0.011 * np.asarray(grads, float) + wd * np.asarray(params, float))
    half_a_unit = float(jnp.finfo(dtype).eps) / 2
    limit = half_a_unit * np.maximum(np.abs(exact), float(jnp.finfo(dtype).tiny))
    number = {1: 2, 2: 1}[version]
    assert np.all(np.abs(np.asarray(updates, float) - exact) <= 1.001 * number * limit)
