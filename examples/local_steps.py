"""Workers that take H steps of their own between two messages: what that saves and what it costs.

M simulated workers train a small model with `optax_dcasgd.local_updates`: each takes H steps of SGD
(of Adam for the text) from the parameters that it got and sends the difference, to which an outer
optimizer is applied. Compared are synchronous local SGD (SSGD: a barrier, and the mean of M
differences), the same with Nesterov momentum 0.9 outside (DiLoCo), and asynchronous workers whose
differences are applied as they come: as they are (ASGD), or after what compare_async.py does about
stale gradients. All see the same batches, each once, whatever M and H are. Run it with

    python examples/local_steps.py --quick
    python examples/local_steps.py --problem mnist
    python examples/local_steps.py --problem characters --batch-size 8

Speeds: "equal"; "1:4", where every second worker takes four times as long; and "1:4-balanced",
where those take a quarter of the steps, so that all send equally often. Every method is run over a
grid of outer learning rates. Shown are the best one (by the validation error) and a fixed one for
all. Every finished cell is one line of cells.jsonl in --out, and is not run again: the same command
goes on where it was interrupted.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import count, machine, make_folder, positive
from compare_async import METHODS as OF_GRADIENTS
from compare_async import MODES as MODES_OF_GRADIENTS
from compare_async import CellFile, Method, Trainer
from compare_async_problems import PROBLEMS
from local_steps_report import LocalCell, plot, report
from tqdm import tqdm

from optax_dcasgd import local_updates, simulation

# Name -> function (outer rate, momentum) -> outer optimizer: compare_async.py's, and DiLoCo's.
METHODS: dict[str, Method] = {
    **OF_GRADIENTS,
    "DiLoCo": lambda rate, _: optax.sgd(rate, 0.9, nesterov=True),
}
MODES = {**MODES_OF_GRADIENTS, "DiLoCo": "sync"}
SPEEDS = ("equal", "1:4", "1:4-balanced")
SLOWER = 4  # times as long
INNER = {  # optimizer, and its learning rate
    "digits": (optax.sgd, 0.1),
    "mnist": (optax.sgd, 0.1),
    "characters": (optax.adam, 0.003),
}

FULL: dict[str, Any] = {"workers": [4, 8, 16], "steps": [1, 4, 16, 64], "seeds": 5}
FULL |= {"methods": ["SSGD", "DiLoCo", "ASGD", "lr/sqrt-tau", "DC-a-clipped", "robust"]}
FULL |= {"rates": [0.0625, 0.125, 0.25, 0.5, 1.0, 2.0], "speeds": list(SPEEDS), "batches": 6144}
FULL |= {"target": 0.3}
QUICK: dict[str, Any] = {"workers": [4, 16], "steps": [1, 16], "seeds": 3}
QUICK |= {
    "methods": ["SSGD", "DiLoCo", "ASGD", "robust"],
    "rates": [0.125, 0.5, 1.0, 2.0],
    "speeds": ["1:4"],
}
QUICK |= {"batches": 1536, "target": 0.5}

Kind = tuple[str, int, int, str]  # speeds, H, M, method


class LocalTrainer(Trainer):
    """Runs cells: all outer rates and seeds of one kind in one compiled program."""

    def steps_of(self, workers: int, steps: int, speeds: str) -> np.ndarray:
        """H of each worker."""
        each = np.full(workers, steps)
        if speeds == "1:4-balanced":
            each[1::2] //= SLOWER
        return each

    def num_pushes(self, workers: int, steps: int, speeds: str) -> int:
        """How many pushes use up all batches."""
        return int(self.args.batches / self.steps_of(workers, steps, speeds).mean())

    def _arrivals(self, workers: int, steps: int, speeds: str) -> simulation.Arrivals:
        """One order of arrivals a seed. A batch takes 1 s on average, exponentially distributed."""
        slower = np.ones(workers)
        if speeds != "equal":
            slower[1::2] = SLOWER
        arrive = functools.partial(
            simulation.arrivals,
            num_workers=workers,
            num_updates=self.num_pushes(workers, steps, speeds),
            compute_time=lambda key: jax.random.gamma(key, steps) / steps,  # a batch's, of H
            slowdown=slower,
            local_steps=self.steps_of(workers, steps, speeds),
        )
        return jax.vmap(arrive)(jax.vmap(jax.random.key)(jnp.arange(self.args.seeds)))

    def _program(self, method: str, steps: int, is_equal: bool, every: int) -> Any:
        """Of all lanes; ``is_equal`` is whether all workers take as many steps."""
        mode = MODES.get(method, "async")
        local = local_updates(
            jax.value_and_grad(self._loss), self.args.inner(self.args.inner_rate), steps
        )

        def train(lane: Any, of_seed: Any, data: Any) -> dict[str, jax.Array]:
            rate, seed = lane
            params, order, arrivals = jax.tree.map(lambda x: x[seed], of_seed)
            images, labels = data["train"]

            def stack(first: Any, num_steps: Any) -> Any:
                index = order[(first + jnp.arange(steps)) % order.shape[0]]
                return images[index], labels[index]

            history = simulation.run(
                local, params, METHODS[method](rate, 0.0),
                (lambda t: stack(t * steps, steps)) if is_equal else stack, arrivals, mode=mode,
                evaluate=functools.partial(self._evaluate, data=data), evaluate_every=every,
            ).history  # fmt: skip
            finite = history.evaluated <= history.num_finite
            curves = {name: jnp.where(finite, v, jnp.nan) for name, v in history.evaluation.items()}
            curves["seconds"] = history.time[history.evaluated - 1]
            return curves | {"updates": history.evaluated}

        def program(lanes: Any, of_seed: Any, data: Any) -> dict[str, jax.Array]:
            train_lane = functools.partial(train, of_seed=of_seed, data=data)
            batch_size = min(len(lanes[0]), self.problem.at_once)
            return jax.lax.map(train_lane, lanes, batch_size=batch_size)

        return jax.jit(program)

    def __call__(self, kind: Kind, rates: list[float]) -> list[LocalCell]:
        """One cell an outer rate."""
        speeds, steps, workers, method = kind
        is_sync = MODES.get(method) == "sync"
        arrivals = self.arrivals(workers, steps, speeds)
        each = self.steps_of(workers, steps, speeds)
        every = self.args.batches / self.args.evaluations / each.mean()  # pushes
        every = max(1, round(every / workers if is_sync else every))
        if is_equal := len(set(each)) == 1:  # then push t uses stack t
            arrivals = dataclasses.replace(arrivals, batch=None, num_steps=None, local_steps=None)
        if not is_sync:
            # With room for the stale parameters of the largest M, one program serves every M.
            most = max(self.args.workers)
            arrivals = dataclasses.replace(
                arrivals, barrier=None, local_steps=None, num_workers=most
            )
        seeds = self.args.seeds
        lanes = jnp.repeat(jnp.array(rates), seeds), jnp.tile(jnp.arange(seeds), len(rates))
        program = self.program(method, steps, is_equal, every)
        curves = program(lanes, (self.params, self.orders, arrivals), self.data)
        curves = {name: np.asarray(v).reshape(len(rates), seeds, -1) for name, v in curves.items()}
        pushes = curves.pop("updates")[0, 0] * (workers if is_sync else 1)
        return [
            LocalCell(*kind, rate, pushes, **{k: v[i] for k, v in curves.items()})
            for i, rate in enumerate(rates)
        ]


def kinds(args: argparse.Namespace) -> Iterator[Kind]:
    """All calls of the trainer."""
    for speeds in args.speeds:
        for steps in args.steps:
            if speeds == "1:4-balanced" and steps % SLOWER:
                continue  # no quarter of the steps
            for method in args.methods:  # which share a program whatever M is
                for workers in args.workers:
                    yield speeds, steps, workers, method


def run_all(args: argparse.Namespace, trainer: Callable[..., Any] = LocalTrainer) -> list[Any]:
    """Runs what is not in the file of cells yet, and returns all cells."""
    names = ("problem", "batches", "batch_size", "seeds", "inner_rate", "evaluations")
    settings = {n: getattr(args, n) for n in names} | PROBLEMS[args.problem].settings
    done = CellFile(args.out / "cells.jsonl", settings, LocalCell)
    wanted = [(*kind, rate) for kind in kinds(args) for rate in args.rates]
    made = None
    found = sum(name in done.cells for name in wanted)
    with tqdm(total=len(wanted), initial=found, desc="cells", unit="cell") as bar:
        for kind in kinds(args):
            if missing := [rate for rate in args.rates if (*kind, rate) not in done.cells]:
                bar.set_postfix_str("{}, H={}, M={}, {}".format(*kind))
                made = made or trainer(args)
                done.append(made(kind, missing))
                bar.update(len(missing))
    return [done.cells[name] for name in wanted]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; whatever cannot be run ends here, before any training."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    asynchronous = [name for name in METHODS if name != "SGD"]

    def listed(name: str) -> str:
        full, quick = (" ".join(f"{v}" for v in kind[name]) for kind in (FULL, QUICK))
        return f" [{full}; with --quick {quick}]"

    add("--quick", action="store_true", help="fewer of everything: under two minutes")
    add("--problem", choices=PROBLEMS, default="digits", help="what to train [digits]")
    add("--workers", type=count, nargs="+", metavar="M", help="even" + listed("workers"))
    add("--steps", type=count, nargs="+", metavar="H", help="local steps" + listed("steps"))
    add("--speeds", choices=SPEEDS, nargs="+", help="see above" + listed("speeds"))
    add("--methods", choices=asynchronous, nargs="+", metavar="NAME",
        help=f"any of {' '.join(asynchronous)}" + listed("methods"))  # fmt: skip
    add("--rates", type=positive, nargs="+", metavar="LR", help="outer" + listed("rates"))
    add("--fixed-rate", type=positive, default=0.5, metavar="LR",
        help="the outer rate that is shown for all, if it was run [0.5]")  # fmt: skip
    inner = ", ".join(f"{name} {tx.__name__} {rate:g}" for name, (tx, rate) in INNER.items())
    add("--inner-rate", type=positive, metavar="LR", help=f"of the local steps [{inner}]")
    add("--seeds", type=count, metavar="N", help=f"[{FULL['seeds']}; --quick {QUICK['seeds']}]")
    add("--batches", type=count, metavar="N",
        help=f"in a run, of all workers [{FULL['batches']}; --quick {QUICK['batches']}]",
    )  # fmt: skip
    add("--batch-size", type=count, default=32, metavar="N", help="images a local step [32]")
    add("--evaluations", type=count, default=48, metavar="N", help="during a run [48]")
    add("--target", type=positive, metavar="LOSS",
        help="training loss to reach; at a low one no barrier gets there "
        f"[{FULL['target']}; --quick {QUICK['target']}]")  # fmt: skip
    add("--out", type=Path, default=Path("local_steps_out"), help="folder for the results")
    args = parser.parse_args(argv)
    for name, value in (FULL | (QUICK if args.quick else {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.inner, inner_rate = INNER[args.problem]
    args.inner_rate = args.inner_rate or inner_rate
    args.pushes = args.batches  # what `Trainer` calls them
    for name in ("workers", "steps", "speeds", "methods", "rates"):
        values = getattr(args, name)
        if repeated := [v for v in values if values.count(v) > 1]:
            parser.error(f"argument --{name}: {repeated[0]} is there more than once")
    if odd := [m for m in args.workers if m % 2]:
        parser.error(f"argument --workers: expected even numbers, got {odd[0]}")
    if args.batches < max(args.workers) * max(args.steps):
        parser.error(
            f"argument --batches: {args.batches} are fewer than one round of "
            f"{max(args.workers)} workers with {max(args.steps)} steps each"
        )
    if args.batch_size > PROBLEMS[args.problem].train_size:
        parser.error(f"argument --batch-size: {args.batch_size} are more than there are images")
    args.rates.sort()
    make_folder(parser, args.out)
    return args


def main(argv: list[str] | None = None) -> None:
    """Trains, prints, saves."""
    args = parse_args(argv)
    start = time.perf_counter()
    cells = run_all(args)
    about = (
        f"{args.problem}: {args.batches} batches of {args.batch_size}, {args.seeds} seeds, "
        f"inner {args.inner.__name__}({args.inner_rate:g}), outer SGD"
    )
    print("\n" + report(cells, about, args))
    plot(cells, args)
    print(f"{machine()}, {time.perf_counter() - start:.0f} s")
    print(f"Saved tables.md, cells.jsonl and plots in {args.out}")


if __name__ == "__main__":
    main()
