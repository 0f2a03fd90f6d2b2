"""Wrong arguments of a constructor raise an error that names them.

Messages are matched for the names that a user needs to find the mistake, not for their wording.
"""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import raises
from transformation_cases import GRADS, PARAMS

import optax_dcasgd as dc
from optax_dcasgd import mxnet

# --- Numbers ---

COMPENSATION = ("lamda", "decay", "eps", "clip")
NUMBERS = {  # a factory, and its numbers
    "add_delay_compensation": (dc.add_delay_compensation, COMPENSATION),
    "robust": (dc.robust_delay_compensation, ("lamda", "decay", "max_norm", "power", "eps")),
    "scale_by_gap": (dc.scale_by_gap, ("decay", "eps")),
    "scale_by_staleness": (dc.scale_by_staleness, ("power",)),
    "dcasgd": (dc.dcasgd, ("learning_rate", "momentum", *COMPENSATION)),
    "fused_dcasgd": (dc.fused_dcasgd, ("learning_rate", "momentum", *COMPENSATION)),
    "track_velocity": (dc.track_velocity, ("decay",)),
    **{
        f"mxnet.DCASGD-{version}": (
            lambda version=version, **arguments: mxnet.DCASGD(version=version, **arguments),
            ("learning_rate", "momentum", "lamda", "wd", "rescale_grad", "clip_gradient"),
        )
        for version in (1, 2)
    },
}
NO_NUMBERS = ["0.1", True, np.True_, 0.5j, [0.5], jnp.asarray(True)]
NOT_ONE_FINITE = [float("nan"), -np.inf, np.float32("nan"), np.full(2, 0.5), jnp.full(1, 0.5)]
MAY_BE_NEGATIVE = ("learning_rate", "wd", "rescale_grad")
MAY_BE_NONE = {
    *("add_delay_compensation.decay", "add_delay_compensation.clip", "robust.max_norm"),
    *(f"{f}.{x}" for f in ("dcasgd", "fused_dcasgd") for x in ("momentum", "decay", "clip")),
    *(f"mxnet.DCASGD-{v}.{x}" for v in (1, 2) for x in ("learning_rate", "clip_gradient")),
}


@pytest.mark.parametrize(
    ("factory", "argument"), [(name, x) for name, (_, names) in NUMBERS.items() for x in names]
)
def test_a_number_that_is_none_or_out_of_range_is_refused(factory, argument):
    make, _ = NUMBERS[factory]
    for value in NO_NUMBERS:
        with raises(TypeError, argument):
            make(**{argument: value})
    for value in [*NOT_ONE_FINITE, 10**400]:  # the last is an integer beyond all floats
        with raises(ValueError, argument):
            make(**{argument: value})
    if argument == "max_norm":
        for value in (0, -1.0):
            with raises(ValueError, argument, "above 0"):
                make(max_norm=value)
    elif argument not in MAY_BE_NEGATIVE:
        for value in (-1, np.float32(-0.1), np.array(-0.1)):
            with raises(ValueError, argument, "at least 0"):
                make(**{argument: value})
    if argument in ("decay", "momentum"):
        for value in (1, np.float64(1.5)):
            with raises(ValueError, argument, "below 1"):
                make(**{argument: value})
    if f"{factory}.{argument}" in MAY_BE_NONE:
        make(**{argument: None})
    else:
        with raises(TypeError, argument):
            make(**{argument: None})


def test_what_cannot_be_a_schedule_is_no_function():
    for factory, argument in [(dc.track_velocity, "decay")] + [
        (mxnet.DCASGD, name)
        for name in ("wd", "rescale_grad", "clip_gradient", "lr_mult", "wd_mult")
    ]:
        with raises(TypeError, argument) as error:
            factory(**{argument: lambda count: 1.0})
        assert "or a schedule" not in str(error.value)  # it must not be offered either


def test_a_schedule_must_return_a_number():
    for value in (jnp.ones((1,)), None, [0.5]):
        for argument in NUMBERS["dcasgd"][1]:
            tx = dc.dcasgd(**{"decay": 0.9, argument: lambda count, value=value: value})
            with raises(ValueError, argument, "must return a scalar"):
                tx.update(GRADS[0], tx.init(PARAMS), PARAMS)


# --- Everything else: (what is called, the error, what its message must have) ---

SGD = optax.sgd(0.1)


class Scheduler:
    base_lr = 0.05

    def __call__(self, num_update):
        return self.base_lr / num_update


def injected_workers():
    """Beside a number of Python, `inject_hyperparams` makes an array of the number of workers."""
    tx = optax.inject_hyperparams(lambda m: dc.remember_params(SGD, num_workers=m))(2)
    return tx.init(PARAMS)


def pallas(factory):
    tx = factory(implementation="pallas")
    arguments = (GRADS[0], tx.init(PARAMS), PARAMS)
    return tx.step(*arguments) if hasattr(tx, "step") else tx.update(*arguments)


OTHERS = [
    *(
        (lambda f=f, x=x: f(accumulator_dtype=x), TypeError, "accumulator_dtype")
        for f, names in NUMBERS.values()
        if "decay" in names
        for x in (int, "complex64", "no such dtype", 3)
    ),
    *(
        case
        for f in (dc.dcasgd, dc.fused_dcasgd)
        for case in [
            *((lambda f=f, x=x: f(store=x), ValueError, "store", "'params'", repr(x))
              for x in ("Params", True, b"params", {})),
            *((lambda f=f, x=x: f(implementation=x), ValueError, "implementation", "'xla'", repr(x))
              for x in ("XLA", True, 1)),
            (lambda f=f: pallas(f), NotImplementedError, "implementation='pallas'", " "),
        ]
    ),
    *(
        (lambda w=w, inner=inner: w(inner), TypeError, "inner")
        for w in (dc.with_master_weights, dc.remember_params, lambda i: dc.delay_gradients(i, 0),
                  lambda i: dc.overlap_reduction(i, "data"))
        for inner in (None, 0.1, optax.sgd, (SGD, SGD), dc.fused_dcasgd())
    ),
    *(
        (lambda x=x: dc.remember_params(SGD, num_workers=x), error, "num_workers", *more)
        for x, error, *more in [
            (0, ValueError, "at least 1"), (np.int64(-1), ValueError, "at least 1"),
            *((x, TypeError) for x in (2.0, True, "2", [2], jnp.asarray(2))),
        ]
    ),
    (injected_workers, TypeError, "num_workers", 'static_args=("num_workers",)'),
    *(
        (lambda x=x: dc.delay_gradients(SGD, x), error, "delay")
        for x, error in [
            (-1, ValueError), (np.int64(-2), ValueError),
            *((x, TypeError) for x in (1.0, True, None, "1", jnp.asarray(1), np.array([1, 2]))),
        ]
    ),
    *(
        (lambda x=x: dc.delay_gradients(SGD, {"dense": 1, "frozen": [0, x]}), error,
         "delay['frozen'][1]")
        for x, error in [(-1, ValueError), (1.0, TypeError), (True, TypeError), ("1", TypeError)]
    ),
    *(
        (lambda x=x: dc.robust_delay_compensation(unit_axes=x), TypeError, "unit_axes", *more)
        for x, *more in [(0.5,), (True,), ("0",), ({"w": [0, "1"]}, "['w'][1]")]
    ),
    (lambda: dc.robust_delay_compensation(unit_axes=5).init(PARAMS), ValueError, "unit_axes",
     "['dense']['bias']", "(2,)"),
    (lambda: mxnet.DCASGD("0.1", lr_scheduler=lambda n: 0.1), TypeError, "learning_rate"),
    (lambda: mxnet.DCASGD(None, lr_scheduler=0.1), TypeError, "lr_scheduler"),
    *((lambda rate=rate: mxnet.DCASGD(*rate, lr_scheduler=Scheduler()), ValueError, "learning_rate",
       "base_lr=0.05") for rate in ([], [0.3])),
    *((lambda x=x: mxnet.DCASGD(begin_num_update=x), error, "begin_num_update")
      for x, error in [(-1, ValueError), (1.0, TypeError), (None, TypeError), (True, TypeError)]),
    *((lambda x=x: mxnet.DCASGD(version=x), error, "version")
      for x, error in [(0, ValueError), (3, ValueError), ("2", TypeError), (None, TypeError)]),
    *((lambda n=n, x=x: mxnet.DCASGD(**{n: {"a": 1.0, "b": [1.0, x]}}), error, f"{n}['b'][1]")
      for n in ("lr_mult", "wd_mult")
      for x, error in [("x", TypeError), (np.ones(2), ValueError), (np.inf, ValueError)]),
    *((lambda x=x: mxnet.DCASGD(**{x: 4}), TypeError, x, advice)
      for x, advice in [*((x, "lr_mult") for x in ("param_idx2name", "sym", "param_dict")),
                        ("aggregate_num", "leave it out"), ("nesterov", "nor has MXNet")]),
    (lambda: mxnet.DCASGD(use_fused_step=True), NotImplementedError, "fused_dcasgd"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(OTHERS)), ids=lambda i: f"{OTHERS[i][2]}-{i}")
def test_a_wrong_argument_is_named(case):
    call, error, *parts = OTHERS[case]
    with raises(error, *parts):
        call()


# --- Trees that are no prefix of the parameters: the path that the message names ---

NO_PREFIXES = [
    ({"dense": 1}, ""),
    ({"dense": 1, "frozen": 1, "more": 1}, ""),
    ({"dense": 1, "frozen": {"offset": 1}}, "['frozen']"),
    ({"dense": 1, "frozen": (1, 1)}, "['frozen']"),
    ({"dense": {"kernel": [1], "bias": 1}, "frozen": 1}, "['kernel']"),
    ({}, ""),
    ([], ""),
]


def update(tx, **extra_args):
    return tx.update(GRADS[0], tx.init(PARAMS), PARAMS, **extra_args)


TAKES_A_PREFIX = {
    "delay": lambda tree: dc.delay_gradients(SGD, tree).init(PARAMS),
    "unit_axes": lambda tree: dc.robust_delay_compensation(unit_axes=tree).init(PARAMS),
    "staleness": lambda tree: update(dc.scale_by_staleness(), staleness=tree),
    # Also those of a weight decay of zero: the mistake will be there when it is no longer zero.
    "wd_mult": lambda tree: update(mxnet.DCASGD(wd=0.0, wd_mult=tree)),
    "lr_mult": lambda tree: update(mxnet.DCASGD(lr_mult=tree)),
}


@pytest.mark.parametrize("argument", TAKES_A_PREFIX)
def test_a_tree_that_is_no_prefix_is_refused(argument):
    for tree, path in NO_PREFIXES:
        if argument == "unit_axes" and tree == {"dense": 1, "frozen": (1, 1)}:
            continue  # a tuple of integers is axes there
        with raises(ValueError, argument, "prefix", path):
            TAKES_A_PREFIX[argument](tree)


def test_a_delay_of_none_is_refused_where_there_is_a_parameter():
    # It is right where the parameter is None too: what jax.tree.map makes of the parameters.
    with raises(ValueError, "delay", "['frozen']['scale']"):
        dc.delay_gradients(SGD, {"dense": 1, "frozen": {"offset": 0, "scale": None}}).init(PARAMS)
