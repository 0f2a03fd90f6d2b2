"""The stream between server and workers, and what is made of it, without Ray."""

import contextlib
import os
import socket
import struct
import threading
import time

import pytest

from optax_dcasgd.parameter_server import _calls, _link


@pytest.fixture
def listener():
    listener = _link.Listener("127.0.0.1")
    yield listener
    listener.close()


def next_of(listener):
    deadline = time.monotonic() + 10
    while not (new := listener.new()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ((index, connection),) = new
    return index, connection


def test_a_stream_brings_messages_both_ways(listener):
    with _link.connect(listener.address, 7) as worker:
        index, server = next_of(listener)
        assert index == 7
        with server:
            for message in (b"", b"task", bytes(70_000)):
                server.send_bytes(message)
                assert worker.recv_bytes() == message
                worker.send_bytes(message)
                assert server.recv_bytes() == message
        with pytest.raises(EOFError):
            worker.recv_bytes()


def test_only_who_knows_the_key_is_let_in(listener):
    """And whoever hangs or talks something else is in nobody's way."""
    address = listener.address
    stranger = _link.Address(address.host, address.port)
    assert stranger.key != address.key
    silent = socket.create_connection((address.host, address.port))
    with pytest.raises(ConnectionError, match=rf"cannot reach the server at .*{address.port}"):
        _link.connect(stranger, 1)
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 400, b"\0\0\0\5#HELO"):
        with socket.create_connection((address.host, address.port)) as noisy:
            with contextlib.suppress(ConnectionError):
                noisy.sendall(noise)
            assert_hung_up(noisy)
    with _link.connect(address, 2) as worker:
        index, server = next_of(listener)
        assert index == 2
        server.send_bytes(b"task")
        assert worker.recv_bytes() == b"task"
        server.close()
    silent.close()
    time.sleep(0.1)
    assert not listener.new()


def assert_hung_up(connected):
    connected.settimeout(10)
    with contextlib.suppress(ConnectionResetError):
        while connected.recv(1000):
            pass


def test_who_asks_instead_of_answering_is_not_let_in(listener):
    """He plays the server's part, so that he is never asked for the key."""
    address = listener.address
    with socket.create_connection((address.host, address.port)) as liar:
        for message in (b"#CHALLENGE#{sha256}" + bytes(20), b"#WELCOME#", bytes(8)):
            with contextlib.suppress(ConnectionError):  # he has been found out
                liar.sendall(len(message).to_bytes(4, "big") + message)
        assert_hung_up(liar)
    assert not listener.new()


def test_whoever_could_not_be_accepted(listener, monkeypatch):
    """The next can be: one has gone already, or there were too many open files for a moment."""

    class Failing:
        def __init__(self):
            self.errors = [ConnectionAbortedError(), OSError(24, "Too many open files")]

        def accept(self):
            if self.errors:
                raise self.errors.pop()
            return sockets.accept()

    sockets = listener._socket
    with _link.connect(listener.address, 1), next_of(listener)[1]:
        pass
    monkeypatch.setattr(listener, "_socket", Failing())
    for index in (2, 3):  # the first is still taken by the call under way
        with _link.connect(listener.address, index), next_of(listener)[1]:
            pass
    monkeypatch.undo()


def test_strangers_do_not_take_all_threads(listener, monkeypatch):
    monkeypatch.setattr(listener, "_strangers", threading.BoundedSemaphore(2))
    at = listener.address.host, listener.address.port
    with socket.create_connection(at) as one, socket.create_connection(at) as two:
        for stranger in (one, two):
            assert b"#CHALLENGE#" in stranger.recv(100)
        with socket.create_connection(at) as third:
            assert_hung_up(third)
    time.sleep(0.2)
    with _link.connect(listener.address, 3), next_of(listener)[1]:
        pass


def test_who_is_silent_is_given_up(listener, monkeypatch):
    monkeypatch.setattr(_link, "_HANDSHAKE_TIMEOUT", 1)
    with socket.create_connection((listener.address.host, listener.address.port)) as silent:
        assert_hung_up(silent)
    mute = socket.create_server(("127.0.0.1", 0))
    with mute, pytest.raises(ConnectionError, match="no word for 1 s"):
        _link.connect(_link.Address(*mute.getsockname()), 0)
    # Who is let in may take his time.
    with _link.connect(listener.address, 3) as worker, next_of(listener)[1] as server:
        timer = threading.Timer(2, worker.send_bytes, [b"at last"])
        timer.start()
        assert server.recv_bytes() == b"at last"
        timer.join()


def test_the_sockets_of_a_stream(listener):
    """Sent at once, without waiting for the peer, who is found out if he disappears."""
    with _link.connect(listener.address, 3) as worker, next_of(listener)[1] as server:
        for connection in (worker, server):
            with socket.socket(fileno=os.dup(connection.fileno())) as connected:
                assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
                # Fails, where it would wait for ever.
                connected.setsockopt(
                    socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 5, 0)
                )
        for _ in range(2):
            server.send_bytes(bytes(100_000))  # nobody reads it yet
    with pytest.raises(ConnectionRefusedError):  # another address of this machine
        socket.create_connection(("127.0.0.2", listener.address.port))


def test_a_worker_does_not_talk_to_a_server_that_does_not_know_the_key():
    def lie():
        """Lets in whoever comes."""
        with connections.accept()[0] as connected:
            challenge = b"#CHALLENGE#" + b"{sha256}" + bytes(20)
            for message in (challenge, b"#WELCOME#", bytes(16)):
                connected.sendall(len(message).to_bytes(4, "big") + message)
            connected.recv(10_000)
            connected.recv(10_000)

    connections = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lie)
    thread.start()
    with pytest.raises(ConnectionError, match="digest received was wrong"):
        _link.connect(_link.Address(*connections.getsockname()), 0)
    thread.join(timeout=10)
    connections.close()
    assert not thread.is_alive()
    with pytest.raises(ConnectionError, match="Connection refused"):
        _link.connect(_link.Address(*connections_of_nobody()), 0)


def connections_of_nobody():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return closed.getsockname()


# Calls over streams.


class Actor:
    """A worker's actor as `StreamCalls` knows it; the test itself connects for it."""

    def __init__(self):
        self.called_with = []
        self.serve = self

    def options(self, max_task_retries):
        assert max_task_retries == -1
        return self

    def remote(self, address, index):
        self.called_with.append((address, index))
        return object()


@pytest.fixture
def stream_calls(monkeypatch):
    """Without Ray, which would say that no call is over."""
    monkeypatch.setattr(_calls.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(_calls.ray, "wait", lambda refs, **_: ([], refs))
    calls = _calls.StreamCalls(4)
    yield calls
    for index in list(calls._actors):
        calls.stop(index)
    calls._listener.close()
    calls._selector.close()


def news_of(calls, at_least=1):
    deadline, news = time.monotonic() + 10, []
    while len(news) < at_least:
        assert time.monotonic() < deadline, news
        news += calls.wait(0.1)
    return news


def test_a_worker_that_connects_anew(stream_calls):
    """The old connection is lost, and a connection that nobody waits for is closed."""
    calls, actor = stream_calls, Actor()
    calls.start(0, actor)
    ((address, index),) = actor.called_with
    assert index == 0
    with _link.connect(address, 0) as first:
        assert news_of(calls) == [(0, _calls.Ready())]
        calls.send(0, b"task", b"one")
        assert first.recv_bytes() == b"taskone"
        with _link.connect(address, 0) as second, _link.connect(address, 5) as nobody:
            assert news_of(calls) == [
                (0, _calls.Lost("it has connected anew")),
                (0, _calls.Ready()),
            ]
            with pytest.raises(EOFError):
                first.recv_bytes()
            assert calls.wait(0.2) == []
            with pytest.raises(EOFError):
                nobody.recv_bytes()
            calls.send(0, b"task", b"two")
            assert second.recv_bytes() == b"tasktwo"
            second.send_bytes(b"headanswer")
            ((index, answer),) = news_of(calls)
            assert (index, answer.header, bytes(answer.packed)) == (0, b"head", b"answer")
        ((index, lost),) = news_of(calls)
        assert index == 0
        assert "the connection was lost" in lost.reason


def test_a_worker_that_stops_amid_a_message_is_lost(stream_calls, monkeypatch):
    """And nobody has to wait for it."""
    monkeypatch.setattr(_link, "_STALL_TIMEOUT", 1)
    calls, actor = stream_calls, Actor()
    for index in range(2):
        calls.start(index, actor)
    address = actor.called_with[0][0]
    with _link.connect(address, 0) as stopped, _link.connect(address, 1) as working:
        assert sorted(news_of(calls, 2)) == [(i, _calls.Ready()) for i in range(2)]
        os.write(stopped.fileno(), (40_000).to_bytes(4, "big") + bytes(16))
        working.send_bytes(b"headanswer")
        found = dict(news_of(calls, 2))
    assert "the connection was lost" in found[0].reason
    assert found[1].header == b"head"


def test_sending_to_a_worker_that_has_gone_is_no_error(stream_calls):
    calls, actor = stream_calls, Actor()
    calls.start(0, actor)
    worker = _link.connect(actor.called_with[0][0], 0)
    assert news_of(calls) == [(0, _calls.Ready())]
    with socket.socket(fileno=os.dup(worker.fileno())) as connected:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        worker.close()
    time.sleep(0.1)  # it has been reset
    calls.send(0, b"task", b"one")
    calls.send(0, b"task", b"two")
    ((index, lost),) = news_of(calls)
    assert index == 0
    assert isinstance(lost, _calls.Lost)


@pytest.mark.parametrize("error", ["ActorUnavailableError", "ActorDiedError"])
def test_what_ray_says_of_a_worker_that_does_not_come(stream_calls, monkeypatch, error):
    """Called again if it may come back; gone if it has died for good."""
    monkeypatch.setattr(_calls.ray, "wait", lambda refs, **_: (refs, []))

    def get(ref):
        if error == "ActorDiedError":
            raise _calls.ray.exceptions.ActorDiedError
        raise _calls.ray.exceptions.ActorUnavailableError("restarting", bytes(16))

    monkeypatch.setattr(_calls.ray, "get", get)
    calls, actor = stream_calls, Actor()
    calls.start(0, actor)
    news = calls.wait(0.1)
    if error == "ActorDiedError":
        ((index, gone),) = news
        assert index == 0
        assert "died" in gone.reason
        assert len(actor.called_with) == 1
    else:
        assert news == []
        assert len(actor.called_with) == 2


def test_a_newcomer_is_noticed_soon(stream_calls):
    calls, actor = stream_calls, Actor()
    for index in range(2):
        calls.start(index, actor)
    address, connected = actor.called_with[0][0], []
    with _link.connect(address, 0):
        assert news_of(calls) == [(0, _calls.Ready())]
        timer = threading.Timer(0.2, lambda: connected.append(_link.connect(address, 1)))
        timer.start()
        start = time.monotonic()
        while not (news := calls.wait(30)):
            assert time.monotonic() < start + 10
        assert time.monotonic() < start + 10
        assert news == [(1, _calls.Ready())]
        timer.join()
        connected[0].close()
