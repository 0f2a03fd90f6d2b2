"""A bound on staleness that lets workers wait instead of dropping their gradients.

Each gradient under way was pulled at some version and has slack: how many more updates may come
before it without its staleness exceeding the bound. Every update takes one from all the others. All
can still be applied within the bound if, in the order of least slack first, the j-th (from 0) has a
slack of at least j. A pull or an update that would break this has to wait. What is oldest can
always be applied, so nobody waits for ever.
"""

from collections.abc import Iterable


def _feasible(slacks: Iterable[int]) -> bool:
    return all(slack >= j for j, slack in enumerate(sorted(slacks)))


def may_pull(staleness: list[int], max_staleness: int) -> bool:
    """Whether another worker may pull, while gradients as old as these are under way."""
    return _feasible(max_staleness - tau for tau in [*staleness, 0])


def may_apply(staleness: list[int], index: int, max_staleness: int) -> bool:
    """Whether that one of the gradients under way may be applied now."""
    others = staleness[:index] + staleness[index + 1 :]
    return _feasible(max_staleness - tau - 1 for tau in others)
