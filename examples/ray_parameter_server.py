"""Trains on MNIST with real asynchronous workers, one of which is slow on purpose.

Three times, from the same batches and with as many gradients, on Ray:

* SSGD: synchronous; each update waits for all workers and applies the mean of their gradients;
* ASGD: asynchronous; each gradient is applied when it comes, as it is;
* DC-ASGD: the same, with `optax_dcasgd.add_delay_compensation` in front of the optimizer.

It prints test accuracy and speed, and saves how stale the gradients were (``staleness.png``), all
numbers (``results.json``) and the order of each asynchronous run (``asgd.npz``, ``dc-asgd.npz``),
which `optax_dcasgd.simulation.run` replays. Ray starts by itself; with ``--address`` it joins a
cluster. To watch it recover:

    python examples/ray_parameter_server.py
    python examples/ray_parameter_server.py --kill-worker
    python examples/ray_parameter_server.py --kill-server
"""

import argparse
import collections
import contextlib
import json
import logging
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import psutil
from common import count, fraction, make_folder, nonnegative, positive
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from train_flax import CNN, TRAIN_IMAGES, evaluate, load_data

from optax_dcasgd import add_delay_compensation, parameter_server

METHODS = ("SSGD", "ASGD", "DC-ASGD")


def make_optimizer(method: str, args: argparse.Namespace) -> optax.GradientTransformation:
    """What the runs differ in, beside the mode."""
    sgd = optax.sgd(args.learning_rate, args.momentum or None)
    if method != "DC-ASGD":
        return sgd
    # The server passes the stale parameters to the compensation.
    return optax.chain(add_delay_compensation(), sgd)


class Batches:
    """Batch i, after the time that a larger model would take to compute its gradient."""

    def __init__(self, data: tuple[np.ndarray, np.ndarray], args: argparse.Namespace, mark: str):
        self.data, self.mark = data, mark
        self.pause, self.slowdown = args.compute_time, args.slowdown
        rng = np.random.default_rng(args.seed)
        size = (args.gradients + 1000, args.batch_size)  # some more, for those that get lost
        self.chosen = rng.integers(0, TRAIN_IMAGES, size)

    def __call__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Called in the workers' processes (and once, for batch 0, in this one)."""
        time.sleep(self.pause * (self.slowdown if i > 0 and self.in_slow_worker() else 1))
        chosen = self.chosen[i % len(self.chosen)]
        return self.data[0][chosen], self.data[1][chosen]

    def in_slow_worker(self) -> bool:
        """Whether this is the process that was the first to ask."""
        try:
            with open(self.mark, "x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return Path(self.mark).read_text() == str(os.getpid())
        return True


def train(method: str, args: argparse.Namespace, data: Any, directory: Path) -> tuple[Any, dict]:
    """One run; returns its result, and what the table says of it."""
    graphdef, params = nnx.split(CNN(nnx.Rngs(args.seed)), nnx.Param)

    def loss_fn(params: nnx.State, batch: Any, key: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params)(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    synchronous = method == "SSGD"
    with Killer(args, directory / method):
        result = parameter_server.train(
            jax.value_and_grad(loss_fn),
            params,
            make_optimizer(method, args),
            Batches(data[0], args, str(directory / f"{method}.slow")),
            num_workers=args.workers,
            num_updates=args.gradients // args.workers if synchronous else args.gradients,
            mode="sync" if synchronous else "async",
            checkpoint_dir=directory / method,
            checkpoint_every=max(1, args.gradients // (40 if synchronous else 10)),
            address=args.address,
        )
    history = result.history
    # The first tenth is left out: workers start one after another, and compile.
    start = len(history.time) // 10
    pushes = (len(history.time) - start - 1) * (args.workers if synchronous else 1)
    row = {
        "accuracy": float(evaluate(graphdef, result.params, *data[1])),
        "updates": len(history.time),
        "gradients per second": float(pushes / (history.time[-1] - history.time[start])),
        "mean staleness": float(history.staleness.mean()),
        "largest staleness": int(history.staleness.max()),
        "events": dict(collections.Counter(event.kind for event in result.events)),
    }
    return result, row


class Killer:
    """Kills a worker, the server, or both with SIGKILL, if asked to: three times in each run."""

    def __init__(self, args: argparse.Namespace, checkpoints: Path):
        self.names = ["ray::Worker"] * args.kill_worker + ["ray::Server"] * args.kill_server
        self.checkpoints = checkpoints
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.kill)

    def kill(self) -> None:
        """Each time when there is a newer checkpoint, so that training is under way."""
        newest = 0
        for _ in range(3 if self.names else 0):
            while (version := self.newest()) <= newest:
                if self.done.wait(0.2):
                    return
            newest = version
            for name in self.names:
                # Ray, if started here, and its workers are children of this process.
                for process in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.Error):  # it may just have ended
                        if name in " ".join(process.cmdline()):
                            print(f"\nkilling {name}, process {process.pid}")
                            process.kill()
                            break

    def newest(self) -> int:
        """The updates in the newest checkpoint."""
        if not self.checkpoints.exists():
            return 0
        return max((int(p.name) for p in self.checkpoints.iterdir() if p.name.isdigit()), default=0)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *exc_info: Any) -> None:
        self.done.set()
        self.thread.join()


def plot(results: dict[str, Any], path: Path) -> None:
    """How stale the gradients of the asynchronous runs were: the slowest worker's, and others'."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    shown = [method for method in METHODS if method != "SSGD"]
    axes = figure.subplots(1, len(shown), sharex=True, sharey=True)
    for axis, method in zip(axes, shown, strict=True):
        history = results[method].history
        slow = np.bincount(history.worker).argmin()
        bins = np.arange(history.staleness.max() + 2) - 0.5
        parts = [
            history.staleness[history.worker != slow],
            history.staleness[history.worker == slow],
        ]
        # Side by side: on a logarithmic scale what is stacked has no height that can be read.
        axis.hist(parts, bins, label=["other workers", "slowest worker"],
                  color=["#0072b2", "#e69f00"])  # fmt: skip
        axis.set(title=method, xlabel="staleness (updates)", yscale="log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("gradients")
    axes[0].legend()
    figure.savefig(path, dpi=150)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Trains a small Flax classifier on MNIST images with asynchronous workers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--workers", type=count, default=4, help="how many workers")
    add("--gradients", type=count, default=1500, help="gradients a run")
    add("--learning-rate", type=positive, default=0.2, help="of SGD")
    add("--momentum", type=fraction, default=0.0, help="of SGD")
    add("--batch-size", type=count, default=32, help="images a gradient")
    add("--compute-time", type=nonnegative, default=0.02, help="seconds added to every gradient")
    add("--slowdown", type=nonnegative, default=5.0, help="factor on them for one of the workers")
    add("--seed", type=int, default=0, help="of the model and the batches")
    add("--kill-worker", action="store_true", help="kill a worker three times in each run")
    add("--kill-server", action="store_true", help="kill the server three times in each run")
    add("--address", default=None, help="of a Ray cluster; by default Ray starts on this machine")
    add("--out", type=Path, default=Path("ray_parameter_server_out"), help="folder for results")
    args = parser.parse_args(argv)
    if args.address and (args.kill_worker or args.kill_server):
        parser.error("--kill-worker and --kill-server need Ray to be started here: no --address")
    if args.gradients < 20 * args.workers:
        parser.error(f"argument --gradients: {args.workers} workers need {20 * args.workers}")
    make_folder(parser, args.out)
    return args


def main(argv: list[str] | None = None) -> None:
    """Trains, prints, saves."""
    args = parse_args(argv)
    logging.basicConfig(format="%(message)s")  # what goes wrong, as it happens
    data = load_data()
    results, rows = {}, {}
    for method in METHODS:
        print(method)
        with tempfile.TemporaryDirectory() as directory:
            results[method], rows[method] = train(method, args, data, Path(directory))
        if (arrivals := results[method].arrivals) is not None:
            arrivals.save(args.out / f"{method.lower()}.npz")
    print(f"\n{args.workers} workers, one of them {args.slowdown:g} times slower; "
          f"{args.gradients} gradients, learning rate {args.learning_rate:g}\n")  # fmt: skip
    columns = ("test accuracy", "updates", "gradients/s", "staleness", "largest", "  what happened")
    widths = (16, 9, 13, 11, 9, 0)
    print(f"{'':9}" + "".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True)))
    for method, row in rows.items():
        events = ", ".join(f"{n} × {kind}" for kind, n in row["events"].items()) or "-"
        cells = (
            f"{row['accuracy']:.1%}", row["updates"], f"{row['gradients per second']:.1f}",
            f"{row['mean staleness']:.1f}", row["largest staleness"], "  " + events,
        )  # fmt: skip
        print(f"{method:9}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)))
    plot(results, args.out / "staleness.png")
    options = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    (args.out / "results.json").write_text(
        json.dumps({"options": options, **rows}, indent=1) + "\n"
    )
    print(f"\nSaved staleness.png, results.json and the runs' arrivals in {args.out}")


if __name__ == "__main__":
    main()
