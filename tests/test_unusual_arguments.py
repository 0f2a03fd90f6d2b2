"""Arguments that are odd but legal."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from validation_cases import FACTORIES, GRADS, PARAMS, TRANSFORMATIONS, call, transformations

from optax_dcasgd import (
    add_delay_compensation,
    dcasgd,
    fused_dcasgd,
    mxnet,
    scale_by_gap,
    scale_by_staleness,
)

UNUSUAL = {
    "decay 0": {"decay": 0.0},
    "integer decay 0": {"decay": 0},
    "clip 0": {"clip": 0.0},
    "large clip": {"clip": 1e6},
    "lamda 0": {"lamda": 0},
    "large lamda": {"lamda": 1e6, "clip": 1.0},
    "large eps": {"eps": 10, "decay": 0.5},
    "no eps": {"eps": 0.0, "decay": 0.5},
    "numpy scalars": {"lamda": np.float64(1), "decay": np.float32(0.5), "eps": np.float16(0.1)},
    "numpy integers": {"lamda": np.int64(1), "clip": np.int8(1), "decay": np.uint8(0)},
    "0-d numpy arrays": {"lamda": np.array(0.5), "clip": np.array(1)},
    "jax scalars": {"lamda": jnp.asarray(0.5), "decay": jnp.asarray(0.5), "clip": jnp.asarray(1)},
    "schedules": {
        "lamda": optax.linear_schedule(0.0, 1.0, 3),
        "decay": lambda count: 0.5,
        "clip": optax.constant_schedule(1.0),
        "eps": lambda count: jnp.exp(-count.astype(float)),
    },
    "accumulator": {"decay": 0.5, "accumulator_dtype": "bfloat16"},
    "numpy accumulator": {"decay": 0.5, "accumulator_dtype": np.float32},
    "one worker": {"num_workers": 1},
    "numpy number of workers": {"num_workers": np.int64(2)},
}


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("unusual", UNUSUAL)
def test_unusual_hyperparameters_are_legal(name, unusual):
    tx = FACTORIES[name](**UNUSUAL[unusual])
    state, params = tx.init(PARAMS), PARAMS
    for _ in range(3):
        output, state = call(tx, GRADS, params, state, worker=0)
        params = jax.tree.map(lambda p: p + 0.125, params)
    for leaf in jax.tree.leaves((output, state)):
        assert np.all(np.isfinite(np.asarray(leaf, np.float32)))


@pytest.mark.parametrize("factory", [dcasgd, fused_dcasgd])
def test_unusual_learning_rates_and_momenta_are_legal(factory):
    for learning_rate in (0, 1, -0.1, np.float32(0.1), jnp.asarray(0.1), lambda count: 0.1):
        for momentum in (None, 0, 0.0, np.float64(0.9), jnp.asarray(0.9), lambda count: 0.9):
            tx, lr = factory(learning_rate, momentum), learning_rate
            rate, zeros = float(lr(0) if callable(lr) else lr), jax.tree.map(jnp.zeros_like, PARAMS)
            output, _ = call(tx, GRADS, PARAMS)
            base = PARAMS if factory is fused_dcasgd else zeros
            expected = jax.tree.map(lambda w, g, rate=rate: w - rate * g, base, GRADS)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), output, expected)


@transformations
def test_other_extra_arguments_are_ignored(name):
    tx = TRANSFORMATIONS[name]()
    expected = call(tx, GRADS, PARAMS)
    got = call(tx, GRADS, PARAMS, value=1.0, worker=7, staleness=3, loss_fn=print)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    function, state = tx.step if hasattr(tx, "step") else tx.update, tx.init(PARAMS)
    named_like_ours = {"step": 3, "leaf": 1, "count": 2, "tx": None, "implementation": "none"}
    if not hasattr(tx, "step"):
        named_like_ours["grads"] = None
    got = function(GRADS, state, PARAMS, **named_like_ours)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


TRACED = {"lamda": 0.5, "decay": 0.5, "eps": 1e-3, "clip": 0.5}


@pytest.mark.parametrize("name", FACTORIES)
def test_traced_hyperparameters_are_legal(name):
    factory = FACTORIES[name]
    tx = factory(**TRACED)
    _, state = call(tx, GRADS, PARAMS)
    expected, _ = call(tx, GRADS, jax.tree.map(jnp.zeros_like, PARAMS), state)

    def two_updates(hyperparams):
        tx = factory(**hyperparams)
        _, state = call(tx, GRADS, PARAMS)
        return call(tx, GRADS, jax.tree.map(jnp.zeros_like, PARAMS), state)[0]

    for transformed in (
        jax.jit(two_updates)(TRACED),
        jax.tree.map(
            lambda x: x[1],
            jax.vmap(two_updates)(jax.tree.map(lambda x: jnp.asarray([0.25, 1.0]) * x, TRACED)),
        ),
    ):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), transformed, expected
        )


def test_injected_hyperparameters_are_legal_and_can_be_changed():
    for factory in (add_delay_compensation, dcasgd):
        tx = optax.inject_hyperparams(factory)(**TRACED)
        state = tx.init(PARAMS)
        for name in TRACED:
            state.hyperparams[name] = state.hyperparams[name] / 2
        _, state = jax.jit(tx.update)(GRADS, state, PARAMS)
        assert {name: float(state.hyperparams[name]) for name in TRACED} == pytest.approx(
            {name: value / 2 for name, value in TRACED.items()}
        )
    tx = optax.inject_hyperparams(scale_by_gap)(decay=0.9)
    tx.update(GRADS, tx.init(PARAMS), PARAMS)
    tx = optax.inject_hyperparams(scale_by_staleness)(power=0.5)
    tx.update(GRADS, tx.init(PARAMS), PARAMS, staleness=2)
    injected = optax.inject_hyperparams(mxnet.DCASGD, static_args=("begin_num_update", "version"))
    tx = injected(0.1, 0.9, wd=0.1)
    tx.update(GRADS, tx.init(PARAMS), PARAMS)


@transformations
@pytest.mark.parametrize(
    "tree",
    [{}, [], (), {"a": None}, {"a": optax.MaskedNode()}],
    ids=["dict", "list", "tuple", "absent", "masked"],
)
def test_there_may_be_no_parameters_at_all(name, tree):
    tx = TRANSFORMATIONS[name]()
    state = tx.init(tree)
    for _ in range(2):
        output, state = call(tx, tree, tree, state)
        assert output == tree


@transformations
def test_numpy_arrays_and_python_floats_are_legal_parameters(name):
    tx = TRANSFORMATIONS[name]()
    params = jax.tree.map(np.asarray, PARAMS)
    params["scales"][0] = 1.0
    state = tx.init(params)
    for _ in range(3):
        output, state = call(tx, params, params, state)
    for leaf, p in zip(jax.tree.leaves(output), jax.tree.leaves(params), strict=True):
        assert isinstance(leaf, jax.Array)
        assert leaf.shape == np.shape(p)
        assert leaf.dtype == jnp.float32
