"""The plots of compare_async.py: error over virtual time, and where training is stable."""

import itertools
from pathlib import Path

import numpy as np
from compare_async_report import WINDOW, Cell, Groups, by_momentum, choose, final
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

DPI = 85  # of the plots: small files, about 900 pixels wide
# Of the methods' lines. Okabe and Ito's colours, which the colour-blind tell apart; methods of one
# kind share a colour and differ in style.
LOOKS = {
    "SGD": ("#000000", "-"),
    "SSGD": ("#999999", "-"),
    "DiLoCo": ("#999999", "--"),
    "ASGD": ("#D55E00", "-"),
    "lr/tau": ("#E69F00", ":"),
    "lr/sqrt-tau": ("#E69F00", "--"),
    "Gap-Aware": ("#009E73", "-."),
    "DC-c": ("#56B4E9", ":"),
    "DC-a": ("#56B4E9", "--"),
    "DC-a-clipped": ("#0072B2", "-"),
    "robust": ("#CC79A7", "-"),
}
MORE_LOOKS = [("#CC79A7", style) for style in ("--", ":", "-.")]  # of methods that were added


def plot_all(cells: list[Cell], problem: str, out: Path) -> None:
    """Both plots for each momentum, as PNG files."""
    for momentum, groups in by_momentum(cells).items():
        title = f"{problem}, momentum {momentum:g}"
        plot_error_over_time(
            groups,
            f"{title}, each method at its best learning rate",
            out / f"error_over_time_momentum_{momentum:g}.png",
        )
        plot_stable_region(
            groups,
            f"{title}; ×n: n seeds diverged",
            out / f"stable_region_momentum_{momentum:g}.png",
        )


def running_mean(values: np.ndarray) -> np.ndarray:
    """Of each value and those before it, at most WINDOW in all; NaN stays NaN."""
    return np.array([values[max(0, i - WINDOW + 1) : i + 1].mean() for i in range(len(values))])


def plot_error_over_time(groups: Groups, title: str, path: Path) -> None:
    """A panel for each M: mean test error against virtual time, log-log."""
    workers = sorted({w for _, w in groups if w > 1}) or [1]
    methods = list(dict.fromkeys(m for m, _ in groups))
    looks = dict(zip((m for m in methods if m not in LOOKS), itertools.cycle(MORE_LOOKS))) | LOOKS
    columns = min(2, len(workers))
    rows = -(-len(workers) // columns)
    figure = Figure(figsize=(5 * columns, 3.6 * rows + 1), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(workers) :]:
        axis.remove()
    lowest = 100.0
    for axis, w in zip(axes.flat, workers, strict=False):
        for method in methods:
            cells = groups.get((method, 1 if method == "SGD" else w))
            if cells:
                cell = choose(cells)
                errors = 100 * running_mean(cell.test_error.mean(0))
                lowest = np.nanmin([lowest, *errors])
                axis.plot(
                    cell.seconds.mean(0),
                    errors,
                    color=looks[method][0],
                    linestyle=looks[method][1],
                    linewidth=1.6,
                    label=f"{method} (M=1)" if method == "SGD" else method,
                )
        axis.set(xscale="log", yscale="log", title=f"M = {w}")
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel(f"test error, % (running mean of {WINDOW})")
    bottom = max(tick for tick in (1, 2, 5, 10, 20, 50) if tick <= max(1, 0.95 * lowest))
    axes.flat[0].set_ylim(bottom, 100)  # of all, which share it
    for axis in axes.flat[: len(workers)]:
        axis.set_xlabel("virtual seconds (one gradient: 1 s on average)")
        for one in (axis.xaxis, axis.yaxis):
            low, high = one.get_view_interval()
            # Over more than two decades the labels in between would touch; in few there are none.
            subs = (1,) if high > 100 * low else (1, 2, 5) if high > 4 * low else range(1, 10)
            one.set_major_locator(LogLocator(subs=subs))
            one.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            one.set_minor_formatter(NullFormatter())
    figure.suptitle(title, fontsize="medium")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=1 + 2 * columns, handlelength=3
    )
    figure.savefig(path, dpi=DPI)


def plot_stable_region(groups: Groups, title: str, path: Path) -> None:
    """A heat map for each method: test error over M × learning rate, one scale for all."""
    methods = [m for m in dict.fromkeys(m for m, _ in groups) if m != "SGD"]
    if not methods:
        return
    workers = sorted({w for m, w in groups if m != "SGD"})
    rates = sorted({cell.learning_rate for cells in groups.values() for cell in cells})
    columns = min(3 if len(methods) > 4 else 2, len(methods))
    rows = -(-len(methods) // columns)
    size = (1.5 + max(2.4, 0.5 * len(rates)) * columns, 1.1 + (0.7 + 0.36 * len(workers)) * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis in axes.flat[len(methods) :]:
        axis.remove()
    # Light is good; grey, outside the scale, is where a seed diverged.
    colors = colormaps["viridis_r"].with_extremes(bad="#d9d9d9")
    for axis, method in zip(axes.flat, methods, strict=False):
        values = np.full((len(workers), len(rates)), np.nan)
        for cell in (c for w in workers for c in groups.get((method, w), [])):
            row, column = workers.index(cell.workers), rates.index(cell.learning_rate)
            errors = final(cell.test_error)
            diverged = int(np.isnan(errors).sum())
            # No mean over the rest: a cell with a diverged seed has no colour of the scale.
            values[row, column] = np.nan if diverged else 100 * errors.mean()
            text = f"×{diverged}" if diverged else f"{100 * errors.mean():.0f}"
            dark = not diverged and values[row, column] < 15
            axis.text(
                column, row, text, ha="center", va="center", fontsize=7,
                color="black" if dark or diverged else "white",
            )  # fmt: skip
        image = axis.imshow(
            np.ma.masked_invalid(values), cmap=colors, norm=LogNorm(2, 90), aspect="auto"
        )
        axis.set_title(method, fontsize="medium")
        axis.tick_params(labelbottom=axis in axes.flat[max(0, len(methods) - columns) :])
        axis.set_xticks(range(len(rates)), [f"{r:g}" for r in rates], rotation=90, fontsize=8)
        axis.set_yticks(range(len(workers)), [str(w) for w in workers], fontsize=8)
    figure.supxlabel("learning rate", fontsize="medium")
    figure.supylabel("workers M", fontsize="medium")
    figure.suptitle(title, fontsize="medium")
    bar = figure.colorbar(
        image,
        ax=list(axes.flat[: len(methods)]),
        label="mean test error, %",
        ticks=[2, 5, 10, 20, 50, 90],
    )
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    figure.savefig(path, dpi=DPI)
