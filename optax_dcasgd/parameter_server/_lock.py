"""One run at a time in a checkpoint directory.

The driver holds a lock on a file there (flock), which the kernel takes back however the process
ends: a driver that was killed can be started again at once. A process that it has forked, a data
loader's, say, may live longer, and would keep the lock: it closes the file. Some file systems have
no such lock, or one that other machines do not see. So the driver also rewrites the file every few
seconds. Who finds what another machine wrote there watches whether it changes. Clocks are not
compared.
"""

import contextlib
import json
import os
import pathlib
import platform
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from typing import Any

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

_BEAT = 5.0  # seconds between two writes of the holder
_MISSED = 3  # so many of which end its hold for another machine
_NAME = "run.lock"
_files: weakref.WeakSet[Any] = weakref.WeakSet()  # that are open here


def _close() -> None:
    for file in list(_files):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close)


def _machine() -> str:
    """Tells machines of one name apart; it changes when one is started anew."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{platform.node()} {uuid.getnode():x}"


def _parse(content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _write(path: pathlib.Path, holder: dict[str, Any], beat: int) -> None:
    """Over what is there, since another file in its place would not have the lock."""
    # Always as long, so that nobody reads half of it.
    content = json.dumps({**holder, "beat": f"{beat:09d}"}).encode()
    with open(path, "r+b") as file:
        file.write(content)
        file.truncate()


def _changes(path: pathlib.Path, content: bytes) -> bool:
    """Whether the holder writes, in the time in which it should have."""
    end = time.monotonic() + _MISSED * _BEAT
    while time.monotonic() < end:
        time.sleep(_BEAT / 5)
        if path.read_bytes() != content:  # opened anew, or NFS may show what it has kept
            return True
    return False


def _is_free(file: Any, path: pathlib.Path) -> bool:
    """Locks the file, and says whether no other run holds it."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        has_locks = fcntl is not None
    except BlockingIOError:
        return False
    except OSError:  # not on this file system
        has_locks = False
    content = path.read_bytes()
    if not content:  # the last run has ended as it should
        return True
    if has_locks and _parse(content).get("machine") == _machine():  # it was killed
        return True
    return not _changes(path, content)


@contextlib.contextmanager
def held(directory: str) -> Iterator[str]:
    """Holds the directory for one run; yields the token by which `is_held` knows it.

    Raises:
      ValueError: If another run holds it.
    """
    path = pathlib.Path(directory, _NAME)
    token = uuid.uuid4().hex
    with contextlib.ExitStack() as stack:
        is_free = None
        while is_free is None:
            file = stack.enter_context(open(path, "a+b"))
            _files.add(file)
            # The error below advises to remove it. Where that happens meanwhile it is opened anew,
            # since the lock on what was removed keeps nobody out.
            with contextlib.suppress(FileNotFoundError):
                is_free = _is_free(file, path)
        if not is_free:
            file.seek(0)
            other = _parse(file.read())
            raise ValueError(
                f"checkpoint_dir {directory} is in use by another run (process "
                f"{other.get('process', 'unknown')} on {other.get('host', 'an unknown machine')}). "
                f"Choose another directory; or, if that run has ended, remove {path}."
            )
        holder = {"token": token, "machine": _machine(), "host": platform.node()}
        holder["process"] = str(os.getpid())
        _write(path, holder, 0)
        end = threading.Event()
        thread = threading.Thread(target=_beat, args=(path, holder, end), daemon=True)
        thread.start()
        try:
            yield token
        finally:
            end.set()
            thread.join()
            with contextlib.suppress(OSError):
                if is_held(directory, token):
                    # Not removed: another process may have it open, to lock it.
                    os.truncate(path, 0)


def _beat(path: pathlib.Path, holder: dict[str, Any], end: threading.Event) -> None:
    beat = 0
    while not end.wait(_BEAT):
        beat += 1
        with contextlib.suppress(OSError):  # the next one may succeed
            if not is_held(str(path.parent), holder["token"]):
                return
            _write(path, holder, beat)


def is_held(directory: str | None, token: str | None) -> bool:
    """Whether no other run has taken the directory, if any, since `held` yielded this token."""
    if directory is None:
        return True
    try:
        content = pathlib.Path(directory, _NAME).read_bytes()
    except OSError:  # nobody has, as far as can be seen
        return True
    return bool(_parse(content).get("token", token) == token)
