"""How trees travel, and what the server does to the parameters; without Ray."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from parameter_server_cases import PARTS_PARAMS as PARAMS

from optax_dcasgd import add_delay_compensation, dcasgd, remember_params, scale_by_staleness
from optax_dcasgd.parameter_server._transport import Layout, from_raw, to_raw
from optax_dcasgd.parameter_server._update import Gradient, Update

TREES = {
    "small": {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": [np.float64(2.5)]},
    "empty leaves": {"a": np.zeros((0, 3), np.float32), "b": np.ones(1, np.int8), "c": None},
    "half": [np.arange(5).astype(jnp.bfloat16), np.arange(3).astype(np.float16)],
    "complex": (np.array([1 + 2j, 3], np.complex64),),
    "no leaves": {},
    "large": {"a": np.arange(20_000, dtype=np.float32), "b": np.ones(7, jnp.bfloat16)},
    "large, with a scalar": {"a": np.ones((300, 300), np.float64), "b": np.float32(3)},
}


@pytest.mark.parametrize("name", TREES)
def test_packed_and_unpacked(name):
    tree = jax.tree.map(np.asarray, TREES[name])
    layout = Layout(tree)
    assert layout.is_small != name.startswith("large")
    leaves = jax.tree.leaves(tree)
    packed = layout.pack(leaves)
    assert isinstance(packed, bytes) == layout.is_small
    unpacked = layout.unpack(packed)
    chex.assert_trees_all_equal(unpacked, leaves, strict=True)
    assert layout.difference("x", layout.treedef.unflatten(unpacked)) is None


def test_strided_leaves_are_packed_in_their_order():
    array = np.arange(12.0).reshape(3, 4).T
    layout = Layout([array])
    np.testing.assert_array_equal(layout.unpack(layout.pack([array]))[0], array)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": np.ones(3, "f4")}, "grads has another structure"),
        (
            {"a": np.ones(3, "f4"), "b": np.ones(2, "f4")},
            r"grads['b'] is float32[2], not float32[]",
        ),
        ({"a": np.ones(3, "f2"), "b": np.ones((), "f4")}, r"grads['a'] is float16[3], not flo"),
    ],
)
def test_what_does_not_fit_is_named(tree, message):
    layout = Layout({"a": np.ones(3, "f4"), "b": np.ones((), "f4")})
    assert message in layout.difference("grads", tree)


def test_only_wider_floats_are_narrowed():
    layout = Layout([np.ones(2, t) for t in ("f4", "f8", "i4", "c8", "f2")]).cast(jnp.bfloat16)
    assert [dtype.name for dtype in layout.dtypes] == [
        *("bfloat16", "bfloat16", "int32", "complex64", "float16"),
    ]


def test_random_keys_as_data():
    tree = {"key": jax.random.key(3, impl="rbg"), "x": jnp.ones(2)}
    like = jax.eval_shape(lambda: tree)
    for template in (tree, like):
        restored = from_raw(template, [np.asarray(x) for x in to_raw(tree)])
        assert jax.random.key_impl(restored["key"]) == "rbg"
        assert jax.random.normal(restored["key"]) == jax.random.normal(tree["key"])


# Updates.


def updater(tx, params=PARAMS):
    """The update, and what makes of a tree a gradient for it."""
    layout = Layout(jax.tree.map(np.asarray, params))

    def gradient(grads, version, worker=0, staleness=0):
        return Gradient(layout.pack(jax.tree.leaves(grads)), version, worker, staleness)

    return Update(tx, params, (layout, layout, layout)), gradient


def pushes(num, params=PARAMS):
    rng = np.random.default_rng(0)
    return [
        jax.tree.map(lambda x: rng.normal(size=np.shape(x)).astype(np.float32), params)
        for _ in range(num)
    ]


@pytest.fixture
def without_ray(monkeypatch):
    """What is put is what is got."""
    monkeypatch.setattr("ray.put", lambda packed: [np.array(x) for x in packed])
    monkeypatch.setattr("ray.get", lambda packed: packed)


LARGE = {**PARAMS, "large": np.ones(20_000, np.float32)}
BOTH_SIZES = pytest.mark.parametrize("params", [PARAMS, LARGE], ids=["small", "large"])


@BOTH_SIZES
@pytest.mark.usefixtures("without_ray")
def test_updates_are_algorithm_2(params):
    """Against float64, with stale parameters that are what was published."""
    update, gradient = updater(dcasgd(0.1, 0.9, 2.0, decay=0.9, store=None), params)
    optimizer = reference.DCASGD(lr=0.1, momentum=0.9, lamda=2.0, decay=0.9)
    versions, published = [reference.wide(params)], [update.publish(0)]
    for t, grads in enumerate(pushes(12, params=params)):
        version = max(0, t - t % 4)
        update.apply([gradient(grads, published[version], staleness=t - version)])
        published.append(update.publish(t + 1))
        change = optimizer(reference.wide(grads), w=versions[-1], w_s=versions[version])
        versions.append(reference.add(versions[-1], change))
    for got, want in zip(published, versions, strict=True):
        chex.assert_trees_all_close(reference.wide(got.params), want, rtol=1e-5, atol=1e-6)


TXS = {
    "dcasgd": dcasgd(0.1, 0.9, 2.0, decay=0.9, store=None),
    "Adam": optax.chain(add_delay_compensation(2.0, decay=None), optax.adam(0.1)),
    "by staleness": optax.chain(scale_by_staleness(), optax.sgd(0.1)),
    "by worker": remember_params(dcasgd(0.1, 0.9, 0.1, store=None), num_workers=3),
}


@BOTH_SIZES
@pytest.mark.parametrize("tx", TXS)
@pytest.mark.usefixtures("without_ray")
def test_several_at_once_are_one_by_one_to_the_bit(tx, params):
    """However the gradients that have come are grouped."""
    results = []
    for groups in ([1] * 20, [2, 3, 1, 8, 6], [20]):
        update, gradient = updater(TXS[tx], params)
        first, twenty = update.publish(0), enumerate(pushes(20, params=params))
        grads = [gradient(g, first, i % 3, i) for i, g in twenty]
        for size in groups:
            update.apply(grads[:size])
            del grads[:size]
        results.append((update.params_to_host(), update.state_to_host()))
    for other in results[1:]:
        chex.assert_trees_all_equal(results[0], other)
    assert not np.array_equal(results[0][0][0], jax.tree.leaves(params)[0])


def test_the_order_of_gradients_matters():
    """So that the test above would see a change of it."""
    finals = []
    for order in (1, -1):
        update, gradient = updater(TXS["dcasgd"])
        first = update.publish(0)
        update.apply([gradient(g, first) for g in pushes(3)[::order]])
        finals.append(update.params_to_host()[1])
    assert not np.array_equal(*finals)


def test_published_versions_do_not_change_with_later_updates():
    update, gradient = updater(optax.sgd(0.1))
    version = update.publish(0)
    before = jax.tree.map(np.array, version.params), bytes(version.message)
    for grads in pushes(5):
        update.apply([gradient(grads, version)])
    chex.assert_trees_all_equal(version.params, before[0])
    assert version.message == before[1] != update.publish(5).message


def test_compensation_is_relative_to_the_gradient():
    lamda, rate = 3.0, 0.3
    tx = optax.chain(
        add_delay_compensation(lamda, decay=None, clip=None), optax.sgd(rate, momentum=0.9)
    )
    update, gradient = updater(tx)
    first, (*earlier, grads) = update.publish(0), pushes(4)
    update.apply([gradient(g, first) for g in earlier])
    params = update.publish(3).params
    added = jax.tree.map(lambda g, w, s: lamda * g * g * (w - s), grads, params, PARAMS)
    got = update.compensation(gradient(grads, first))
    np.testing.assert_allclose(got, optax.tree.norm(added) / optax.tree.norm(grads), 1e-4)


def test_a_mean_is_one_update():
    update, gradient = updater(optax.sgd(0.1))
    version, grads = update.publish(0), pushes(3)
    update.apply_mean([gradient(g, version) for g in grads])
    want = jax.tree.map(lambda p, *g: p - 0.1 * sum(g) / 3, PARAMS, *grads)
    chex.assert_trees_all_close(update.publish(1).params, want, rtol=1e-6)


@pytest.mark.parametrize(
    "tx", [optax.contrib.prodigy(), optax.contrib.dog()], ids=["prodigy", "dog"]
)
def test_an_optimizer_that_keeps_the_parameters_it_was_made_with(tx):
    update, gradient = updater(tx)
    expected, state = PARAMS, tx.init(jax.tree.map(jnp.asarray, PARAMS))
    for grads in pushes(3):
        update.apply([gradient(grads, update.publish(0))])
        updates, state = tx.update(grads, state, expected)
        expected = optax.apply_updates(expected, updates)
    chex.assert_trees_all_close(update.publish(3).params, expected, rtol=1e-5)
