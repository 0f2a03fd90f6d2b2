"""mxnet.DCASGD against trajectories of the real MXNet 1.9.1 and 2.0.0b1.

fixtures/make_mxnet_trajectories.py ran MXNet itself and wrote the fixtures. They are checked here
in turn: a float64 formula must reproduce them, and the same formula with a fault must not.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_dcasgd import mxnet

FIXTURES = pathlib.Path(__file__).parent / "fixtures"

# Every weight may be off by this much of the largest magnitude that this very element has had so
# far, MXNet being right: sixteen roundings of float32. MXNet's own float32 is off from the float64
# formula by up to two thirds of it.
TOLERANCE = 1e-6
# A wrong rule must be off by this many tolerances somewhere. A backup in half precision is the
# closest to the right rule, off by 44; the next closest is off by 200, most by more than 10,000.
MUCH_MORE = 30


def load_cases():
    cases = {}
    for version, file in ((1, "mxnet_1.9.1.json"), (2, "mxnet_2.0.0b1.json")):
        recorded = json.loads((FIXTURES / file).read_text(encoding="utf-8"))["cases"]
        for name, case in recorded.items():
            cases[f"{version}-{name}"] = {**case, "version": version}
    return cases


CASES = load_cases()


def learning_rate_of(formula, num_update):
    """Evaluates a recorded scheduler, for a Python int and for a traced one."""
    if formula["kind"] == "inverse":
        return formula["base_lr"] / (1 + formula["decay"] * num_update)
    assert formula["kind"] == "stairs"
    return formula["base_lr"] * formula["factor"] ** (num_update // formula["period"])


def make_optimizer(case, **overrides):
    args = {**case["args"], "version": case["version"], **overrides}
    if "lr_scheduler" in args:
        formula = args["lr_scheduler"]
        args["lr_scheduler"] = lambda num_update: learning_rate_of(formula, num_update)
    return mxnet.DCASGD(**args)


def as_arrays(case, tree, module=np):
    return {name: module.asarray(tree[name], dtype=dtype) for name, dtype in case["dtypes"].items()}


def follow(tx, case, *, compiled=True):
    """Steps our optimizer through a case as users of Optax do."""
    params = as_arrays(case, case["initial_weights"], jnp)
    state = tx.init(params)
    update = jax.jit(tx.update) if compiled else tx.update
    trajectory = []
    for gradients in case["gradients"]:
        updates, state = update(as_arrays(case, gradients, jnp), state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append({name: np.asarray(w) for name, w in params.items()})
    return trajectory


def follow_formula(case, name, fault=None):
    """The rule of MXNet for one tensor in float64, or the rule with one of FAULTS in it."""
    args, version = case["args"], case["version"]
    momentum, lamda, wd = args["momentum"], args["lamda"], args.get("wd", 0.0)
    rescale, clip = args.get("rescale_grad", 1.0), args.get("clip_gradient")
    begin = args.get("begin_num_update", 0)
    lr_mult = args.get("lr_mult", {}).get(name, 1.0)
    wd *= args.get("wd_mult", {}).get(name, 1.0)
    if fault == "no compensation":  # also what a backup kept by reference amounts to
        lamda = 0.0
    if fault == "lamda is 1":
        lamda = 1.0
    if fault == "wd on the other side of the square":
        version = 3 - version
    if fault == "no momentum":
        momentum = 0.0
    if fault == "no wd":
        wd = 0.0
    if fault == "no rescaling":
        rescale = 1.0
    if fault == "no clipping":
        clip = None
    if fault == "num_update counted from 0":
        begin -= 1
    if fault == "begin_num_update ignored":
        begin = 0
    if fault == "lr_mult ignored":
        lr_mult = 1.0
    if fault == "wd_mult ignored":
        wd = args["wd"]

    dtype = case["dtypes"][name]
    w = np.asarray(case["initial_weights"][name], dtype).astype(np.float64)
    previous, velocity, trajectory = w, np.zeros_like(w), []
    if fault == "backup starts at zero":
        previous = np.zeros_like(w)
    for step, gradients in enumerate(case["gradients"]):
        lr = 0.01 if args["learning_rate"] is None else args["learning_rate"]
        if "lr_scheduler" in args:
            lr = learning_rate_of(args["lr_scheduler"], begin + step + 1)
        lr *= lr_mult

        g = np.asarray(gradients[name], dtype).astype(np.float64)
        if fault == "rescaling in half precision":
            g = (g * rescale).astype(dtype).astype(np.float64) / rescale
        if fault == "clipping before rescaling":
            g = np.clip(g, -clip, clip) * rescale
        elif fault == "clipping after wd":
            g = np.clip(g * rescale + wd * w, -clip, clip) - wd * w
        else:
            g = g * rescale if clip is None else np.clip(g * rescale, -clip, clip)
        decayed = g + wd * w
        squared = (decayed if version == 2 else g) ** 2
        if fault == "a factor of g missing":
            squared = decayed if version == 2 else g
        d = decayed + lamda * squared * (w - previous)

        if fault == "lr outside the momentum":
            velocity = momentum * velocity - d
            change = lr * velocity
        else:
            velocity = momentum * velocity - lr * d
            change = velocity
        previous, w = w, w + change
        if fault == "no master weights":
            w = w.astype(dtype).astype(np.float64)
        if fault == "backup in half precision":
            previous = previous.astype(dtype).astype(np.float64)
        trajectory.append(w)
    return trajectory, velocity, previous


# Each fault, and which cases it makes a difference to.
FAULTS = {
    "no compensation": lambda args: args["lamda"],
    "lamda is 1": lambda args: True,
    "a factor of g missing": lambda args: args["lamda"],
    "backup starts at zero": lambda args: args["lamda"],
    "wd on the other side of the square": lambda args: args["lamda"] and "wd" in args,
    "no momentum": lambda args: args["momentum"],
    "no wd": lambda args: "wd" in args,
    "no rescaling": lambda args: "rescale_grad" in args and "clip_gradient" not in args,
    "no clipping": lambda args: "clip_gradient" in args,
    "clipping before rescaling": lambda args: "clip_gradient" in args and "rescale_grad" in args,
    "clipping after wd": lambda args: "clip_gradient" in args and "wd" in args,
    "num_update counted from 0": lambda args: "lr_scheduler" in args,
    "begin_num_update ignored": lambda args: "begin_num_update" in args,
    "lr outside the momentum": lambda args: args["momentum"] and "lr_scheduler" in args,
    "lr_mult ignored": lambda args: "lr_mult" in args,
    "wd_mult ignored": lambda args: "wd_mult" in args,
    "rescaling in half precision": lambda args: (
        "multi_precision" in args and "rescale_grad" in args
    ),
    "no master weights": lambda args: "multi_precision" in args,
    "backup in half precision": lambda args: "multi_precision" in args,
}
FAULTY_CASES = [
    (fault, name)
    for fault, matters in FAULTS.items()
    for name in CASES
    if matters(CASES[name]["args"])
]


def recorded_weights(case, name):
    """What MXNet had in float32 after every step: the masters, if the weights are float16."""
    steps = case["masters"] if case["dtypes"][name] == "float16" else case["weights"]
    return [np.asarray(step[name], np.float32).astype(np.float64) for step in steps]


def allowances(case, name):
    """TOLERANCE, in absolute terms, for every step and element of one tensor."""
    start = np.asarray(case["initial_weights"][name], np.float64)
    magnitudes = np.abs([start, *recorded_weights(case, name)])
    return TOLERANCE * np.maximum.accumulate(magnitudes)[1:]


def worst_error(case, name, trajectory):
    """The largest error of a trajectory, in tolerances."""
    got = np.asarray(trajectory, np.float64)
    return np.max(np.abs(got - recorded_weights(case, name)) / allowances(case, name))


def names_of(case, dtype):
    return [name for name, d in case["dtypes"].items() if d == dtype]


def assert_follows(case, trajectory):
    for name in names_of(case, "float32"):
        got = [step[name] for step in trajectory]
        assert all(w.dtype == np.float32 for w in got)
        assert worst_error(case, name, got) <= 1
    for name in names_of(case, "float16"):
        got = np.stack([step[name] for step in trajectory])
        want = np.asarray([step[name] for step in case["weights"]], np.float16)
        assert got.dtype == np.float16
        unit = np.spacing(np.maximum(np.abs(got), np.abs(want)))
        assert np.all(np.abs(got.astype(np.float64) - want) <= unit)
        # Stricter: it is the float16 nearest to some float32 that is right within the tolerance.
        masters, off = np.asarray(recorded_weights(case, name)), allowances(case, name)
        assert np.all(got >= (masters - off).astype(np.float16))
        assert np.all(got <= (masters + off).astype(np.float16))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_step_is_that_of_mxnet(case):
    assert_follows(case, follow(make_optimizer(case), case))


@pytest.mark.parametrize(
    "name", ["1-everything", "2-momentum_everything", "2-momentum_float16_beside_float32"]
)
def test_every_step_is_that_of_mxnet_without_jit(name):
    assert_follows(CASES[name], follow(make_optimizer(CASES[name]), CASES[name], compiled=False))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_fixture_is_what_the_formula_gives_in_float64(case):
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


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_float16_weights_of_the_fixture_are_the_rounded_masters(case):
    halves = names_of(case, "float16")
    assert bool(halves) == ("multi_precision" in case["args"])
    for name in halves:
        weights = np.asarray([step[name] for step in case["weights"]], np.float16)
        masters = np.asarray([step[name] for step in case["masters"]], np.float32)
        np.testing.assert_array_equal(weights, masters.astype(np.float16))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_cases_compensate_and_clip_noticeably(case):
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


@pytest.mark.parametrize(("fault", "name"), FAULTY_CASES)
def test_a_faulty_rule_is_far_from_the_fixture(fault, name):
    case = CASES[name]
    faulty = {tensor: follow_formula(case, tensor, fault)[0] for tensor in case["dtypes"]}
    assert max(worst_error(case, tensor, w) for tensor, w in faulty.items()) >= MUCH_MORE
    # An implementation with this fault fails here, even where float16 hides most of the error.
    steps = [
        {tensor: faulty[tensor][i].astype(dtype) for tensor, dtype in case["dtypes"].items()}
        for i in range(len(case["weights"]))
    ]
    with pytest.raises(AssertionError):
        assert_follows(case, steps)


def test_every_fault_is_tried_on_some_case_of_each_version_that_can_have_it():
    tried = {(fault, name[0]) for fault, name in FAULTY_CASES}
    only_with_momentum = {"no momentum", "lr outside the momentum"}
    assert tried == {(f, "2") for f in FAULTS} | {
        (f, "1") for f in FAULTS.keys() - only_with_momentum
    }


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
    jax.tree.map(np.testing.assert_array_equal, spelled_out, by_position)

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
            updates, state = jax.jit(tx.update)(jax.tree.map(jnp.cos, w), state, w)
            w = optax.apply_updates(w, updates)
        got.append(w)
    jax.tree.map(np.testing.assert_array_equal, *got)
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


@pytest.mark.parametrize("learning_rate", [{}, {"learning_rate": 0.3}])
def test_a_scheduler_whose_base_lr_mxnet_would_overwrite_is_refused(learning_rate):
    scheduler = SchedulerWithBaseLR({"kind": "inverse", "base_lr": 0.2, "decay": 0.25})
    with pytest.raises(ValueError, match="base_lr"):
        mxnet.DCASGD(**learning_rate, lr_scheduler=scheduler)


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("param_idx2name", {0: "w"}, "lr_mult"),
        ("sym", object(), "lr_mult"),
        ("param_dict", {}, "lr_mult"),
        ("aggregate_num", 4, "leave it out"),
    ],
)
def test_arguments_of_mxnet_that_make_no_sense_here_are_refused_with_advice(name, value, advice):
    with pytest.raises((TypeError, ValueError), match=rf"{name}.*{advice}"):
        mxnet.DCASGD(**{name: value})


def test_an_argument_that_mxnet_has_not_either_is_refused_by_name():
    with pytest.raises(TypeError, match="weight_decay"):
        mxnet.DCASGD(weight_decay=0.1)


def test_a_fused_step_is_not_implemented_as_in_mxnet():
    with pytest.raises(NotImplementedError, match="use_fused_step"):
        mxnet.DCASGD(use_fused_step=True)


def test_an_unknown_version_is_refused():
    with pytest.raises(ValueError, match="version"):
        mxnet.DCASGD(version=3)
