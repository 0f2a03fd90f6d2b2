"""A transformer whose layers are stages of a pipeline, each with gradients of its own staleness.

A pipeline that updates its weights after every batch, without waiting for it to drain, applies the
gradient of the first of P stages P − 1 updates late, that of the next P − 2, and that of the last
at once. Here `optax_dcasgd.pipeline_delays` and `delay_gradients` do the same to a small Flax (nnx)
transformer on one device, which learns to predict the next character of Python's language reference
(the text behind ``help("topics")``, which every Python has). It is trained by SGD with momentum, by
Adam and by Muon, with everything in ``stale_methods.py`` that can be done about the delays. Run it
with

    python examples/pipeline_delay.py --quick
    python examples/pipeline_delay.py

It prints the validation loss at every learning rate. For each method at its best rate it also
prints how much of the loss that the delays cost it gives back, and its overhead: updates to the
loss that it ends at, as a multiple of fresh training's (`diagnostics.overhead`). It saves the
tables (``tables.md``), the curves (``curves.png``) and the overhead against the number of stages
(``overhead.png``). Every finished cell (stages, optimizer, method, learning rate) is one line of
``cells.jsonl``, and is not run again: the same command goes on where it was interrupted.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import stale_methods
from characters import CONTEXT, TEXT, Transformer, load_text
from common import count
from flax import nnx
from stale_methods import METHODS, UNDELAYED, Cell, ideas_of, make_optimizer
from stale_report import Measure, run
from tqdm import tqdm

from optax_dcasgd import delay_gradients, pipeline_delays, predict_params

BATCH = 8
EVALUATE_EVERY = 50  # updates
FULL = {"stages": [4, 8, 16], "updates": 1000, "seeds": 5, "methods": list(METHODS)}
FULL |= {"sgd_rates": [0.02, 0.05, 0.1, 0.2], "adam_rates": [0.001, 0.002, 0.004, 0.008]}
FULL |= {"muon_rates": [0.003, 0.006, 0.01, 0.015]}
QUICK = {"stages": [8], "updates": 600, "seeds": 3, "sgd_rates": [], "adam_rates": []}
QUICK |= {"muon_rates": [0.006], "methods": ["fresh", "stale", "strong"]}


def layers(num_blocks: int) -> list[Any]:
    """What a stage can be made of, in the order of the forward pass: the halves of the blocks."""
    halves: list[Any] = [
        f"blocks/{i}/{half}" for i in range(num_blocks) for half in ("attention", "perceptron")
    ]
    halves[0] = ("embed", "positions", halves[0])
    halves[-1] = (halves[-1], "norm", "head")
    return halves


def loss_fn(graphdef: nnx.GraphDef, params: nnx.State, text: jax.Array) -> jax.Array:
    """Cross-entropy of the next character, in nats; text: (batch, CONTEXT + 1)."""
    logits = nnx.merge(graphdef, params)(text[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


class Trainer:
    """Trains cells: all seeds at once, in one program for each optimizer and number of stages."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        train, validation = map(jnp.asarray, load_text())
        held_out = validation[: len(validation) // 512 * 512].reshape(512, -1)
        self.text = train, held_out[:, : CONTEXT + 1]
        self.num_characters = int(train.max()) + 1
        self.program = functools.lru_cache(maxsize=1)(self._program)

    def models(self, stages: int) -> tuple[nnx.GraphDef, nnx.State, Any]:
        """The model, its parameters with an axis of seeds in front, and their delays."""
        blocks = max(self.args.blocks, -(-stages // 2))
        models = [
            nnx.split(Transformer(self.num_characters, blocks, nnx.Rngs(seed)), nnx.Param)
            for seed in range(self.args.seeds)
        ]
        graphdef, params = models[0]
        all_params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(p for _, p in models))
        return graphdef, all_params, pipeline_delays(params, layers(blocks), stages)

    def train(
        self,
        graphdef: nnx.GraphDef,
        tx: optax.GradientTransformationExtraArgs,
        ahead: Any,
        state: Any,
        updates: int,
    ) -> Any:
        """Some updates of ``state``: parameters, optimizer's state and key of one seed."""
        text = self.text[0]

        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, opt_state, key = carry
            key, batch_key = jax.random.split(key)
            first = jax.random.randint(batch_key, (BATCH, 1), 0, len(text) - CONTEXT)
            batch = text[first + jnp.arange(CONTEXT + 1)]
            # Where the parameters will be when the gradient arrives, or are now.
            at = predict_params(params, opt_state, ahead)
            grads = jax.grad(loss_fn, argnums=1)(graphdef, at, batch)
            updates, opt_state = tx.update(grads, opt_state, params, stale_params=at)
            return (optax.apply_updates(params, updates), opt_state, key), None

        return jax.lax.scan(step, state, length=updates)[0]

    def _program(self, stages: int, optimizer: str, delayed: bool) -> tuple[Any, Any]:
        graphdef, all_params, delays = self.models(stages)

        def make(learning_rate: Any, on: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
            tx = make_optimizer(optimizer, learning_rate, on)
            return delay_gradients(tx, delays if delayed else 0)

        def start(params: nnx.State, seed: jax.Array) -> Any:
            copy = jax.tree.map(jnp.copy, params)  # `advance` donates its argument
            tx = make(0.1, ideas_of("all-three", 1))  # the state is the same for all methods
            return copy, tx.init(params), jax.random.key(seed)

        def advance(state: Any, learning_rate: jax.Array, on: Any) -> tuple[Any, jax.Array]:
            ahead = jax.tree.map(lambda delay: jnp.minimum(delay, on["predicted"]), delays)
            tx = make(learning_rate, on)
            state = self.train(graphdef, tx, ahead, state, EVALUATE_EVERY)
            return state, loss_fn(graphdef, state[0], self.text[1])

        start = jax.jit(jax.vmap(start))
        seeds = jnp.arange(self.args.seeds)
        advance = jax.jit(jax.vmap(advance, in_axes=(0, None, None)), donate_argnums=0)
        return lambda: start(all_params, seeds), advance

    def __call__(self, name: Cell, bar: tqdm) -> dict[str, list[list[float]]]:
        """The validation losses after every `EVALUATE_EVERY` updates."""
        method = name["method"]
        delayed = method not in UNDELAYED
        start, advance = self.program(name["stages"], name["optimizer"], delayed)
        state, losses = start(), []
        on = ideas_of(method, (name["stages"] - 1) / 2)  # the mean delay
        for _ in range(self.args.updates // EVALUATE_EVERY):
            state, loss = advance(state, name["learning_rate"], on)
            losses.append(np.asarray(loss))
            bar.update(EVALUATE_EVERY)
        return {"loss": np.stack(losses, 1).tolist()}


def final(cell: Cell) -> np.ndarray:
    """The last loss of each seed, NaN if it diverged; a uniform guess costs 4.5 nats."""
    last = cell["loss"][:, -1]
    return np.where(last < 4.5, last, np.nan)


MEASURE = Measure("validation loss, nats a character", final, lambda loss: loss, digits=3)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; whatever cannot be run ends here, before any training."""
    parser = argparse.ArgumentParser(
        "pipeline_delay.py",
        description="Trains a small Flax transformer whose layers have gradients of different "
        "staleness, as the stages of a pipeline do, and compares what can be done about it. What "
        "is not given has the value in brackets.",
    )
    help = "blocks of the transformer; at least half the stages are taken [4]"
    parser.add_argument("--blocks", type=count, default=4, help=help)
    return stale_methods.parse_args(parser, argv, FULL, QUICK, EVALUATE_EVERY)


def main(argv: list[str] | None = None) -> None:
    """Trains, prints, saves."""
    args = parse_args(argv)
    run(args, {"blocks": args.blocks, "text": TEXT}, Trainer, MEASURE, EVALUATE_EVERY)


if __name__ == "__main__":
    main()
