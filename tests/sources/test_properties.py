"""What sources hand to the optimizer inside, on arbitrary trees, bit for bit.

The optimizer inside notes what it is given, and steps against half the gradient.
"""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_bit_equal
from hypothesis import strategies as st
from property_cases import Pair, apply, cases, examples, initialise, leaves_of, signature

from optax_dcasgd import delay_gradients, remember_params

NUM_WORKERS = 3
# The indices that say who pushes may have any of these types.
INTEGERS = [int, np.int64, jnp.int32, lambda i: jnp.asarray(i, jnp.uint8)]


def noting(calls):
    def update(updates, state, params, **extra):
        calls.append((updates, extra))
        return jax.tree.map(lambda g: -g / 2, updates), state + 1

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), jnp.int32), update)


def check_call(call, tree, grads, at, age):
    """The optimizer inside was given these gradients, stale parameters and age, and no more."""
    updates, extra = call
    assert extra.keys() == {"stale_params", "staleness"}
    assert int(extra["staleness"]) == age
    assert_bit_equal(updates, tree.unflatten(grads))
    assert_bit_equal(extra["stale_params"], tree.unflatten(at))


@pytest.mark.parametrize("num_workers", [None, 1, NUM_WORKERS])
@hypothesis.given(case=cases({}), wider=st.booleans())
@examples(10)
def test_what_is_remembered_and_what_the_caller_says(num_workers, case, wider):
    x64, tree, _, data = case
    with jax.enable_x64(x64):
        calls = []
        tx = remember_params(noting(calls), num_workers=num_workers)
        params = data.params(tree)
        state = initialise(tx, tree.unflatten(params))
        kind = signature(state)
        # The parameters of the first call count, whatever init saw.
        params = data.params(tree) if num_workers is None else params
        backups, pulled_at = [params] * (num_workers or 1), [0] * (num_workers or 1)
        for t in range(6):
            grads, extra, i = data.grads(tree, wider=wider), {"other": t}, 0
            if num_workers:
                i = int(data.rng.integers(num_workers))
                extra["worker"] = INTEGERS[data.rng.integers(len(INTEGERS))](i)
            at, age = backups[i], (t - pulled_at[i] if num_workers else min(t, 1))
            said = {}
            if data.rng.random() < 0.3:  # each by itself wins over what is remembered
                at = data.perturbed(params)
                said["stale_params"] = tree.unflatten(at)
            if data.rng.random() < 0.3:
                age = said["staleness"] = 7
            updates, state = tx.update(
                tree.unflatten(grads), state, tree.unflatten(params), **extra, **said
            )
            assert signature(state) == kind
            assert state.inner_state == t + 1
            assert calls[-1][1].pop("other") == t
            assert calls[-1][1].pop("worker", None) is extra.get("worker")
            check_call(calls[-1], tree, grads, at, age)
            before, params = params, apply(params, leaves_of(tree, updates))
            # A worker goes on with the result of its own update; alone, one is an update late.
            backups[i], pulled_at[i] = (params if num_workers else before), t + 1


@hypothesis.given(case=cases({}), delay=st.integers(0, 3), wider=st.booleans())
@examples(25)
def test_a_uniform_delay_is_a_queue_in_front_of_the_optimizer(case, delay, wider):
    x64, tree, _, data = case
    with jax.enable_x64(x64):
        calls = []
        tx = delay_gradients(noting(calls), delay)
        params = data.params(tree)
        state = initialise(tx, tree.unflatten(params))
        kind = signature(state)
        queue = []
        for t in range(5):
            grads = data.grads(tree, wider=wider)
            updates, state = tx.update(tree.unflatten(grads), state, tree.unflatten(params))
            assert signature(state) == kind
            queue.append((queued(grads, params, delay), params))
            assert state.inner_state == max(t - delay + 1, 0)
            updates = leaves_of(tree, updates)
            if t < delay:
                assert_bit_equal(updates, [jnp.zeros_like(p) for p in params])
            else:
                due, at = queue[t - delay]
                check_call(calls[-1], tree, due, at, delay)
            params = apply(params, updates)


def queued(grads, params, delay):
    """Gradients as they are put into a queue: in their parameter's dtype, absent ones as zeros."""
    if not delay:
        return grads
    return [
        jnp.zeros_like(p) if g is None else g.astype(p.dtype)
        for g, p in zip(grads, params, strict=True)
    ]


@st.composite
def prefixes(draw, tree):
    """A tree of delays that is a prefix of the parameters, and the delay of each parameter."""
    delays = []

    def cut(node):
        if isinstance(node, float) or (node is not None and draw(st.integers(0, 3)) == 0):
            delay = draw(st.integers(0, 3))
            delays.extend([delay] * len(jax.tree.leaves(node)))
            return delay
        if node is None or isinstance(node, optax.MaskedNode):
            return node
        if isinstance(node, dict):
            return {key: cut(child) for key, child in node.items()}
        children = [cut(child) for child in node]
        return Pair(*children) if isinstance(node, Pair) else type(node)(children)

    return cut(tree.unflatten([0.0] * len(tree.specs))), delays


@hypothesis.given(case=cases({}), draw=st.data(), wider=st.booleans())
@examples(25)
def test_a_tree_of_delays_gives_every_parameter_its_own_queue(case, draw, wider):
    x64, tree, _, data = case
    prefix, delays = draw.draw(prefixes(tree))
    hypothesis.assume(not isinstance(prefix, int))
    with jax.enable_x64(x64):
        calls = []
        tx = delay_gradients(noting(calls), prefix)
        params = data.params(tree)
        state = initialise(tx, tree.unflatten(params))
        kind = signature(state)
        queues = [[] for _ in delays]
        for t in range(5):
            grads = data.grads(tree, wider=wider)
            updates, state = tx.update(tree.unflatten(grads), state, tree.unflatten(params))
            assert signature(state) == kind
            assert state.inner_state == t + 1
            updates = leaves_of(tree, updates)
            seen, extra = calls[-1]
            handed = leaves_of(tree, seen), leaves_of(tree, extra["stale_params"])
            rows = zip(queues, delays, *handed, updates, grads, params, strict=True)
            for queue, delay, due, at, update, g, w in rows:
                fresh = jnp.zeros_like(w) if g is None else g
                queue.append((fresh.astype(w.dtype) if delay else fresh, w))
                if len(queue) <= delay:
                    # The optimizer runs, on a zero gradient that is not stale.
                    assert_bit_equal((due, at, update), (jnp.zeros_like(w), w, jnp.zeros_like(w)))
                else:
                    assert_bit_equal((due, at), queue.pop(0))
                    assert_bit_equal(update, -due / 2)
            ages = tree.unflatten([int(age) for age in delays])
            assert jax.tree.leaves(extra["staleness"]) == jax.tree.leaves(ages)
            params = apply(params, updates)
