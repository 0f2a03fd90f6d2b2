"""Times a simulated push against one step of plain training, in one interleaved run.

    python benchmarks/simulation.py

The model is a 64-64-64-10 ReLU network on scikit-learn's digits, batch 32, in float32. Plain
training is a ``lax.scan`` over ``optax.sgd``, without a simulation. In every round each contender
takes its turn, in random order; reported are the fastest and the median round, per update, and two
ratios to plain training: that of the fastest rounds, and the median of those of the same round.
Both mean something on a machine that has other work, the microseconds do not.
"""

import argparse
import platform
import random
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from optax_dcasgd import add_delay_compensation, dcasgd, simulation

BASELINE = "plain scan, sgd"
LEARNING_RATE = 0.05
SIZES = [64, 64, 64, 10]


def loss_fn(params, batch, key):
    del key
    h, labels = batch
    for layer in params[:-1]:
        h = jax.nn.relu(h @ layer["kernel"] + layer["bias"])
    logits = h @ params[-1]["kernel"] + params[-1]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


grad_fn = jax.value_and_grad(loss_fn)


def problem(num_updates):
    x, y = load_digits(return_X_y=True)
    index = np.random.default_rng(0).integers(len(x), size=(num_updates, 32))
    keys = jax.random.split(jax.random.key(0), len(SIZES) - 1)
    params = [
        {"kernel": jax.nn.initializers.he_normal()(key, (m, n)), "bias": jnp.zeros(n)}
        for key, m, n in zip(keys, SIZES[:-1], SIZES[1:], strict=True)
    ]
    return params, (jnp.asarray(x / 16, jnp.float32)[index], jnp.asarray(y)[index])


def plain(tx):
    def train(params, batches, arrivals):
        del arrivals

        def step(carry, batch):
            params, state = carry
            loss, grads = grad_fn(params, batch, None)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, tx.init(params)), batches)

    return train


def simulated(tx, **options):
    def train(params, batches, arrivals):
        return simulation.run(grad_fn, params, tx, batches, arrivals, **options)

    return train


def contenders():
    sgd = optax.sgd(LEARNING_RATE)

    def link(decay):
        return optax.chain(add_delay_compensation(2.0, decay=decay, clip=None), sgd)

    return {
        BASELINE: plain(sgd),
        "run, sequential, sgd": simulated(sgd, mode="sequential"),
        "run, async, sgd": simulated(sgd),
        "run, async, DC-c": simulated(link(None)),
        "run, async, DC-a": simulated(link(0.95)),
        "run, async, DC-a (dcasgd)": simulated(
            dcasgd(LEARNING_RATE, lamda=2.0, decay=0.95, store=None)
        ),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-workers", type=int, default=8)
    parser.add_argument("--num-updates", type=int, default=500, help="updates a round")
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()

    params, batches = problem(args.num_updates)
    arrivals = simulation.arrivals(jax.random.key(1), args.num_workers, args.num_updates)
    trains = {name: jax.jit(train) for name, train in contenders().items()}
    for train in trains.values():
        jax.block_until_ready(train(params, batches, arrivals))
    seconds = {name: [] for name in trains}
    order = random.Random(0)
    for _ in range(args.rounds):
        for name in order.sample(list(trains), len(trains)):
            start = time.perf_counter()
            jax.block_until_ready(trains[name](params, batches, arrivals))
            seconds[name].append((time.perf_counter() - start) / args.num_updates)

    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}")
    print(f"M = {args.num_workers}, {args.rounds} rounds of {args.num_updates} updates")
    print(f"{'':28}{'fastest, µs':>12}{'ratio':>8}{'median, µs':>12}{'ratio':>8}")
    plain_rounds = seconds[BASELINE]
    for name, of in seconds.items():
        fastest, median = min(of), statistics.median(of)
        ratio = statistics.median(a / b for a, b in zip(of, plain_rounds, strict=True))
        row = f"{name:28}{fastest * 1e6:12.1f}{fastest / min(plain_rounds):8.2f}"
        print(f"{row}{median * 1e6:12.1f}{ratio:8.2f}")


if __name__ == "__main__":
    main()
