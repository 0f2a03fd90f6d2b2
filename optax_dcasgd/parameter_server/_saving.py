"""When the server writes a checkpoint, what of its state goes into one, and how it goes on."""

import numpy as np

from optax_dcasgd.parameter_server import _history, _lock
from optax_dcasgd.parameter_server._book import Book
from optax_dcasgd.parameter_server._checkpoint import Checkpoints, Snapshot, reason
from optax_dcasgd.parameter_server._fingerprint import changes
from optax_dcasgd.parameter_server._options import Options
from optax_dcasgd.parameter_server._record import Record
from optax_dcasgd.parameter_server._update import Update

_NAMED = 3  # leaves, in a message


class Saving:
    """Writes the checkpoints of a run, or does nothing where it has no directory for them."""

    def __init__(self, options: Options, state: tuple[Update, Record, Book]):
        self._options, directory = options, options.checkpoint_dir
        self._checkpoints = None if directory is None else Checkpoints(directory)
        self._update, self._record, self._book = state
        self._diverged: str | None = None

    def restore(self) -> None:
        """Goes back to the last checkpoint that can be read, if there is one."""
        if (checkpoints := self._checkpoints) is None:
            return
        checkpoints.remove_parts()  # of a server that was killed
        like = self._update.like()
        found = checkpoints.newest(lambda version: checkpoints.load(version, *like))
        if found is None:
            return
        version, snapshot, damaged = found
        for newer in damaged:
            aside = checkpoints.set_aside(newer.version)
            self._record.event(
                "checkpoint damaged",
                None,
                f"the checkpoint of {newer.version} updates cannot be read ({newer.reason}); it is "
                f"now {aside}, and {newer.version - version} updates are lost",
            )
        self._update.restore(snapshot.params, snapshot.state)
        self._book.restore(snapshot.meta)
        rows = _history.to_rows(snapshot.history) if version else self._record.rows[:0]
        self._record.restore(rows, snapshot.meta["time"])
        self._record.event("resumed", None, f"from the checkpoint of {version} updates")
        if changed := changes(snapshot.meta["fingerprint"], self._options.fingerprint):
            kept = (
                " (hyperparameters kept in the state, as by optax.inject_hyperparams, are the "
                "checkpoint's)"
            )
            self._record.event(
                "changed",
                None,
                f"{' and '.join(changed)} differ from those of the first {version} updates"
                f"{kept if 'tx' in changed else ''}: "
                "simulation.run does not replay the run with the one or the other alone",
            )

    def give_up(self, found: str) -> str:
        """Writes nothing more of a run that has diverged; returns what to say of it."""
        last = None if self._checkpoints is None else self._checkpoints.latest()
        remedy = (
            "There is no checkpoint to go on from."
            if last is None
            else f"The last checkpoint is of {last} updates: call train again, with a lower "
            "learning rate, say, to go on from there; remove it to go on from the one before."
        )
        self._diverged = f"Training has diverged. {found}. {remedy}"
        return self._diverged

    def failure(self) -> str | None:
        """Why nothing more may be written, so that training cannot go on; None if it may."""
        if self._diverged is not None:
            return self._diverged
        if names := self._update.not_finite():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            after = f"Not finite after {self._record.version} updates"
            return self.give_up(f"{after}: {', '.join(names[:_NAMED])}{more}")
        directory = self._options.checkpoint_dir
        if not _lock.is_held(directory, self._options.lock):
            return f"Another run has taken checkpoint_dir {directory}."
        return None

    def is_due(self) -> bool:
        """Whether a checkpoint has to be written after this update."""
        every = self._options.checkpoint_every
        return self._checkpoints is not None and self._record.version % every == 0

    def begin(self) -> str | None:
        """Begins to write a checkpoint; returns the `failure` that keeps it from being written.

        What the directory has against it is an event, and does not end the run.
        """
        if (failure := self.failure()) is not None:
            return failure
        try:
            self._write()
        except Exception as error:
            self._report(error)
        return None

    def save(self) -> int | None:
        """Writes a checkpoint and waits for it; returns its version.

        None without a directory, and where `failure` says why nothing may be written.
        """
        if self._checkpoints is None:
            return None
        if (error := self._checkpoints.settle()) is not None:
            self._report(error)
        if self.failure() is not None:
            return None
        self._write()
        if (error := self._checkpoints.settle()) is not None:
            raise error
        return self._record.version

    def _write(self) -> None:
        assert self._checkpoints is not None
        if self._checkpoints.latest() == self._record.version:
            return
        rows = self._record.rows
        meta = {
            "signature": self._options.signature,
            "fingerprint": self._options.fingerprint,
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
        self._record.event("checkpoint failed", None, reason(error))
