"""Data parallelism with the all-reduce of gradients under the next step's compute.

The convolutional model of ``train_flax.py`` learns real MNIST images from batches that are split
over eight devices, in one program made with `jax.shard_map`. Fresh: every step waits for the mean
of the gradients it has just computed. Stale: `optax_dcasgd.overlap_reduction` applies the mean one
update late, so that it can be computed while the next step computes its gradients. Beside them
stands all of ``stale_methods.py`` that can be done about that update of delay, under SGD with
momentum, Adam and Muon. Run it with

    python examples/overlapped_data_parallel.py --quick
    python examples/overlapped_data_parallel.py
    python examples/overlapped_data_parallel.py --delay 8 --batch-size 32

With ``--delay 8`` the mean is on its way for eight steps instead of one.

It prints the test accuracies at every learning rate, says which of them differ from fresh training,
and saves the tables (``tables.md``) and the curves (``curves.png``). Every finished cell
(optimizer, method, learning rate) is one line of ``cells.jsonl``, and is not run again: the same
command goes on where it was interrupted.

The devices are virtual ones on the CPU, and so nothing is faster here: this is about what one
update of staleness costs in accuracy, and what gives it back. What the TPU compiler makes of such a
step is in ``benchmarks/tpu_overlap.py``.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import stale_methods
from common import count, number
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from stale_methods import METHODS, UNDELAYED, Cell, ideas_of, make_optimizer
from stale_report import Measure, run
from tqdm import tqdm
from train_flax import CNN, TRAIN_IMAGES, batches, load_data

from optax_dcasgd import (
    OverlapReductionState,
    delay_gradients,
    overlap_reduction,
    predict_params,
)

DEVICES = 8  # virtual ones, on the CPU
EVALUATE_EVERY = 20  # updates
OVERLAPPED = OverlapReductionState(count=P(), grads=P("data"), inner_state=P())
FULL = {"updates": 1000, "seeds": 5}
FULL |= {"methods": [name for name in METHODS if name not in ("strong", "fresh+extrapolated")]}
FULL |= {"sgd_rates": [0.005, 0.02, 0.05, 0.1, 0.15], "adam_rates": [0.001, 0.003, 0.01]}
FULL |= {"muon_rates": [0.003, 0.01, 0.03]}
QUICK = {"updates": 120, "seeds": 3, "methods": ["fresh", "stale", "predicted+robust"]}
QUICK |= {"sgd_rates": [0.02, 0.1], "adam_rates": [], "muon_rates": []}


def make_steps(optimizer: str, delay: int, graphdef: nnx.GraphDef, mesh: Mesh) -> tuple[Any, Any]:
    """The jitted ``init(params)`` and ``advance(params, opt_state, batches, learning_rate, on)``.

    The mean of the gradients is applied ``delay`` updates late; with 0, every step waits for it.
    ``batches`` are images of shape (updates, batch size, 28, 28, 1), and their labels; ``on`` says
    how strongly each idea of ``stale_methods.py`` is used.
    """

    def make(learning_rate: Any, on: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
        tx = make_optimizer(optimizer, learning_rate, on)
        # overlap_reduction itself makes one update of the delay.
        return overlap_reduction(delay_gradients(tx, delay - 1), "data") if delay else tx

    def loss_fn(params: nnx.State, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def advance(
        params: nnx.State, opt_state: Any, batches: Any, learning_rate: jax.Array, on: Any
    ) -> tuple[nnx.State, Any]:
        tx = make(learning_rate, on)

        def step(carry: Any, batch: Any) -> tuple[Any, None]:
            params, opt_state = carry
            # Where the parameters will be when the gradient is applied, or are now.
            at = predict_params(params, opt_state, jnp.minimum(delay, on["predicted"]))
            local = jax.lax.pcast(at, "data", to="varying")  # for gradients of this device alone
            grads = jax.grad(loss_fn)(local, *batch)
            if not delay:
                grads = jax.lax.pmean(grads, "data")
            updates, opt_state = tx.update(grads, opt_state, params, stale_params=at, staleness=0)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, opt_state), batches)[0]

    def init(params: nnx.State) -> Any:
        return make(0.1, ideas_of("all-three", 1)).init(params)

    specs = OVERLAPPED if delay else P()
    init = jax.shard_map(init, mesh=mesh, in_specs=P(), out_specs=specs)
    in_specs = (P(), specs, P(None, "data"), P(), P())
    advance = jax.shard_map(advance, mesh=mesh, in_specs=in_specs, out_specs=(P(), specs))
    return jax.jit(init), jax.jit(advance, donate_argnums=(0, 1))


class Trainer:
    """Trains cells, one seed after the other: a convolution is no faster on several at once."""

    def __init__(self, args: argparse.Namespace):
        self.args, (self.train, test) = args, load_data()
        self.mesh = jax.make_mesh((DEVICES,), ("data",), (jax.sharding.AxisType.Auto,))
        self.graphdef, _ = nnx.split(CNN(nnx.Rngs(0)), nnx.Param)
        self.steps = functools.lru_cache(maxsize=1)(
            functools.partial(make_steps, graphdef=self.graphdef, mesh=self.mesh)
        )

        @jax.jit
        def evaluate(params: nnx.State) -> tuple[jax.Array, jax.Array]:
            logits = nnx.merge(self.graphdef, params)(test[0])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, test[1])
            return losses.mean(), jnp.mean(jnp.argmax(logits, axis=-1) == test[1])

        self.evaluate = evaluate

    def __call__(self, name: Cell, bar: tqdm) -> dict[str, list[list[float]]]:
        """Test losses and accuracies after every `EVALUATE_EVERY` updates."""
        method = name["method"]
        delay = 0 if method in UNDELAYED else self.args.delay
        on = ideas_of(method, self.args.delay)
        init, advance = self.steps(name["optimizer"], delay)
        curves: dict[str, list[list[float]]] = {"loss": [], "accuracy": []}
        epochs = -(-self.args.updates // (TRAIN_IMAGES // self.args.batch_size))
        for seed in range(self.args.seeds):
            _, params = nnx.split(CNN(nnx.Rngs(seed)), nnx.Param)
            params = jax.device_put(params, NamedSharding(self.mesh, P()))
            opt_state, results = init(params), []
            stream = batches(self.train, self.args.batch_size, epochs, seed)
            for _ in range(self.args.updates // EVALUATE_EVERY):
                chunk = [next(stream) for _ in range(EVALUATE_EVERY)]
                stacked = tuple(map(np.stack, zip(*chunk, strict=True)))
                stacked = jax.device_put(stacked, NamedSharding(self.mesh, P(None, "data")))
                # Virtual devices share the CPU's threads: with several calls under way at once
                # they can wait for each other forever. Real ones need no such wait.
                params, opt_state = jax.block_until_ready(
                    advance(params, opt_state, stacked, name["learning_rate"], on)
                )
                on_one_device = jax.device_put(jax.device_get(params), jax.devices()[0])
                results.append(np.array(self.evaluate(on_one_device), float))
                bar.update(EVALUATE_EVERY / self.args.seeds)
            for key, values in zip(curves, np.transpose(results), strict=True):
                curves[key].append(values.tolist())
        return curves


def final(cell: Cell) -> np.ndarray:
    """The test error of each seed at the end; NaN if it diverged or is near chance, 90 %."""
    accuracy, loss = cell["accuracy"][:, -1], cell["loss"][:, -1]
    return np.where((accuracy > 0.2) & np.isfinite(loss), 1 - accuracy, np.nan)


MEASURE = Measure("test accuracy, %", final, lambda error: 100 * (1 - error), digits=1)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; whatever cannot be run ends here, before any training."""
    parser = argparse.ArgumentParser(
        "overlapped_data_parallel.py",
        description="Trains a small Flax classifier on MNIST images on eight virtual devices, with "
        "synchronous and with overlapped reductions of the gradients, and compares what can be "
        "done about the update of delay. What is not given has the value in brackets.",
    )
    batch = number(
        int,
        f"a multiple of {DEVICES} from {DEVICES} to {TRAIN_IMAGES}",
        lambda v: 1 <= v <= TRAIN_IMAGES and v % DEVICES == 0,
    )
    help = "images an update, over all devices [256]"
    parser.add_argument("--batch-size", type=batch, default=256, help=help)
    help = "how many updates late the mean of the gradients is applied [1]"
    parser.add_argument("--delay", type=count, default=1, help=help)
    args = stale_methods.parse_args(parser, argv, FULL, QUICK, EVALUATE_EVERY)
    if args.delay >= args.updates:
        parser.error(f"argument --delay: {args.delay} is after the end, {args.updates} updates")
    return args


def main(argv: list[str] | None = None) -> None:
    """Trains, prints, saves."""
    args = parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    settings = {"batch_size": args.batch_size, "delay": args.delay}
    run(args, settings, Trainer, MEASURE, EVALUATE_EVERY)


if __name__ == "__main__":
    main()
