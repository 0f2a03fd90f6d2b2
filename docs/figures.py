"""Draws the manual's figures from committed results: ``python docs/figures.py NAME ...``, or all.

The colours are Okabe and Ito's, which the colour-blind tell apart, and lines differ in style too.
The background is white, so that a figure reads the same in a light and in a dark page.
"""

import argparse
import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from optax_dcasgd import diagnostics, simulation

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
# Of the methods of compare_async.py: what they are called in the results, in a figure, and how
# they are drawn.
METHODS = {
    "ASGD": ("stale gradients as they are", RED, "-", "o"),
    "lr/sqrt-tau": ("step over √τ", ORANGE, "--", "s"),
    "Gap-Aware": ("Gap-Aware", GREEN, "-.", "^"),
    "DC-c": ("DC-ASGD-c, MXNet's default", SKY, ":", "v"),
    "DC-a-clipped": ("add_delay_compensation()", BLUE, "-", "D"),
    "robust": ("robust_delay_compensation()", PINK, "-", "P"),
}
STUDIES = {"digits": "digits", "mnist": "MNIST"}
plain = FuncFormatter(lambda value, _: f"{value:g}")


def rows(study: str, table: str) -> list[dict[str, str]]:
    """The rows of a table of compare_async.py."""
    with (RESULTS / "compare_async" / study / f"{table}.csv").open() as file:
        return list(csv.DictReader(file))


def read(name: str) -> Any:
    """A JSON file of results."""
    return json.loads((RESULTS / name).read_text())


def log_axis(axis: Any, ticks: list[float]) -> None:
    """Labels a logarithmic axis at these values alone."""
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(NullFormatter())


def late_gradients() -> Figure:
    """Accuracy over time and over the learning rate: fresh, late, and late and compensated."""
    looks = {
        "fresh": ("fresh gradients", BLACK, "-"),
        "stale": ("8 updates late", RED, ":"),
        "compensated": ("8 updates late, compensated", BLUE, "--"),
    }
    runs = [read(f"train_flax/{path.name}") for path in (RESULTS / "train_flax").glob("*.json")]
    runs = sorted(runs, key=lambda run: run["options"]["learning_rate"])
    rates = [run["options"]["learning_rate"] for run in runs]
    figure = Figure(figsize=(8.6, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for method, (label, color, style) in looks.items():
        curves = runs[rates.index(0.2)]["curves"][method]
        values = 100 * np.array([curve["test accuracy"] for curve in curves], float)
        updates = curves[0]["updates"]
        left.plot(updates, values.mean(0), style, color=color, linewidth=2, label=label)
        left.fill_between(updates, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
        last = [
            100 * np.mean([curve["test accuracy"][-1] for curve in run["curves"][method]])
            for run in runs
        ]
        right.plot(rates, last, style, color=color, linewidth=2, marker="o", markersize=5)
    left.set(xlabel="updates", ylabel="test accuracy, %", ylim=(0, 100))
    left.set_title("learning rate 0.2", fontsize="medium")
    right.set(xscale="log", xlabel="learning rate")
    right.set_title("after 1,000 updates", fontsize="medium")
    log_axis(right.xaxis, rates)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def stable_region() -> Figure:
    """How many cells of M × learning rate end with a low error for every seed."""
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    names = list(METHODS)[::-1]
    for axis, (study, title) in zip(axes, STUDIES.items(), strict=True):
        text = (RESULTS / "compare_async" / study / "tables.md").read_text()
        found = re.findall(r"Stable region: of (\d+) .* under (\d+) % test error: (.*)\.", text)
        for (_, _, counts), offset, hatch in zip(found, (0.2, -0.2), ("", "////"), strict=True):
            of_method = dict(part.rsplit(" ", 1) for part in counts.split(", "))
            bars = axis.barh(
                np.arange(len(names)) + offset,
                [int(of_method[name]) for name in names],
                0.36,
                color=[METHODS[name][1] for name in names],
                edgecolor="white",
                hatch=hatch,
            )
            axis.bar_label(bars, padding=3, fontsize=8)
        cells, limit, _ = found[0]
        axis.set(xlim=(0, 31), xlabel=f"cells of {cells} with test error under {limit} %")
        axis.set_title(title, fontsize="medium")
        axis.set_yticks(range(len(names)), [METHODS[name][0] for name in names])
    figure.suptitle("upper bar: no momentum; lower, hatched: momentum 0.9", fontsize="small")
    return figure


def pushes_to_target() -> Figure:
    """Gradients until a training loss, against the number of workers."""
    figure = Figure(figsize=(8.6, 6.2), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for row_of_axes, (study, title) in zip(axes, STUDIES.items(), strict=True):
        for axis, momentum in zip(row_of_axes, ("0", "0.9"), strict=True):
            table = [row for row in rows(study, "pushes_to_target") if row["momentum"] == momentum]
            (alone,) = (float(r["pushes_to_target_mean"]) for r in table if r["method"] == "SGD")
            axis.axhline(alone, color=BLACK, linewidth=1, label="sequential SGD")
            for name, (label, color, style, marker) in METHODS.items():
                points = [
                    (int(row["workers"]), float(row["pushes_to_target_mean"]))
                    for row in table
                    if row["method"] == name and row["seeds"] == row["seeds_at_target"]
                ]
                axis.plot(
                    *zip(*points, strict=True),
                    style,
                    color=color,
                    marker=marker,
                    markersize=5,
                    label=label,
                )
            axis.set(xscale="log", yscale="log")
            log_axis(axis.xaxis, [4, 8, 16, 32])
            log_axis(axis.yaxis, [250, 500, 1000, 2000])
            axis.set_title(f"{title}, momentum {momentum}", fontsize="medium")
            axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("workers M")
    for axis in axes[:, 0]:
        axis.set_ylabel("gradients until the target")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8.5
    )
    return figure


def time_of_an_update() -> Figure:
    """Milliseconds of one update on a CPU, in each form and beside the peers."""
    cases = read("update-cpu-epyc-jax-0.10.2.json")["cases"]
    figure = Figure(figsize=(8.6, 4.1), layout="constrained")
    axes = figure.subplots(1, len(cases), sharey=True)
    for axis, (title, forms) in zip(axes, cases.items(), strict=True):
        ours = [name for name in forms if "dcasgd(" in name]
        for names, color, marker, label in (
            (ours, BLUE, "o", "this library"),
            ([name for name in forms if name not in ours], RED, "s", "others"),
        ):
            y = [-list(forms).index(name) for name in names]
            times = np.array(
                [[forms[n][f"{k}_ms"] for k in ("min", "median", "max")] for n in names]
            )
            axis.hlines(y, times[:, 0], times[:, 2], color=color, alpha=0.4, linewidth=3)
            axis.plot(times[:, 1], y, marker, color=color, markersize=6, label=label)
        axis.axvline(forms["optax.sgd"]["median_ms"], color=BLACK, linewidth=0.8, linestyle=":")
        axis.set(xscale="log", xlabel="milliseconds an update")
        log_axis(axis.xaxis, [3, 10, 30, 100])
        axis.set_yticks(-np.arange(len(forms)), list(forms))
        axis.set_title(title, fontsize="medium")
        axis.grid(axis="x", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def bytes_of_an_update() -> Figure:
    """Bytes a parameter that one donated update moves on a TPU v5e, by the compiler's count."""
    table = [
        row
        for row in read("tpu-compile-jax-0.12.json")["rows"]
        if row["chip"] == "v5e" and row["returned"] == "params, state"
    ]
    names = list(dict.fromkeys(row["step"] for row in table))[::-1]
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    axis = figure.subplots()
    for dtype, offset, color in (("float32", 0.2, BLUE), ("bfloat16", -0.2, ORANGE)):
        moved = {row["step"]: row for row in table if row["dtype"] == dtype}
        values = [moved[name]["bytes_per_parameter"] for name in names]
        bars = axis.barh(np.arange(len(names)) + offset, values, 0.36, color=color, label=dtype)
        axis.bar_label(bars, labels=[f"{value:.0f}" for value in values], padding=3, fontsize=8)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="bytes a parameter, one donated update, TPU v5e")
    axis.legend(title="parameters", loc="lower right")
    axis.grid(axis="x", alpha=0.3)
    return figure


def staleness() -> Figure:
    """How stale gradients are, with workers alike and with a slow one; from the simulator."""
    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, slow, title in (
        (axes[0], {}, "8 workers alike"),
        (axes[1], {7: 4.0}, "one 4 × slower"),
    ):
        arrivals = simulation.arrivals(
            jax.random.key(0), 8, 4000,
            compute_time=simulation.lognormal(1.0, 0.5), slowdown=slow,
        )  # fmt: skip
        of_the_slow = np.asarray(arrivals.worker) == 7
        tau = np.asarray(arrivals.staleness)
        bins = np.arange(0, 62) - 0.5
        share = np.full(tau.size, 100 / tau.size)
        parts = (~of_the_slow, of_the_slow)
        axis.hist(
            [tau[part] for part in parts],
            bins,
            weights=[share[part] for part in parts],
            stacked=True,
            color=[BLUE, ORANGE],
            label=["workers 0 to 6", "worker 7"],
        )
        axis.set_title(f"{title}; mean staleness {tau.mean():.1f}", fontsize="medium")
        axis.set_xlabel("staleness τ, updates")
        axis.legend()
    axes[0].set_ylabel("share of gradients, %")
    return figure


def cells(name: str) -> list[dict[str, Any]]:
    """The cells of an example on pipelines or overlapped reductions."""
    lines = (RESULTS / name / "cells.jsonl").read_text().splitlines()
    return [entry["name"] | entry["curves"] for entry in map(json.loads, lines)]


def given_back() -> Figure:
    """What overlapped reductions and pipelines cost, and what the recipe leaves of it."""
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    looks = {
        "fresh": ("the synchronous step", BLACK, "-", "o"),
        "stale": ("one update late", RED, ":", "s"),
        "predicted+robust": ("predicted, compensated", BLUE, "--", "D"),
    }
    found = [cell for cell in cells("overlapped_data_parallel") if cell["optimizer"] == "SGD"]
    for method, (label, color, style, marker) in looks.items():
        of_method = [cell for cell in found if cell["method"] == method]
        of_method.sort(key=lambda cell: cell["learning_rate"])
        rates = [cell["learning_rate"] for cell in of_method]
        last = 100 * np.array([[run[-1] for run in cell["accuracy"]] for cell in of_method])
        left.plot(rates, last.mean(1), style, color=color, marker=marker, markersize=5, label=label)
        left.fill_between(rates, last.min(1), last.max(1), color=color, alpha=0.15, lw=0)
    left.set(xscale="log", xlabel="learning rate", ylabel="test accuracy, %", ylim=(0, 100))
    log_axis(left.xaxis, rates)
    left.set_title("all-reduce under the next step, SGD 0.9", fontsize="medium")
    left.legend(fontsize=8.5, loc="lower left")

    of_kind: dict[tuple[str, str, int], list[np.ndarray]] = {}
    for cell in cells("pipeline_ideas"):
        kind = cell["optimizer"], cell["method"], cell["stages"]
        of_kind.setdefault(kind, []).append(np.array(cell["loss"], float))
    best = {
        kind: min(
            (loss for loss in losses if np.isfinite(loss).all()), key=lambda x: x[:, -1].mean()
        )
        for kind, losses in of_kind.items()
    }
    for optimizer, color, marker in (
        ("Adam", ORANGE, "s"),
        ("SGD", GREEN, "^"),
        ("Muon", BLUE, "D"),
    ):
        recipe = "strong" if optimizer == "Muon" else "strong+momentum-up"
        for method, style, label in (("stale", ":", "stale"), (recipe, "-", "the recipe")):
            points = []
            for stages in sorted(n for o, m, n in best if (o, m) == (optimizer, method)):
                fresh, late = (best[optimizer, m, stages] for m in ("fresh", method))
                updates = np.arange(1, 1 + fresh.shape[1])
                overhead = diagnostics.overhead(fresh, late, updates)
                points.append((stages, overhead.ratio, overhead.standard_error))
            right.errorbar(
                *zip(*points, strict=True), ls=style, color=color, marker=marker, markersize=5,
                capsize=3, label=f"{optimizer}, {label}",
            )  # fmt: skip
    right.axhline(1, color=BLACK, linewidth=1)
    right.set(
        xscale="log", xlabel="stages of a pipeline", ylabel="updates for the same loss, × fresh"
    )
    log_axis(right.xaxis, [4, 8, 16])
    right.set_title("stale pipelines of a small transformer", fontsize="medium")
    right.legend(fontsize=8.5)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    function.__name__: function
    for function in (
        late_gradients,
        given_back,
        stable_region,
        pushes_to_target,
        time_of_an_update,
        bytes_of_an_update,
        staleness,
    )
}


def main(argv: list[str] | None = None) -> None:
    """Draws the figures that are named."""
    parser = argparse.ArgumentParser(description="Draws the manual's figures.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--out", type=Path, default=HERE / "figures", help="folder for them")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in FIGURES:
            parser.error(f"{name!r} is no figure: they are {', '.join(FIGURES)}")
    # The same file for the same results: no date, no random names.
    mpl.rcParams.update({"svg.hashsalt": "optax_dcasgd", "font.size": 10})
    for name in args.names or FIGURES:
        path = args.out / f"{name}.svg"
        FIGURES[name]().savefig(path, metadata={"Date": None})
        print(f"Saved {path}")


if __name__ == "__main__":
    main()
