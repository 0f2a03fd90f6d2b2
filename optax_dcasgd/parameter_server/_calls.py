"""How the server sends tasks to its workers and hears from them.

Ray places, starts and restarts the workers. Each task gets exactly one answer, or the worker is
lost: so it is for a call of Ray's, and so it is for a connection, which is never taken up again.
"""

import contextlib
import selectors
import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import ray

from optax_dcasgd.parameter_server._link import Listener
from optax_dcasgd.parameter_server._transport import Packed

_ASK_AGAIN = 0.05  # seconds, where there is nothing to wait for
_CLOSE_TIMEOUT = 1.0  # seconds, for gradients that are being computed
_MAX_MESSAGE = 1 << 24  # bytes, from a worker: a small gradient, or the text of an error
# A worker that ends so is not started again.
_NEVER_AGAIN = (ray.exceptions.ActorDiedError, ray.exceptions.RuntimeEnvSetupError)


class Answer(NamedTuple):
    """To a task."""

    header: bytes  # a `RESULT`
    packed: Packed


class Ready(NamedTuple):
    """The worker is there, for the first time or again, and has nothing to do."""


class Lost(NamedTuple):
    """The worker has died or cannot be reached; it may come back."""

    reason: str


class Gone(NamedTuple):
    """The worker will not come back."""

    reason: str


News = Answer | Ready | Lost | Gone


class Calls(Protocol):
    """What the server knows of either way."""

    def start(self, index: int, actor: Any) -> None:
        """Takes a worker on; `Ready` follows when it has been started."""

    def stop(self, index: int) -> None:
        """Forgets a worker, which has nothing to do."""

    def send(self, index: int, task: bytes, message: Any) -> None:
        """Sends a task, and the packed parameters or a reference to them, to an idle worker."""

    def wait(self, seconds: float) -> list[tuple[int, News]]:
        """What has come, in that order; waits for it if need be, but not for longer."""

    def close(self) -> None:
        """Ends what can be ended, before the workers are killed; nothing is called after this."""


class StreamCalls:
    """For small messages: one long call of Ray's a worker, and a stream for the tasks within it.

    A call of Ray's costs both sides about a millisecond of CPU time together, a message on a stream
    a tenth of that.
    """

    def __init__(self, header_size: int):
        self._header_size = header_size
        self._listener = Listener(ray.util.get_node_ip_address())
        self._selector = selectors.DefaultSelector()
        self._actors: dict[int, Any] = {}
        self._calls: dict[int, ray.ObjectRef[Any]] = {}
        self._connections: dict[int, Connection] = {}

    def start(self, index: int, actor: Any) -> None:
        self._actors[index] = actor
        # Queued by Ray until the worker has been started, and made again when it is restarted.
        call = actor.serve.options(max_task_retries=-1)
        self._calls[index] = call.remote(self._listener.address, index)

    def stop(self, index: int) -> None:
        del self._actors[index], self._calls[index]
        self._disconnect(index)

    def _disconnect(self, index: int) -> None:
        if (connection := self._connections.pop(index, None)) is not None:
            self._selector.unregister(connection)
            connection.close()

    def send(self, index: int, task: bytes, message: Any) -> None:
        with contextlib.suppress(OSError):  # `wait` will find that it is lost
            self._connections[index].send_bytes(task + message)

    def wait(self, seconds: float) -> list[tuple[int, News]]:
        if len(self._connections) < len(self._actors) or not self._actors:
            seconds = min(seconds, _ASK_AGAIN)  # somebody may come
        news: list[tuple[int, News]] = []
        for key, _ in self._selector.select(seconds):
            index = key.data
            try:
                message = self._connections[index].recv_bytes(_MAX_MESSAGE)
            except (EOFError, OSError) as error:
                self._disconnect(index)
                news.append((index, Lost(f"the connection was lost ({error!r})")))
            else:
                size = self._header_size
                news.append((index, Answer(message[:size], memoryview(message)[size:])))
        if len(self._connections) < len(self._actors):
            news += self._ask_ray()
        for index, connection in self._listener.new():
            if index not in self._actors:
                connection.close()
                continue
            if index in self._connections:
                self._disconnect(index)
                news.append((index, Lost("it has connected anew")))
            self._connections[index] = connection
            self._selector.register(connection, selectors.EVENT_READ, index)
            news.append((index, Ready()))
        return news

    def close(self) -> None:
        self._listener.close()
        for index in list(self._connections):
            self._disconnect(index)
        self._selector.close()
        # Ray says of a call that may be made again, and whose worker is killed, that it failed.
        calls = list(self._calls.values())
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=_CLOSE_TIMEOUT)

    def _ask_ray(self) -> list[tuple[int, News]]:
        """What has become of the calls that are over."""
        news: list[tuple[int, News]] = []
        indices = {ref: index for index, ref in self._calls.items()}
        for ref in ray.wait(list(indices), num_returns=len(indices), timeout=0)[0]:
            index = indices[ref]
            try:
                ray.get(ref)
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, ConnectionError):
                    raise  # see RayCalls
                self.stop(index)
                news.append((index, Gone(str(error.cause))))
            except _NEVER_AGAIN as error:
                self.stop(index)
                news.append((index, Gone(str(error).strip())))
            except ray.exceptions.RayError:
                self.start(index, self._actors[index])
            else:  # only its connection was lost
                self.start(index, self._actors[index])
        return news


class RayCalls:
    """For large messages, which Ray's object store carries: one call of Ray's a task."""

    def __init__(self) -> None:
        self._actors: dict[int, Any] = {}
        self._calls: dict[ray.ObjectRef[Any], int] = {}
        self._starting: set[ray.ObjectRef[Any]] = set()  # those of them that only wait for a worker

    def start(self, index: int, actor: Any) -> None:
        self._actors[index] = actor
        # Queued by Ray until the worker has been started, or restarted.
        ref = actor.ready.options(max_task_retries=-1).remote()
        self._calls[ref] = index
        self._starting.add(ref)

    def stop(self, index: int) -> None:
        del self._actors[index]

    def send(self, index: int, task: bytes, message: Any) -> None:
        call = self._actors[index].gradient.remote
        ref = call(task + message) if isinstance(message, bytes) else call(task, message)
        self._calls[ref] = index

    def wait(self, seconds: float) -> list[tuple[int, News]]:
        if not self._calls:
            time.sleep(min(seconds, _ASK_AGAIN))
            return []
        done, rest = ray.wait(list(self._calls), timeout=seconds)
        if done and rest:
            done += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        return [self._news(ref) for ref in done]

    def close(self) -> None:
        pass  # Ray does not make the calls of `send` again

    def _news(self, ref: ray.ObjectRef[Any]) -> tuple[int, News]:
        index = self._calls.pop(ref)
        starting = ref in self._starting
        self._starting.discard(ref)
        try:
            answer = ray.get(ref)
        except ray.exceptions.RayTaskError:
            raise  # a worker catches what grad_fn and batches raise, so this is an error of its own
        except ray.exceptions.RayError as error:
            reason = str(error).strip()
            if starting and isinstance(error, _NEVER_AGAIN):
                self.stop(index)
                return index, Gone(reason)
            self.start(index, self._actors[index])
            return index, Lost(f"{type(error).__name__}: {reason.splitlines()[0]}")
        return index, Ready() if starting else Answer(*answer)
