"""What overlapped_data_parallel.py and pipeline_delay.py say about their runs."""

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import compare, machine, mean_and_std
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from stale_methods import METHODS, OPTIMIZERS, Cell, Grid, cell_names

from optax_dcasgd import diagnostics

STYLES = {  # colours of Okabe and Ito, which people with any colour vision can tell apart
    "fresh": ("#000000", "-"),
    "stale": ("#D55E00", ":"),
    "scaled": ("#999999", "-."),
    "DC-a": ("#F0E442", "--"),
    "predicted": ("#0072B2", "--"),
    "extrapolated": ("#E69F00", "--"),
    "robust": ("#009E73", "--"),
    "predicted+extrapolated": ("#CC79A7", "-"),
    "predicted+robust": ("#56B4E9", "-"),
    "extrapolated+robust": ("#882255", "-."),
    "all-three": ("#009E73", "-"),
    "strong": ("#0072B2", "-"),
    "fresh+extrapolated": ("#999999", "-"),
}


@dataclasses.dataclass(frozen=True)
class Measure:
    """By what runs are judged: numbers of which the lowest is the best."""

    name: str
    final: Callable[[Cell], np.ndarray]  # of each seed, NaN where it failed
    shown: Callable[[np.ndarray], np.ndarray]  # for people
    digits: int


Rates = dict[float, Cell]  # the cells that differ in the learning rate alone


def groups(cells: list[Cell]) -> Iterator[tuple[str, dict[str, Rates], int | None]]:
    """For each number of stages and optimizer: its name, and the cells of each method."""
    found: dict[tuple[int | None, str], dict[str, Rates]] = {}
    for cell in cells:
        methods = found.setdefault((cell.get("stages"), cell["optimizer"]), {})
        methods.setdefault(cell["method"], {})[cell["learning_rate"]] = cell
    for stages, optimizer in sorted(found, key=lambda k: (k[0] or 0, [*OPTIMIZERS].index(k[1]))):
        methods = found[stages, optimizer]
        ordered = {name: methods[name] for name in METHODS if name in methods}
        yield f"{stages} stages, {optimizer}" if stages else optimizer, ordered, stages


def best(rates: Rates, measure: Measure) -> Cell:
    """The learning rate with the fewest failed seeds, and then the lowest mean of the others."""

    def badness(cell: Cell) -> tuple[int, float]:
        values = measure.final(cell)
        bad = np.isnan(values)
        return int(bad.sum()), math.inf if bad.all() else float(np.mean(values[~bad]))

    return min(rates.values(), key=badness)


def final_words(cell: Cell, measure: Measure) -> str:
    """Mean ± standard deviation of the seeds that did not fail, and how many did."""
    values = measure.final(cell)
    good = values[~np.isnan(values)]
    if not good.size:
        return "all failed"
    words = mean_and_std(measure.shown(good), measure.digits)
    return words if len(good) == len(values) else f"{words}, {len(values) - len(good)} failed"


def share_closed(fresh: Cell, stale: Cell, cell: Cell, measure: Measure) -> str:
    """Of what staleness clearly cost, the share that this cell does not lose; in percent."""
    finals = [measure.final(c) for c in (fresh, stale, cell)]
    means = [float(np.mean(values)) for values in finals]
    hurt = compare(finals[0], finals[1], standard_errors=3) == "hurt"
    if not (hurt and all(map(math.isfinite, means))):
        return ""
    return f"{round(100 * (means[1] - means[2]) / (means[1] - means[0]))} %"


def overhead_of(fresh: Cell, cell: Cell, updates: np.ndarray) -> diagnostics.Overhead | None:
    """None if the fresh runs do not even have a first loss."""
    if not np.isfinite(fresh["loss"][:, 0]).all():
        return None
    return diagnostics.overhead(fresh["loss"], cell["loss"], updates)


def overhead_words(fresh: Cell, cell: Cell, updates: np.ndarray) -> str:
    """The overhead ± its standard error, which one seed does not have."""
    found = overhead_of(fresh, cell, updates)
    if found is None:
        return ""
    error = found.standard_error
    return f"{found.ratio:.2f}" + (f" ± {error:.2f}" if math.isfinite(error) else "")


def row(*entries: str) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(entries)} |"


def tables(name: str, methods: dict[str, Rates], updates: np.ndarray, measure: Measure) -> str:
    """Every cell, and the best of each method beside fresh and stale training."""
    rates = sorted({rate for cells in methods.values() for rate in cells})
    lines = [f"### {name}: {measure.name}", "", row("learning rate", *(f"{r:g}" for r in rates))]
    lines.append("|---" * (1 + len(rates)) + "|")
    for method, cells in methods.items():
        shown = [final_words(cells[rate], measure) if rate in cells else "" for rate in rates]
        lines.append(row(method, *shown))
    if "fresh" not in methods or "stale" not in methods:
        return "\n".join(lines)

    chosen = {method: best(cells, measure) for method, cells in methods.items()}
    fresh, stale = chosen["fresh"], chosen["stale"]
    head = ["at its best rate", "rate", measure.name, "gap closed", "overhead"]
    lines += ["", row(*head, "against stale", "against fresh"), "|---" * 7 + "|"]
    finals = {method: measure.final(cell) for method, cell in chosen.items()}
    for method, cell in chosen.items():
        rate = f"{cell['learning_rate']:g}"
        tried = sorted(methods[method])
        if len(rates) > 2 and cell["learning_rate"] in (tried[0], tried[-1]):
            rate += " (edge)"
        entries = [method, rate, final_words(cell, measure), "", "", "", ""]
        if method not in ("fresh", "stale"):
            entries[3] = share_closed(fresh, stale, cell, measure)
            entries[5] = compare(finals["stale"], finals[method], standard_errors=3)
        if method != "fresh":
            entries[6] = compare(finals["fresh"], finals[method], standard_errors=3)
            entries[4] = overhead_words(fresh, cell, updates)
        lines.append(row(*entries))

    lines += ["", "Against fresh at the same learning rate:", ""]
    lines += [row("", *(f"{r:g}" for r in rates)), "|---" * (1 + len(rates)) + "|"]
    for method, cells in methods.items():
        if method != "fresh":
            both = [rate in cells and rate in methods["fresh"] for rate in rates]
            words = [
                compare(
                    measure.final(methods["fresh"][rate]),
                    measure.final(cells[rate]),
                    standard_errors=3,
                )
                if there
                else ""
                for rate, there in zip(rates, both, strict=True)
            ]
            lines.append(row(method, *words))
    return "\n".join(lines)


def overview(cells: list[Cell], updates: np.ndarray, measure: Measure) -> str:
    """A row for each number of stages and optimizer, with the methods that all of them have."""
    found = {
        name: {method: best(rates, measure) for method, rates in methods.items()}
        for name, methods, _ in groups(cells)
    }
    shared = [m for m in METHODS if all(m in chosen for chosen in found.values())]
    if len(found) < 2 or not {"fresh", "stale"} < {*shared}:
        return ""
    shared.remove("fresh")
    lines = [
        "### Overhead (gap closed), each at its best rate",
        "",
        row("", *shared),
        "|---" * (1 + len(shared)) + "|",
    ]
    for name, chosen in found.items():
        entries = [name]
        for method in shared:
            entry = overhead_words(chosen["fresh"], chosen[method], updates)
            if method != "stale":
                share = share_closed(chosen["fresh"], chosen["stale"], chosen[method], measure)
                entry += f" ({share or '–'})"
            entries.append(entry)
        lines.append(row(*entries))
    return "\n".join(lines)


def plot_curves(cells: list[Cell], updates: np.ndarray, measure: Measure, path: Path) -> None:
    """Draws every method at its best rate: the mean over seeds, and the lowest to the highest."""
    found = list(groups(cells))
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(4.6 * columns, 1 + 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    handles = {}
    for axis, (name, methods, _) in zip(axes, found, strict=False):
        for method, cells_of in methods.items():
            runs = best(cells_of, measure)["loss"]  # NaN, and so cut off, once one diverges
            color, line = STYLES[method]
            (handles[method],) = axis.plot(updates, runs.mean(0), line, color=color, lw=1.6)
            axis.fill_between(updates, runs.min(0), runs.max(0), color=color, alpha=0.12, lw=0)
        axis.set(title=name, xlabel="updates", ylabel="loss", yscale="log")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 4, 6)))  # 8, 9 and 10 would touch
        axis.set_ylim(top=min(axis.get_ylim()[1], 5))  # a guess costs 2.3 or 4.5
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:.2g}")
        axis.grid(alpha=0.3, which="both")
    for axis in axes[len(found) :]:
        axis.remove()
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2 * min(2, columns))
    figure.savefig(path, dpi=150)


def plot_overhead(cells: list[Cell], updates: np.ndarray, measure: Measure, path: Path) -> None:
    """Draws the overhead at the best rates against the number of stages, ± its standard error."""
    points: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    for name, methods, stages in groups(cells):
        if stages and "fresh" in methods:
            fresh = best(methods["fresh"], measure)
            for method, rates in methods.items():
                found = overhead_of(fresh, best(rates, measure), updates)
                if method != "fresh" and found is not None and math.isfinite(found.ratio):
                    point = (stages, found.ratio, np.nan_to_num(found.standard_error))
                    points.setdefault(name.split(", ")[1], {}).setdefault(method, []).append(point)
    if not points:
        return
    figure = Figure(figsize=(4.6 * len(points), 4.2), layout="constrained")
    axes = figure.subplots(1, len(points), squeeze=False, sharey=True)[0]
    handles = {}
    for axis, (optimizer, methods) in zip(axes, points.items(), strict=True):
        for method, values in methods.items():
            stages, ratios, errors = zip(*values, strict=True)
            color, line = STYLES[method]
            options = {"color": color, "ls": line, "marker": "o", "capsize": 3}
            handles[method] = axis.errorbar(stages, ratios, errors, **options)
        axis.axhline(1, color="#000000", lw=1)
        axis.set(
            title=optimizer, xlabel="stages", xticks=sorted({cell["stages"] for cell in cells})
        )
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("updates for the same loss, fresh = 1")
    ncols = 2 * min(2, len(points))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=ncols)
    figure.savefig(path, dpi=150)


def report(cells: list[Cell], updates: np.ndarray, measure: Measure, title: str, out: Path) -> str:
    """The tables, also written to tables.md, and the plots."""
    parts = [tables(name, methods, updates, measure) for name, methods, _ in groups(cells)]
    parts.append(overview(cells, updates, measure))
    words = "\n\n".join(filter(None, [f"## {title}", *parts]))
    (out / "tables.md").write_text(words + "\n")
    plot_curves(cells, updates, measure, out / "curves.png")
    plot_overhead(cells, updates, measure, out / "overhead.png")
    return words


def run(
    args: argparse.Namespace,
    settings: dict[str, Any],
    make_trainer: Callable[[argparse.Namespace], Any],
    measure: Measure,
    evaluate_every: int,
) -> None:
    """Trains what is missing, prints, saves."""
    start = time.perf_counter()
    settings = {"updates": args.updates, "seeds": args.seeds, **settings}
    grid, names = Grid(args.out / "cells.jsonl", settings), cell_names(args)
    if not args.report:
        grid.run(names, make_trainer(args), args.updates)
    updates = evaluate_every * np.arange(1, 1 + args.updates // evaluate_every)
    title = ", ".join(f"{name} {value}" for name, value in settings.items())
    print(f"\n{report(grid.finished(names), updates, measure, title, args.out)}\n")
    print(f"{machine()}, {time.perf_counter() - start:.0f} s")
    print(f"Saved tables.md and plots in {args.out}")
