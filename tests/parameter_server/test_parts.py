"""The server's parts, each without Ray."""

import asyncio
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ray
from parameter_server_cases import PARTS_PARAMS as PARAMS
from ray._raylet import raise_sys_exit_with_custom_error_message

from optax_dcasgd.parameter_server import (
    _calls,
    _history,
    _metrics,
    _reasons,
    _settings,
    _worker,
)
from optax_dcasgd.parameter_server._book import Book, Push
from optax_dcasgd.parameter_server._transport import Layout

# Metrics.


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


# The server's book and its calls.


def book_with_dropped(batch, worker):
    book = Book(None)
    assert [book.pull(worker, None, is_alone=False) for _ in range(batch + 1)][-1] == (batch, None)
    book.drop(book.answered(worker))
    return book


@pytest.mark.parametrize(
    ("index", "is_alone", "chosen"),
    [
        (0, False, 6),  # it was too slow with batch 5
        (1, False, 5),
        (0, True, 5),  # nobody else is there, though others may be waited for
    ],
)
def test_a_dropped_batch_is_for_another_worker_if_there_is_one(index, is_alone, chosen):
    book = book_with_dropped(5, worker=0)
    assert book.pull(index, None, is_alone=is_alone).batch == chosen
    assert book.pull(1, None, is_alone=False).batch == {6: 5, 5: 6}[chosen]


@pytest.mark.parametrize(("num_workers", "most"), [(1, 2), (4, 4)])
def test_a_batch_over_which_more_workers_are_lost_than_there_are_is_refused(num_workers, most):
    book = Book(None)
    for _ in range(most):
        assert book.pull(0, None, is_alone=True).batch == 0
        assert book.lost(0, num_workers) is None
    assert book.pull(0, None, is_alone=True).batch == 0
    pull, reason = book.lost(0, num_workers)
    assert pull.task == (0, None)
    assert reason == f"{most + 1} workers were lost over batch 0"
    assert book.lost(0, num_workers) is None  # it has nothing to do
    assert book.pull(0, None, is_alone=True).batch == 1


def test_what_is_under_way_is_computed_again_after_a_restart():
    book = book_with_dropped(0, worker=0)
    for worker in (0, 1):
        book.pull(worker, None, is_alone=False)
    book.push(Push(book.answered(1), 0.0, 0.0, b""))
    book.pull(1, None, is_alone=False)
    restored = Book(None)
    restored.restore(book.to_save())
    assert [restored.pull(0, None, is_alone=False).batch for _ in range(4)] == [0, 1, 2, 3]


class Actor:
    """A worker's actor as `Calls` knows it; each call is an object."""

    def __init__(self):
        self.calls = []
        self.ready = self.gradient = self

    def options(self, max_task_retries):
        assert max_task_retries == -1
        return self

    def remote(self, *args):
        self.calls.append(args)
        return object()


@pytest.mark.parametrize(
    ("error", "is_gone"),
    [
        (ray.exceptions.ActorUnavailableError("it restarts", bytes(16)), False),
        (ray.exceptions.ActorDiedError(), True),
        (ray.exceptions.OutOfMemoryError("its node has too little memory"), True),
        (ray.exceptions.RuntimeEnvSetupError("no such package"), True),
    ],
)
def test_a_worker_that_does_not_come(error, is_gone, monkeypatch):
    """Ray is asked again if the worker may come back. A task that is lost is never sent again."""

    def get(ref):
        if answers:
            return answers.pop()
        raise error

    monkeypatch.setattr(ray, "wait", lambda refs, **_: (refs, []))
    monkeypatch.setattr(ray, "get", get)
    calls, actor, answers = _calls.Calls(), Actor(), []
    calls.start(0, actor)
    ((index, news),) = calls.wait(0.1)
    assert index == 0
    assert type(news) is (_calls.Gone if is_gone else _calls.Lost)
    assert news.reason == _reasons.one_line(error)
    assert actor.calls == [()] if is_gone else [(), ()]
    if is_gone:
        assert calls.wait(0.01) == []
        calls.start(0, actor)
    answers.append(None)
    assert calls.wait(0.1) == [(0, _calls.Ready())]
    calls.send(0, _worker.Task(7), b"params")
    ((_, news),) = calls.wait(0.1)
    assert type(news) is _calls.Lost  # in the middle of a task, whatever the error
    assert actor.calls[-2:] == [(7, None, b"params"), ()]


TASK_ERROR = ray.exceptions.RayTaskError(
    "gradient", "Traceback (most recent call last):\n  File ...\nMemoryError: no", MemoryError("no")
)


def test_a_fault_of_a_worker_itself_is_one_of_its_batch(monkeypatch):
    """And if it comes while the worker starts, the worker is gone, not started again and again."""

    def get(ref):
        raise TASK_ERROR

    monkeypatch.setattr(ray, "wait", lambda refs, **_: (refs, []))
    calls, actor = _calls.Calls(), Actor()
    calls.start(0, actor)
    monkeypatch.setattr(ray, "get", lambda ref: None)
    calls.wait(0.1)
    monkeypatch.setattr(ray, "get", get)
    calls.send(0, _worker.Task(7), b"params")
    assert calls.wait(0.1) == [(0, _worker.Refused("MemoryError: no"))]
    calls.start(1, actor)
    assert calls.wait(0.1) == [(1, _calls.Gone("MemoryError: no"))]
    assert calls.wait(0.01) == []


# Workers.


def make_worker(grad_fn, batches, params, transport_dtype=None):
    layout = Layout(params)
    sent = layout.cast(transport_dtype)
    return _worker.Worker(grad_fn, batches, jax.random.key(0), layout, layout, sent), layout


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (SystemExit(3), "SystemExit: 3"),
        (ValueError("\ud800"), "\\ud800"),
        (asyncio.CancelledError(), "CancelledError"),  # as data loaders raise
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit(), "GeneratorExit"),
    ],
)
def test_a_worker_survives_what_batches_raise(error, told):
    def batches(i):
        raise error

    worker, layout = make_worker(lambda *_: None, batches, PARAMS)
    worker.ready()
    refused = worker.gradient(7, None, layout.pack(jax.tree.leaves(PARAMS)))
    assert isinstance(refused, _worker.Refused)
    assert "failed on batch 7:\n" in refused.reason
    assert told in refused.reason


def test_a_worker_does_not_survive_what_ends_its_process():
    """Its batch is not at fault. On SIGTERM Ray raises this, wherever the worker is."""
    worker, layout = make_worker(
        lambda *_: None, lambda i: raise_sys_exit_with_custom_error_message("SIGTERM"), PARAMS
    )
    for call in (
        worker.ready,
        lambda: worker.gradient(7, None, layout.pack(jax.tree.leaves(PARAMS))),
    ):
        with pytest.raises(SystemExit):
            call()


def test_a_model_without_parameters():
    worker, layout = make_worker(lambda params, *_: (jnp.ones(()), params), lambda i: i, {})
    computed = worker.gradient(0, None, layout.pack([]))
    assert (computed.loss, computed.packed) == (1.0, b"")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 1, 150_000, -1])
def test_one_number_that_is_not_finite_is_found(bad, where):
    """In an array so large that the compiler splits its reduction."""
    grad = np.random.default_rng(0).normal(size=300_000).astype(np.float32)
    worker, layout = make_worker(
        lambda params, batch, key: (jnp.zeros(()), {"w": batch}), lambda i: grad, {"w": grad}
    )
    packed = layout.pack([grad])
    assert isinstance(worker.gradient(0, None, packed), _worker.Computed)
    grad[where] = bad
    told = "grads['w'] is not finite (batch 0)"
    assert worker.gradient(0, None, packed) == _worker.Refused(told, True)


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(jnp.float16, 65504), (jnp.bfloat16, 3.38e38), (jnp.float8_e4m3fn, 448)],
    ids=["float16", "bfloat16", "float8"],
)
def test_a_gradient_has_to_be_finite_as_it_is_sent(dtype, largest):
    """It may be before it is rounded, and infinite or NaN after that."""
    grads = {"a": np.ones(2, np.float32), "b": np.full(3, largest, np.float32)}

    def answer(dtype):
        worker, layout = make_worker(
            lambda params, batch, key: (jnp.zeros(()), {"a": params["a"], "b": batch}),
            lambda i: grads["b"],
            grads,
            dtype,
        )
        return worker.gradient(0, None, layout.pack(jax.tree.leaves(grads)))

    assert isinstance(answer(dtype), _worker.Computed)
    grads["b"][1] *= 1.005 if dtype == jnp.bfloat16 else 1.1
    name = np.dtype(dtype).name
    told = f"grads['b'] is not finite as {name}, the transport_dtype (batch 0)"
    assert answer(dtype) == _worker.Refused(told, True)
    grads["b"][1] = np.nan
    for sent in (dtype, jnp.float4_e2m1fn):  # the latter has no NaN
        assert answer(sent) == _worker.Refused("grads['b'] is not finite (batch 0)", True)


# Machines.


def test_actors_have_the_callers_defaults_but_not_what_has_no_value():
    sent = _settings.of_caller({"JAX_ENABLE_X64": "1"})
    assert "jax_enable_x64" not in sent  # the user has chosen
    assert _settings.of_caller({})["jax_enable_x64"] is False
    assert {*sent.values()}.isdisjoint({None, ""})


def test_how_long_ray_waits_for_a_machine():
    """As docs/parameter_server.md has it, in milliseconds and checks."""
    config = ray._raylet.Config
    assert config.health_check_timeout_ms() == 10_000
    assert config.health_check_period_ms() == 3_000
    assert config.health_check_failure_threshold() == 5
