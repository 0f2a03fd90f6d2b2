"""`delay_gradients` against loops that really hold the old gradients and parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_dcasgd

_rng = np.random.default_rng(1)
PARAMS = {
    "first": {"w": jnp.asarray(_rng.normal(size=(3, 2)), jnp.float32)},
    "last": {"w": jnp.asarray(_rng.normal(size=(4,)), jnp.float32), "b": jnp.float32(0.3)},
}
INNERS = {
    "sgd": optax.sgd(0.3),
    "momentum": optax.sgd(0.1, 0.9),
    "adam": optax.adam(0.1),
    "dcasgd": optax_dcasgd.dcasgd(0.1, 0.9, 2.0),
    "DC-ASGD-a": optax_dcasgd.dcasgd(0.1, 0.9, 2.0, decay=0.95, store=None),
    "compensated adam": optax.chain(
        optax_dcasgd.add_delay_compensation(2.0, store=None), optax.adam(0.1)
    ),
    "scaled": optax.chain(optax_dcasgd.scale_by_staleness(0.5), optax.sgd(0.3)),
}


@jax.jit
def grads_at(params):
    return jax.grad(lambda p: sum(jnp.sum(jnp.sin(x) + 0.3 * x**2) for x in jax.tree.leaves(p)))(
        params
    )


def train(tx, num_updates, params=PARAMS, **extra_args):
    update = jax.jit(tx.update)
    state = tx.init(params)
    trajectory = [params]
    for _ in range(num_updates):
        updates, state = update(grads_at(params), state, params, **extra_args)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory, state


def assert_close(actual, expected, rtol=1e-6):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol, rtol), actual, expected)


def assert_bit_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("delay", [1, 2, 5])
@pytest.mark.parametrize("inner", INNERS)
def test_a_loop_that_holds_the_old_parameters(inner, delay):
    """The gradient at w_{t−d} is computed when it is applied, from a list of all parameters."""
    inner = INNERS[inner]
    actual, _ = train(optax_dcasgd.delay_gradients(inner, delay), 12 + delay)

    update = jax.jit(optax.with_extra_args_support(inner).update)
    history, state = [PARAMS] * (delay + 1), inner.init(PARAMS)
    for _ in range(12):
        stale = history[-1 - delay]
        updates, state = update(
            grads_at(stale), state, history[-1], stale_params=stale, staleness=delay
        )
        history.append(optax.apply_updates(history[-1], updates))
    assert_close(actual, history)


@pytest.mark.parametrize("inner", INNERS)
def test_a_delay_of_zero_is_the_inner_optimizer(inner):
    inner = INNERS[inner]
    extra_args = {"stale_params": PARAMS, "staleness": 1}
    actual = train(optax_dcasgd.delay_gradients(inner, 0), 6, **extra_args)
    expected = train(optax.with_extra_args_support(inner), 6, **extra_args)
    assert_bit_equal(actual, expected)


def test_until_the_history_is_full_nothing_happens():
    inner = optax_dcasgd.dcasgd(optax.linear_schedule(0.1, 0.2, 10), 0.9, decay=0.9)
    trajectory, state = train(optax_dcasgd.delay_gradients(inner, 3), 3)
    assert_bit_equal(trajectory, [PARAMS] * 4)
    assert_bit_equal(state.inner_state, inner.init(PARAMS))
    _, state = train(optax_dcasgd.delay_gradients(inner, 3), 4)
    assert state.inner_state.count == 1


def test_an_inner_state_with_a_random_key_is_left_alone_too():
    inner = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1))
    _, state = train(optax_dcasgd.delay_gradients(inner, 2), 2)
    expected = inner.init(PARAMS)
    assert_bit_equal(
        optax.tree.unwrap_random_key_data(state.inner_state),
        optax.tree.unwrap_random_key_data(expected),
    )


@pytest.mark.parametrize("inner", ["sgd", "momentum", "DC-ASGD-a", "compensated adam", "scaled"])
@pytest.mark.parametrize(
    "delay",
    [{"first": 3, "last": 1}, {"first": 2, "last": {"w": 0, "b": 1}}, {"first": 0, "last": 0}],
    ids=str,
)
def test_a_tree_of_delays_gives_each_leaf_its_own(inner, delay):
    inner = optax.with_extra_args_support(INNERS[inner])
    num_updates = 10
    actual, _ = train(optax_dcasgd.delay_gradients(inner, delay), num_updates)

    delays = jax.tree.map(lambda d, sub: jax.tree.map(lambda _: d, sub), delay, PARAMS)
    history, grads, state = [PARAMS], [], inner.init(PARAMS)
    update = jax.jit(inner.update)
    for t in range(num_updates):
        grads.append(grads_at(history[-1]))

        def due(d, *leaves, t=t):
            return leaves[t - d] if t >= d else jnp.zeros_like(leaves[0])

        def computed_at(d, *leaves, t=t):
            return leaves[t - d] if t >= d else leaves[t]

        updates, state = update(
            jax.tree.map(due, delays, *grads),
            state,
            history[-1],
            stale_params=jax.tree.map(computed_at, delays, *history),
            staleness=delays,
        )
        updates = jax.tree.map(
            lambda d, u, t=t: u if t >= d else jnp.zeros_like(u), delays, updates
        )
        history.append(optax.apply_updates(history[-1], updates))
    assert_close(actual, history)


def test_a_leaf_without_history_is_fresh_to_the_inner_optimizer():
    remember_stale_params = optax.GradientTransformationExtraArgs(
        lambda params: params,
        lambda updates, state, params, stale_params, **_: (updates, stale_params),
    )
    tx = optax_dcasgd.delay_gradients(remember_stale_params, {"first": 2, "last": 0})
    params, state = PARAMS, tx.init(PARAMS)
    for t in range(4):
        _, state = tx.update(PARAMS, state, params)
        expected = params["first"]["w"] - (2 if t >= 2 else 0)
        np.testing.assert_allclose(state.inner_state["first"]["w"], expected, 1e-6)
        assert_bit_equal(state.inner_state["last"], params["last"])
        params = jax.tree.map(lambda p: p + 1, params)


def test_a_tree_stores_only_what_each_leaf_needs():
    tx = optax_dcasgd.delay_gradients(optax.sgd(0.1), {"first": 3, "last": {"w": 1, "b": 0}})
    state = tx.init(PARAMS)
    for tree in (state.grads, state.params):
        assert tree["first"]["w"].shape == (3, 3, 2)
        assert tree["last"]["w"].shape == (1, 4)
        assert not jax.tree.leaves(tree["last"]["b"])


@pytest.mark.parametrize("inner", ["sgd", "DC-ASGD-a", "scaled"])
def test_delays_add_up(inner):
    """The parameters a gradient was computed at travel along with it through both rings."""
    inner = INNERS[inner]
    nested = optax_dcasgd.delay_gradients(optax_dcasgd.delay_gradients(inner, 2), 3)
    actual, _ = train(nested, 15)
    expected, _ = train(optax_dcasgd.delay_gradients(inner, 5), 15)
    assert_close(actual, expected)


def test_a_tree_around_a_tree_adds_leaf_by_leaf():
    inner = INNERS["scaled"]
    outer, middle = {"first": 1, "last": 2}, {"first": 2, "last": {"w": 0, "b": 1}}
    nested = optax_dcasgd.delay_gradients(optax_dcasgd.delay_gradients(inner, middle), outer)
    summed = optax_dcasgd.delay_gradients(inner, {"first": 3, "last": {"w": 2, "b": 3}})
    assert_close(train(nested, 12)[0], train(summed, 12)[0])


def test_one_update_old_is_what_dcasgd_remembers_by_itself():
    """MXNet's rule needs no stale_params when every gradient is exactly one update old."""
    told = optax_dcasgd.dcasgd(0.1, 0.9, 2.0, decay=0.95, store=None)
    expected, _ = train(optax_dcasgd.delay_gradients(told, 1), 12)

    for store in ("params", "updates"):
        tx = optax_dcasgd.dcasgd(0.1, 0.9, 2.0, decay=0.95, store=store)
        update = jax.jit(tx.update)
        params, state, history = PARAMS, tx.init(PARAMS), [PARAMS, PARAMS]
        for _ in range(11):
            updates, state = update(grads_at(history[-2]), state, params)
            params = optax.apply_updates(params, updates)
            history.append(params)
        assert_close(history, expected, rtol=2e-6)


@pytest.mark.parametrize(
    ("made_with", "used_with", "message"),
    [
        (2, 3, r"delay is 3, but .* made with a delay of 2 \(for params\['a'\]\)"),
        (3, 2, r"delay is 2, but .* made with a delay of 3 \(for params\['a'\]\)"),
        ({"a": 1, "b": 2}, {"a": 1, "b": 0}, r"delay is 0, .* a delay of 2 \(for params\['b'\]\)"),
        ({"a": 1, "b": 0}, {"a": 1, "b": 2}, r"delay is 2, .* a delay of 0 \(for params\['b'\]\)"),
    ],
)
def test_a_state_made_for_another_delay_is_refused(made_with, used_with, message):
    """In place of gradients in another order."""
    params = {"a": jnp.ones(2), "b": jnp.ones(())}
    state = optax_dcasgd.delay_gradients(optax.sgd(1.0), made_with).init(params)
    with pytest.raises(ValueError, match=message):
        optax_dcasgd.delay_gradients(optax.sgd(1.0), used_with).update(params, state, params)


def test_gradients_that_are_none_count_as_zero():
    tx = optax_dcasgd.delay_gradients(optax.sgd(0.1), 1)
    params = {"trained": jnp.ones(2), "frozen": jnp.ones(3)}
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update({"trained": jnp.ones(2), "frozen": None}, state, params)
    assert_bit_equal(updates, {"trained": jnp.full(2, -0.1), "frozen": jnp.zeros(3)})
