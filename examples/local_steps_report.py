"""What local_steps.py says about its runs: tables, a few sentences, plots."""

import argparse
import dataclasses
from collections.abc import Callable

import numpy as np
from common import compare
from compare_async_plots import plot_error_over_time
from compare_async_problems import PROBLEMS
from compare_async_report import (
    WINDOW,
    Groups,
    choose,
    describe,
    effects,
    failed,
    fastest,
    final,
    markdown,
    matrix,
    percent_change,
    rate,
    seconds_to,
)


@dataclasses.dataclass(frozen=True, eq=False)
class LocalCell:
    """S runs of one kind, one for each seed, evaluated E times; NaN from where a run diverged."""

    speeds: str
    steps: int  # H
    workers: int
    method: str
    learning_rate: float  # of the outer optimizer
    pushes: np.ndarray  # (E,): messages so far, of all workers
    seconds: np.ndarray  # (S, E): virtual time
    training_loss: np.ndarray  # (S, E)
    validation_error: np.ndarray  # (S, E)
    test_error: np.ndarray  # (S, E)

    @property
    def name(self) -> tuple[str, int, int, str, float]:
        """What tells it from the other cells."""
        return self.speeds, self.steps, self.workers, self.method, self.learning_rate


SYNCHRONOUS = ("SSGD", "DiLoCo")
Pairs = dict[int, tuple[np.ndarray, np.ndarray]]  # M -> what synchronous runs end with, and others


def grouped(cells: list[LocalCell], label: Callable[[LocalCell], str]) -> Groups:
    """(label, M) -> the cells of all outer rates."""
    groups: Groups = {}
    for cell in cells:
        groups.setdefault((label(cell), cell.workers), []).append(cell)
    return groups


def errors_of(cell: LocalCell) -> np.ndarray:
    """Each seed's test error at the end; NaN where it failed."""
    errors = final(cell.test_error)
    return np.where(failed(errors), np.nan, errors)


def seconds_table(groups: Groups, target: float) -> str:
    """Virtual seconds to the target, each at the outer rate that needs the fewest pushes."""

    def entry(cells: list[LocalCell]) -> str:
        cell = fastest(cells, target)
        seconds = seconds_to(cell, target)
        reached = np.isfinite(seconds)
        if not reached.all():
            return f"{reached.sum()} of {len(seconds)} seeds ({rate(cell, cells)})"
        return f"{seconds.mean():.0f} s ({rate(cell, cells)})"

    return matrix(groups, entry)


def error_table(groups: Groups) -> str:
    """Test errors, each at the outer rate of the lowest validation error."""

    def entry(cells: list[LocalCell]) -> str:
        cell = choose(cells)
        return f"{describe(final(cell.test_error))} ({rate(cell, cells)})"

    return matrix(groups, entry)


def at_rate(cells: list[LocalCell], fixed: float) -> list[LocalCell]:
    """Those of one outer rate."""
    return [cell for cell in cells if cell.learning_rate == fixed]


def times(before: np.ndarray, after: np.ndarray) -> str:
    """For the sentences: how many times as long."""
    if np.isnan(before).any() or np.isnan(after).any():
        counts = [f"{np.isfinite(v).sum()} of {len(v)}" for v in (before, after)]
        return f"{counts[0]} → {counts[1]} seeds reach it"
    return f"{after.mean() / before.mean():.2f} times as long"


def against(barrier: str, cells: list[LocalCell], args: argparse.Namespace) -> list[str]:
    """What asynchronous workers do better or worse than a barrier, by the rule of `compare`."""
    groups = grouped(cells, lambda cell: cell.method)
    methods = [m for m in dict.fromkeys(m for m, _ in groups) if m not in SYNCHRONOUS]
    workers = [w for m, w in groups if m == barrier]
    lines = []
    for method in methods:
        shared = [w for w in workers if (method, w) in groups]
        best: Pairs = {}
        fixed: Pairs = {}
        seconds: Pairs = {}
        for w in shared:
            pair = groups[barrier, w], groups[method, w]
            before, after = (errors_of(choose(group)) for group in pair)
            best[w] = before, after
            if found := at_rate(pair[1], args.fixed_rate):
                fixed[w] = before, errors_of(found[0])
            before, after = (seconds_to(fastest(group, args.target), args.target) for group in pair)
            seconds[w] = before, after
        clauses = [f"test error {effects(best, percent_change)}"] if best else []
        if fixed:
            clauses.append(
                f"at the fixed outer rate {args.fixed_rate:g} against the best synchronous one "
                f"{effects(fixed, percent_change)}"
            )
        if seconds:
            said = ", ".join(
                f"M={w} {times(*pair)} ({compare(*pair, standard_errors=2)})"
                for w, pair in seconds.items()
            )
            clauses.append(f"virtual time to the target: {said}")
        lines.append(f"- {method}: {'; '.join(clauses)}.")
    return lines


def everywhere(barrier: str, cells: list[LocalCell]) -> str:
    """For each method and outer rate, in how many cases it ends as well as a barrier at its best.

    A case is a number of workers with their speeds, and a number of steps. In a good one no seed
    fails, and the mean error is not clearly higher.
    """

    def case(cell: LocalCell) -> tuple[str, int, int]:
        return cell.speeds, cell.steps, cell.workers

    at_barrier: dict[tuple, list[LocalCell]] = {}
    for cell in cells:
        if cell.method == barrier:
            at_barrier.setdefault(case(cell), []).append(cell)
    best = {name: errors_of(choose(found)) for name, found in at_barrier.items()}
    rates = sorted({cell.learning_rate for cell in cells})
    rows = []
    for method in dict.fromkeys(cell.method for cell in cells):
        row = [method]
        for learning_rate in rates:
            found = [c for c in at_rate(cells, learning_rate) if c.method == method]
            errors = [errors_of(cell) for cell in found]
            good = [
                not np.isnan(after).any()
                and compare(best[case(cell)], after, standard_errors=2) != "hurt"
                for cell, after in zip(found, errors, strict=True)
            ]
            row.append(f"{sum(good)} of {len(good)}")
        rows.append(row)
    return markdown(["outer rate", *(f"{r:g}" for r in rates)], rows)


def bytes_table(cells: list[LocalCell], num_parameters: int) -> str:
    """What all workers together send and receive in a run: parameters, and their differences."""
    rows = []
    for steps in sorted({cell.steps for cell in cells}):
        found = [c for c in cells if c.steps == steps and c.speeds != "1:4-balanced"]
        pushes = max(int(cell.pushes[-1]) for cell in found or cells)
        megabytes = 2 * 4 * num_parameters * pushes / 1e6
        rows.append([f"H={steps}", str(pushes), f"{megabytes:.1f}"])
    return markdown(["local steps", "pushes", "megabytes (float32)"], rows)


def report(cells: list[LocalCell], about: str, args: argparse.Namespace) -> str:
    """Returns the tables and the sentences, and writes them into ``args.out``."""
    parts = [
        f"# Local steps compared\n\n{about}",
        bytes_table(cells, PROBLEMS[args.problem].num_parameters),
    ]
    for speeds in args.speeds:
        of_speeds = [cell for cell in cells if cell.speeds == speeds]
        if not of_speeds:
            continue
        groups = grouped(of_speeds, lambda cell: f"H={cell.steps} {cell.method}")
        parts += [
            f"## Workers' speeds: {speeds}",
            f"Test error at the end (mean of the last {WINDOW} evaluations), %, mean ± standard "
            "deviation over the seeds. In brackets the outer rate, the one with the lowest "
            "validation error (* at the edge of the grid).",
            error_table(groups),
        ]
        at_fixed = grouped(
            at_rate(of_speeds, args.fixed_rate), lambda cell: f"H={cell.steps} {cell.method}"
        )
        if at_fixed:
            parts += [
                f"The same at the outer rate {args.fixed_rate:g}.",
                matrix(at_fixed, lambda cells: describe(final(cells[0].test_error))),
            ]
        parts += [
            f"Virtual seconds until the training loss is {args.target:g}, at the outer rate that "
            "needs the fewest. (Where not every seed gets there: how many do.)",
            seconds_table(groups, args.target),
        ]
        for steps in args.steps:
            of_steps = [cell for cell in of_speeds if cell.steps == steps]
            for barrier in [m for m in SYNCHRONOUS if m in args.methods]:
                if lines := against(barrier, of_steps, args):
                    head = f"H={steps}, against {barrier}, each at its own best outer rate:"
                    parts.append("\n".join([head, "", *lines]))
    for barrier in [m for m in SYNCHRONOUS if m in args.methods]:
        parts += [
            f"## One outer rate for all, against {barrier}",
            "In how many cases (speeds, H and M) no seed fails and the test error is not clearly "
            f"higher than {barrier}'s at its best rate.",
            everywhere(barrier, cells),
        ]
    parts.append(
        "(Helped, hurt: by more than two standard errors of the difference of the means, or, where "
        "seeds failed, by numbers of them that chance explains in at most one case of ten. About "
        "one comparison in ten is that far apart by chance.)"
    )
    text = "\n\n".join(parts)
    (args.out / "tables.md").write_text(text + "\n")
    return text


def plot(cells: list[LocalCell], args: argparse.Namespace) -> None:
    """For each H and each kind of speeds, error against virtual time, a panel for each M."""
    for speeds in args.speeds:
        for steps in args.steps:
            found = [cell for cell in cells if (cell.speeds, cell.steps) == (speeds, steps)]
            if found:
                plot_error_over_time(
                    grouped(found, lambda cell: cell.method),
                    f"{args.problem}, H={steps}, speeds {speeds}, each at its best outer rate",
                    args.out / f"error_over_time_H{steps}_{speeds.replace(':', '-')}.png",
                )
