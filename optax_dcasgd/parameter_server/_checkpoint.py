"""Checkpoints of a run, by Orbax: parameters, optimizer state, history, and the batches in hand."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from optax_dcasgd.parameter_server import _lock
from optax_dcasgd.parameter_server._fingerprint import checksum

_FORMAT = "optax_dcasgd.parameter_server/3"
_LENGTH = 200  # characters of a reason
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # in what TensorStore raises
_T = TypeVar("_T")


class Snapshot(NamedTuple):
    """All that a server needs to go on."""

    params: list[np.ndarray]
    state: list[np.ndarray]
    history: dict[str, np.ndarray]
    meta: dict[str, Any]  # of numbers, strings and lists


def signature(**trees: Any) -> list[str]:
    """One line a leaf: its path, dtype and shape. Models with the same lines fit each other."""
    return [
        f"{jax.tree_util.keystr(path)}: {leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_flatten_with_path(trees)[0]
    ]


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError("checkpoint_dir needs Orbax: pip install orbax-checkpoint.") from error
    return orbax.checkpoint


def reason(error: BaseException) -> str:
    """An error in one short sentence; TensorStore's may have kilobytes."""
    text = str(error).strip()
    if found := _OS_ERROR.search(text):
        error = OSError(int(found[1]), os.strerror(int(found[1])))
        text = str(error)
    line = text.splitlines()[0] if text else ""
    line = line if len(line) <= _LENGTH else f"{line[:_LENGTH]}..."
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _named(arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    """For Orbax, which takes no arrays without elements."""
    return {str(i): array for i, array in enumerate(arrays) if array.size}


def _sum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


class Damaged(NamedTuple):
    """A checkpoint that cannot be read."""

    version: int
    reason: str


def _read(read: Callable[[int], _T], version: int) -> _T:
    try:
        return read(version)
    except Exception as error:
        if not isinstance(error, OSError) and not _OS_ERROR.search(str(error)):
            raise
    return read(version)  # a file system that others use may fail for a moment


class Checkpoints:
    """The checkpoints in one directory, the last two of which are kept."""

    def __init__(self, directory: str):
        self._orbax = _orbax()
        self._directory = pathlib.Path(directory)
        self._manager = self._orbax.CheckpointManager(
            self._directory,
            options=self._orbax.CheckpointManagerOptions(max_to_keep=2, create=True),
        )

    def latest(self) -> int | None:
        """The version of the newest complete one."""
        version: int | None = self._manager.latest_step()
        return version

    def newest(self, read: Callable[[int], _T]) -> tuple[int, _T, list[Damaged]] | None:
        """Reads the newest checkpoint that can be read.

        Args:
          read: `meta` or `load`, as a function of the version alone.

        Returns:
          Its version, what `read` returned, and the newer ones that cannot be read. None if there
          are no checkpoints.

        Raises:
          ValueError: If none of them can be read.
        """
        damaged: list[Damaged] = []
        for version in sorted(self._manager.all_steps(), reverse=True):
            try:
                return version, _read(read, version), damaged
            except MemoryError:
                raise
            except Exception as error:
                damaged.append(Damaged(version, reason(error)))
        if not damaged:
            return None
        paths = ", ".join(str(self._directory / str(each.version)) for each in damaged)
        raise ValueError(
            f"checkpoint_dir {self._directory} holds no checkpoint of the parameter server that "
            f"can be read ({damaged[0].version}: {damaged[0].reason}). Choose another directory; "
            f"or, to begin anew, remove {paths}."
        )

    def set_aside(self, version: int) -> pathlib.Path:
        """Renames a checkpoint that cannot be read; returns where it is now."""
        aside = self._directory / f"damaged-{version}"
        shutil.rmtree(aside, ignore_errors=True)  # an earlier one of that version
        (self._directory / str(version)).rename(aside)
        self._manager.reload()
        return aside

    def remove_parts(self) -> None:
        """Removes what is left of checkpoints whose writing failed or was cut off."""
        suffix = self._orbax.utils.TMP_DIR_SUFFIX
        for part in self._directory.glob(f"*{suffix}*"):
            shutil.rmtree(part, ignore_errors=True)

    def save(self, version: int, snapshot: Snapshot) -> None:
        """Starts to write; then raises a failure of the one before, which is not tried again.

        The arrays must not change while it is written.
        """
        failure = self.settle()
        arrays = {"params": _named(snapshot.params), "state": _named(snapshot.state)}
        arrays["history"] = snapshot.history if version else {}
        arrays = {name: leaves for name, leaves in arrays.items() if leaves}
        # TensorStore notices what is cut off, but not another bit within an array.
        sums = {
            name: checksum([leaves[i] for i in sorted(leaves)]) for name, leaves in arrays.items()
        }
        meta = {**snapshot.meta, "checksums": sums}
        meta = {"format": _FORMAT, "checksum": _sum(meta), "meta": meta}
        args = self._orbax.args
        try:
            self._manager.save(
                version,
                args=args.Composite(arrays=args.StandardSave(arrays), meta=args.JsonSave(meta)),
                force=True,
            )
        except Exception:
            self.settle()
            self.remove_parts()
            raise
        if failure is not None:
            raise failure

    def settle(self) -> Exception | None:
        """Waits until all is written; returns what went wrong, of which nothing remains."""
        try:
            self.wait()
        except Exception as error:
            self._manager.reload()  # or it would count as the latest
            self.remove_parts()
            return error
        return None

    def wait(self) -> None:
        """Waits until all is written; raises what went wrong."""
        self._manager.wait_until_finished()

    def meta(self, version: int) -> dict[str, Any]:
        """What was saved beside the arrays."""
        args = self._orbax.args
        restored = self._manager.restore(version, args=args.Composite(meta=args.JsonRestore()))
        if (of := restored["meta"]["format"]) != _FORMAT:
            raise ValueError(f"it is of another release, {of!r}")
        meta: dict[str, Any] = restored["meta"]["meta"]
        if _sum(meta) != restored["meta"]["checksum"]:
            raise ValueError("its checksum is another")
        return meta

    def load(self, version: int, params: Any, state: Any) -> Snapshot:
        """Reads it, for a model of these shapes and dtypes."""
        meta = self.meta(version)
        trees = {"params": jax.tree.leaves(params), "state": jax.tree.leaves(state)}
        like = {
            name: {str(i): np.empty(x.shape, x.dtype) for i, x in enumerate(leaves) if np.size(x)}
            for name, leaves in trees.items()
        }
        like["history"] = {
            name: np.empty(version, dtype) for name, dtype in meta["history"].items() if version
        }
        like = {name: leaves for name, leaves in like.items() if leaves}
        args = self._orbax.args
        restored = self._manager.restore(
            version, args=args.Composite(arrays=args.StandardRestore(like))
        )["arrays"]
        for name, total in meta["checksums"].items():
            if checksum([restored[name][i] for i in sorted(like[name])]) != total:
                raise ValueError(f"the checksum of its {name} is another")
        leaves = {
            name: [
                np.asarray(restored[name][str(i)]) if x.size else np.empty(x.shape, x.dtype)
                for i, x in enumerate(of)
            ]
            for name, of in trees.items()
        }
        return Snapshot(**leaves, history=restored.get("history", {}), meta=meta)

    def close(self) -> None:
        """Stops Orbax's threads."""
        self._manager.close()


def _writable(directory: Any) -> pathlib.Path:
    """Makes the directory, and returns its absolute path."""
    if "://" in os.fspath(directory):
        raise ValueError(
            f"checkpoint_dir must be a directory that the server's machine has; got {directory!r}."
        )
    path = pathlib.Path(directory).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(f"checkpoint_dir {path} cannot be written: {error}") from error
    return path


@contextlib.contextmanager
def claimed(
    directory: Any, lines: list[str], *, resume: bool, num_updates: int
) -> Iterator[tuple[str | None, str | None]]:
    """Holds a directory for a run, after checking, before anything is started, that it can.

    Yields:
      Its absolute path, and the token of `_lock.held`; None for both without a directory.

    Raises:
      OSError: If it cannot be written.
      ValueError: If it is in use, or holds a run that must not be, or cannot be, continued.
    """
    if directory is None:
        yield None, None
        return
    path = str(_writable(directory))
    with _lock.held(path) as token:
        checkpoints = Checkpoints(path)
        try:
            _check(path, checkpoints, lines, resume=resume, num_updates=num_updates)
        finally:
            checkpoints.close()
        yield path, token


def _check(
    path: str, checkpoints: Checkpoints, lines: list[str], *, resume: bool, num_updates: int
) -> None:
    if (version := checkpoints.latest()) is None:
        return
    if not resume:
        raise ValueError(
            f"checkpoint_dir {path} holds a run of {version} updates: continue it with "
            "resume=True, or choose another directory."
        )
    found = checkpoints.newest(checkpoints.meta)
    assert found is not None
    version, meta, _ = found  # of the damaged ones the server has to tell, which may find more
    if meta["signature"] != lines:
        pairs = zip([*meta["signature"], "nothing"], [*lines, "nothing"], strict=False)
        differing = [f"{saved} there and {here} here" for saved, here in pairs if saved != here]
        raise ValueError(f"checkpoint_dir {path} holds another model: {differing[0]}.")
    if version > num_updates:
        raise ValueError(
            f"num_updates must be at least {version}, which the run in checkpoint_dir {path} "
            f"has had; got {num_updates}."
        )
