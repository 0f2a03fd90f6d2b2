"""Trajectories of the real MXNet 1.9.1 and 2.0.0b1, how to follow them, and how exactly.

fixtures/make_mxnet_trajectories.py ran MXNet itself and wrote the fixtures.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

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


def follow(tx, case, *, compiled=False):
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
