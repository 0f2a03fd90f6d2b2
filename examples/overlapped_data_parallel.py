"""Data parallelism with the all-reduce of gradients under the next step's compute.

The convolutional model of ``train_flax.py`` learns real MNIST images from batches that are split
over eight devices, in one program made with `jax.shard_map`:

* synchronous: every step waits for the mean of the gradients it has just computed;
* overlapped: `optax_dcasgd.overlap_reduction` applies the mean one update late, so that it can be
  computed while the next step computes its gradients;
* compensated: the same around `optax_dcasgd.dcasgd`, which corrects gradients one update old from
  nothing but its momentum.

It prints the test accuracies at several learning rates and saves them as a plot
(``accuracy.png``) and as numbers (``results.json``). Run it with

    python examples/overlapped_data_parallel.py

The devices are virtual ones on the CPU, and so nothing is faster here: this is about what one
update of staleness costs in accuracy, and what compensation gives back. What the TPU compiler makes
of such a step is in ``benchmarks/tpu_overlap.py``.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import count, fraction, make_folder, mean_and_std, number, positive
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from tqdm import tqdm
from train_flax import (
    CNN,
    TRAIN_IMAGES,
    Images,
    batches,
    count_failed,
    evaluate,
    judge,
    load_data,
    percent,
)

from optax_dcasgd import OverlapReductionState, dcasgd, overlap_reduction

DEVICES = 8  # virtual ones, on the CPU
METHODS = ("synchronous", "overlapped", "compensated")
OVERLAPPED = OverlapReductionState(count=P(), grads=P("data"), inner_state=P())
# The defaults of add_delay_compensation; those of dcasgd are MXNet's.
COMPENSATION = {"lamda": 8.0, "decay": 0.95, "clip": 1.0}

Accuracies = dict[str, list[list[float]]]  # by method; for each learning rate, one for each seed


def make_steps(
    method: str, graphdef: nnx.GraphDef, mesh: Mesh, args: argparse.Namespace
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The jitted ``init(params)`` and ``train_step(params, opt_state, batch, learning_rate)``.

    The learning rate is an argument so that one compilation serves all of them.
    """

    def optimizer(learning_rate: jax.Array) -> optax.GradientTransformationExtraArgs:
        # With lamda=0, dcasgd is SGD with momentum.
        rule = COMPENSATION if method == "compensated" else {"lamda": 0.0}
        sgd = dcasgd(learning_rate, args.momentum, **rule, store="updates")
        return sgd if method == "synchronous" else overlap_reduction(sgd, "data")

    def loss_fn(params: nnx.State, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def train_step(
        params: nnx.State, opt_state: Any, batch: Images, learning_rate: jax.Array
    ) -> tuple[nnx.State, Any]:
        local = jax.lax.pcast(params, "data", to="varying")  # for gradients of this device alone
        grads = jax.grad(loss_fn)(local, *batch)
        if method == "synchronous":
            grads = jax.lax.pmean(grads, "data")
        updates, opt_state = optimizer(learning_rate).update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def init(params: nnx.State) -> Any:
        return optimizer(jnp.float32(0)).init(params)

    specs = P() if method == "synchronous" else OVERLAPPED
    init = jax.shard_map(init, mesh=mesh, in_specs=P(), out_specs=specs)
    train_step = jax.shard_map(
        train_step, mesh=mesh, in_specs=(P(), specs, P("data"), P()), out_specs=(P(), specs)
    )
    return jax.jit(init), jax.jit(train_step, donate_argnums=(0, 1))


def train(
    method: str, data: tuple[Images, Images], mesh: Mesh, args: argparse.Namespace, bar: tqdm
) -> list[list[float]]:
    """The test accuracy at the end for every learning rate and seed."""
    graphdef, _ = nnx.split(CNN(nnx.Rngs(0)), nnx.Param)
    init, train_step = make_steps(method, graphdef, mesh, args)
    accuracies = []
    for learning_rate in args.learning_rates:
        accuracies.append([])
        for seed in range(args.seeds):
            _, params = nnx.split(CNN(nnx.Rngs(seed)), nnx.Param)
            params = jax.device_put(params, NamedSharding(mesh, P()))
            opt_state = init(params)
            for batch in batches(data[0], args.batch_size, args.epochs, seed):
                batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
                # Virtual devices share the CPU's threads: with several steps under way at once they
                # can wait for each other forever. Real ones need no such wait.
                params, opt_state = jax.block_until_ready(
                    train_step(params, opt_state, batch, learning_rate)
                )
                bar.update()
            on_one_device = jax.device_put(jax.device_get(params), jax.devices()[0])
            accuracies[-1].append(float(evaluate(graphdef, on_one_device, *data[1])))
            accuracy = percent(accuracies[-1][-1])
            bar.set_postfix_str(f"{learning_rate=:g}, {seed=}, test accuracy {accuracy}")
    return accuracies


def table(accuracies: Accuracies, learning_rates: list[float]) -> str:
    """Mean ± standard deviation over the seeds, and how many of them failed."""
    lines = [
        "| learning rate | " + " | ".join(accuracies) + " |",
        "|---" * (len(METHODS) + 1) + "|",
    ]
    for i, learning_rate in enumerate(learning_rates):
        cells = []
        for runs in accuracies.values():
            failed = count_failed(runs[i])
            cells.append(f"{mean_and_std(100 * np.array(runs[i]), 1)} %")
            cells[-1] += f" ({failed} of {len(runs[i])} failed)" if failed else ""
        lines.append(f"| {learning_rate:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(accuracies: Accuracies, learning_rates: list[float]) -> str:
    """Says in words, for each learning rate, what staleness and compensation did."""
    lines = []
    for i, learning_rate in enumerate(learning_rates):
        fresh, stale, compensated = (accuracies[method][i] for method in METHODS)
        (damage, how_much), (effect, gain) = judge(fresh, stale), judge(stale, compensated)
        lines.append(
            f"{learning_rate:g}: the update of delay {damage} ({how_much}); "
            f"compensation {effect} ({gain})."
        )
    return "\n".join([*lines, "(Failed: diverged, or under 20 % where chance is 10 %.)"])


def plot(accuracies: Accuracies, learning_rates: list[float], title: str, path: Path) -> None:
    """Draws the mean over seeds, and the range from the lowest to the highest."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axis = figure.subplots()
    for (method, runs), style in zip(accuracies.items(), ("o-", "s:", "^--"), strict=True):
        values = np.nan_to_num(runs)  # a diverged run gets nothing right
        (line,) = axis.plot(learning_rates, values.mean(1), style, linewidth=2, label=method)
        axis.fill_between(
            learning_rates, values.min(1), values.max(1), color=line.get_color(), alpha=0.2, lw=0
        )
    axis.set(xlabel="learning rate", ylabel="test accuracy", xscale="log", ylim=(0, 1))
    axis.set_xticks(learning_rates, [f"{rate:g}" for rate in learning_rates])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize="medium")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; whatever cannot be run ends here, before any training."""
    parser = argparse.ArgumentParser(
        description="Trains a small Flax classifier on MNIST images on eight virtual devices, with "
        "synchronous and with overlapped reductions of the gradients, and compares them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    batch = number(
        int,
        f"a multiple of {DEVICES} from {DEVICES} to {TRAIN_IMAGES}",
        lambda v: 1 <= v <= TRAIN_IMAGES and v % DEVICES == 0,
    )
    add = parser.add_argument
    rates = [0.005, 0.01, 0.02, 0.05, 0.1]
    add("--learning-rates", type=positive, nargs="+", default=rates, help="of SGD")
    add("--momentum", type=fraction, default=0.9, help="of SGD")
    add("--epochs", type=count, default=8, help="passes over the training images")
    add("--batch-size", type=batch, default=256, help="images an update, over all devices")
    add("--seeds", type=count, default=3, help="runs of each kind, with seeds 0, 1, ...")
    out = Path("overlapped_data_parallel_out")
    add("--out", type=Path, default=out, help="folder for plot and numbers")
    args = parser.parse_args(argv)
    make_folder(parser, args.out)
    return args


def main(argv: list[str] | None = None) -> None:
    """Trains, prints, saves."""
    args = parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    start = time.perf_counter()
    data = load_data()
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types)
    updates = args.epochs * (TRAIN_IMAGES // args.batch_size)
    total = len(args.learning_rates) * args.seeds * updates
    accuracies: Accuracies = {}
    for method in METHODS:
        with tqdm(total=total, desc=f"{method:11}", unit="update") as bar:
            accuracies[method] = train(method, data, mesh, args, bar)

    settings = f"{updates} updates of {args.batch_size} images, momentum {args.momentum}"
    words = verdict(accuracies, args.learning_rates)
    print(f"\nTest accuracy after {settings}, {args.seeds} seeds\n")
    print(f"{table(accuracies, args.learning_rates)}\n\n{words}\n")

    seeds = f"line: mean of {args.seeds} seeds, band: lowest to highest"
    title = f"MNIST on {DEVICES} devices, {settings}\n{seeds}"
    plot(accuracies, args.learning_rates, title, args.out / "accuracy.png")
    machine = f"JAX {jax.__version__} on {DEVICES} virtual CPU devices"
    options = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    results = {"machine": machine, "options": options, "accuracies": accuracies}
    # JSON knows no NaN: null is where a run had diverged.
    results = jax.tree.map(lambda v: None if v != v else v, results)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{machine}, {time.perf_counter() - start:.0f} s")
    print(f"Saved {args.out / 'accuracy.png'} and {args.out / 'results.json'}")


if __name__ == "__main__":
    main()
