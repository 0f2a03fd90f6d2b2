"""One run at a time in a checkpoint directory, however the one before has ended."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from parameter_server_runs import meanwhile

from optax_dcasgd.parameter_server import _lock

IN_USE = r"checkpoint_dir .* is in use by another run .* remove .*run\.lock"


def no_locks(file, operation):
    raise OSError(errno.EOPNOTSUPP, "not on this file system")


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(_lock, "_BEAT", 0.1)


@pytest.fixture(params=["with locks", "without"])
def locks(request, monkeypatch, fast):
    """A file system with locks, and one that has none."""
    if request.param == "without":
        monkeypatch.setattr(_lock.fcntl, "flock", no_locks)


@pytest.mark.usefixtures("locks")
def test_a_directory_is_for_one_run_and_then_for_the_next(tmp_path):
    with _lock.held(str(tmp_path)) as first:
        time.sleep(0.5)  # some beats
        with pytest.raises(ValueError, match=IN_USE), _lock.held(str(tmp_path)):
            pass
        assert _lock.is_held(str(tmp_path), first)
    with _lock.held(str(tmp_path)) as second:
        assert _lock.is_held(str(tmp_path), second)
        assert not _lock.is_held(str(tmp_path), first)


HOLD = """
import os, sys, time
from optax_dcasgd.parameter_server import _lock
with _lock.held(sys.argv[1]):
    if "fork" not in sys.argv:
        print(0, flush=True)
    elif os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_killed_run_can_be_resumed_at_once(how, tmp_path):
    """Also if a process that it has forked, of a data loader, say, lives on."""
    command = [sys.executable, "-c", HOLD, str(tmp_path), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        try:
            with (
                pytest.raises(ValueError, match=f"process {process.pid} on"),
                _lock.held(str(tmp_path)),
            ):
                pass
            process.kill()
            process.wait()
            start = time.monotonic()
            with _lock.held(str(tmp_path)):
                assert time.monotonic() - start < _lock._BEAT  # it does not watch the file
        finally:
            if child:
                os.kill(child, signal.SIGKILL)  # it lived on


def beat(path, times):
    holder = {"token": "other", "machine": "other", "host": "far away", "process": "1"}
    for number in range(times):
        with contextlib.suppress(FileNotFoundError):
            _lock._write(path, holder, number)
        time.sleep(0.1)


@pytest.mark.usefixtures("fast")
def test_another_machine_holds_what_it_writes_to(tmp_path):
    """Though its lock cannot be seen here; until it writes no more."""
    path = tmp_path / "run.lock"
    path.touch()
    with meanwhile(beat, path, 10):
        time.sleep(0.2)
        with pytest.raises(ValueError, match="process 1 on far away"), _lock.held(str(tmp_path)):
            pass
    with _lock.held(str(tmp_path)) as token:
        assert _lock.is_held(str(tmp_path), token)


@pytest.mark.usefixtures("fast")
def test_the_file_may_be_removed_while_another_run_waits(tmp_path):
    """As the error says; the directory is then free."""
    path = tmp_path / "run.lock"
    path.touch()
    beat(path, 1)

    def remove():
        time.sleep(0.05)
        path.unlink()

    with meanwhile(remove), _lock.held(str(tmp_path)) as token:
        assert token in path.read_text()
        with pytest.raises(ValueError, match=IN_USE), _lock.held(str(tmp_path)):
            pass


@pytest.mark.usefixtures("fast")
def test_who_was_taken_for_dead_learns_it(tmp_path):
    """It stops writing, and knows that the directory is another's."""
    path = tmp_path / "run.lock"
    with _lock.held(str(tmp_path)) as token:
        beat(path, 1)
        written = path.read_bytes()
        time.sleep(0.4)
        assert path.read_bytes() == written
        assert not _lock.is_held(str(tmp_path), token)
    assert path.read_bytes() == written
