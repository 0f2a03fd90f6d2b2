"""When the server writes a checkpoint, what of its state goes into one, and how it goes on."""

import numpy as np

from optax_dcasgd.parameter_server import _history
from optax_dcasgd.parameter_server._book import Book
from optax_dcasgd.parameter_server._checkpoint import Checkpoints, Snapshot
from optax_dcasgd.parameter_server._record import Record
from optax_dcasgd.parameter_server._update import Update


class Saving:
    """Writes the checkpoints of a run, or does nothing where it has no directory for them."""

    def __init__(
        self,
        directory: str | None,
        every: int,
        signature: list[str],
        state: tuple[Update, Record, Book],
    ):
        self._checkpoints = None if directory is None else Checkpoints(directory)
        self._every, self._signature = every, signature
        self._update, self._record, self._book = state

    def restore(self) -> None:
        """Goes back to the last checkpoint, if there is one."""
        if self._checkpoints is None or (version := self._checkpoints.latest()) is None:
            return
        snapshot = self._checkpoints.load(version, *self._update.like())
        self._update.restore(snapshot.params, snapshot.state)
        self._book.restore(snapshot.meta)
        rows = _history.to_rows(snapshot.history) if version else self._record.rows[:0]
        self._record.restore(rows, snapshot.meta["time"])
        self._record.event("resumed", None, f"from the checkpoint of {version} updates")

    def is_due(self) -> bool:
        """Whether a checkpoint has to be written after this update."""
        return self._checkpoints is not None and self._record.version % self._every == 0

    def begin(self) -> None:
        """Begins to write a checkpoint; a failure is an event, and does not end the run."""
        try:
            self._write()
        except Exception as error:
            self._report(error)

    def save(self) -> int | None:
        """Writes a checkpoint and waits for it; returns its version, None without a directory."""
        if self._checkpoints is None:
            return None
        if (failure := self._checkpoints.settle()) is not None:
            self._report(failure)
        self._write()
        self._checkpoints.wait()
        return self._record.version

    def _write(self) -> None:
        assert self._checkpoints is not None
        if self._checkpoints.latest() == self._record.version:
            return
        rows = self._record.rows
        meta = {
            "signature": self._signature,
            "time": self._record.seconds(),
            "history": {name: rows.dtype[name].str for name in _history.History._fields},
            **self._book.to_save(),
        }
        snapshot = Snapshot(
            # Copies: the next update writes over the originals.
            [np.array(leaf) for leaf in self._update.params_to_host()],
            [np.array(leaf) for leaf in self._update.state_to_host()],
            _history.to_columns(rows)._asdict(),
            meta,
        )
        self._checkpoints.save(self._record.version, snapshot)

    def _report(self, error: Exception) -> None:
        message = f"{type(error).__name__}: {error}"
        self._record.event("checkpoint failed", None, message)
