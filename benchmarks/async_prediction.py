"""Does it help asynchronous workers to compute gradients ahead of the parameters they pull?

What pays in pipelines (``examples/stale_methods.py``), for simulated asynchronous workers:

* predicted: a worker that pulls w computes its gradient at ŵ = w + s·δ, where s is the mean
  staleness of all pushes so far, which is what it has to expect, and δ is the last update, as in a
  pipeline. ``half``: half as far. ``smooth``: δ is a moving average of the updates, with a decay of
  0.9. The gradient's stale parameters are ŵ;
* extrapolated: ``optax.scale_by_optimistic_gradient`` behind SGD;
* robust: `robust_delay_compensation` before it.

They train what ``examples/compare_async.py`` trains, with its options, tables and sentences, and
its file of finished cells:

    python benchmarks/async_prediction.py --out out
    python benchmarks/async_prediction.py --problem mnist --out out/mnist

In the end it prints one table of all of them, made from ``grid.csv`` and ``test_error.csv``.
"""

import csv
import functools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_dcasgd import predict_params, robust_delay_compensation, track_velocity

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import compare_async


class Params(NamedTuple):
    """What the server holds: the parameters, and where a worker that pulls them should compute."""

    ahead: Any
    now: Any


class State(NamedTuple):
    """Of the optimizer, and what it knows of the workers."""

    count: Any
    inner: Any
    total: Any  # of the staleness of all pushes


def ahead_of(tx: Any, share: float) -> optax.GradientTransformationExtraArgs:
    """Updates `Params` by ``tx``, and predicts by this share of the staleness to be expected."""

    def init(params: Params) -> State:
        return State(jnp.zeros(()), tx.init(params.now), jnp.zeros(()))

    def update(
        grads: Params,
        state: State,
        params: Params,
        *,
        stale_params: Params,
        staleness: Any,
        **extra: Any,
    ) -> tuple[Params, State]:
        updates, inner = tx.update(
            grads.ahead,
            state.inner,
            params.now,
            stale_params=stale_params.ahead,  # where the gradient was computed
            staleness=staleness,
            **extra,
        )
        now = optax.apply_updates(params.now, updates)
        count, total = state.count + 1, state.total + staleness
        ahead = predict_params(now, inner, share * total / count)
        return Params(optax.tree.sub(ahead, params.ahead), updates), State(count, inner, total)

    return optax.GradientTransformationExtraArgs(init, update)


def method(
    learning_rate: Any,
    momentum: float,
    *,
    predicted: float = 0.0,
    decay: float = 0.0,
    extrapolated: bool = False,
    robust: bool = False,
) -> optax.GradientTransformationExtraArgs:
    tx = optax.chain(
        robust_delay_compensation() if robust else optax.identity(),
        compare_async.sgd(learning_rate, momentum),
        optax.scale_by_optimistic_gradient() if extrapolated else optax.identity(),
        track_velocity(decay),
    )
    return ahead_of(tx, predicted)


def make(**options: Any) -> Any:
    return functools.partial(method, **options)


METHODS = {
    "ASGD": make(),
    "robust": make(robust=True),
    "predicted": make(predicted=1.0),
    "half": make(predicted=0.5),
    "smooth": make(predicted=1.0, decay=0.9),
    "extrapolated": make(extrapolated=True),
    "predicted+robust": make(predicted=1.0, robust=True),
    "half+robust": make(predicted=0.5, robust=True),
    "smooth+robust": make(predicted=1.0, decay=0.9, robust=True),
    "extrapolated+robust": make(extrapolated=True, robust=True),
    "predicted+extrapolated": make(predicted=1.0, extrapolated=True),
    "all-three": make(predicted=1.0, extrapolated=True, robust=True),
}


class Trainer(compare_async.Trainer):
    """Computes gradients at the parameters ahead, and evaluates those of now."""

    def __init__(self, args: Any):
        super().__init__(args)
        self.params = Params(self.params, self.params)

    def _loss(self, params: Params, batch: Any, key: Any = None) -> jax.Array:
        return super()._loss(params.ahead, batch, key)

    def _evaluate(self, params: Params, data: Any) -> dict[str, jax.Array]:
        return super()._evaluate(params.now, data)


def error(row: dict[str, str]) -> str:
    """The mean test error in percent; not that of some seeds."""
    return f"{100 * float(row['test_error_mean']):.1f}" if row["test_error_mean"] else "diverged"


def table(grid: list[dict[str, str]], chosen: list[dict[str, str]]) -> str:
    """Of grid.csv and test_error.csv: at the best learning rate, and at the middle one."""

    def kind(row: dict[str, str]) -> tuple[float, int]:
        return float(row["momentum"]), int(row["workers"])

    kinds = sorted({kind(row) for row in grid})
    head = [f"M = {m}" + f", momentum {mu:g}" * (mu > 0) for mu, m in kinds]
    lines = [["", *head], ["---"] * (len(kinds) + 1)]
    for name in dict.fromkeys(row["method"] for row in grid):
        cells = [row for row in grid if row["method"] == name]
        entries = []
        for which in kinds:
            of_kind = [row for row in cells if kind(row) == which]
            of_kind.sort(key=lambda row: float(row["learning_rate"]))
            middle = error(of_kind[len(of_kind) // 2])
            (best,) = [row for row in chosen if (row["method"], *kind(row)) == (name, *which)]
            entries.append(f"{error(best)} ({best['learning_rate']}); {middle}")
        lines.append([name, *entries])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    compare_async.METHODS.clear()
    compare_async.METHODS.update(METHODS)
    compare_async.Trainer = Trainer  # type: ignore[misc]
    argv = ["--workers", "8", "32", *sys.argv[1:]]
    compare_async.main(argv)
    out = compare_async.parse_args(argv).out
    files = [(out / name).read_text().splitlines() for name in ("grid.csv", "test_error.csv")]
    print(f"\n{table(*(list(csv.DictReader(lines)) for lines in files))}")


if __name__ == "__main__":
    main()
