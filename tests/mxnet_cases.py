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


def follow_formula(case, name):
    """The rule of MXNet for one tensor in float64: weights of every step, momentum, backup."""
    args, dtype = case["args"], case["dtypes"][name]
    rescale, clip = args.get("rescale_grad", 1.0), args.get("clip_gradient", np.inf)
    wd = args.get("wd", 0.0) * args.get("wd_mult", {}).get(name, 1.0)
    w = np.asarray(case["initial_weights"][name], dtype).astype(np.float64)
    previous, velocity, trajectory = w, np.zeros_like(w), []
    for step, gradients in enumerate(case["gradients"]):
        lr = 0.01 if args["learning_rate"] is None else args["learning_rate"]
        if "lr_scheduler" in args:
            num_update = args.get("begin_num_update", 0) + step + 1
            lr = learning_rate_of(args["lr_scheduler"], num_update)
        lr *= args.get("lr_mult", {}).get(name, 1.0)
        g = np.asarray(gradients[name], dtype).astype(np.float64)
        g = np.clip(g * rescale, -clip, clip)
        decayed = g + wd * w
        squared = (decayed if case["version"] == 2 else g) ** 2
        d = decayed + args["lamda"] * squared * (w - previous)
        velocity = args["momentum"] * velocity - lr * d
        previous, w = w, w + velocity
        trajectory.append(w)
    return trajectory, velocity, previous


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
