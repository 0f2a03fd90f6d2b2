"""The roster of workers: which belong to the run, which are there, and which are idle."""

import collections


class Roster:
    """The workers by index. Those with an index of ``num_workers`` or more have to leave."""

    def __init__(self, num_workers: int):
        self.num_workers = num_workers  # as last wished
        self.members: set[int] = set()
        self._present: set[int] = set()
        self._lost: set[int] = set()  # those that were there before
        self._idle: collections.deque[int] = collections.deque()

    def ready(self, index: int, *, is_idle: bool) -> bool:
        """Notes that a worker is there; returns whether it had been lost."""
        self._present.add(index)
        if is_idle:
            self._idle.append(index)
        was_lost = index in self._lost
        self._lost.discard(index)
        return was_lost

    def lose(self, index: int) -> None:
        """Notes that a worker is not there."""
        self._present.discard(index)
        if index in self._idle:
            self._idle.remove(index)
        self._lost.add(index)

    def remove(self, index: int) -> None:
        """Notes that a worker will never be there again."""
        self.lose(index)
        self._lost.remove(index)
        self.members.remove(index)

    def release(self, index: int) -> None:
        """Notes that a worker is idle, if it is there."""
        if index in self._present:
            self._idle.append(index)

    def idle(self) -> list[int]:
        """The workers that may get a task, those that have waited longest first."""
        return [index for index in self._idle if index < self.num_workers]

    def occupy(self, index: int) -> bool:
        """Notes that an idle worker gets a task; returns whether it is the only one there."""
        self._idle.remove(index)
        return len(self._present) == 1

    def starting(self) -> list[int]:
        """The workers that are new and not there yet."""
        return sorted(self.members - self._present - self._lost)

    def missing(self) -> list[int]:
        """The workers that are not there."""
        return sorted(self.members - self._present)

    def retire(self) -> list[int]:
        """Removes the idle workers that have to leave, and returns them."""
        leaving = [index for index in self._idle if index >= self.num_workers]
        for index in leaving:
            self.remove(index)
        return leaving
