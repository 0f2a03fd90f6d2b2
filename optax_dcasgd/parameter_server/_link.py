"""An authenticated stream between the server and a worker.

Both prove to each other, by HMAC, that they know a key which the server draws and Ray brings to the
worker. The stream carries bytes of a layout that both know; nothing is unpickled.
"""

import collections
import contextlib
import multiprocessing
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

_HELLO = struct.Struct("<q")  # which worker it is
_BUFFER = 256 * 1024  # bytes; a message fits, so that to send one to a worker takes no waiting
_CONNECT_TIMEOUT = 20.0  # seconds
_HANDSHAKE_TIMEOUT = 60  # seconds, for each message until both know who the other is
_STALL_TIMEOUT = 20  # seconds, for the rest of a message that the server has begun to read
_MAX_STRANGERS = 64  # handshakes at once
# For a peer whose machine is gone without a word: given up after about 30 seconds, whether it owes
# an answer or the receipt of what was sent (in milliseconds).
_KEEP_ALIVE = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 4,
    "TCP_USER_TIMEOUT": 30_000,
}
# What the handshake raises where the other side is not what it has to be.
_NOT_OURS = (multiprocessing.AuthenticationError, EOFError, OSError, AssertionError)


class Address:
    """Where a `Listener` is reached, and the key to it."""

    def __init__(self, host: str, port: int):
        self.host, self.port = host, port
        self.key = secrets.token_bytes(32)


class Listener:
    """Takes connections, in threads of its own: a peer that hangs, or lies, holds nobody up."""

    def __init__(self, host: str):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family)
        self.address = Address(host, self._socket.getsockname()[1])
        self._new: collections.deque[tuple[int, Connection]] = collections.deque()
        self._strangers = threading.BoundedSemaphore(_MAX_STRANGERS)
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._socket.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(0.1)  # it has gone already, or there are too many open files for now
                continue
            if self._strangers.acquire(blocking=False):
                threading.Thread(target=self._welcome, args=(accepted,), daemon=True).start()
            else:
                accepted.close()

    def _welcome(self, accepted: socket.socket) -> None:
        try:
            with _handshake(accepted, then=_STALL_TIMEOUT) as connection:
                deliver_challenge(connection, self.address.key)
                answer_challenge(connection, self.address.key)
                (index,) = _HELLO.unpack(connection.recv_bytes(_HELLO.size))
            self._new.append((index, connection))
        except _NOT_OURS:
            pass
        finally:
            self._strangers.release()

    def new(self) -> list[tuple[int, Connection]]:
        """The connections that have come since the last call, and whose they are."""
        return [self._new.popleft() for _ in range(len(self._new))]

    def close(self) -> None:
        """Takes no more connections."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # ends the thread's accept
        self._socket.close()


def connect(address: Address, index: int) -> Connection:
    """Connects worker number ``index`` to the server.

    Raises:
      ConnectionError: If there is no server, or none that knows the key.
    """
    try:
        made = socket.create_connection((address.host, address.port), timeout=_CONNECT_TIMEOUT)
        made.settimeout(None)
        with _handshake(made, then=0) as connection:
            answer_challenge(connection, address.key)
            deliver_challenge(connection, address.key)
            connection.send_bytes(_HELLO.pack(index))
        return connection
    except _NOT_OURS as error:
        raise ConnectionError(
            f"cannot reach the server at {address.host}, port {address.port}: {error!r}"
        ) from error


@contextlib.contextmanager
def _handshake(connected: socket.socket, then: int) -> Iterator[Connection]:
    """The connection of a socket; closed if what is done under it fails, or waits too long.

    Args:
      connected: The socket; closed, as the connection has a descriptor of its own.
      then: How many seconds reading may wait after that; 0 for ever.
    """
    with connected:
        connection = Connection(os.dup(connected.fileno()))
        try:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEP_ALIVE.items():
                if hasattr(socket, name):  # as on Linux
                    connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            _limit_waiting(connected, _HANDSHAKE_TIMEOUT)
            yield connection
            _limit_waiting(connected, then)
        except BlockingIOError as error:
            connection.close()
            raise TimeoutError(f"no word for {_HANDSHAKE_TIMEOUT} s") from error
        except BaseException:
            connection.close()
            raise


def _limit_waiting(connected: socket.socket, seconds: int) -> None:
    """How long reading waits, 0 for ever: of the kernel's socket, so for every descriptor."""
    timeval = struct.pack("@ll", seconds, 0)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
