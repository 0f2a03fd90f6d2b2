"""The server: it owns the parameters and the optimizer's state, and runs the loop of training.

It sends each idle worker a batch and the newest parameters as one call, whose answer is the
gradient: a pull and the next push are one round trip. Answers that have come together are applied
one after another, in the order in which their tasks were sent, then those that arrived meanwhile.
Only after that the server packs the parameters, once for all workers that are idle.

Only one thread ever works here. The driver calls `advance` again and again. Between two calls it
can have a checkpoint written, workers attached or retired, and the run stopped.
"""

import time
from typing import Any, NamedTuple

import numpy as np
import optax

from optax_dcasgd.parameter_server._book import Book, Pull, Push, mean_of
from optax_dcasgd.parameter_server._calls import Calls, Gone, Lost, News, Ready
from optax_dcasgd.parameter_server._history import Event
from optax_dcasgd.parameter_server._options import Options
from optax_dcasgd.parameter_server._record import Record
from optax_dcasgd.parameter_server._roster import Roster
from optax_dcasgd.parameter_server._saving import Saving
from optax_dcasgd.parameter_server._transport import Layout
from optax_dcasgd.parameter_server._update import Gradient, Update, Version
from optax_dcasgd.parameter_server._worker import Computed, Refused


class Status(NamedTuple):
    """What the driver hears after each `advance`."""

    version: int
    loss: float
    staleness: float  # mean over the last updates
    events: list[Event]  # since the last status
    num_workers: int  # as last wished
    wish: str | None  # which the driver has yet to fulfil
    retired: list[int]  # workers that have left
    gone: list[int]  # workers that will not come back, since the last status
    starting: list[int]  # workers that have not been there yet
    took_part: set[int]  # workers whose gradients were applied
    failure: str | None  # why training cannot go on


_PATIENCE = 60.0  # seconds without a gradient, after which an event says who is missing


class Server:
    """An actor that owns parameters and optimizer state."""

    def __init__(
        self,
        tx: optax.GradientTransformation,
        params: Any,
        layouts: tuple[Layout, Layout, Layout],  # of parameters, gradients, gradients as sent
        options: Options,
        workers: dict[int, Any],
    ):
        self._options, self._local_steps = options, options.local_steps
        self._update = Update(tx, params, layouts)
        limit = options.max_staleness if options.on_stale == "wait" else None
        self._book = Book(limit, options.local_steps.most(options.num_workers))
        self._record = Record(options.num_updates, options.name)
        self._saving = Saving(options, (self._update, self._record, self._book))
        self._saving.restore()
        self._published: Version | None = None
        self._to_apply: list[Gradient] = []  # which the book has no more
        self._took_part: set[int] = set()
        self._gone: list[int] = []
        self._why_gone = "it had to leave"  # the last one
        self._failure: str | None = None
        self._num_not_finite = 0  # gradients since the last update
        self._calls = Calls()
        self._roster = Roster(options.num_workers)
        self._wish: str | None = None  # the last one, until the driver has fulfilled it
        self._wishes: set[str | None] = set()  # all that were ever heard of
        self.attach(workers, options.num_workers)
        self._heard = time.monotonic()

    # What the driver calls.

    def ready(self) -> int:
        """Returns, when the server is there, the number of updates done."""
        return self._record.version

    def attach(self, workers: dict[int, Any], num_workers: int, wish: str | None = None) -> None:
        """Takes these workers on; those with an index of num_workers or more will leave."""
        self._wishes.add(wish)
        if self._wish in (None, wish):  # and there is no newer one
            self._roster.num_workers, self._wish = num_workers, None
        for index in sorted(workers.keys() - self._roster.members):
            self._roster.members.add(index)
            self._calls.start(index, workers[index])

    def resize(self, num_workers: int, wish: str) -> bool:
        """Wishes for so many workers; returns whether the driver has made those that are missing.

        To be repeated, as the same wish, until it has: a server in the place of this one has heard
        of none. The last wish counts; one that another has followed is done.
        """
        if wish not in self._wishes:
            self._wishes.add(wish)
            self._roster.num_workers, self._wish = num_workers, wish
        return wish != self._wish

    def advance(self, seconds: float) -> Status:
        """Trains for so long, or until all updates are done."""
        end, record = time.monotonic() + seconds, self._record
        while not (record.is_done() or self._failure) and (left := end - time.monotonic()) > 0:
            self._send_out()
            come = self._calls.wait(left)
            self._watch(bool(come))
            while come:  # and what has come during the update
                for index, news in come:
                    self._receive(index, news)
                self._apply()
                come = self._calls.wait(0)
        if self._record.is_done():
            self._fail(self._saving.failure())
        retired = self._roster.retire()
        for index in retired:
            self._calls.stop(index)
            self._local_steps.forget(index)
        gone, self._gone = self._gone, []
        if (retired or gone) and not self._roster.members and self._wish is None:
            self._fail(f"No worker is left; the last one: {self._why_gone}")
        return Status(
            self._record.version,
            *self._record.report(),
            self._roster.num_workers,
            self._wish,
            retired,
            gone,
            self._roster.starting(),
            self._took_part,
            self._failure,
        )

    def save(self) -> int | None:
        """Writes a checkpoint and waits for it; returns its version, None if there is none."""
        if self._to_apply:
            raise RuntimeError("an update has failed half way, and is not saved")
        return self._saving.save()

    def result(self) -> tuple[Any, Any, Any, list[Event]]:
        """Parameters and optimizer state as host arrays, the history, and the last events."""
        params, state = self._update.params_to_host(), self._update.state_to_host()
        return params, state, self._record.rows, self._record.take_events()

    # Pull.

    def _send_out(self) -> None:
        """Gives every idle worker that may pull a batch and the newest parameters."""
        if self._options.mode == "sync" and (not self._book.is_empty() or self._roster.starting()):
            return  # until the round is over, and those that are new are there
        for index in self._roster.idle():
            if not self._book.may_pull(self._record.version):
                return
            try:
                num_steps = self._local_steps(index)
            except Exception as error:  # the user's function, of a worker that `resize` added
                self._fail(f"local_steps({index}) failed: {type(error).__name__}: {error}")
                return
            version = self._publish()
            is_alone = self._roster.occupy(index)
            task = self._book.pull(index, version, is_alone=is_alone, num_steps=num_steps)
            self._calls.send(index, task, version.message)

    def _publish(self) -> Version:
        """The newest parameters, which are packed once however many workers get them."""
        number = self._record.version
        if self._published is None or self._published.number != number:
            self._published = self._update.publish(number)
        return self._published

    # Push.

    def _receive(self, index: int, news: News) -> None:
        match news:
            case Computed(loss, seconds, packed):
                pull = self._book.answered(index)
                self._book.push(Push(pull, loss, seconds, packed))
                self._local_steps.took(index, pull.task.num_steps, seconds)
            case Refused(reason, not_finite):
                self._refuse(self._book.answered(index), reason, not_finite)
            case Ready():
                # A worker may come back before what it has sent is applied, and is idle then.
                if self._roster.ready(index, is_idle=not self._book.has_pushed(index)):
                    self._record.event("worker back", index, "restarted")
            case Lost(reason):
                self._roster.lose(index)
                self._give_to_another(index)
                self._record.event("worker lost", index, reason)
            case Gone(reason):
                self._roster.remove(index)
                self._give_to_another(index)
                self._record.event("worker gone", index, reason)
                self._gone.append(index)
                self._why_gone = reason

    def _give_to_another(self, index: int) -> None:
        """What a lost worker was to compute."""
        self._local_steps.forget(index)
        if (refused := self._book.lost(index, self._roster.num_workers)) is not None:
            self._refuse(*refused)

    def _refuse(self, pull: Pull, reason: str, not_finite: bool = False) -> None:
        self._book.num_refused += 1
        self._num_not_finite += not_finite
        self._record.event("refused", pull.worker, reason)
        self._roster.release(pull.worker)
        # It may be the fault of the parameters; then all gradients will be like this one.
        self._fail(self._saving.failure())
        if self._book.num_refused > self._options.max_bad_pushes:
            told = (
                f"{self._book.num_refused} gradients were refused, more than "
                f"max_bad_pushes={self._options.max_bad_pushes}; the last, of worker "
                f"{pull.worker}: {reason}"
            )
            if self._num_not_finite > self._roster.num_workers:
                found = f"No gradient is finite with such parameters ({self._update.largest()})"
                told = f"{self._saving.give_up(found)} {told}"
            self._fail(told)

    def _fail(self, reason: str | None) -> None:
        """Ends the run for the first of the reasons why it cannot go on."""
        self._failure = self._failure or reason

    # Update.

    def _apply(self) -> None:
        """Applies what may be applied; what came first goes first."""
        if self._options.mode == "sync":
            if pushes := self._book.whole_round():
                self._apply_round(pushes)
            return
        while not self._record.is_done():
            if (push := self._book.next_push(self._record.version)) is None:
                break
            self._roster.release(push.pull.worker)
            self._apply_or_drop(push)
        self._flush()

    def _apply_or_drop(self, push: Push) -> None:
        pull, version, limit = push.pull, self._record.version, self._options.max_staleness
        staleness = version - pull.version.number
        if limit is not None and staleness > limit:
            self._book.drop(pull)
            message = f"staleness {staleness} > max_staleness={limit} ({pull.task})"
            self._record.event("dropped", pull.worker, message)
            return
        self._took_part.add(pull.worker)
        gradient = Gradient(push.packed, pull.version, pull.worker, staleness)
        every, compensation = self._options.compensation_every, np.nan
        is_measured = every is not None and version % every == 0
        if is_measured:
            self._flush()
        self._to_apply.append(gradient)
        if is_measured:
            compensation = self._update.compensation(gradient)
        self._count(push, staleness, compensation)

    def _flush(self) -> None:
        if self._to_apply:
            self._update.apply(self._to_apply)
            self._to_apply = []

    def _apply_round(self, pushes: list[Push]) -> None:
        """One update with the mean of all workers' gradients."""
        for push in pushes:
            self._roster.release(push.pull.worker)
            self._took_part.add(push.pull.worker)
        self._to_apply = [Gradient(push.packed, push.pull.version, 0, 0) for push in pushes]
        self._update.apply_mean(self._to_apply)
        self._to_apply = []
        self._count(mean_of(pushes), 0, np.nan)

    def _count(self, push: Push, staleness: int, compensation: float) -> None:
        """Records an update, and writes a checkpoint if one is due."""
        self._record.update(push, staleness, compensation)
        self._num_not_finite = 0
        if self._saving.is_due():
            self._flush()
            self._fail(self._saving.begin())

    def _watch(self, has_come: bool) -> None:
        """Says, now and then, who is missing while nothing happens."""
        now = time.monotonic()
        if has_come:
            self._heard = now
        elif now - self._heard > _PATIENCE:
            self._heard = now
            self._record.event(
                "waiting",
                None,
                f"nothing has come for {_PATIENCE:.0f} s. Workers that have not started: "
                f"{self._roster.missing() or 'none'}; that are computing: "
                f"{self._book.computing() or 'none'}",
            )
