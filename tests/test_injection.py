"""Hyperparameters: numbers, schedules, traced values, and `optax.inject_hyperparams`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import WORKERS, assert_bit_equal
from transformation_cases import NUM_WORKERS, assert_close

import optax_dcasgd as dc

STEPS = 4
# Of each hyperparameter a number, another one, and a schedule. An injected decay is a float32, and
# so 1 − decay is a difference of float32 numbers: equal to that of the Python number only if binary
# fractions are subtracted.
HYPERPARAMETERS = {
    "learning_rate": (0.1, 0.05, lambda t: 0.2 / (1 + t)),
    "momentum": (0.9, 0.5, lambda t: 1 - 1 / (2.0 + t)),
    "lamda": (0.8, 0.1, lambda t: 0.3 + 0.2 * t),
    "decay": (0.875, 0.5, lambda t: 0.9 - 0.1 * t),
    "eps": (0.02, 0.3, lambda t: 0.1 / (1 + t)),
    "clip": (0.5, 0.02, lambda t: jnp.where(t < 2, 0.2, 2.0)),
    "max_norm": (0.75, 0.5, lambda t: 0.5 + 0.25 * t),
    "power": (0.5, 2.0, lambda t: 1 / (1.0 + t)),
}
NUMBERS, OTHERS, SCHEDULES = ({k: v[i] for k, v in HYPERPARAMETERS.items()} for i in range(3))
PARAMS = jnp.array([[1.0, -2.0], [0.5, 3.0]])
GRADS = jnp.asarray(np.random.default_rng(0).normal(size=(STEPS, 2, 2)), jnp.float32)


def remembered(factory):
    """The rule under the only memory for rules, made from the hyperparameters of the rule."""

    @functools.wraps(factory)
    def make(*args, **kwargs):
        inner = optax.chain(factory(*args, **kwargs), optax.scale(-0.5))
        return dc.remember_params(inner, num_workers=NUM_WORKERS)

    return make


COMPENSATION = ("lamda", "decay", "eps", "clip")
FACTORIES = {  # what is made, and what can be injected
    "dcasgd": (dc.dcasgd, ("learning_rate", "momentum", *COMPENSATION)),
    "dcasgd-updates": (
        functools.partial(dc.dcasgd, store="updates"),
        ("learning_rate", "momentum", *COMPENSATION),
    ),
    "add_delay_compensation": (remembered(dc.add_delay_compensation), COMPENSATION),
    "robust": (
        remembered(dc.robust_delay_compensation),
        ("lamda", "decay", "max_norm", "power", "eps"),
    ),
    "scale_by_gap": (remembered(dc.scale_by_gap), ("decay", "eps")),
    "scale_by_staleness": (remembered(dc.scale_by_staleness), ("power",)),
}


def run(tx, changes=None):
    """The parameters after each step; the hyperparameters in the state are changed first."""
    params, state, trajectory = PARAMS, tx.init(PARAMS), []
    for name, value in (changes or {}).items():
        state.hyperparams[name] = jnp.asarray(value, state.hyperparams[name].dtype)
    states = (state, getattr(state, "inner_state", None))  # without and with injection
    by_worker = any(isinstance(s, dc.RememberParamsState) for s in states)
    for t in range(STEPS):
        extras = {"worker": WORKERS[t]} if by_worker else {}
        updates, state = tx.update(GRADS[t], state, params, **extras)
        params = params + updates
        trajectory.append(params)
    return jnp.stack(trajectory)


def made(name, values, *, inject):
    factory, names = FACTORIES[name]
    factory = optax.inject_hyperparams(factory) if inject else factory
    return factory(**{n: values[n] for n in names})


@functools.cache
def compiled(name):
    """The run as a function of the hyperparameters: set in the state, or traced arguments."""
    tx = made(name, NUMBERS, inject=True)
    in_state = jax.jit(lambda values: run(tx, values))
    return in_state, jax.jit(lambda values: run(made(name, values, inject=False)))


@pytest.mark.parametrize("values", [NUMBERS, SCHEDULES], ids=["numbers", "schedules"])
@pytest.mark.parametrize("name", FACTORIES)
def test_injected_equals_not_injected(name, values):
    tx = made(name, values, inject=True)
    assert set(tx.init(PARAMS).hyperparams) == set(FACTORIES[name][1])  # none is left out
    expected = jax.jit(lambda: run(made(name, values, inject=False)))()
    assert_close(jax.jit(lambda: run(tx))(), expected)
    if values is NUMBERS:
        assert_close(compiled(name)[1](NUMBERS), expected)


@pytest.mark.parametrize("name", FACTORIES)
def test_every_hyperparameter_can_be_set_in_the_state_or_be_traced(name):
    in_state, traced = compiled(name)
    for changed in FACTORIES[name][1]:
        values = {n: NUMBERS[n] for n in FACTORIES[name][1]} | {changed: OTHERS[changed]}
        assert_close(in_state(values), traced({**NUMBERS, **values}))
        assert np.max(np.abs(in_state(values) - in_state({}))) > 1e-3


def test_a_batch_of_hyperparameters_is_a_loop_over_them():
    values = {"lamda": jnp.array([0.0, 0.8, 0.8]), "learning_rate": jnp.array([0.1, 0.1, 0.2])}
    others = {name: x for name, x in NUMBERS.items() if name not in values}
    batch = jax.jit(jax.vmap(lambda v: run(made("dcasgd", {**others, **v}, inject=False))))(values)
    traced = compiled("dcasgd")[1]
    for i, result in enumerate(batch):
        assert_close(result, traced({**others, **{name: x[i] for name, x in values.items()}}))


def test_remember_params_itself_can_be_injected_around_a_static_number_of_workers():
    rule = optax.chain(dc.add_delay_compensation(0.8), optax.scale(-0.5))
    inject = optax.inject_hyperparams(dc.remember_params, static_args=("inner", "num_workers"))
    expected = jax.jit(lambda: run(dc.remember_params(rule, num_workers=NUM_WORKERS)))()
    actual = jax.jit(lambda: run(inject(rule, num_workers=NUM_WORKERS)))()
    assert_bit_equal(actual, expected)


def test_a_scheduler_of_mxnet_beside_injected_numbers():
    class Scheduler:
        base_lr = 0.1

        def __call__(self, num_update):
            return self.base_lr / num_update

    def trajectory(make):
        return run(make(0.1, momentum=0.5, lamda=2.0, wd=0.1, lr_scheduler=Scheduler()))

    integers = ("begin_num_update", "version")
    injected = optax.inject_hyperparams(dc.mxnet.DCASGD, static_args=(*integers, "lr_scheduler"))
    assert_close(trajectory(injected), trajectory(dc.mxnet.DCASGD))


# --- On bfloat16 parameters, whose dtype injected numbers get by default ---

MXNET = functools.partial(
    optax.inject_hyperparams, static_args=("begin_num_update", "version", "lr_scheduler")
)
ALL_FACTORIES = {
    **{name: (optax.inject_hyperparams, *entry) for name, entry in FACTORIES.items()},
    "track_velocity": (optax.inject_hyperparams, dc.track_velocity, ("decay",)),
    **{
        f"mxnet-{version}": (
            MXNET,
            functools.partial(dc.mxnet.DCASGD, version=version),
            ("learning_rate", "momentum", "lamda", "wd", "rescale_grad", "clip_gradient"),
        )
        for version in (1, 2)
    },
}
DECAYS = [
    (name, argument)
    for name, (_, _, names) in ALL_FACTORIES.items()
    for argument in ("decay", "momentum")
    if argument in names
]
HALF = PARAMS.astype(jnp.bfloat16)


def of_worker(state):
    """The extra arguments that a transformation needs, or the one that an injection holds."""
    states = state, getattr(state, "inner_state", None)
    needed = any(getattr(of, "pulled_at", None) is not None for of in states)
    return {"worker": 0} if needed else {}


@pytest.mark.parametrize(("name", "argument"), DECAYS)
def test_an_injected_decay_that_rounds_to_one_is_refused(name, argument):
    inject, factory, _ = ALL_FACTORIES[name]
    for value in (0.999, lambda count: 0.999):
        if name == "track_velocity" and callable(value):
            continue
        with pytest.raises(ValueError, match=rf"{argument}.*below 1.*hyperparam_dtype=jnp.float32"):
            inject(factory)(**{argument: value}).init(HALF)
        state = inject(factory, hyperparam_dtype=jnp.float32)(**{argument: value}).init(HALF)
        assert state.hyperparams[argument] == jnp.float32(0.999)
    tx = inject(factory)(**{argument: 0.5})
    state = tx.init(HALF)
    state.hyperparams[argument] = jnp.bfloat16(1.0)  # what a schedule of one's own may write
    with pytest.raises(ValueError, match=rf"{argument}.*below 1"):
        tx.update(HALF, state, HALF, **of_worker(state))


@pytest.mark.parametrize(("name", "argument"), DECAYS)
def test_a_decay_that_a_schedule_rounds_to_one_is_refused(name, argument):
    """Also while the update is traced, if the schedule computes nothing there."""
    _, factory, _ = ALL_FACTORIES[name]
    if name == "track_velocity":
        return  # takes no schedule
    for now in (1.0, np.float16(0.9999), jnp.bfloat16(0.999), -0.5):
        tx = factory(**{argument: lambda count, now=now: now})
        state = tx.init(HALF)
        with pytest.raises(ValueError, match=f"{argument} must be .* below 1"):
            jax.eval_shape(tx.update, HALF, state, HALF, **of_worker(state))


@pytest.mark.parametrize(("name", "argument"), DECAYS)
def test_a_decay_may_be_an_array_whose_value_is_known_while_tracing(name, argument):
    _, factory, _ = ALL_FACTORIES[name]
    value = jnp.float32(0.5)

    def update(params, decay):
        tx = factory(**{argument: decay})
        state = tx.init(params)
        return tx.update(params, state, params, **of_worker(state))

    jax.eval_shape(lambda params: update(params, value), HALF)
    if name != "track_velocity":  # which takes no schedule
        jax.eval_shape(lambda params: update(params, lambda count: value), HALF)


@pytest.mark.parametrize("name", ALL_FACTORIES)
def test_injected_numbers_of_another_dtype_need_no_promotion(name):
    inject, factory, names = ALL_FACTORIES[name]
    values = {"wd": 0.1, "rescale_grad": 0.5, "clip_gradient": 0.5, **NUMBERS}
    tx = inject(factory)(**{n: values[n] for n in names})
    with jax.numpy_dtype_promotion("strict"):
        state = jax.eval_shape(tx.init, HALF)
        updates, after = jax.eval_shape(tx.update, HALF, state, HALF, **of_worker(state))
    assert updates.dtype == jnp.bfloat16
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
