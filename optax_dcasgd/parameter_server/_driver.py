"""The driver, which runs where `train` is called: it starts the actors and restarts what died."""

import collections
import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray

from optax_dcasgd.parameter_server import _checkpoint, _history, _resources, _settings
from optax_dcasgd.parameter_server._actors import Server, Worker
from optax_dcasgd.parameter_server._calls import ENDED, NOT_STARTED
from optax_dcasgd.parameter_server._history import Event, Result
from optax_dcasgd.parameter_server._options import Options
from optax_dcasgd.parameter_server._reasons import one_line
from optax_dcasgd.parameter_server._server import Status
from optax_dcasgd.parameter_server._transport import from_raw
from optax_dcasgd.parameter_server._travel import Parcel

NAMESPACE = "optax_dcasgd"  # of the server's name, in Ray
_REPORT_EVERY = 0.5  # seconds
_KILL_TIMEOUT = 2.0  # seconds
_MAX_DEATHS = 3  # of the server, without a new checkpoint between them
_PATIENCE = 60.0  # seconds that an actor may take to start before it is mentioned
_LARGE = {
    # On Linux glibc asks for large pages. Each gradient is written to new memory, and to get it in
    # pages of 4 KiB can take longer than to write it.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
_log = logging.getLogger("optax_dcasgd.parameter_server")


class Driver:
    """Owns the actors of one run, and all that a new server has to know of them."""

    def __init__(
        self,
        of_worker: Parcel,  # grad_fn, batches, key, and the three layouts
        of_server: Parcel,  # the optimizer, the parameters, and the layouts
        like: tuple[Any, Any],  # parameters and optimizer state, or their shapes
        options: Options,
        worker_options: Mapping[str, Any],
        server_options: Mapping[str, Any],
    ):
        self._options, self._like = options, like
        self._worker_options, self._server_options = worker_options, server_options
        self._events: list[Event] = []
        self._num_dropped: collections.Counter[int | None] = collections.Counter()  # by worker
        self._workers: dict[int, Any] = {}
        self._gone: set[int] = set()  # workers that would not start, or end, another time
        self._waiting: dict[int, float] = {}  # since when, for each worker not mentioned yet
        self._took_part: set[int] = set()
        self._wished = options.num_workers
        self._version = 0
        self._bar: Any = None
        self._is_up = False  # the server
        self._deaths, self._saved = 0, -1  # of the server, without a newer checkpoint than that
        environment = {} if of_worker.contents[3].is_small else _LARGE
        spread = {"scheduling_strategy": "SPREAD", "max_restarts": -1}
        self._new_worker = _maker(Worker, of_worker, {**spread, **worker_options}, environment)
        named = {} if options.name is None else {"name": options.name, "namespace": NAMESPACE}
        # The driver restarts it: it alone knows which workers there are, and what has happened.
        by_driver = {"max_restarts": 0, **named}
        self._new_server = _maker(Server, of_server, {**server_options, **by_driver}, environment)
        try:
            self._make_workers(options.num_workers)
            self._start_server()
        except BaseException as error:
            for worker in self._workers.values():
                ray.kill(worker)
            if isinstance(error, ValueError) and "already taken" in str(error):  # from Ray
                raise ValueError(f"name={options.name!r} is that of a run under way.") from error
            raise

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._kill_server()
        for worker in self._workers.values():
            ray.kill(worker)

    # The server.

    def _start_server(self) -> None:
        options = dataclasses.replace(self._options, num_workers=self._wished)
        self._server = self._new_server(options, self._workers)
        self._waiting.update(dict.fromkeys(self._waiting, time.monotonic()))

    def _kill_server(self) -> None:
        """Until it is gone: it would report the workers' ends as faults."""
        self._is_up = False
        ray.kill(self._server)
        with contextlib.suppress(ray.exceptions.RayError):
            while True:
                ray.get(self._server.ready.remote(), timeout=_KILL_TIMEOUT)

    def _wait_for_server(self) -> None:
        ready = self._server.ready.remote()
        while not ray.wait([ready], timeout=_PATIENCE)[0]:
            why = _resources.why_it_waits(self._server_options)
            self._note("waiting", f"the server has not started for {_PATIENCE:.0f} s: {why}")
        self._version = ray.get(ready)
        self._is_up = True
        if self._version > self._saved:
            self._deaths, self._saved = 0, self._version

    def _restart(self, error: ray.exceptions.RayError) -> None:
        """Starts a new server in the place of one that has died, or cannot be reached."""
        reason, was_up = one_line(error), self._is_up
        self._kill_server()
        if isinstance(error, NOT_STARTED) or getattr(error, "actor_init_failed", False):
            raise RuntimeError(f"The server could not be started: {reason}") from None
        if self._options.checkpoint_dir is None:
            when = f"after about {self._version} updates" if was_up else "when it was started"
            raise RuntimeError(
                f"The server died {when}, and without checkpoint_dir there is nothing to go on "
                f"from: {reason}"
            ) from None
        self._deaths += 1
        if self._deaths == _MAX_DEATHS:
            raise RuntimeError(
                f"The server died {self._deaths} times without a new checkpoint, the last time "
                f"after about {self._version} updates: {reason}"
            ) from None
        self._note("server lost", f"after at least {self._version} updates: {reason}")
        self._start_server()

    # The workers.

    def _make_workers(self, num_workers: int) -> None:
        new = sorted(set(range(num_workers)) - self._workers.keys() - self._gone)
        if new and (message := _resources.too_many(num_workers, self._worker_options)):
            self._note("many workers", message)
        for index in new:
            self._workers[index] = self._new_worker()
            self._waiting[index] = time.monotonic()

    def _heed(self, status: Status) -> None:
        """Does what the server cannot do, and says what it has to say."""
        self._version = status.version
        self._took_part.update(status.took_part)
        for event in status.events:
            self._event(event)
        self._gone.update(status.gone)
        for index in [*status.retired, *status.gone]:
            ray.kill(self._workers.pop(index))
            self._waiting.pop(index, None)
        self._wished = status.num_workers
        if status.wish is not None:
            self._gone.clear()  # these are made anew
        if status.wish is not None or self._wished > len(self._workers.keys() | self._gone):
            self._make_workers(self._wished)
            ray.get(self._server.attach.remote(self._workers, self._wished, status.wish))
        self._mention(status.starting)
        if self._bar is not None:
            self._bar.update(status.version - self._bar.n)
            if not math.isnan(status.loss):
                of = {"loss": f"{status.loss:.4g}", "staleness": f"{status.staleness:.1f}"}
                self._bar.set_postfix(of)

    def _mention(self, starting: list[int]) -> None:
        """Says once of each worker that it takes long to start."""
        now = time.monotonic()
        late = [i for i in starting if now - self._waiting.get(i, now) > _PATIENCE]
        if late:
            for index in late:
                del self._waiting[index]
            why = _resources.why_it_waits(self._worker_options)
            self._note("waiting", f"workers {late} have not started for {_PATIENCE:.0f} s: {why}")

    # Training.

    def train(self, progress: bool) -> Result:
        """Trains until all updates are done. Whatever ends it, the updates so far are saved."""
        try:
            while True:
                try:
                    return self._result(*self._train(progress))
                except ENDED as error:
                    self._restart(error)
        except BaseException as error:
            if self._is_up and self._options.checkpoint_dir is not None:
                self._save_before(error)
            raise
        finally:
            if self._bar is not None:
                self._bar.close()

    def _train(self, progress: bool) -> tuple[Any, ...]:
        """Lets the server train until all updates are done; ends with it if it dies."""
        self._wait_for_server()
        if progress and self._bar is None:
            self._bar = _bar(self._options.num_updates, self._version)
        while True:
            status = ray.get(self._server.advance.remote(_REPORT_EVERY))
            self._heed(status)
            if status.failure is not None:
                raise RuntimeError(status.failure)
            if status.version >= self._options.num_updates:
                self._save()
                result: tuple[Any, ...] = ray.get(self._server.result.remote())
                return result

    def _save_before(self, error: BaseException) -> None:
        """Saves the updates so far, before the error ends the run."""
        try:
            version = self._save()
        except ENDED as death:
            version = None
            self._note("checkpoint failed", one_line(death))
        if version is not None:
            by = "Stopped by an error" if isinstance(error, Exception) else "Interrupted"
            _log.warning("%s; a checkpoint of %d updates was written.", by, version)

    def _save(self) -> int | None:
        """Has a checkpoint written, and returns its version; a failure is an event."""
        try:
            version: int | None = ray.get(self._server.save.remote())
        except ENDED:
            raise
        except Exception as error:
            # TensorStore's are long, and Ray's own are the whole traceback.
            self._note("checkpoint failed", _checkpoint.reason(getattr(error, "cause", error)))
            return None
        return version

    def _note(self, kind: str, message: str) -> None:
        self._event(Event(time.time(), kind, None, message))

    def _event(self, event: Event) -> None:
        self._events.append(event)
        who = "" if event.worker is None else f" (worker {event.worker})"
        if event.kind == "dropped":  # a slow worker may have all its gradients dropped
            self._num_dropped[event.worker] += 1
            num = self._num_dropped[event.worker]
            if num & (num - 1):  # not 1, 2, 4, 8, ...
                return
            who += f", {num} by now"
        _log.warning("%s%s: %s", event.kind, who, event.message)

    def _result(self, params: Any, state: Any, rows: np.ndarray, events: list[Event]) -> Result:
        for event in events:
            self._event(event)
        if 0 < len(self._took_part) < self._wished:  # 0 if there was nothing left to do
            _log.warning("%d of %d workers took part.", len(self._took_part), self._wished)
        history = _history.to_columns(rows)
        in_rounds, arrivals = self._options.local_steps.given is not None, None
        if self._options.mode == "async":
            num_workers = self._options.num_workers
            arrivals = _history.to_arrivals(history, num_workers, in_rounds=in_rounds)
        result = Result(
            from_raw(self._like[0], params),
            from_raw(self._like[1], state),
            history,
            arrivals,
            tuple(self._events),
            tuple(sorted(self._took_part)),
        )
        for straggler in result.stragglers():
            _log.warning(
                "worker %d takes %.3g s for a batch, %.1f times as long as the others.",
                *straggler,
            )
        return result


def _maker(cls: Any, parcel: Parcel, options: Mapping[str, Any], environment: Any) -> Any:
    """A function that makes an actor of a class, given the other arguments of its constructor."""
    runtime_env = options.get("runtime_env") or {}
    variables = runtime_env.get("env_vars", {})  # of the user, which go before
    runtime_env = {**runtime_env, "env_vars": {**environment, **variables}}
    actor = ray.remote(cls).options(
        **{"enable_task_events": False, **options, "runtime_env": runtime_env}
    )
    # Put once, however many actors there are; and kept, since a restart needs it again.
    arguments = _settings.of_caller(variables), [ray.put(parcel)]
    return lambda *rest: actor.remote(*arguments, *rest)


def _bar(total: int, done: int) -> Any:
    """A progress bar, or None without tqdm."""
    try:
        import tqdm
    except ImportError:
        return None
    return tqdm.tqdm(total=total, initial=done, unit="push")
