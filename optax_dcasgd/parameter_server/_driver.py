"""The driver, which runs where `train` is called: it starts the actors and restarts what died."""

import collections
import contextlib
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
import ray

from optax_dcasgd.parameter_server import _checkpoint, _history
from optax_dcasgd.parameter_server._history import Event, Result
from optax_dcasgd.parameter_server._server import Options, Server
from optax_dcasgd.parameter_server._transport import from_raw
from optax_dcasgd.parameter_server._worker import Worker

NAMESPACE = "optax_dcasgd"  # of the server's name, in Ray
_REPORT_EVERY = 0.5  # seconds
_KILL_TIMEOUT = 2.0  # seconds
_MAX_DEATHS = 3  # of the server, without training between them
_LARGE = {
    # On Linux glibc asks for large pages. Each gradient is written to new memory, and to get it in
    # pages of 4 KiB can take longer than to write it.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
_log = logging.getLogger("optax_dcasgd.parameter_server")


def _environment() -> dict[str, str]:
    """Settings of JAX: an actor has to compute with the same numbers as the caller."""
    same = ("jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable")
    return {
        # An actor waits for each result at once, so a thread for dispatch only costs time.
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false",
        **{name.upper(): str(getattr(jax.config, name)).lower() for name in same},
    }


class Driver:
    """Owns the actors of one run."""

    def __init__(
        self,
        worker_args: tuple[Any, ...],
        tx: optax.GradientTransformation,
        params: Any,
        options: Options,
        worker_options: Mapping[str, Any],
        server_options: Mapping[str, Any],
    ):
        self._options, self._params = options, params
        self._events: list[Event] = []
        self._num_dropped: collections.Counter[int | None] = collections.Counter()  # by worker
        self._workers: dict[int, Any] = {}
        self._version = 0
        self._wished = options.num_workers
        self._state_like = jax.eval_shape(tx.init, params)
        usual = {"max_restarts": -1, "enable_task_events": False}
        environment = {**_environment(), **({} if worker_args[3].is_small else _LARGE)}
        worker_options, server_options = (
            {**usual, **of_actor, "runtime_env": _add_to_runtime_env(of_actor, environment)}
            for of_actor in (worker_options, server_options)
        )
        spread = {"scheduling_strategy": "SPREAD"}
        self._worker_class = ray.remote(Worker).options(**{**spread, **worker_options})
        # Put once, however many workers there are; and kept, since a restart needs them again.
        self._worker_args = [ray.put(arg) for arg in worker_args]
        # Without checkpoints there is nothing to restart from.
        named = {} if options.name is None else {"name": options.name, "namespace": NAMESPACE}
        restarts = {"max_restarts": 0 if options.checkpoint_dir is None else -1}
        host_params = jax.tree.map(np.asarray, params)
        server_class = ray.remote(Server).options(**{**server_options, **restarts, **named})
        self._server_args = [ray.put(tx), ray.put(host_params)]
        try:
            self._make_workers(options.num_workers)
            self._server: Any = server_class.remote(
                *self._server_args, worker_args[3:], options, self._workers
            )
        except BaseException as error:
            for worker in self._workers.values():
                ray.kill(worker)
            if isinstance(error, ValueError) and options.name is not None:  # from Ray
                raise ValueError(f"name={options.name!r} is that of a run under way.") from error
            raise

    def _ask(self, method: str, *args: Any) -> Any:
        """Calls the server; again, if it has to be restarted before it answers."""
        retries = 0 if self._options.checkpoint_dir is None else -1
        call = getattr(self._server, method).options(max_task_retries=retries)
        return ray.get(call.remote(*args))

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        ray.kill(self._server)
        # Until it is gone: it would report the workers' ends as faults.
        with contextlib.suppress(ray.exceptions.RayError):
            while True:
                ray.get(self._server.ready.remote(), timeout=_KILL_TIMEOUT)
        for worker in self._workers.values():
            ray.kill(worker)

    def _make_workers(self, num_workers: int) -> None:
        for index in range(num_workers):
            if index not in self._workers:
                self._workers[index] = self._worker_class.remote(*self._worker_args)

    def train(self, progress: bool) -> None:
        """Lets the server train until all updates are done."""
        self._version = self._ask("ready")
        bar = _bar(self._options.num_updates, self._version) if progress else None
        try:
            while True:
                status = self._advance()
                self._version = status.version
                if bar is not None:
                    bar.update(status.version - bar.n)
                    if not math.isnan(status.loss):
                        bar.set_postfix(
                            loss=f"{status.loss:.4g}", staleness=f"{status.staleness:.1f}"
                        )
                if status.failure is not None:
                    self._save()
                    raise RuntimeError(status.failure)
                if status.version >= self._options.num_updates:
                    saved = self._save()
                    if saved is None or saved >= self._options.num_updates:
                        return
                    # It died before it had saved them: the rest again, from its last checkpoint.
                    message = f"after {status.version} updates, before it had saved them"
                    self._event(Event(time.time(), "server lost", None, message))
                    self._version = saved
                    self._attach()
        except KeyboardInterrupt:
            version = self._save()
            if version is not None:
                _log.warning("Interrupted; a checkpoint of %d updates was written.", version)
            raise
        finally:
            if bar is not None:
                bar.close()

    def _advance(self) -> Any:
        """Lets the server train for a while, and brings it back if it dies."""
        deaths = 0
        while True:
            try:
                if deaths:
                    self._version = self._ask("ready")
                    self._attach()
                status = ray.get(self._server.advance.remote(_REPORT_EVERY))
                break
            except ray.exceptions.RayActorError as error:
                if self._options.checkpoint_dir is None:
                    raise RuntimeError(
                        f"The server died after about {self._version} updates, and without "
                        "checkpoint_dir there is nothing to go on from."
                    ) from error
                deaths += 1
                if deaths == _MAX_DEATHS:
                    raise RuntimeError(
                        f"The server died {deaths} times in a row, after {self._version} updates."
                    ) from error
                reason = str(error).strip().splitlines()[0]
                message = f"after at least {self._version} updates: {reason}"
                self._event(Event(time.time(), "server lost", None, message))
        self._wished = status.num_workers
        for event in status.events:
            self._event(event)
        for index in status.retired:
            ray.kill(self._workers.pop(index))
        if status.num_workers > len(self._workers):
            self._make_workers(status.num_workers)
            self._attach()
        return status

    def _attach(self) -> None:
        self._ask("attach", self._workers, self._wished)

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

    def _save(self) -> int | None:
        try:
            version: int | None = self._ask("save")
        except Exception as error:
            # Ray's own message is the whole traceback.
            message = _checkpoint.reason(getattr(error, "cause", error))
            self._event(Event(time.time(), "checkpoint failed", None, message))
            return None
        return version

    def result(self) -> Result:
        """Makes what `train` returns."""
        params, state, rows, events = self._ask("result")
        for event in events:
            self._event(event)
        if len(rows) < self._options.num_updates:
            raise RuntimeError(
                f"The server died after its last update, and its last checkpoint is of {len(rows)} "
                "updates: call train again to go on from there."
            )
        history = _history.to_columns(rows)
        is_async = self._options.mode == "async"
        arrivals = _history.to_arrivals(history, self._options.num_workers) if is_async else None
        result = Result(
            from_raw(self._params, params),
            from_raw(self._state_like, state),
            history,
            arrivals,
            tuple(self._events),
        )
        for straggler in result.stragglers():
            _log.warning(
                "worker %d takes %.3g s for a gradient, %.1f times as long as the others.",
                *straggler,
            )
        return result


def _add_to_runtime_env(options: Mapping[str, Any], environment: dict[str, str]) -> Any:
    """The user's runtime environment, with variables that it does not set."""
    given = options.get("runtime_env") or {}
    return {**given, "env_vars": {**environment, **given.get("env_vars", {})}}


def _bar(total: int, done: int) -> Any:
    """A progress bar, or None without tqdm."""
    try:
        import tqdm
    except ImportError:
        return None
    return tqdm.tqdm(total=total, initial=done, unit="push")
