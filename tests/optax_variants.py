"""This library's optimizers for Optax's suites, and which cases the suites then have."""

import functools

import optax
from optax_suites import Variant

import optax_dcasgd as dc


def of_a_worker(inner):
    """One backup per worker. The suites do not name the worker, so it is always the same one."""
    tx = dc.remember_params(inner, num_workers=3)
    return optax.GradientTransformationExtraArgs(tx.init, functools.partial(tx.update, worker=1))


def dcasgd_of_a_worker(learning_rate: optax.ScalarOrSchedule, momentum=None):
    return of_a_worker(dc.dcasgd(learning_rate, momentum, store=None))


def dcasgd_of_the_last_update(learning_rate: optax.ScalarOrSchedule, momentum=None):
    return dc.remember_params(dc.dcasgd(learning_rate, momentum, store=None))


def dcasgd_of_fresh_gradients(learning_rate: optax.ScalarOrSchedule, momentum=None):
    return dc.delay_gradients(dc.dcasgd(learning_rate, momentum, store=None), 0)


def delay_compensated_sgd(learning_rate: optax.ScalarOrSchedule, momentum=None):
    rule = dc.add_delay_compensation(0.04, decay=None, clip=None)
    return dc.remember_params(optax.chain(rule, optax.sgd(learning_rate, momentum)))


def delay_compensated_adam(learning_rate: optax.ScalarOrSchedule):
    return dc.remember_params(optax.chain(dc.add_delay_compensation(), optax.adam(learning_rate)))


def gap_aware_sgd(learning_rate: optax.ScalarOrSchedule, momentum=None):
    return dc.remember_params(optax.chain(dc.scale_by_gap(), optax.sgd(learning_rate, momentum)))


def robust_sgd(learning_rate: optax.ScalarOrSchedule, momentum=None):
    rule = dc.robust_delay_compensation()
    return dc.remember_params(optax.chain(rule, optax.sgd(learning_rate, momentum)))


def remembering(rule):
    """A rule by itself, told the parameters of the last update."""
    return lambda **kwargs: dc.remember_params(rule(**kwargs))


def wrapped(wrapper, *args):
    return lambda: wrapper(optax.sgd(1e-3, 0.9), *args)


# The learning rates are those of `optax.sgd` and `optax.adam` in Optax's lists.
LR = {"learning_rate": 1e-3}
MOMENTUM = LR | {"momentum": 0.9}
CLIPPED = {"lamda": 2.0, "decay": 0.95, "clip": 1.0}
BFLOAT16 = {"decay": 0.95, "accumulator_dtype": "bfloat16"}

OPTIMIZERS = [
    Variant("dcasgd", dc.dcasgd, LR),
    Variant("dcasgd_updates", dc.dcasgd, LR | {"store": "updates"}),
    Variant("dcasgd_momentum", dc.dcasgd, MOMENTUM),
    Variant("dcasgd_momentum_updates", dc.dcasgd, MOMENTUM | {"store": "updates"}),
    Variant("dcasgd_adaptive", dc.dcasgd, MOMENTUM | {"decay": 0.95}),
    Variant("delay_compensated_sgd", delay_compensated_sgd, MOMENTUM),
    Variant("delay_compensated_adam", delay_compensated_adam, {"learning_rate": 1e-1}),
]

# The two large suites overlap. For these, one of them has to do.
MORE_OPTIMIZERS = [
    Variant("dcasgd_clipped", dc.dcasgd, MOMENTUM | CLIPPED | {"store": "updates"}),
    Variant("dcasgd_bfloat16", dc.dcasgd, MOMENTUM | BFLOAT16),
    Variant("dcasgd_of_a_worker", dcasgd_of_a_worker, MOMENTUM),
    Variant("dcasgd_of_the_last_update", dcasgd_of_the_last_update, MOMENTUM),
    Variant("dcasgd_of_fresh_gradients", dcasgd_of_fresh_gradients, MOMENTUM),
    Variant("gap_aware_sgd", gap_aware_sgd, MOMENTUM),
    Variant("robust_sgd", robust_sgd, MOMENTUM),
]

# Not optimizers by themselves, or not meant to do as well as those they wrap. The suites that do
# not look at convergence have room for them.
TRANSFORMATIONS = [
    Variant("add_delay_compensation", remembering(dc.add_delay_compensation), {}),
    Variant("scale_by_gap", remembering(dc.scale_by_gap), {}),
    Variant("scale_by_staleness", remembering(dc.scale_by_staleness), {}),
    Variant("robust", remembering(dc.robust_delay_compensation), {}),
    Variant("with_master_weights", wrapped(dc.with_master_weights), {}),
    Variant("delay_gradients", wrapped(dc.delay_gradients, 2), {}),
    Variant("track_velocity", dc.track_velocity, {}),
]

# How many cases Optax's own parameters make of each of its tests, for one optimizer.
CASES = {
    "ContribTest": {
        "test_optimizers_accept_extra_args": 2,
        "test_optimizers": 4,
        "test_optimizers_can_be_wrapped_in_inject_hyperparams": 1,
        "test_preserve_dtype": 2,
        "test_gradient_accumulation": 2,
        "test_state_shape_dtype_shard_stability": 4,
        "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such": 1,
    },
    "AliasTest": {
        "test_optimization": 4,
        "test_optimizers_accept_extra_args": 1,
        "test_optimizers_can_be_wrapped_in_inject_hyperparams": 1,
        "test_preserve_dtype": 2,
        "test_state_shape_dtype_shard_stability": 6,
        "test_gradient_accumulation": 2,
    },
    "Float64Test": {"test_mixed_dtype_input_outputs": 1},
    "ShardingTest": {
        "test_init_with_abstract_input": 1,
        "test_state_sharding_type_init_match_update": 1,
        "test_state_sharding_type_preserved_with_jit": 1,
    },
}

VARIANTS = {
    "ContribTest": OPTIMIZERS,
    "AliasTest": OPTIMIZERS + MORE_OPTIMIZERS,
    "Float64Test": OPTIMIZERS + MORE_OPTIMIZERS + TRANSFORMATIONS,
    "ShardingTest": OPTIMIZERS + MORE_OPTIMIZERS + TRANSFORMATIONS,
}

# The cases that run by default, by the last part of their names; the others run with -m slow. Tests
# of one name are much the same in both large suites.
BY_DEFAULT = {
    "ContribTest": {
        "test_optimizers_accept_extra_args": ["wrapFalse"],
        "test_optimizers": ["rosenbrock_float32", "mixed_tensor_target_float32"],
        "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such": [""],
    },
    "AliasTest": {
        "test_optimization": ["parabola_complex64"],
        "test_optimizers_accept_extra_args": [""],
        "test_optimizers_can_be_wrapped_in_inject_hyperparams": [""],
        "test_preserve_dtype": ["bfloat16"],
        "test_state_shape_dtype_shard_stability": ["bfloat16", "complex128"],
        "test_gradient_accumulation": ["bfloat16"],
    },
    "Float64Test": {test: [""] for test in CASES["Float64Test"]},
    "ShardingTest": {test: [""] for test in CASES["ShardingTest"]},
}

# Cases in which Optax's optimizer with the same hyperparameters fails too: 10,000 steps at this
# learning rate are too few without momentum. Nothing else is left out.
LEFT_OUT = [
    "AliasTest.test_optimization_dcasgd_rosenbrock_complex64",
    "AliasTest.test_optimization_dcasgd_updates_rosenbrock_complex64",
]
