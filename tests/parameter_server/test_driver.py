"""The driver, with actors that exist only here."""

import collections
import copy

import numpy as np
import pytest
import ray
from parameter_server_cases import PARTS_PARAMS as PARAMS
from parameter_server_runs import kinds

from optax_dcasgd.parameter_server import _driver, _history, _server
from optax_dcasgd.parameter_server._options import Options
from optax_dcasgd.parameter_server._transport import Layout

STATUS = _server.Status(
    **{"version": 1, "loss": 0.0, "staleness": 0.0, "events": [], "num_workers": 2},
    **{
        "wish": None,
        "retired": [],
        "gone": [],
        "starting": [],
        "took_part": {0, 1},
        "failure": None,
    },
)
OUT_OF_MEMORY = ray.exceptions.OutOfMemoryError("Task was killed due to the node running low")


class Actor:
    """A call of it is a function, which `ray.get` calls; what it answers is a list by method."""

    def __init__(self, answers=None):
        self.answers, self.is_alive = answers or collections.defaultdict(list), True
        self.calls = []

    def __getattr__(self, method):
        def remote(*args):
            self.calls.append((method, *map(copy.copy, args)))
            return lambda: self._answer(method)

        return type("Method", (), {"remote": staticmethod(remote)})

    def _answer(self, method):
        if not self.is_alive:
            raise ray.exceptions.ActorDiedError
        answer = self.answers[method].pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def healthy(**answers):
    """A server that has nothing left to do, but for these first answers."""
    rows = np.ones(1, _history.DTYPE)
    others = {"ready": [0], "advance": [STATUS], "save": [1], "result": [([], [], rows, [])]}
    return Actor({**others, "attach": [None] * 9, **answers})


@pytest.fixture
def start(monkeypatch, tmp_path):
    """A function that makes a driver of these servers, one after another."""

    def get(call, timeout=None):
        return call()

    def kill(actor):
        actor.is_alive = False

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", kill)
    monkeypatch.setattr(ray, "wait", lambda calls, **_: (calls, []))
    monkeypatch.setattr(_driver._resources, "too_many", lambda *_: None)
    workers = []

    def made(server):
        return server() if callable(server) else server

    def start(*servers, checkpoint_dir=str(tmp_path), **options):
        servers = list(servers)

        def make(cls, *_):
            if cls is _driver.Server:
                return lambda *rest: made(servers.pop(0))
            return lambda: workers.append(Actor()) or workers[-1]

        monkeypatch.setattr(_driver, "_maker", make)
        options = Options(
            **{"mode": "sync", "num_workers": 2, "num_updates": 1, "max_staleness": None},
            **{"on_stale": "wait", "checkpoint_every": 100, "compensation_every": None},
            **{"max_bad_pushes": 3, "name": None, "signature": [], **options},
            checkpoint_dir=checkpoint_dir,
        )
        of_worker = type("Parcel", (), {"contents": (None, None, None, Layout(PARAMS))})
        return _driver.Driver(of_worker, None, ((), ()), options, {}, {})

    return start


@pytest.mark.parametrize("method", ["ready", "advance", "save", "result"])
def test_a_server_that_rays_memory_monitor_kills_is_restarted(method, start):
    with start(healthy(**{method: [OUT_OF_MEMORY]}), healthy()) as driver:
        result = driver.train(progress=False)
    assert kinds(result) == {"server lost": 1}, result.events
    assert "OutOfMemoryError: Task was killed" in result.events[0].message


def test_a_server_that_is_killed_while_it_saves_before_an_error(start):
    server = healthy(advance=[STATUS._replace(failure="it is enough")], save=[OUT_OF_MEMORY])
    with start(server) as driver, pytest.raises(RuntimeError, match="it is enough"):
        driver.train(progress=False)
    (event,) = driver._events
    assert event.kind == "checkpoint failed"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OUT_OF_MEMORY, "The server died when it was started, and without checkpoint_dir .*Out"),
        (ray.exceptions.RuntimeEnvSetupError("no"), "The server could not be started: Runtime"),
        (ray.exceptions.ActorUnschedulableError("no"), "The server could not be started: Actor"),
    ],
)
def test_why_there_is_no_server(error, told, start):
    with (
        start(healthy(ready=[error]), checkpoint_dir=None) as driver,
        pytest.raises(RuntimeError, match=told),
    ):
        driver.train(progress=False)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_that_is_gone_is_made_anew_when_one_is_wished(num_workers, start):
    """And not before: it would be gone again, for ever. The number may be the same."""
    gone, other = STATUS._replace(version=0, gone=[0]), STATUS._replace(version=0)
    resized = other._replace(num_workers=num_workers)
    left = list(range(num_workers, 2))
    last = STATUS._replace(num_workers=num_workers, retired=left)
    server = healthy(advance=[gone, other, resized._replace(wish="this"), resized, last])
    with start(server) as driver:
        before = dict(driver._workers)
        driver.train(progress=False)
        assert driver._workers.keys() == set(range(num_workers))
        assert driver._workers[0] is not before[0]
    assert not any(worker.is_alive for worker in before.values())
    (attached,) = [call for call in server.calls if call[0] == "attach"]
    assert attached[2:] == (num_workers, "this")
    assert attached[1][1] is before[1]


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        ("The name mine (namespace=optax_dcasgd) is already taken. Please use", "^name='mine' is"),
        ("Invalid option keyword num_cpu", "^Invalid option keyword num_cpu"),
    ],
)
def test_only_rays_own_error_is_that_of_a_name_that_is_taken(raised, told, start):
    def fail(*_):
        raise ValueError(raised)

    with pytest.raises(ValueError, match=told):
        start(fail, name="mine")
