"""What compare_async.py says about its runs: tables, and a few sentences."""

import csv
import dataclasses
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import compare, mean_and_std, std

# A run with more errors than this has learned nothing: chance is 90 % where there are 10 classes.
STUCK = 0.8
# At a constant learning rate the error goes up and down between evaluations: "at the end" is the
# mean of the last WINDOW of them, in the tables, and the plots show running means of as many.
WINDOW = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """S runs of one kind, one for each seed, evaluated E times; NaN from where a run diverged."""

    workers: int
    method: str
    momentum: float
    learning_rate: float
    pushes: np.ndarray  # (E,): gradients computed so far
    seconds: np.ndarray  # (S, E): virtual time
    training_loss: np.ndarray  # (S, E)
    validation_error: np.ndarray  # (S, E)
    test_error: np.ndarray  # (S, E)

    @property
    def name(self) -> tuple[int, str, float, float]:
        """What tells it from the other cells."""
        return self.workers, self.method, self.momentum, self.learning_rate


Groups = dict[tuple[str, int], list[Cell]]  # (method, M) -> the cells of all learning rates


def by_momentum(cells: list[Cell]) -> dict[float, Groups]:
    """Cells that differ in the learning rate alone, together."""
    result: dict[float, Groups] = {}
    for cell in cells:
        groups = result.setdefault(cell.momentum, {})
        groups.setdefault((cell.method, cell.workers), []).append(cell)
    return result


def final(errors: np.ndarray) -> np.ndarray:
    """Each seed's error at the end: the mean over its last evaluations."""
    return errors[:, -WINDOW:].mean(1)


def failed(errors: np.ndarray) -> np.ndarray:
    """Which runs diverged, or learned nothing."""
    return ~(errors <= STUCK)  # NaN is not


def choose(cells: list[Cell]) -> Cell:
    """The learning rate that the validation images prefer; the test images have no say.

    The one with the fewest failed seeds, and among those with the lowest mean error of the others;
    of equals the lowest.
    """

    def badness(cell: Cell) -> tuple[int, float, float]:
        errors = final(cell.validation_error)
        bad = failed(errors)
        mean = math.inf if bad.all() else float(errors[~bad].mean())
        return int(bad.sum()), mean, cell.learning_rate

    return min(cells, key=badness)


def pushes_to(cell: Cell, target: float) -> np.ndarray:
    """For each seed, how many pushes its training loss needed to fall to the target; or NaN."""
    reached = cell.training_loss <= target
    return np.where(reached.any(1), cell.pushes[reached.argmax(1)], np.nan)


def fastest(cells: list[Cell], target: float) -> Cell:
    """The learning rate at which most seeds reach the target, and among those the soonest."""

    def slowness(cell: Cell) -> tuple[int, float, float]:
        pushes = pushes_to(cell, target)
        missed = np.isnan(pushes)
        mean = math.inf if missed.all() else float(pushes[~missed].mean())
        return int(missed.sum()), mean, cell.learning_rate

    return min(cells, key=slowness)


def describe(errors: np.ndarray) -> str:
    """Mean ± standard deviation in percent; where a seed failed, how many instead."""
    diverged, stuck = int(np.isnan(errors).sum()), int((errors > STUCK).sum())
    if diverged or stuck:
        counts = [f"{n} {word}" for n, word in ((diverged, "diverged"), (stuck, "stuck")) if n]
        first, *rest = counts
        n, word = first.split()
        return ", ".join([f"{n} of {len(errors)} seeds {word}", *rest])
    return mean_and_std(100 * errors, 1)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns are aligned, so that it reads well in a terminal too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def matrix(groups: Groups, entry: Callable[[list[Cell]], str]) -> str:
    """One row a method, one column a number of workers."""
    methods, workers = list(dict.fromkeys(m for m, _ in groups)), sorted({w for _, w in groups})
    rows = [
        [method, *(entry(groups[method, w]) if (method, w) in groups else "" for w in workers)]
        for method in methods
    ]
    return markdown(["method", *(f"M={w}" for w in workers)], rows)


def rate(cell: Cell, cells: list[Cell]) -> str:
    """A learning rate; a star says that it is the grid's first or last one."""
    rates = [c.learning_rate for c in cells]
    edge = len(rates) > 2 and cell.learning_rate in (min(rates), max(rates))
    return f"{cell.learning_rate:g}{'*' if edge else ''}"


def error_table(groups: Groups) -> str:
    """Test errors, each at the learning rate of the lowest validation error."""

    def entry(cells: list[Cell]) -> str:
        cell = choose(cells)
        return f"{describe(final(cell.test_error))} ({rate(cell, cells)})"

    return matrix(groups, entry)


def target_table(groups: Groups, target: float) -> str:
    """Pushes to the target, and virtual seconds, each at the learning rate that needs fewest."""

    def entry(cells: list[Cell]) -> str:
        cell = fastest(cells, target)
        pushes = pushes_to(cell, target)
        reached = np.isfinite(pushes)
        if not reached.all():
            return f"{reached.sum()} of {len(pushes)} seeds ({rate(cell, cells)})"
        return f"{pushes.mean():.0f}, {seconds_to(cell, target).mean():.0f} s ({rate(cell, cells)})"

    return matrix(groups, entry)


def seconds_to(cell: Cell, target: float) -> np.ndarray:
    """Virtual seconds until the training loss falls to the target; NaN where it does not."""
    reached = cell.training_loss <= target
    first = np.take_along_axis(cell.seconds, reached.argmax(1)[:, None], 1)[:, 0]
    return np.where(reached.any(1), first, np.nan)


def count_good(groups: Groups, method: str, good: float) -> tuple[int, int]:
    """How many of a method's cells with M > 1 have every seed's test error under ``good``."""
    cells = [cell for (m, w), cells in groups.items() if m == method and w > 1 for cell in cells]
    return sum(bool((final(cell.test_error) < good).all()) for cell in cells), len(cells)


def percent_change(before: np.ndarray, after: np.ndarray) -> str:
    """For the sentences: from which test error to which."""
    if np.isnan(before).any() or np.isnan(after).any():
        counts = [f"{np.isnan(v).sum()} of {len(v)}" for v in (before, after)]
        return f"{counts[0]} → {counts[1]} seeds failed"
    return f"{100 * before.mean():.1f} → {100 * after.mean():.1f} %"


def ratio(before: np.ndarray, after: np.ndarray) -> str:
    """For the sentences: how many times as many pushes."""
    if np.isnan(before).any() or np.isnan(after).any():
        counts = [f"{np.isfinite(v).sum()} of {len(v)}" for v in (before, after)]
        return f"{counts[0]} → {counts[1]} seeds reach it"
    return f"{after.mean() / before.mean():.2f} times as many"


def effects(
    pairs: dict[int, tuple[np.ndarray, np.ndarray]], show: Callable[[Any, Any], str]
) -> str:
    """For M -> (before, after): at which M it helped, hurt, or made no clear difference."""
    found = {w: compare(*pair, standard_errors=2) for w, pair in pairs.items()}
    clauses = []
    for effect in ("helped", "hurt"):
        if at := [f"M={w} ({show(*pairs[w])})" for w, e in found.items() if e == effect]:
            clauses.append(f"{effect} at {', '.join(at)}")
    if at := [str(w) for w, e in found.items() if e == "made no clear difference"]:
        every = "every M" if len(at) == len(found) else f"M={', '.join(at)}"
        clauses.append(f"no clear difference at {every}")
    return "; ".join(clauses)


def words(groups: Groups, good: float, target: float) -> str:
    """Says what was seen, by the rule of `compare`."""
    methods, workers = list(dict.fromkeys(m for m, _ in groups)), sorted({w for _, w in groups})
    stale = [w for w in workers if w > 1]

    def errors(method: str, w: int) -> np.ndarray:
        values = final(choose(groups[method, w]).test_error)
        return np.where(failed(values), np.nan, values)

    def pushes(method: str, w: int) -> np.ndarray:
        return pushes_to(fastest(groups[method, w], target), target)

    lines = []
    if ("SGD", 1) in groups and "ASGD" in methods:
        pairs = {w: (errors("SGD", 1), errors("ASGD", w)) for w in stale}
        found = effects(pairs, percent_change)
        lines.append(f"Staleness (ASGD against sequential SGD), test error: {found}.")
    others = [m for m in methods if m not in ("SGD", "SSGD", "ASGD")]
    if "ASGD" in methods and others:
        lines.append("Against ASGD, test error, each at its own best learning rate:")
        for method in others:
            pairs = {w: (errors("ASGD", w), errors(method, w)) for w in stale}
            lines.append(f"- {method}: {effects(pairs, percent_change)}.")
        lines.append(f"Against ASGD, pushes to a training loss of {target:g}, each at its fastest:")
        for method in others:
            pairs = {w: (pushes("ASGD", w), pushes(method, w)) for w in stale}
            lines.append(f"- {method}: {effects(pairs, ratio)}.")
    counts = {m: count_good(groups, m, good) for m in methods if m != "SGD"}
    if counts:
        total = next(iter(counts.values()))[1]
        listed = sorted(counts, key=lambda m: -counts[m][0])
        lines.append(
            f"Stable region: of {total} cells (M × learning rate), this many have every seed under "
            f"{100 * good:g} % test error: "
            + ", ".join(f"{m} {counts[m][0]}" for m in listed)
            + "."
        )
    return "\n".join(lines)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """One row a dictionary, all with the same keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
    )
    path.write_text(text.getvalue())


def csv_row(cell: Cell, target: float) -> dict[str, Any]:
    """What there is to say about a cell; a mean is left empty where a seed is not in it."""
    test, validation = final(cell.test_error), final(cell.validation_error)
    pushes, seconds = pushes_to(cell, target), seconds_to(cell, target)
    complete, reached = not np.isnan(test).any(), not np.isnan(pushes).any()
    return {
        "momentum": cell.momentum,
        "workers": cell.workers,
        "method": cell.method,
        "learning_rate": cell.learning_rate,
        "seeds": len(test),
        "diverged": int(np.isnan(test).sum()),
        "stuck": int((test > STUCK).sum()),
        "validation_error_mean": float(validation.mean()) if complete else "",
        "test_error_mean": float(test.mean()) if complete else "",
        "test_error_std": std(test) if complete and len(test) > 1 else "",
        "seeds_at_target": int(np.isfinite(pushes).sum()),
        "pushes_to_target_mean": float(pushes.mean()) if reached else "",
        "seconds_to_target_mean": float(seconds.mean()) if reached else "",
    }


def report(cells: list[Cell], about: str, good: float, target: float, out: Path) -> str:
    """Returns the tables and the sentences, and writes them and the CSV files into ``out``."""
    parts = [f"# Asynchronous training compared\n\n{about}"]
    for momentum, groups in by_momentum(cells).items():
        parts += [
            f"## Momentum {momentum:g}",
            f"Test error at the end (mean of the last {WINDOW} evaluations), %, mean ± standard "
            "deviation over the seeds. In brackets the learning rate, the one with the lowest "
            "validation error (* at the edge of the grid).",
            error_table(groups),
            f"Pushes until the training loss is {target:g}, and virtual seconds, at the learning "
            "rate that needs the fewest. (Where not every seed gets there: how many do.)",
            target_table(groups, target),
            words(groups, good, target),
        ]
    parts.append(
        "(Helped, hurt: by more than two standard errors of the difference of the means, or, where "
        "seeds failed, by numbers of them that chance explains in at most one case of ten: of five "
        "seeds three and none. About one comparison in ten is that far apart by chance. Failed, "
        f"stuck: diverged, or over {100 * STUCK:g} % errors at the end.)"
    )
    text = "\n\n".join(parts)
    (out / "tables.md").write_text(text + "\n")
    same = [group for groups in by_momentum(cells).values() for group in groups.values()]
    write_csv(out / "grid.csv", [csv_row(cell, target) for cell in cells])
    write_csv(out / "test_error.csv", [csv_row(choose(group), target) for group in same])
    write_csv(
        out / "pushes_to_target.csv",
        [csv_row(fastest(group, target), target) for group in same],
    )
    return text
