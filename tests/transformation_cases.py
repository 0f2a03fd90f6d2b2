"""Every transformation in every mode, ready for the tests of what all of them owe their users."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import WORKERS, random_tree, train

import optax_dcasgd as dc

NUM_WORKERS = 3
STALENESS = [1, 3, 2, 5, 1, 4, 2, 3, 6]
PARAMS = random_tree(0)
GRADS = [random_tree(100 + t) for t in range(9)]
STALE = [random_tree(200 + t, scale=0.5) for t in range(9)]


def no_extras(t):
    return {}


def given(t):
    return {"stale_params": STALE[t], "staleness": np.int32(STALENESS[t])}


def worker(t):
    return {"worker": np.int32(WORKERS[t])}


class Case(NamedTuple):
    """A transformation that leaves nothing to do but to add its updates to the parameters."""

    make: Callable[[], Any]
    extras: Callable[[int], dict[str, Any]] = no_extras  # of update t
    is_real: bool = False  # whether complex parameters mean nothing to it
    has_masters: bool = False


def before_sgd(*rules):
    return optax.chain(*rules, optax.scale(-0.1))


def workers(inner):
    return dc.remember_params(inner, num_workers=NUM_WORKERS)


RULES = {
    "constant": lambda: dc.add_delay_compensation(0.5, decay=None, clip=None),
    "adaptive": lambda: dc.add_delay_compensation(0.8, decay=0.9, eps=0.01, clip=0.7),
    "robust": lambda: dc.robust_delay_compensation(2.0, decay=0.5),
    "gap": lambda: dc.scale_by_gap(0.9),
    "staleness": lambda: dc.scale_by_staleness(0.5),
    "scheduled-staleness": lambda: dc.scale_by_staleness(
        lambda count: 1 / (1 + count.astype(float))
    ),
}
DELAYS = {"dense": {"bias": 0, "kernel": 2}, "frozen": 3}
MULTIPLIERS = {"dense": 1.0, "frozen": {"offset": 0.5, "scale": 2.0}}


def of_mxnet(**arguments):
    is_real = "clip_gradient" in arguments
    return Case(
        lambda: dc.mxnet.DCASGD(0.1, 0.9, 0.5, wd=0.05, rescale_grad=0.5, **arguments),
        is_real=is_real,
    )


CASES = {
    "dcasgd-params": Case(lambda: dc.dcasgd(0.1, 0.9, 0.5)),
    "dcasgd-adaptive": Case(lambda: dc.dcasgd(0.1, None, 0.8, decay=0.9, eps=0.01, clip=0.7)),
    "dcasgd-updates": Case(lambda: dc.dcasgd(0.1, None, 0.5, store="updates")),
    "dcasgd-given": Case(lambda: dc.dcasgd(0.1, 0.9, 0.5, decay=0.9, store=None), given),
    "dcasgd-workers": Case(
        lambda: workers(dc.dcasgd(0.1, 0.9, 0.5, decay=0.9, store=None)), worker
    ),
    "fused_dcasgd": Case(lambda: dc.fused_dcasgd(0.1, 0.9, 0.5, decay=0.9)),
    "mxnet-1": of_mxnet(version=1, lr_mult=MULTIPLIERS, wd_mult=2.0),
    "mxnet-2": of_mxnet(version=2, clip_gradient=0.4, lr_mult=MULTIPLIERS, wd_mult=MULTIPLIERS),
    **{
        f"{n}-remembered": Case(lambda r=r: dc.remember_params(before_sgd(r())))
        for n, r in RULES.items()
    },
    **{f"{n}-given": Case(lambda r=r: before_sgd(r()), given) for n, r in RULES.items()},
    "workers": Case(
        lambda: workers(before_sgd(*(RULES[n]() for n in ("robust", "gap", "adaptive")))), worker
    ),
    "one-worker": Case(
        lambda: dc.remember_params(before_sgd(RULES["adaptive"]()), num_workers=1),
        lambda t: {"worker": np.int32(0)},
    ),
    "delay_gradients": Case(lambda: dc.delay_gradients(dc.dcasgd(0.1, 0.9, 0.5, store=None), 2)),
    "delay_gradients-tree": Case(
        lambda: dc.delay_gradients(
            before_sgd(RULES["adaptive"](), dc.scale_by_staleness(0.5)), DELAYS
        )
    ),
    "delay_gradients-0": Case(lambda: dc.delay_gradients(before_sgd(RULES["robust"]()), 0)),
    "track_velocity": Case(lambda: optax.chain(optax.scale(-0.1), dc.track_velocity(0.5))),
    "with_master_weights": Case(
        lambda: dc.with_master_weights(dc.dcasgd(0.1, 0.9, 0.5, decay=0.9)), has_masters=True
    ),
    "with_master_weights-remembered": Case(
        lambda: dc.with_master_weights(dc.remember_params(before_sgd(RULES["robust"]()))),
        has_masters=True,
    ),
    "with_master_weights-delay": Case(
        lambda: dc.with_master_weights(dc.delay_gradients(before_sgd(RULES["constant"]()), 2)),
        has_masters=True,
    ),
    "mxnet-multi_precision": of_mxnet(multi_precision=True)._replace(has_masters=True),
}


# Those whose states and programs differ from one another, for tests that compile.
DISTINCT = [
    *("dcasgd-params", "dcasgd-adaptive", "dcasgd-updates", "dcasgd-workers", "fused_dcasgd"),
    *("mxnet-1", "adaptive-remembered", "gap-remembered", "scheduled-staleness-given", "workers"),
    *("one-worker", "delay_gradients", "delay_gradients-tree", "track_velocity"),
    *("with_master_weights-remembered", "with_master_weights-delay"),
]


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def inputs(name, t):
    """The parameters, gradients and extra arguments of update t; in bfloat16 for masters."""
    case, extras = CASES[name], dict(CASES[name].extras(t))
    dtype = jnp.bfloat16 if case.has_masters else jnp.float32
    return cast(PARAMS, dtype), cast(GRADS[t], dtype), extras


def assert_close(actual, expected, *, rtol=1e-6, atol=1e-6):
    """Equal but for the order in which two programs round."""
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def make_step(tx):
    """``step(params, state, grads, extras) -> (params, state)`` of an optimizer, fused or not."""

    def step(params, state, grads, extras):
        if isinstance(tx, dc.FusedOptimizer):
            return tx.step(grads, state, params, **extras)
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state

    return step


def run(tx, extras=no_extras, *, grads=GRADS[:6], params=PARAMS):
    """The parameters after each step, and the last state."""
    return train(tx, params, grads, extras)


def accumulated(tx, every):
    """`optax.MultiSteps`, whose own ``gradient_transformation`` drops extra arguments."""
    multi_steps = optax.MultiSteps(tx, every)
    return optax.GradientTransformationExtraArgs(multi_steps.init, multi_steps.update)
