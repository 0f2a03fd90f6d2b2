"""What overlapped_data_parallel.py and pipeline_delay.py compare, and how they run a grid of it.

Three optimizers, each with what can be done about stale gradients:

* fresh: no delay; stale: delayed gradients, and nothing done about them;
* scaled: `scale_by_staleness` behind the optimizer, a step divided by √delay;
* DC-a: `add_delay_compensation` before it, with its defaults;
* predicted: gradients are computed at `predict_params`, where the parameters will be when the
  gradient arrives if every update until then is like the last;
* extrapolated: ``optax.scale_by_optimistic_gradient`` behind the optimizer: the update u becomes
  u + (u − the previous u);
* robust: `robust_delay_compensation` before the optimizer, with its defaults;
* each pair of the last three, and all three;
* strong: all three, with the update u + β (u − the previous u), where β is the delay (of stages:
  their mean), and at most two updates predicted;
* fresh+extrapolated: no delay, and that update: what it gives by itself.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from common import count, make_folder, number, positive, read_entries
from tqdm import tqdm

from optax_dcasgd import (
    add_delay_compensation,
    robust_delay_compensation,
    scale_by_staleness,
    track_velocity,
)

OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "SGD": lambda learning_rate: optax.sgd(learning_rate, 0.9),
    "Adam": optax.adam,
    "Muon": optax.contrib.muon,
}
IDEAS = ("predicted", "extrapolated", "robust")
METHODS: dict[str, tuple[str, ...]] = {
    "fresh": (),
    "stale": (),
    **{idea: (idea,) for idea in ("scaled", "DC-a", *IDEAS)},
    **{"+".join(pair): pair for pair in itertools.combinations(IDEAS, 2)},
    "all-three": IDEAS,
    "strong": IDEAS,
    "fresh+extrapolated": ("extrapolated",),
}
UNDELAYED = ("fresh", "fresh+extrapolated")


def ideas_of(method: str, delay: float) -> dict[str, float]:
    """How strongly the method uses each idea; 0 if not at all.

    Of "predicted" it is the most updates that are predicted.
    """
    strength = {"predicted": math.inf}
    if method in ("strong", "fresh+extrapolated"):
        strength = {"predicted": 2.0, "extrapolated": delay}
    return {
        idea: strength.get(idea, 1.0) if idea in METHODS[method] else 0.0
        for idea in ("scaled", "DC-a", *IDEAS)
    }


def make_optimizer(
    optimizer: str, learning_rate: Any, on: dict[str, Any]
) -> optax.GradientTransformationExtraArgs:
    """All that the methods differ in, beside where the gradient is computed.

    What a method does not use is there, and switched off by its hyperparameters: they may be
    traced, so that one compilation serves all methods and learning rates.
    """
    return optax.chain(
        add_delay_compensation(8.0 * on["DC-a"]),
        robust_delay_compensation(
            8.0 * on["robust"],
            max_norm=jnp.where(on["robust"] > 0, 2.0, jnp.inf),
            power=0.25 * on["robust"],
        ),
        OPTIMIZERS[optimizer](learning_rate),
        optax.scale_by_optimistic_gradient(beta=on["extrapolated"]),
        scale_by_staleness(0.5 * on["scaled"]),
        track_velocity(0.0),  # for predict_params
    )


def parse_args(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    full: dict[str, Any],
    quick: dict[str, Any],
    evaluate_every: int,
) -> argparse.Namespace:
    """Reads the command line; whatever cannot be run ends here, before any training.

    What is not given has its value of ``full``, or with --quick of ``quick``.
    """

    def add(name: str, help: str, **options: Any) -> None:
        key = name.removeprefix("--").replace("-", "_")
        shown = [
            " ".join(map(str, value if isinstance(value, list) else [value])) or "none"
            for value in (full[key], quick.get(key, full[key]))
        ]
        both = shown[0] if shown[0] == shown[1] else f"{shown[0]}; with --quick {shown[1]}"
        parser.add_argument(name, help=f"{help} [{both}]", **options)

    help = "the main result, in under three minutes on two cores"
    if quick:
        parser.add_argument("--quick", action="store_true", help=help)
    if "stages" in full:
        help = "of the pipeline: one or more values"
        add("--stages", help, type=count, nargs="+", metavar="P")
    for optimizer in OPTIMIZERS:
        help = f"learning rates of {optimizer}; none at all leaves it out"
        add(f"--{optimizer.lower()}-rates", help, type=positive, nargs="*", metavar="LR")
    help = f"any of {', '.join(METHODS)}"
    add("--methods", help, choices=METHODS, nargs="+", metavar="NAME")
    kind = f"a multiple of {evaluate_every}"
    updates = number(int, kind, lambda v: v >= 1 and v % evaluate_every == 0)
    add("--updates", "of each run", type=updates)
    add("--seeds", "runs of each kind, with seeds 0, 1, ...", type=count)
    out = Path(f"{Path(parser.prog).stem}_out")
    parser.add_argument("--out", type=Path, default=out, help=f"folder for all files [{out}]")
    help = "run nothing: make tables and plots of the cells that are finished"
    parser.add_argument("--report", action="store_true", help=help)
    args = parser.parse_args(argv)
    for key, value in (full | (quick if getattr(args, "quick", False) else {})).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    make_folder(parser, args.out)
    return args


Cell = dict[str, Any]  # what names it, and its curves: arrays of shape (seeds, evaluations)


def cell_names(args: argparse.Namespace) -> list[Cell]:
    """The names of all cells, those of one program next to each other."""
    return [
        stages | {"optimizer": optimizer, "method": method, "learning_rate": rate}
        for stages in ([{"stages": n} for n in args.stages] if "stages" in args else [{}])
        for optimizer in OPTIMIZERS
        for method in args.methods
        for rate in getattr(args, f"{optimizer.lower()}_rates")
    ]


class Grid:
    """The finished cells of a grid: one line of JSON each, so that a second call goes on."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings
        self.cells: dict[str, Cell] = {}
        for entry in read_entries(path, settings):
            self._add(entry)

    def run(
        self,
        names: Sequence[Cell],
        train: Callable[[Cell, tqdm], dict[str, list[list[float]]]],
        updates: int,
    ) -> None:
        """Has ``train(name, bar)`` make the curves of the cells that are not yet there.

        The bar counts ``updates`` a cell.
        """
        missing = [name for name in names if json.dumps(name) not in self.cells]
        total, done = len(names) * updates, (len(names) - len(missing)) * updates
        with tqdm(total=total, initial=done, unit="update", smoothing=0.02) as bar:
            for name in missing:
                bar.set_postfix_str(", ".join(map(str, name.values())))
                # JSON knows no NaN: null is where a run had diverged.
                curves = {
                    key: [[round(v, 5) if math.isfinite(v) else None for v in run] for run in runs]
                    for key, runs in train(name, bar).items()
                }
                entry = {"name": name, "curves": curves, "settings": self.settings}
                with self.path.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                self._add(entry)

    def finished(self, names: Sequence[Cell]) -> list[Cell]:
        """Those of these cells that are there, with their curves."""
        keys = map(json.dumps, names)
        return [self.cells[key] for key in keys if key in self.cells]

    def _add(self, entry: dict[str, Any]) -> None:
        curves = {key: np.array(runs, float) for key, runs in entry["curves"].items()}
        self.cells[json.dumps(entry["name"])] = entry["name"] | curves
