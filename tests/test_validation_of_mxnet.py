"""Wrong arguments of mxnet.DCASGD raise an error that names them."""

import numpy as np
import pytest
from validation_cases import GRADS, NO_PREFIXES, PARAMS, call, raises

from optax_dcasgd import mxnet


@pytest.mark.parametrize("argument", ["learning_rate", "momentum", "lamda"])
@pytest.mark.parametrize("value", ["0.1", True, [0.1], np.ones(2), float("nan")], ids=repr)
def test_the_rule_of_mxnet_1_refuses_what_that_of_mxnet_2_refuses(argument, value):
    with raises((TypeError, ValueError), argument):
        mxnet.DCASGD(**{argument: value}, version=1)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("value", ["0.1", True, [0.1], float("nan")], ids=repr)
def test_a_learning_rate_is_checked_beside_a_scheduler(value, version):
    with raises((TypeError, ValueError), "learning_rate"):
        mxnet.DCASGD(value, lr_scheduler=lambda num_update: 0.1, version=version)


@pytest.mark.parametrize("argument", ["rescale_grad", "clip_gradient", "lr_mult", "wd_mult"])
def test_what_mxnet_cannot_schedule_is_no_function(argument):
    with raises(TypeError, argument):
        mxnet.DCASGD(wd=0.1, **{argument: lambda count: 1.0})


def test_what_cannot_be_scheduled_in_a_combination_is_refused_in_it():
    with raises(TypeError, "wd"):
        mxnet.DCASGD(wd=lambda count: 0.1, wd_mult=2.0)


@pytest.mark.parametrize("value", ["x", 0.1, [1]], ids=repr)
def test_a_scheduler_must_be_a_function(value):
    with raises(TypeError, "lr_scheduler"):
        mxnet.DCASGD(None, lr_scheduler=value)


class Scheduler:
    base_lr = 0.05

    def __call__(self, num_update):
        return self.base_lr / num_update


def test_a_scheduler_must_not_contradict_the_learning_rate():
    with raises(ValueError, "learning_rate=0.1", "base_lr=0.05"):
        mxnet.DCASGD(0.1, lr_scheduler=Scheduler())
    for learning_rate in (0.05, None):
        call(mxnet.DCASGD(learning_rate, lr_scheduler=Scheduler()), GRADS, PARAMS)


@pytest.mark.parametrize(
    ("value", "error"),
    [(-1, ValueError), (1.0, TypeError), (None, TypeError), (True, TypeError), ("1", TypeError)],
    ids=repr,
)
def test_updates_are_counted_from_a_natural_number(value, error):
    with raises(error, "begin_num_update"):
        mxnet.DCASGD(begin_num_update=value)


@pytest.mark.parametrize("value", [0, 3, "2", None, True, 1.0], ids=repr)
def test_an_unknown_version_is_refused(value):
    with raises((TypeError, ValueError), "version"):
        mxnet.DCASGD(version=value)


@pytest.mark.parametrize("argument", ["lr_mult", "wd_mult"])
@pytest.mark.parametrize("value", ["x", True, np.ones(2), float("inf")], ids=repr)
def test_a_wrong_multiplier_is_named_by_its_path(argument, value):
    with raises((TypeError, ValueError), f"{argument}['scales'][1]"):
        mxnet.DCASGD(wd=0.1, **{argument: {"dense": 1.0, "scales": [1.0, value]}})
    with raises((TypeError, ValueError), argument):
        mxnet.DCASGD(wd=0.1, **{argument: value})


@pytest.mark.parametrize("case", NO_PREFIXES)
@pytest.mark.parametrize("argument", ["lr_mult", "wd_mult"])
@pytest.mark.parametrize("wd", [0.1, 0.0])
def test_multipliers_that_are_no_prefix_are_refused(case, argument, wd):
    # Also those of a weight decay of zero: the mistake will be there when it is no longer zero.
    mult, path = NO_PREFIXES[case]
    with raises(ValueError, argument, "prefix", *path):
        call(mxnet.DCASGD(wd=wd, **{argument: mult}), GRADS, PARAMS)


def test_what_mxnet_has_and_what_it_has_not_is_told_apart():
    with raises(TypeError, "param_dict", "lr_mult"):
        mxnet.DCASGD(param_dict={})
    with raises(TypeError, "nesterov"):
        mxnet.DCASGD(nesterov=True)
    with raises(NotImplementedError, "use_fused_step", "fused_dcasgd"):
        mxnet.DCASGD(use_fused_step=True)
