"""The parts of the parameter server that need no Ray cluster."""

import itertools
import random
import subprocess
import sys
import types
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from optax_dcasgd import add_delay_compensation, dcasgd, scale_by_staleness
from optax_dcasgd.parameter_server import (
    _bound,
    _checkpoint,
    _history,
    _metrics,
    _server,
    _worker,
)
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
    for got, want in zip(unpacked, leaves, strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        np.testing.assert_array_equal(got, want)
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


# The bound on staleness.


def can_all_be_applied(staleness, max_staleness):
    """Whether there is an order that keeps the bound, by trying all."""
    return any(
        all(tau + earlier <= max_staleness for earlier, tau in enumerate(order))
        for order in itertools.permutations(staleness)
    )


def test_the_bound_allows_exactly_what_can_be_kept():
    for size in range(5):
        for staleness in itertools.product(range(4), repeat=size):
            for limit in range(5):
                pulled = can_all_be_applied([*staleness, 0], limit)
                assert _bound.may_pull(list(staleness), limit) == pulled
                for i, tau in enumerate(staleness):
                    rest = [other + 1 for j, other in enumerate(staleness) if j != i]
                    if tau <= limit:
                        applied = can_all_be_applied(rest, limit)
                        assert _bound.may_apply(list(staleness), i, limit) == applied


@pytest.mark.parametrize("limit", [0, 1, 2, 5])
def test_nobody_waits_for_ever(limit):
    """Workers of random speed: the bound is kept, and there is always something to do."""
    draw = random.Random(limit)
    version, pulled, waiting, idle = 0, [], [], 6
    for _ in range(2000):
        while idle and _bound.may_pull([version - v for v in waiting + pulled], limit):
            pulled.append(version)
            idle -= 1
        assert pulled or waiting
        if pulled and draw.random() < 0.7:
            waiting.append(pulled.pop(draw.randrange(len(pulled))))
        while waiting:
            staleness = [version - v for v in waiting + pulled]
            may = [i for i in range(len(waiting)) if _bound.may_apply(staleness, i, limit)]
            if not may:
                assert pulled  # what it waits for is under way
                break
            assert version - waiting.pop(may[0]) <= limit
            version, idle = version + 1, idle + 1
    assert version > 200


# Updates.

PARAMS = {"w": np.linspace(-1, 1, 6, dtype=np.float32), "b": np.float32(0.5)}


def updater(tx, params=PARAMS):
    layout = Layout(jax.tree.map(np.asarray, params))
    return Update(tx, params, (layout, layout, layout)), layout


def pushes(num, seed=0, params=PARAMS):
    rng = np.random.default_rng(seed)
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


@pytest.mark.parametrize("params", [PARAMS, LARGE], ids=["small", "large"])
@pytest.mark.usefixtures("without_ray")
def test_updates_are_algorithm_2(params):
    """Against float64, with stale parameters that are what was published."""
    update, layout = updater(dcasgd(0.1, 0.9, 2.0, decay=0.9, store=None), params)
    optimizer = reference.DCASGD(lr=0.1, momentum=0.9, lamda=2.0, decay=0.9)
    versions, published = [reference.wide(params)], [update.publish(0)]
    for t, grads in enumerate(pushes(12, params=params)):
        version = max(0, t - t % 4)
        packed = layout.pack(jax.tree.leaves(grads))
        update.apply([Gradient(packed, published[version], 0, t - version)])
        published.append(update.publish(t + 1))
        change = optimizer(reference.wide(grads), w=versions[-1], w_s=versions[version])
        versions.append(reference.add(versions[-1], change))
    for got, want in zip(published, versions, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), got.params, want)


TXS = {
    "dcasgd": dcasgd(0.1, 0.9, 2.0, decay=0.9, store=None),
    "Adam": optax.chain(add_delay_compensation(2.0, clip=1.0, store=None), optax.adam(0.1)),
    "by staleness": optax.chain(scale_by_staleness(), optax.sgd(0.1)),
    "by worker": optax.chain(add_delay_compensation(0.1, num_workers=3), optax.sgd(0.1, 0.9)),
}


@pytest.mark.parametrize("params", [PARAMS, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("tx", TXS)
@pytest.mark.usefixtures("without_ray")
def test_several_at_once_are_one_by_one_to_the_bit(tx, params):
    """However the gradients that have come are grouped."""
    results = []
    for groups in ([1] * 20, [2, 3, 1, 8, 6], [20]):
        update, layout = updater(TXS[tx], params)
        first = update.publish(0)
        grads = [
            Gradient(layout.pack(jax.tree.leaves(g)), first, i % 3, i)
            for i, g in enumerate(pushes(20, params=params))
        ]
        for size in groups:
            update.apply(grads[:size])
            del grads[:size]
        results.append((update.params_to_host(), update.state_to_host()))
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)
    assert not np.array_equal(results[0][0][0], jax.tree.leaves(params)[0])


def test_the_order_of_gradients_matters():
    """So that the test above would see a change of it."""
    finals = []
    for order in (1, -1):
        update, layout = updater(TXS["dcasgd"])
        first = update.publish(0)
        packed = [layout.pack(jax.tree.leaves(g)) for g in pushes(3)]
        update.apply([Gradient(p, first, 0, i) for i, p in enumerate(packed[::order])])
        finals.append(update.params_to_host()[1])
    assert not np.array_equal(*finals)


def test_published_versions_do_not_change_with_later_updates():
    update, layout = updater(optax.sgd(0.1))
    version = update.publish(0)
    before = jax.tree.map(np.array, version.params), bytes(version.message)
    for grads in pushes(5):
        update.apply([Gradient(layout.pack(jax.tree.leaves(grads)), version, 0, 0)])
    jax.tree.map(np.testing.assert_array_equal, version.params, before[0])
    assert version.message == before[1] != update.publish(5).message


def test_compensation_is_relative_to_the_gradient():
    lamda, rate = 3.0, 0.3
    tx = optax.chain(add_delay_compensation(lamda, store=None), optax.sgd(rate, momentum=0.9))
    update, layout = updater(tx)
    first = update.publish(0)
    packed = [layout.pack(jax.tree.leaves(grads)) for grads in pushes(4)]
    update.apply([Gradient(p, first, 0, i) for i, p in enumerate(packed[:3])])
    params, grads = update.publish(3).params, pushes(4)[3]
    added = jax.tree.map(lambda g, w, s: lamda * g * g * (w - s), grads, params, PARAMS)
    got = update.compensation(Gradient(packed[3], first, 0, 3))
    np.testing.assert_allclose(got, optax.tree.norm(added) / optax.tree.norm(grads), 1e-4)


def test_a_mean_is_one_update():
    update, layout = updater(optax.sgd(0.1))
    version, grads = update.publish(0), pushes(3)
    update.apply_mean([Gradient(layout.pack(jax.tree.leaves(g)), version, 0, 0) for g in grads])
    want = jax.tree.map(lambda p, *g: p - 0.1 * sum(g) / 3, PARAMS, *grads)
    for got, leaf in zip(update.params_to_host(), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, leaf, 1e-6)


# Checkpoints.


def snapshot(version, params, state):
    rows = np.zeros(version, _history.DTYPE)
    rows["loss"] = np.arange(version)
    meta = {
        "signature": ["lines"],
        "history": {name: rows.dtype[name].str for name in _history.History._fields},
        "next_batch": 7,
    }
    return _checkpoint.Snapshot(params, state, _history.to_columns(rows)._asdict(), meta)


@pytest.mark.parametrize("version", [0, 5])
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_saved_and_loaded(version, tmp_path):
    params = [np.arange(3.0), np.zeros((0, 2), np.float32), np.float32(2)]
    state = [np.array([1, 2], np.uint32), np.ones(2, jnp.bfloat16), np.zeros(0, np.int32)]
    checkpoints = _checkpoint.Checkpoints(str(tmp_path))
    assert checkpoints.latest() is None
    checkpoints.save(version, snapshot(version, params, state))
    checkpoints.wait()
    assert checkpoints.latest() == version
    loaded = checkpoints.load(version, params, state)
    checkpoints.close()
    for got, want in zip(loaded.params + loaded.state, params + state, strict=True):
        assert got.dtype == np.asarray(want).dtype
        np.testing.assert_array_equal(got, want)
    assert loaded.meta["next_batch"] == 7
    if version:
        np.testing.assert_array_equal(loaded.history["loss"], np.arange(version))
        rows = _history.to_rows(loaded.history)
        assert rows.dtype == _history.DTYPE


FULL = """
import resource, sys
import numpy as np
from optax_dcasgd.parameter_server import _checkpoint
checkpoints = _checkpoint.Checkpoints(sys.argv[1])
params = [np.random.default_rng(0).normal(size=100_000)]
snapshot = _checkpoint.Snapshot(params, [], {"loss": np.zeros(1)}, {"history": {"loss": "<f8"}})
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # as if the disk were full
checkpoints.save(1, snapshot)
assert checkpoints.settle() is not None
assert checkpoints.latest() is None
resource.setrlimit(resource.RLIMIT_FSIZE, before)
checkpoints.save(1, snapshot)
assert checkpoints.settle() is None
assert checkpoints.latest() == 1
np.testing.assert_array_equal(checkpoints.load(1, params, []).params[0], params[0])
checkpoints.close()
print("as it should")
"""


def test_a_checkpoint_is_written_though_the_one_before_failed(tmp_path):
    """In a process of its own, for what Orbax's threads leave behind then."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "as it should" in done.stdout, done.stderr[-3000:]


def test_a_failed_checkpoint_does_not_keep_the_next_from_being_written(tmp_path, monkeypatch):
    checkpoints = _checkpoint.Checkpoints(str(tmp_path))
    params = [np.ones(3)]
    checkpoints.save(1, snapshot(1, params, []))
    wait, failures = checkpoints.wait, [OSError("full")]

    def fail_once():
        wait()
        if failures:
            raise failures.pop()

    monkeypatch.setattr(checkpoints, "wait", fail_once)
    with pytest.raises(OSError, match="full"):
        checkpoints.save(2, snapshot(2, params, []))
    checkpoints.wait()
    assert checkpoints.latest() == 2
    checkpoints.close()


class _Recorded:
    """In the place of one of Ray's metrics: what it was told, by name."""

    told: ClassVar[dict] = {}

    def __init__(self, name, description, tag_keys):
        assert description
        self._name, self._keys, self._tags = name, tag_keys, {}

    def set_default_tags(self, tags):
        self._tags = tags

    def _tell(self, value, tags=None):
        tags = self._tags | (tags or {})
        assert tags.keys() == set(self._keys)
        self.told.setdefault(self._name, []).append((value, tags))

    inc = set = _tell


def test_what_rays_metrics_are_told(monkeypatch):
    monkeypatch.setattr(_metrics.metrics, "Counter", _Recorded)
    monkeypatch.setattr(_metrics.metrics, "Gauge", _Recorded)
    monkeypatch.setattr(_Recorded, "told", {})
    rows = np.zeros(3, _history.DTYPE)
    rows["loss"], rows["staleness"] = [1, 2, 6], [0, 1, 2]
    run = _metrics.Metrics("mine")
    run.updates(rows)
    run.updates(rows[:0])
    run.event("dropped")
    assert _Recorded.told == {
        "optax_dcasgd_updates": [(3, {"run": "mine"})],
        "optax_dcasgd_loss": [(3.0, {"run": "mine"})],
        "optax_dcasgd_staleness": [(1.0, {"run": "mine"})],
        "optax_dcasgd_events": [(1, {"run": "mine", "kind": "dropped"})],
    }


def test_who_is_missing_is_said_while_nothing_happens(monkeypatch):
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    for metric in ("Counter", "Gauge"):
        monkeypatch.setattr(_metrics.metrics, metric, _Recorded)
    layout = Layout(PARAMS)
    options = _server.Options(
        mode="async",
        num_workers=2,
        num_updates=10,
        max_staleness=None,
        on_stale="wait",
        checkpoint_dir=None,
        checkpoint_every=100,
        compensation_every=None,
        max_bad_pushes=0,
        name=None,
        signature=[],
    )
    server = _server.Server(optax.sgd(0.1), PARAMS, (layout, layout, layout), options, {})
    server._workers = {0, 1}
    server._present.add(1)
    assert not server.advance(0.2).events  # not yet
    monkeypatch.setattr(_server, "_PATIENCE", 0.0)
    event, *_ = server.advance(0.2).events
    assert event.kind == "waiting"
    assert "not started: [0]; that are computing: none" in event.message
    server.close()


def test_a_worker_survives_what_batches_raise():
    layout = Layout(PARAMS)
    for error, told in ((SystemExit(3), "SystemExit: 3"), (ValueError("\ud800"), "\\ud800")):

        def batches(i, error=error):
            raise error

        worker = _worker.Worker(lambda *_: None, batches, jax.random.key(0), *[layout] * 3)
        worker.ready()
        header, reason = worker.gradient(
            _worker.TASK.pack(7, 0) + layout.pack(jax.tree.leaves(PARAMS))
        )
        assert not _worker.RESULT.unpack(header)[0]
        assert "failed on batch 7:\n" in reason.decode()
        assert told in reason.decode()


def test_a_model_without_parameters():
    layout = Layout({})
    worker = _worker.Worker(
        lambda params, batch, key: (jnp.ones(()), params),
        lambda i: i,
        jax.random.key(0),
        *[layout] * 3,
    )
    header, packed = worker.gradient(_worker.TASK.pack(0, 0) + layout.pack([]))
    assert _worker.RESULT.unpack(header)[:2] == (True, 1.0)
    assert packed == b""


@pytest.mark.parametrize(
    "tx", [optax.contrib.prodigy(), optax.contrib.dog()], ids=["prodigy", "dog"]
)
def test_an_optimizer_that_keeps_the_parameters_it_was_made_with(tx):
    update, layout = updater(tx)
    expected, state = PARAMS, tx.init(jax.tree.map(jnp.asarray, PARAMS))
    for grads in pushes(3):
        packed = layout.pack(jax.tree.leaves(grads))
        update.apply([Gradient(packed, update.publish(0), 0, 0)])
        updates, state = tx.update(grads, state, expected)
        expected = optax.apply_updates(expected, updates)
    for got, want in zip(update.params_to_host(), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 1, 150_000, -1])
def test_one_number_that_is_not_finite_is_found(bad, where):
    """In an array so large that the compiler splits its reduction."""
    grad = np.random.default_rng(0).normal(size=300_000).astype(np.float32)
    layout = Layout({"w": grad})
    one = _worker.Worker(
        lambda params, batch, key: (jnp.zeros(()), {"w": batch}),
        lambda i: grad,
        jax.random.key(0),
        *(layout, layout, layout),
    )
    task, packed = _worker.TASK.pack(0, 0), layout.pack([grad])
    header, _ = one.gradient(task, packed)
    assert _worker.RESULT.unpack(header)[0]
    grad[where] = bad
    header, reason = one.gradient(task, packed)
    assert not _worker.RESULT.unpack(header)[0]
    assert reason == b"grads['w'] is not finite (batch 0)"


@pytest.mark.parametrize(
    ("index", "present", "chosen"),
    [
        (0, {0, 1}, 7),  # it was too slow with batch 5
        (1, {0, 1}, 5),
        (0, {0}, 5),  # nobody else is there, though others may be waited for
    ],
)
def test_a_dropped_batch_is_for_another_worker_if_there_is_one(index, present, chosen):
    server = types.SimpleNamespace(_again={5: 0}, _present=present, _next_batch=7)
    assert _server.Server._choose_batch(server, index) == chosen
    assert server._again == ({5: 0} if chosen == 7 else {})
    assert server._next_batch == (8 if chosen == 7 else 7)
