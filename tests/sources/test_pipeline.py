"""A pipeline's delays and predicted parameters, against loops over single leaves in float64."""

import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_dcasgd as dc
from optax_dcasgd import delay_gradients, pipeline_delays, predict_params, track_velocity

UPDATES = 12
LAYERS = [("embed", "block_0"), "block_1", ("block_2", "head")]
_rng = np.random.default_rng(0)
SHAPES = {"embed": (3,), "block_0": (2, 2), "block_1": (2,), "block_2": (4,), "head": ()}
PARAMS = {name: {"w": np.float32(_rng.normal(size=shape))} for name, shape in SHAPES.items()}
DELAYS = {"embed": 2, "block_0": 2, "block_1": 1, "block_2": 0, "head": 0}


def gradient(w):
    """Of the sum of 1 − cos(w) + 0.15 w², one component at a time."""
    return np.sin(w) + 0.3 * w


def run(tx, predict=None):
    """The parameters after each update, in float32 with this library."""
    params, state = PARAMS, tx.init(PARAMS)

    @jax.jit
    def step(params, state):
        at = params if predict is None else predict(params, state)
        grads = jax.tree.map(lambda w: jnp.sin(w) + 0.3 * w, at)
        updates, state = tx.update(grads, state, params, stale_params=at)
        return optax.apply_updates(params, updates), state

    trajectory = []
    for _ in range(UPDATES):
        params, state = step(params, state)
        trajectory.append(params)
    return trajectory


def follow(lamda=0.0, momentum=0.9, lr=0.1, decay=None, velocity_decay=None):
    """The same for each leaf by itself, with its own queue of gradients, in float64.

    ``velocity_decay``: of the average of updates by which the parameters to differentiate at are
    predicted; None for no prediction.
    """
    final = []
    for name, leaf in PARAMS.items():
        age, w = DELAYS[name], leaf["w"].astype(np.float64)
        queue, mom, velocity, nu, trajectory = [], 0 * w, 0 * w, 0 * w, []
        for _ in range(UPDATES):
            at = w if velocity_decay is None else w + age * velocity
            queue.append((gradient(at), at))
            g, w_s = queue.pop(0) if len(queue) > age else (0 * w, w)
            strength = lamda
            if decay is not None:
                nu = decay * nu + (1 - decay) * g**2
                strength = np.where(g == 0, 0, lamda / np.sqrt(nu + 1e-7))
            mom = momentum * mom - lr * (g + strength * g**2 * (w - w_s))
            if velocity_decay is not None:
                velocity = velocity_decay * velocity + (1 - velocity_decay) * mom
            w = w + mom
            trajectory.append(w)
        final.append(trajectory)
    return [
        {name: {"w": leaf[t]} for name, leaf in zip(PARAMS, final, strict=True)}
        for t in range(UPDATES)
    ]


def assert_close(actual, expected):
    expected = jax.tree.map(np.float32, expected)
    chex.assert_trees_all_close(actual, expected, rtol=2e-5, atol=1e-6)


def largest_gap(a, b):
    return max(np.max(np.abs(gap)) for gap in jax.tree.leaves(jax.tree.map(np.subtract, a, b)))


@pytest.mark.parametrize("rule", [{}, {"lamda": 2.0}, {"lamda": 2.0, "decay": 0.9}], ids=str)
def test_stages_are_their_own_number_of_updates_late(rule):
    inner = dc.dcasgd(0.1, 0.9, **{"lamda": 0.0, **rule}, store=None)
    tx = delay_gradients(inner, pipeline_delays(PARAMS, LAYERS, 3))
    expected = follow(**rule)
    assert_close(run(tx), expected)
    assert not rule or largest_gap(expected[-1], follow()[-1]) > 0.01


@pytest.mark.parametrize("velocity_decay", [0.0, 0.8])
@pytest.mark.parametrize("lamda", [0.0, 2.0])
def test_gradients_at_predicted_parameters(velocity_decay, lamda):
    delays = pipeline_delays(PARAMS, LAYERS, 3)
    inner = optax.chain(dc.dcasgd(0.1, 0.9, lamda, store=None), track_velocity(velocity_decay))
    actual = run(
        delay_gradients(inner, delays), lambda params, state: predict_params(params, state, delays)
    )
    expected = follow(lamda, velocity_decay=velocity_decay)
    assert_close(actual, expected)
    assert largest_gap(expected[-1], follow(lamda)[-1]) > 0.01


def test_with_the_last_update_a_constant_velocity_is_predicted_exactly():
    """Constant gradients without momentum: the parameters move by the same step every time."""
    tx = optax.chain(optax.sgd(0.5), track_velocity(0.0))
    params, trajectory = jnp.array([4.0, -1.0]), []
    state = tx.init(params)
    for _ in range(5):
        trajectory.append((params, predict_params(params, state, 2)))
        updates, state = tx.update(jnp.array([1.0, -2.0]), state, params)
        params = optax.apply_updates(params, updates)
    for t in range(1, 3):
        np.testing.assert_array_equal(trajectory[t][1], trajectory[t + 2][0])


def test_a_stage_without_delay_keeps_its_parameters():
    state = track_velocity().init(PARAMS)
    state = state._replace(velocity=jax.tree.map(lambda v: v + np.inf, state.velocity))
    predicted = predict_params(PARAMS, state, DELAYS)
    assert predicted["head"]["w"] is PARAMS["head"]["w"]
    assert np.isinf(predicted["embed"]["w"]).all()


def test_a_parameter_behind_a_mask_stays():
    """It gets no updates, so that where it is, is where it will be."""
    params = {"w": jnp.ones(2), "frozen": {"a": jnp.ones(3), "b": jnp.ones(())}}
    tx = optax.masked(
        optax.chain(optax.sgd(0.5), track_velocity(0.0)), {"w": True, "frozen": False}
    )
    _, state = tx.update(params, tx.init(params), params)
    predicted = predict_params(params, state, 2)
    np.testing.assert_allclose(predicted["w"], 0.0)
    assert jax.tree.all(jax.tree.map(operator.is_, predicted["frozen"], params["frozen"]))


def test_low_precision_is_averaged_in_float32_and_predicted_in_its_own():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = track_velocity(0.999)
    state = tx.init(params)
    for _ in range(5):
        updates, state = tx.update({"w": jnp.full(3, 0.5, jnp.bfloat16)}, state, params)
    assert updates["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(state.velocity["w"], 0.5 * (1 - 0.999**5), rtol=1e-5)
    assert predict_params(params, state, 3)["w"].dtype == jnp.bfloat16
    assert track_velocity(accumulator_dtype=jnp.bfloat16).init(params).velocity["w"].dtype == (
        jnp.bfloat16
    )


def test_an_update_that_is_none_counts_as_zero():
    tx = track_velocity(0.5)
    state = tx.init({"a": jnp.ones(2), "b": jnp.ones(1)})
    state = state._replace(velocity={"a": jnp.ones(2), "b": jnp.ones(1)})
    updates, state = tx.update({"a": None, "b": jnp.ones(1)}, state)
    assert updates["a"] is None
    np.testing.assert_array_equal(state.velocity["a"], 0.5)
    np.testing.assert_array_equal(state.velocity["b"], 1.0)


def test_a_parameter_that_is_none_has_no_velocity_and_a_subtree_without_updates_keeps_its_own():
    params = {"frozen": None, "a": {"w": jnp.ones(2), "b": jnp.ones(())}}
    tx = track_velocity(0.5)
    _, state = tx.update(params, tx.init(params), params)
    _, state = tx.update({"frozen": None, "a": None}, state, params)
    want = {"frozen": None, "a": {"w": np.full(2, 0.25), "b": np.float64(0.25)}}
    assert jax.tree.structure(state.velocity) == jax.tree.structure(want)
    assert_close(state.velocity, want)


# --- pipeline_delays ---


def test_layers_are_split_as_evenly_as_can_be():
    params = {f"block_{i}": {"w": 0.0, "b": 0.0} for i in range(7)}
    delays = pipeline_delays(params, list(params), 3)
    assert [delays[f"block_{i}"]["b"] for i in range(7)] == [2, 2, 2, 1, 1, 0, 0]
    assert set(jax.tree.leaves(pipeline_delays(params, list(params), 1))) == {0}
    assert pipeline_delays(PARAMS, LAYERS, 3) == {n: {"w": d} for n, d in DELAYS.items()}


def test_block_1_is_not_block_10():
    params = {f"block_{i}": 0.0 for i in range(12)}
    delays = pipeline_delays(params, [f"block_{i}" for i in range(12)], 12)
    assert delays == {f"block_{i}": 11 - i for i in range(12)}


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(3)])


def test_paths_of_an_nnx_state_and_of_nested_variables():
    params = nnx.state(Stack(nnx.Rngs(0)), nnx.Param)
    delays = pipeline_delays(params, ["embed", "blocks/0", "blocks/1", "blocks/2"], 2)
    state = delay_gradients(optax.sgd(0.1), delays).init(params)
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(state.params)) == {
        "embed": {"embedding": (1, 5, 4)},
        "blocks": {
            0: {"bias": (1, 4), "kernel": (1, 4, 4)},
            1: {"bias": optax.MaskedNode(), "kernel": optax.MaskedNode()},
            2: {"bias": optax.MaskedNode(), "kernel": optax.MaskedNode()},
        },
    }
    variables = {"params": {"a": 0.0, "b": [0.0, 0.0]}}
    assert pipeline_delays(variables, ["params/a", "params/b/0", "params/b/1"], 3) == {
        "params": {"a": 2, "b": [1, 0]}
    }


@pytest.mark.parametrize(
    ("layers", "num_stages", "error", "message"),
    [
        (LAYERS, 0, ValueError, "num_stages must be at least 1"),
        (LAYERS, 4, ValueError, "num_stages must be at most the number of layers, 3; got 4"),
        (LAYERS, 2.0, TypeError, "num_stages"),
        (LAYERS[:2], 2, ValueError, "'block_2/w' is in no layer"),
        ([*LAYERS, "block_9"], 2, ValueError, "'block_9', but params has no such path"),
        ([*LAYERS, "head"], 2, ValueError, r"layers\[3\] names 'head' a second time"),
        ([*LAYERS, "head/w"], 2, ValueError, "'head/w' is in two layers, 'head' and 'head/w'"),
        ([*LAYERS, 3], 2, TypeError, r"layers\[3\] must be a path"),
        ([*LAYERS, ("tail", 3)], 2, TypeError, r"layers\[3\] must be a path"),
        ([*LAYERS, ()], 2, TypeError, "layers must be a list of paths, with no empty tuple"),
        ("head", 2, TypeError, "layers must be a list of paths"),
    ],
)
def test_pipeline_delays_refuses(layers, num_stages, error, message):
    with pytest.raises(error, match=message):
        pipeline_delays(PARAMS, layers, num_stages)


# --- Bad input of the prediction ---


@pytest.mark.parametrize("num", [0, 2])
def test_the_state_must_hold_one_velocity(num):
    tx = optax.chain(optax.sgd(0.1), *[track_velocity()] * num)
    with pytest.raises(ValueError, match=f"it holds {num}. Put track_velocity"):
        predict_params(PARAMS, tx.init(PARAMS), 1)


@pytest.mark.parametrize(
    ("steps", "error", "message"),
    [
        (-1, ValueError, "steps must be finite and at least 0"),
        ({**DELAYS, "head": "late"}, TypeError, r"steps\['head'\] must be a number"),
        ({"embed": 1}, ValueError, "steps must be one value or a prefix tree"),
    ],
)
def test_predict_params_refuses(steps, error, message):
    with pytest.raises(error, match=message):
        predict_params(PARAMS, track_velocity().init(PARAMS), steps)


def test_track_velocity_refuses():
    with pytest.raises(ValueError, match="decay must be finite and at least 0 and below 1"):
        track_velocity(1.0)
    with pytest.raises(TypeError, match=r"params\['n'\] has dtype int32"):
        track_velocity().init({"n": jnp.arange(3)})
    state = track_velocity().init({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"updates\['w'\] has shape"):
        track_velocity().update({"w": jnp.ones(2)}, state)
