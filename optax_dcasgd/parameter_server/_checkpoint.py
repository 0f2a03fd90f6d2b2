"""Checkpoints of a run, by Orbax: parameters, optimizer state, history, and the batches in hand."""

import os
import pathlib
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np

_FORMAT = "optax_dcasgd.parameter_server/1"


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


def _named(arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    """For Orbax, which takes no arrays without elements."""
    return {str(i): array for i, array in enumerate(arrays) if array.size}


class Checkpoints:
    """The checkpoints in one directory, the last two of which are kept."""

    def __init__(self, directory: str):
        self._orbax = _orbax()
        self._directory = os.fspath(directory)
        self._manager = self._orbax.CheckpointManager(
            self._directory,
            options=self._orbax.CheckpointManagerOptions(max_to_keep=2, create=True),
        )

    def latest(self) -> int | None:
        """The version of the newest complete one."""
        version: int | None = self._manager.latest_step()
        return version

    def save(self, version: int, snapshot: Snapshot) -> None:
        """Starts to write; then raises a failure of the one before, which is not tried again.

        The arrays must not change while it is written.
        """
        failure = self.settle()
        arrays = {"params": _named(snapshot.params), "state": _named(snapshot.state)}
        arrays = {name: leaves for name, leaves in arrays.items() if leaves}
        if version:
            arrays["history"] = snapshot.history
        meta = {"format": _FORMAT, **snapshot.meta}
        args = self._orbax.args
        self._manager.save(
            version,
            args=args.Composite(arrays=args.StandardSave(arrays), meta=args.JsonSave(meta)),
            force=True,
        )
        if failure is not None:
            raise failure

    def settle(self) -> Exception | None:
        """Waits until all is written; returns what went wrong, of which nothing remains."""
        try:
            self.wait()
        except Exception as error:
            self._manager.reload()  # or it would count as the latest
            return error
        return None

    def wait(self) -> None:
        """Waits until all is written; raises what went wrong."""
        self._manager.wait_until_finished()

    def meta(self, version: int) -> dict[str, Any]:
        """What was saved beside the arrays."""
        args = self._orbax.args
        restored = self._manager.restore(version, args=args.Composite(meta=args.JsonRestore()))
        meta: dict[str, Any] = restored["meta"]
        return meta

    def load(self, version: int, params: Any, state: Any) -> Snapshot:
        """Reads it, for a model of these shapes and dtypes."""
        meta = self.meta(version)
        trees = {"params": jax.tree.leaves(params), "state": jax.tree.leaves(state)}
        like = {
            name: {str(i): np.empty(x.shape, x.dtype) for i, x in enumerate(leaves) if np.size(x)}
            for name, leaves in trees.items()
        }
        like = {name: leaves for name, leaves in like.items() if leaves}
        like["history"] = {
            name: np.empty(version, dtype) for name, dtype in meta["history"].items() if version
        }
        if not version:
            del like["history"]
        args = self._orbax.args
        restored = self._manager.restore(
            version, args=args.Composite(arrays=args.StandardRestore(like))
        )["arrays"]
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


def check(directory: Any, lines: list[str], *, resume: bool, num_updates: int) -> str:
    """Checks that a run can use the directory, before anything is started.

    Returns:
      Its absolute path.

    Raises:
      OSError: If it cannot be written.
      ValueError: If it holds a run that must not be, or cannot be, continued.
    """
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
    checkpoints = Checkpoints(str(path))
    try:
        version = checkpoints.latest()
        if version is None:
            return str(path)
        if not resume:
            raise ValueError(
                f"checkpoint_dir {path} holds a run of {version} updates: continue it with "
                "resume=True, or choose another directory."
            )
        try:
            meta = checkpoints.meta(version)
            fits = meta["format"] == _FORMAT
        except Exception as error:
            raise ValueError(
                f"checkpoint_dir {path} holds checkpoints that are none of the parameter server's."
            ) from error
        if not fits:
            raise ValueError(f"checkpoint_dir {path} is of another release: {meta['format']!r}.")
        if meta["signature"] != lines:
            differing = [
                f"{saved} there and {here} here"
                for saved, here in zip(
                    [*meta["signature"], "nothing"], [*lines, "nothing"], strict=False
                )
                if saved != here
            ]
            raise ValueError(f"checkpoint_dir {path} holds another model: {differing[0]}.")
        if version > num_updates:
            raise ValueError(
                f"num_updates must be at least {version}, which the run in checkpoint_dir {path} "
                f"has had; got {num_updates}."
            )
        return str(path)
    finally:
        checkpoints.close()
