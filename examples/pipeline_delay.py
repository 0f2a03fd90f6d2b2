"""A transformer whose layers are stages of a pipeline, each with gradients of its own staleness.

A pipeline that updates its weights after every batch, without waiting for it to drain, applies the
gradient of the first of P stages P − 1 updates late, that of the next P − 2, and that of the last
at once. Here `optax_dcasgd.pipeline_delays` and `delay_gradients` do the same to a small Flax (nnx)
transformer on one device, which learns to predict the next character of Python's language reference
(the text behind ``help("topics")``, which every Python has). It is trained by SGD with momentum and
by Adam, each

* fresh: without any delay, as a pipeline that is drained before every update;
* stale: with the stages' delays, and nothing done about them;
* compensated: `add_delay_compensation` before the optimizer;
* scaled: `scale_by_staleness` after it, so that a stage's step is divided by √(its delay);
* predicted: gradients are computed at `predict_params`, where the stage's parameters will be by the
  time it arrives if they go on as they do;
* both: predicted and compensated.

It prints the validation losses at a low and a high learning rate of each, says in words what each
method did, and saves the curves (``curves.png``) and all numbers (``results.json``). Run it with

    python examples/pipeline_delay.py
"""

import argparse
import functools
import json
import math
import pydoc_data.topics
import time
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
    make_folder,
    mean_and_std,
    number,
    positive,
)
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

from optax_dcasgd import (
    add_delay_compensation,
    delay_gradients,
    pipeline_delays,
    predict_params,
    scale_by_staleness,
    track_velocity,
)

WIDTH, HEADS, CONTEXT, BATCH = 32, 2, 32, 8
METHODS = ("fresh", "stale", "compensated", "scaled", "predicted", "both")
PREDICTED = ("predicted", "both")
OPTIMIZERS = {
    "SGD": lambda learning_rate: optax.sgd(learning_rate, 0.9),
    "Adam": lambda learning_rate: optax.adam(learning_rate),
}
EVALUATE_EVERY = 50  # updates
STYLES = [  # colours of Okabe and Ito, which people with any colour vision can tell apart
    {"color": "#000000", "linestyle": "-"},
    {"color": "#D55E00", "linestyle": ":"},
    {"color": "#009E73", "linestyle": "--"},
    {"color": "#E69F00", "linestyle": "-."},
    {"color": "#0072B2", "linestyle": (0, (5, 1))},
    {"color": "#CC79A7", "linestyle": (0, (3, 1, 1, 1))},
]

# Validation losses by optimizer, learning rate and method; of each seed, over time.
Curves = dict[str, dict[float, dict[str, list[list[float]]]]]


class Block(nnx.Module):
    """Causal self-attention and a perceptron, each behind a layer norm and beside a residual."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.Dict(
            norm=nnx.LayerNorm(WIDTH, use_bias=False, rngs=rngs),
            heads=nnx.Linear(WIDTH, 3 * WIDTH, use_bias=False, rngs=rngs),
            out=nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs),
        )
        self.perceptron = nnx.Dict(
            norm=nnx.LayerNorm(WIDTH, use_bias=False, rngs=rngs),
            up=nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs),
            down=nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x of shape (batch, context, width) with what the block adds to it."""
        heads = self.attention.heads(self.attention.norm(x))
        query, key, value = jnp.split(heads.reshape(*x.shape[:-1], HEADS, -1), 3, axis=-1)
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention.out(attended.reshape(x.shape))
        hidden = nnx.relu(self.perceptron.up(self.perceptron.norm(x)))
        return x + self.perceptron.down(hidden)


class Transformer(nnx.Module):
    """Predicts the next character from up to `CONTEXT` of them."""

    def __init__(self, num_characters: int, num_blocks: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(num_characters, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(num_blocks)])
        self.norm = nnx.LayerNorm(WIDTH, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(WIDTH, num_characters, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        """Returns logits of shape (batch, context, characters)."""
        x = self.embed(text) + self.positions(jnp.arange(text.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def layers(num_blocks: int) -> list[Any]:
    """What a stage can be made of, in the order of the forward pass: the halves of the blocks."""
    halves: list[Any] = [
        f"blocks/{i}/{half}" for i in range(num_blocks) for half in ("attention", "perceptron")
    ]
    halves[0] = ("embed", "positions", halves[0])
    halves[-1] = (halves[-1], "norm", "head")
    return halves


def make_optimizer(
    method: str, optimizer: str, learning_rate: Any, delays: Any, args: argparse.Namespace
) -> optax.GradientTransformationExtraArgs:
    """What the methods differ in, beside where the gradient is computed."""
    tx = OPTIMIZERS[optimizer](learning_rate)
    if method in ("compensated", "both"):
        tx = optax.chain(add_delay_compensation(), tx)
    if method == "scaled":
        tx = optax.chain(tx, scale_by_staleness(0.5))
    if method in PREDICTED:
        tx = optax.chain(tx, track_velocity(args.velocity_decay))
    return optax.with_extra_args_support(tx) if method == "fresh" else delay_gradients(tx, delays)


def loss_fn(graphdef: nnx.GraphDef, params: nnx.State, text: jax.Array) -> jax.Array:
    """Cross-entropy of the next character, in nats; text: (batch, CONTEXT + 1)."""
    logits = nnx.merge(graphdef, params)(text[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


def load_text() -> tuple[np.ndarray, np.ndarray]:
    """The training and the validation text, the last tenth, as indices of characters."""
    topics = pydoc_data.topics.topics
    text = "".join(topics[topic] for topic in sorted(topics))
    codes = np.frombuffer(text.encode("ascii", "ignore"), np.uint8)
    _, indices = np.unique(codes, return_inverse=True)
    split = len(indices) * 9 // 10
    return indices[:split].astype(np.int32), indices[split:].astype(np.int32)


class Trainer:
    """One method with one optimizer, compiled once for all seeds and learning rates."""

    def __init__(
        self,
        method: str,
        optimizer: str,
        models: list[tuple[nnx.GraphDef, nnx.State]],
        text: tuple[np.ndarray, np.ndarray],
        args: argparse.Namespace,
    ):
        train, validation = map(jnp.asarray, text)
        held_out = validation[: len(validation) // 512 * 512].reshape(512, -1)[:, : CONTEXT + 1]
        graphdef, params = models[0]
        delays = pipeline_delays(params, layers(args.blocks), args.stages)

        @jax.jit
        def start(params: nnx.State, seed: int) -> Any:
            tx = make_optimizer(method, optimizer, jnp.float32(0), delays, args)
            return jax.tree.map(jnp.copy, params), tx.init(params), jax.random.key(seed)

        @functools.partial(jax.jit, donate_argnums=0)
        def advance(state: Any, learning_rate: jax.Array) -> tuple[Any, jax.Array]:
            tx = make_optimizer(method, optimizer, learning_rate, delays, args)

            def step(carry: Any, _: None) -> tuple[Any, None]:
                params, opt_state, key = carry
                key, batch_key = jax.random.split(key)
                first = jax.random.randint(batch_key, (BATCH, 1), 0, len(train) - CONTEXT)
                batch = train[first + jnp.arange(CONTEXT + 1)]
                # Where each stage's parameters will be when their gradient arrives, or are now.
                at = predict_params(params, opt_state, delays) if method in PREDICTED else params
                grads = jax.grad(loss_fn, argnums=1)(graphdef, at, batch)
                updates, opt_state = tx.update(grads, opt_state, params, stale_params=at)
                return (optax.apply_updates(params, updates), opt_state, key), None

            state, _ = jax.lax.scan(step, state, length=EVALUATE_EVERY)
            return state, loss_fn(graphdef, state[0], held_out)

        self.models, self.start, self.advance = models, start, advance

    def train(self, seed: int, learning_rate: float, updates: int, bar: tqdm) -> list[float]:
        """The validation loss after every `EVALUATE_EVERY` updates."""
        state, losses = self.start(self.models[seed][1], seed), []
        for _ in range(updates // EVALUATE_EVERY):
            state, loss = self.advance(state, learning_rate)
            losses.append(float(loss))
            bar.update(EVALUATE_EVERY)
        bar.set_postfix_str(f"{learning_rate=:g}, {seed=}, validation loss {losses[-1]:.2f}")
        return losses


def failed(loss: float) -> bool:
    """Whether a run diverged; a uniform guess among the characters costs 4.5 nats."""
    return not loss < 4.5


def cell(losses: list[float]) -> str:
    """Mean ± standard deviation of the runs that did not fail, and how many did."""
    good = [loss for loss in losses if not failed(loss)]
    text = mean_and_std(good, 2) if good else "diverged"
    return text if len(good) in (0, len(losses)) else f"{text} ({len(losses) - len(good)} diverged)"


def judge(before: list[float], after: list[float]) -> str:
    """As `common.compare`, by final losses; the means have to be three standard errors apart."""
    losses = [[math.nan if failed(loss) else loss for loss in runs] for runs in (before, after)]
    return compare(*losses, standard_errors=3)


def report(curves: Curves, methods: list[str]) -> str:
    """The table, and what each method did to stale training, in words."""
    columns = [(optimizer, rate) for optimizer, rates in curves.items() for rate in rates]
    lines = ["| | " + " | ".join(f"{name} {rate:g}" for name, rate in columns) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    final = {
        (method, *column): [run[-1] for run in curves[column[0]][column[1]][method]]
        for column in columns
        for method in methods
    }
    for method in methods:
        cells = [cell(final[(method, *column)]) for column in columns]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines.append("")
    for column in columns:
        stale = final[("stale", *column)]
        damage = judge(final[("fresh", *column)], stale)
        words = [f"{m} {judge(stale, final[(m, *column)])}" for m in methods[2:]]
        lines.append(f"{column[0]} {column[1]:g}: the delays {damage}; {'; '.join(words)}.")
    return "\n".join(lines)


def plot(curves: Curves, title: str, path: Path) -> None:
    """Draws the mean over seeds, and the range from the lowest to the highest, of every curve."""
    figure = Figure(figsize=(10, 0.7 + 2.9 * len(curves)), layout="constrained")
    num_rates = max(map(len, curves.values()))
    grid = figure.subplots(len(curves), num_rates, squeeze=False, sharex=True, sharey=True)
    for row, (optimizer, rates) in zip(grid, curves.items(), strict=True):
        for axis, (rate, methods) in zip(row, rates.items(), strict=False):
            for method, runs in methods.items():
                style = STYLES[METHODS.index(method)]
                values = np.array(runs)  # NaN, and so cut off, once one of them diverges
                updates = EVALUATE_EVERY * np.arange(1, 1 + values.shape[1])
                axis.plot(updates, values.mean(0), linewidth=1.8, label=method, **style)
                color = style["color"]
                axis.fill_between(
                    updates, values.min(0), values.max(0), color=color, alpha=0.15, lw=0
                )
            axis.set_title(f"{optimizer}, learning rate {rate:g}")
            axis.grid(alpha=0.3)
    grid[0, 0].set_ylim(top=min(grid[0, 0].get_ylim()[1], 4.6))  # 4.5 is a uniform guess
    for axis in grid[-1]:
        axis.set_xlabel("updates")
    for axis in grid[:, 0]:
        axis.set_ylabel("validation loss, nats a character")
    figure.suptitle(title, fontsize="medium")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=150)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; whatever cannot be run ends here, before any training."""
    parser = argparse.ArgumentParser(
        description="Trains a small Flax transformer whose layers have gradients of different "
        "staleness, as the stages of a pipeline do, and compares what can be done about it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    updates = number(
        int, f"a multiple of {EVALUATE_EVERY}", lambda v: v >= 1 and v % EVALUATE_EVERY == 0
    )
    add = parser.add_argument
    add("--blocks", type=count, default=4, help="of the transformer")
    add("--stages", type=count, default=8, help="of the pipeline, at most two a block")
    none = "learning rates; none at all leaves the optimizer out"
    add("--sgd-rates", type=positive, nargs="*", default=[0.02, 0.1], help=none)
    add("--adam-rates", type=positive, nargs="*", default=[0.001, 0.005], help=none)
    beside = "to compare with fresh and stale"
    add("--methods", choices=METHODS[2:], nargs="+", default=METHODS[2:], help=beside)
    add("--updates", type=updates, default=300, help="of each run")
    add("--velocity-decay", type=fraction, default=0.0, help="of the average update; 0: the last")
    add("--seeds", type=count, default=3, help="runs of each kind, with seeds 0, 1, ...")
    add("--out", type=Path, default=Path("pipeline_delay_out"), help="folder for plot and numbers")
    args = parser.parse_args(argv)
    if args.stages > 2 * args.blocks:
        parser.error(
            f"argument --stages: {args.blocks} blocks have {2 * args.blocks} halves to make "
            f"stages of, got {args.stages}"
        )
    if not args.sgd_rates + args.adam_rates:
        parser.error("argument --sgd-rates: with no learning rate at all there is nothing to run")
    make_folder(parser, args.out)
    return args


def main(argv: list[str] | None = None) -> None:
    """Trains, prints, saves."""
    args = parse_args(argv)
    start = time.perf_counter()
    text = load_text()
    num_characters = int(max(map(np.max, text))) + 1
    models = [
        nnx.split(Transformer(num_characters, args.blocks, nnx.Rngs(seed)), nnx.Param)
        for seed in range(args.seeds)
    ]
    methods = [*METHODS[:2], *args.methods]
    curves: Curves = {}
    for optimizer, rates in (("SGD", args.sgd_rates), ("Adam", args.adam_rates)):
        if not rates:
            continue
        curves[optimizer] = {rate: {} for rate in rates}
        for method in methods:
            total = len(rates) * args.seeds * args.updates
            with tqdm(total=total, desc=f"{optimizer:4} {method:11}", unit="update") as bar:
                trainer = Trainer(method, optimizer, models, text, args)
                for rate in rates:
                    curves[optimizer][rate][method] = [
                        trainer.train(seed, rate, args.updates, bar) for seed in range(args.seeds)
                    ]

    words = report(curves, methods)
    settings = f"{args.stages} stages, delays {args.stages - 1} to 0, {args.updates} updates"
    print(f"\nValidation loss in nats; {settings}, {args.seeds} seeds\n\n{words}\n")
    title = f"{settings}; line: mean of {args.seeds} seeds, band: lowest to highest"
    plot(curves, title, args.out / "curves.png")
    device = jax.devices()[0]
    machine = f"JAX {jax.__version__} on {device.platform} ({device.device_kind})"
    options = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    results = {"machine": machine, "options": options, "report": words, "curves": curves}
    # JSON knows no NaN: null is where a run had diverged.
    results = jax.tree.map(lambda v: None if v != v else v, results)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{machine}, {time.perf_counter() - start:.0f} s")
    print(f"Saved {args.out / 'curves.png'} and {args.out / 'results.json'}")


if __name__ == "__main__":
    main()
