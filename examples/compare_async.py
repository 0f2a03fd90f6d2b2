"""Compares optimizers for stale gradients: the experiment of the delay compensation paper, small.

M simulated workers train one model asynchronously (`optax_dcasgd.simulation`), for several M, and
with each method in METHODS: plain asynchronous SGD, steps scaled by staleness, Gap-Aware, delay
compensation; beside them synchronous SGD (SSGD, a barrier and the mean of M gradients) and
sequential SGD (M = 1). All methods see the same initial parameters, batches, compute times and
number of gradients ("pushes"). Every method is run over a grid of learning rates; its best one is
chosen by the validation error. Run it with

    python examples/compare_async.py --quick
    python examples/compare_async.py
    python examples/compare_async.py --problem mnist

It prints tables and says in words where compensation helped, where it made no difference and where
it hurt. Into --out it writes tables.md, the same tables as CSV, and for each momentum the plots
error_over_time_*.png and stable_region_*.png. Every finished cell (M, method, momentum, learning
rate) is one line of cells.jsonl, and is not run again: the same command goes on where it was
interrupted. (All learning rates of one M and method are one compiled program, and so finish
together. After changing a method, use another --out.)
"""

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import count, fraction, machine, make_folder, positive, read_entries
from compare_async_plots import plot_all
from compare_async_problems import PROBLEMS, split
from compare_async_report import Cell, report
from flax import nnx
from tqdm import tqdm

from optax_dcasgd import (
    add_delay_compensation,
    robust_delay_compensation,
    scale_by_gap,
    scale_by_staleness,
    simulation,
)

Link = Callable[[], optax.GradientTransformation]
Method = Callable[[Any, float], optax.GradientTransformation]


def sgd(learning_rate: Any, momentum: float) -> optax.GradientTransformation:
    """SGD; the learning rate may be traced, the momentum not."""
    return optax.sgd(learning_rate, momentum or None)


def before_sgd(link: Link) -> Method:
    """A method that changes the gradients and leaves the rest to SGD."""
    return lambda learning_rate, momentum: optax.chain(link(), sgd(learning_rate, momentum))


# Name -> function (learning_rate, momentum) -> optimizer. One more line adds one more method. The
# simulation passes stale_params, worker and staleness to whatever takes them.
METHODS: dict[str, Method] = {
    "SGD": sgd,
    "SSGD": sgd,
    "ASGD": sgd,
    "lr/tau": before_sgd(lambda: scale_by_staleness(1.0)),
    "lr/sqrt-tau": before_sgd(lambda: scale_by_staleness(0.5)),
    "Gap-Aware": before_sgd(scale_by_gap),
    # The defaults of MXNet, of the paper (with its λ0 of 2), and of this library.
    "DC-c": before_sgd(lambda: add_delay_compensation(0.04, decay=None, clip=None)),
    "DC-a": before_sgd(lambda: add_delay_compensation(2.0, clip=None)),
    "DC-a-clipped": before_sgd(add_delay_compensation),
    "robust": before_sgd(robust_delay_compensation),
}
MODES = {"SGD": "sequential", "SSGD": "sync"}  # of `simulation.run`; all others are "async"
COMPUTE_TIMES = {  # of one gradient, with a mean of one virtual second
    "exponential": simulation.exponential(),
    "lognormal": simulation.lognormal(),
    "deterministic": simulation.deterministic(),
}

FULL = {"workers": [1, 4, 8, 16, 32], "learning_rates": [0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6]}
FULL |= {"momentum": [0.0, 0.9], "seeds": 5}
QUICK = {"workers": [1, 4, 16], "learning_rates": [0.05, 0.1, 0.2, 0.4, 0.8]}
QUICK |= {"momentum": [0.0], "seeds": 3, "pushes": 1500}


def orders(args: argparse.Namespace) -> np.ndarray:
    """Which images are in which batch, (seeds, pushes, batch size): shuffled anew every epoch."""
    size = args.pushes * args.batch_size
    epochs = -(-size // PROBLEMS[args.problem].train_size)

    def order(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        indices = [rng.permutation(PROBLEMS[args.problem].train_size) for _ in range(epochs)]
        return np.concatenate(indices)[:size].reshape(args.pushes, args.batch_size)

    return np.stack([order(seed) for seed in range(args.seeds)]).astype(np.int32)


class Trainer:
    """Runs cells: all learning rates and seeds of one M and method in one compiled program."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.problem = args, PROBLEMS[args.problem]
        self.data = jax.tree.map(jnp.asarray, split(self.problem))
        models = [nnx.split(self.problem.model(nnx.Rngs(s)), nnx.Param) for s in range(args.seeds)]
        self.graphdef = models[0][0]
        self.params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(p for _, p in models))
        self.orders = jnp.asarray(orders(args))
        self.arrivals = functools.cache(self._arrivals)
        self.program = functools.cache(self._program)

    def _arrivals(self, workers: int) -> simulation.Arrivals:
        """One order of arrivals a seed."""
        compute_time = COMPUTE_TIMES[self.args.compute_time]
        keys = jax.vmap(jax.random.key)(jnp.arange(self.args.seeds))
        arrive = functools.partial(
            simulation.arrivals,
            num_workers=workers,
            num_updates=self.args.pushes,
            compute_time=compute_time,
        )
        return jax.vmap(arrive)(keys)

    def _logits(self, params: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(self.graphdef, params)(images)

    def _loss(self, params: Any, batch: Any, key: Any = None) -> jax.Array:
        images, labels = batch
        logits = self._logits(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def _evaluate(self, params: Any, data: Any) -> dict[str, jax.Array]:
        def logits(images: jax.Array) -> jax.Array:
            def of_one(image: jax.Array) -> jax.Array:
                return self._logits(params, image[None])[0]

            return jax.lax.map(of_one, images, batch_size=self.problem.evaluate_at_once)

        def error(images: jax.Array, labels: jax.Array) -> jax.Array:
            return jnp.mean(jnp.argmax(logits(images), axis=-1) != labels)

        images, labels = (x[: self.problem.evaluated] for x in data["train"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(images), labels)
        return {
            "training_loss": losses.mean(),
            "validation_error": error(*data["validation"]),
            "test_error": error(*data["test"]),
        }

    def _program(self, method: str, momentum: float, every: int) -> Callable[..., Any]:
        mode = MODES.get(method, "async")

        def train(lane: Any, of_seed: Any, data: Any) -> dict[str, jax.Array]:
            learning_rate, seed = lane
            params, order, arrivals = jax.tree.map(lambda x: x[seed], of_seed)
            images, labels = data["train"]
            history = simulation.run(
                jax.value_and_grad(self._loss),
                params,
                METHODS[method](learning_rate, momentum),
                lambda t: (images[order[t]], labels[order[t]]),
                arrivals,
                mode=mode,
                evaluate=functools.partial(self._evaluate, data=data),
                evaluate_every=every,
            ).history
            # From the first loss or parameter on that is not finite, the run counts as diverged.
            finite = history.evaluated <= history.num_finite
            curves = {name: jnp.where(finite, v, jnp.nan) for name, v in history.evaluation.items()}
            curves["seconds"] = history.time[history.evaluated - 1]
            return curves | {"updates": history.evaluated}

        # The images are an argument: the compiler would try to compute with constants in advance.
        def program(lanes: Any, of_seed: Any, data: Any) -> dict[str, jax.Array]:
            batch_size = min(len(lanes[0]), self.problem.at_once)
            train_lane = functools.partial(train, of_seed=of_seed, data=data)
            return jax.lax.map(train_lane, lanes, batch_size=batch_size)

        return jax.jit(program)

    def __call__(
        self, workers: int, method: str, momentum: float, learning_rates: list[float]
    ) -> list[Cell]:
        """One cell a learning rate."""
        sync = MODES.get(method) == "sync"
        arrivals, every = self.arrivals(workers), self.problem.evaluate_every
        if sync:
            every = max(1, every // workers)  # rounds
        else:
            # With room for the stale parameters of the largest M, one program serves every M.
            most = max(self.args.workers)
            arrivals = dataclasses.replace(arrivals, barrier=None, num_workers=most)
        num_rates, seeds = len(learning_rates), self.args.seeds
        lanes = (
            jnp.repeat(jnp.array(learning_rates), seeds),
            jnp.tile(jnp.arange(seeds), num_rates),
        )
        of_seed = (self.params, self.orders, arrivals)
        curves = self.program(method, momentum, every)(lanes, of_seed, self.data)
        curves = {name: np.asarray(v).reshape(num_rates, seeds, -1) for name, v in curves.items()}
        pushes = curves.pop("updates")[0, 0] * (workers if sync else 1)
        return [
            Cell(workers, method, momentum, rate, pushes, **{k: v[i] for k, v in curves.items()})
            for i, rate in enumerate(learning_rates)
        ]


class CellFile:
    """The finished cells, one line of JSON each, with the settings that they were run with."""

    def __init__(self, path: Path, settings: dict[str, Any], kind: Any = Cell):
        self.path, self.settings, self.kind = path, settings, kind
        self.cells: dict[tuple, Any] = {}
        for entry in read_entries(path, settings):
            self._add(entry)

    def append(self, cells: Iterable[Any]) -> None:
        """Writes cells to the end of the file."""
        with self.path.open("a") as file:
            for cell in cells:
                entry = {k: from_array(v) for k, v in dataclasses.asdict(cell).items()}
                file.write(json.dumps(entry | {"settings": self.settings}) + "\n")
                self._add(entry)

    def _add(self, entry: dict[str, Any]) -> None:
        """Keeps a cell rounded as in the file: a resumed run shows what a whole one does."""
        cell = self.kind(**{k: to_array(v) for k, v in entry.items()})
        self.cells[cell.name] = cell


def from_array(value: Any) -> Any:
    """What JSON can hold: lists for arrays, rounded, and null for NaN."""
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.kind != "f":
        return value.tolist()
    rounded = [float(f"{v:.5g}") for v in value.ravel()]
    as_json = np.array([v if math.isfinite(v) else None for v in rounded], object)
    return as_json.reshape(value.shape).tolist()


def to_array(value: Any) -> Any:
    """The inverse of `from_array`."""
    if not isinstance(value, list):
        return value
    return np.array(value, float if isinstance(value[0], list) else int)


def groups(args: argparse.Namespace) -> Iterator[tuple[int, str, float, list[float]]]:
    """The arguments of every call of the `Trainer`."""
    for momentum in args.momentum:
        # With momentum μ a gradient moves the parameters 1/(1 − μ) times as far in the end.
        rates = [float(f"{rate * (1 - momentum):.3g}") for rate in args.learning_rates]
        for workers in sorted(args.workers):
            for method in args.methods:
                # With one worker no gradient is stale, and every method is sequential SGD.
                if (workers == 1) == (method == "SGD"):
                    yield workers, method, momentum, rates


def run_all(args: argparse.Namespace) -> list[Cell]:
    """Runs what is not in the file of cells yet, and returns all cells."""
    settings = {name: getattr(args, name) for name in ("problem", "pushes", "batch_size", "seeds")}
    settings["compute_time"] = args.compute_time
    done = CellFile(args.out / "cells.jsonl", settings | PROBLEMS[args.problem].settings)
    wanted = [(*group, rate) for *group, rates in groups(args) for rate in rates]
    trainer = None
    found = sum(name in done.cells for name in wanted)
    with tqdm(total=len(wanted), initial=found, desc="cells", unit="cell") as bar:
        for workers, method, momentum, rates in groups(args):
            missing = [r for r in rates if (workers, method, momentum, r) not in done.cells]
            if missing:
                bar.set_postfix_str(f"M={workers}, {method}, momentum {momentum:g}")
                trainer = trainer or Trainer(args)
                done.append(trainer(workers, method, momentum, missing))
                bar.update(len(missing))
    return [done.cells[name] for name in wanted]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; whatever cannot be run ends here, before any training."""
    parser = argparse.ArgumentParser(
        description="Trains a small model with simulated asynchronous workers and compares "
        "methods for stale gradients. What is not given has the value in brackets."
    )

    def default(name: str) -> str:
        values = [FULL[name], QUICK[name]]
        full, quick = (
            " ".join(f"{v:g}" for v in (value if isinstance(value, list) else [value]))
            for value in values
        )
        return f" [{full}; with --quick {quick}]"

    add = parser.add_argument
    add("--quick", action="store_true", help="fewer M, rates, seeds and pushes: under two minutes")
    add("--problem", choices=PROBLEMS, default="digits", help="what to train [digits]")
    workers_help = "numbers of workers; 1 is sequential SGD" + default("workers")
    add("--workers", type=count, nargs="+", metavar="M", help=workers_help)
    methods_help = f"any of {' '.join(METHODS)} [all]"
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME",
        help=methods_help)  # fmt: skip
    momentum_help = "of SGD: one or more values" + default("momentum")
    add("--momentum", type=fraction, nargs="+", metavar="MU", help=momentum_help)
    rates_help = "the grid, without momentum; it is multiplied by 1 - MU" + default(
        "learning_rates"
    )
    add("--learning-rates", type=positive, nargs="+", metavar="LR", help=rates_help)
    seeds_help = "runs of each kind, with seeds 0, 1, ..." + default("seeds")
    add("--seeds", type=count, metavar="N", help=seeds_help)
    usual = ", ".join(f"{name} {p.pushes}" for name, p in PROBLEMS.items())
    pushes_help = (
        f"gradients a run, of all workers together [{usual}; with --quick {QUICK['pushes']}]"
    )
    add("--pushes", type=count, metavar="N", help=pushes_help)
    add("--batch-size", type=count, default=32, metavar="N", help="images a gradient [32]")
    add("--compute-time", choices=COMPUTE_TIMES, default="exponential",
        help="distribution of the time of one gradient; its mean is 1 virtual second "
        "[exponential]")  # fmt: skip
    targets = ", ".join(f"{name} {p.target:g}" for name, p in PROBLEMS.items())
    add("--target", type=positive, metavar="LOSS", help=f"training loss to reach [{targets}]")
    add("--out", type=Path, default=Path("compare_async_out"), help="folder for the results")
    args = parser.parse_args(argv)

    problem = PROBLEMS[args.problem]
    defaults = {"pushes": problem.pushes, "target": problem.target}
    defaults |= FULL | (QUICK if args.quick else {})
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("workers", "methods", "momentum", "learning_rates"):
        values = getattr(args, name)
        if repeated := [v for v in values if values.count(v) > 1]:
            option = name.replace("_", "-")
            parser.error(f"argument --{option}: {repeated[0]} is there more than once")
    if not list(groups(args)):
        parser.error(
            "argument --methods: SGD runs with 1 worker and all others with more; nothing is left "
            f"of methods {' '.join(args.methods)} with workers {' '.join(map(str, args.workers))}"
        )
    if args.pushes < max(args.workers):
        parser.error(
            f"argument --pushes: {args.pushes} pushes are fewer than one for each of "
            f"{max(args.workers)} workers"
        )
    if args.batch_size > problem.train_size:
        parser.error(
            f"argument --batch-size: {args.batch_size} images are more than the "
            f"{problem.train_size} training images"
        )
    args.learning_rates.sort()
    make_folder(parser, args.out)
    return args


def main(argv: list[str] | None = None) -> None:
    """Trains, prints, saves."""
    args = parse_args(argv)
    start = time.perf_counter()
    cells = run_all(args)
    problem = PROBLEMS[args.problem]
    about = (
        f"{args.problem}: {args.pushes} pushes of {args.batch_size} images, {args.seeds} seeds, "
        f"{args.compute_time} compute times with a mean of 1 virtual second"
    )
    print("\n" + report(cells, about, problem.good, args.target, args.out))
    plot_all(cells, args.problem, args.out)
    print(f"{machine()}, {time.perf_counter() - start:.0f} s")
    print(f"Saved tables.md, CSV files and plots in {args.out}")


if __name__ == "__main__":
    main()
