"""`delay_gradients` beside what the matrix and the properties show: compiled, nested, refused."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from common import assert_bit_equal, random_tree

from optax_dcasgd import delay_gradients, scale_by_staleness

PARAMS = random_tree(1, shapes={"first": {"w": (3, 2)}, "last": {"w": (4,), "b": ()}})


def grads_at(params):
    return jax.tree.map(lambda w: jnp.sin(w) + 0.3 * w, params)


def train(tx, num_updates):
    update = jax.jit(tx.update)
    params, state = PARAMS, tx.init(PARAMS)
    trajectory = [params]
    for _ in range(num_updates):
        updates, state = update(grads_at(params), state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory, state


def test_a_delay_of_zero_tells_the_inner_optimizer_so():
    calls = []

    def update(updates, state, params, **extra):
        calls.append(extra)
        return updates, state

    tx = delay_gradients(optax.GradientTransformationExtraArgs(lambda params: (), update), 0)
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, other=3)
    assert calls[0]["stale_params"] is PARAMS  # so that a rule knows it while tracing
    assert calls[0] == {"stale_params": PARAMS, "staleness": 0, "other": 3}
    elsewhere = random_tree(5, shapes=jax.tree.map(jnp.shape, PARAMS))
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, stale_params=elsewhere, staleness=4)
    assert_bit_equal(calls[1]["stale_params"], elsewhere)
    assert calls[1]["staleness"] == 4


def test_until_the_history_is_full_the_inner_optimizer_is_left_alone():
    """Also where its state holds a random key."""
    inner = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.adam(0.1))
    trajectory, state = train(delay_gradients(inner, 2), 2)
    assert_bit_equal(trajectory, [PARAMS] * 3)
    expected = inner.init(PARAMS)
    chex.assert_trees_all_equal(
        optax.tree.unwrap_random_key_data(state.inner_state),
        optax.tree.unwrap_random_key_data(expected),
    )
    _, state = train(delay_gradients(inner, 2), 3)
    assert state.inner_state[1][0].count == 1


def test_a_tree_stores_only_what_each_leaf_needs():
    tx = delay_gradients(optax.sgd(0.1), {"first": 3, "last": {"w": 1, "b": 0}})
    state = tx.init(PARAMS)
    for tree in (state.grads, state.params):
        assert tree["first"]["w"].shape == (3, 3, 2)
        assert tree["last"]["w"].shape == (1, 4)
        assert not jax.tree.leaves(tree["last"]["b"])


@pytest.mark.parametrize(
    ("outer", "middle", "total"),
    [
        ({"first": 1, "last": 2}, {"first": 2, "last": {"w": 0, "b": 1}}, (3, 2, 3)),
        ({"first": 1, "last": 2}, 1, (2, 3, 3)),
    ],
)
def test_delays_inside_a_tree_of_them_are_added_leaf_by_leaf(outer, middle, total):
    inner = optax.chain(scale_by_staleness(0.5), optax.sgd(0.3))
    nested = delay_gradients(delay_gradients(inner, middle), outer)
    first, w, b = total
    summed = delay_gradients(inner, {"first": first, "last": {"w": w, "b": b}})
    chex.assert_trees_all_close(train(nested, 7)[0], train(summed, 7)[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("made_with", "used_with", "message"),
    [
        ({"a": 1, "b": 2}, {"a": 1, "b": 0}, r"delay is 0, .* a delay of 2 \(for params\['b'\]\)"),
        ({"a": 1, "b": 0}, {"a": 1, "b": 2}, r"delay is 2, .* a delay of 0 \(for params\['b'\]\)"),
    ],
)
def test_a_state_made_for_another_delay_is_refused(made_with, used_with, message):
    """In place of gradients in another order."""
    params = {"a": jnp.ones(2), "b": jnp.ones(())}
    state = delay_gradients(optax.sgd(1.0), made_with).init(params)
    with pytest.raises(ValueError, match=message):
        delay_gradients(optax.sgd(1.0), used_with).update(params, state, params)
