"""What the optimizer's state costs in memory, and what a smaller one costs in accuracy.

    pip install ".[examples]"
    python benchmarks/state_memory.py

The convolutional model of examples/train_flax.py on MNIST, with gradients that are one update old,
by `dcasgd` with momentum: the state in bytes a parameter, and the test accuracy at the end, for the
three things that make it smaller: ``store="updates"``, ``accumulator_dtype=jnp.bfloat16``, and
DC-ASGD-c in place of DC-ASGD-a; beside no compensation at all, to see that it matters here.
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from robust_search import mnist
from tqdm import tqdm

from optax_dcasgd import dcasgd

RULES = {
    "no compensation": {"lamda": 0.0},
    "DC-ASGD-c, λ=32, clip 1": {"lamda": 32.0, "clip": 1.0},
    "DC-ASGD-a, λ=8, decay 0.95, clip 1": {"lamda": 8.0, "decay": 0.95, "clip": 1.0},
}
STATES = {
    "`store='params'`": {},
    "`store='updates'`": {"store": "updates"},
    "`store='params'`, bfloat16": {"accumulator_dtype": jnp.bfloat16},
    "`store='updates'`, bfloat16": {"store": "updates", "accumulator_dtype": jnp.bfloat16},
}


def main() -> None:
    """Trains with every rule and state, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, help="where to write the figures, as JSON")
    args = parser.parse_args()
    problem = mnist()
    rows = []
    turns = [
        (rule, state)
        for rule in RULES
        for state in STATES
        if RULES[rule]["lamda"] or state == "`store='updates'`"  # without λ they are all the same
    ]
    for rule, state in tqdm(turns, desc="trained", unit="way"):
        tx = dcasgd(args.learning_rate, 0.9, **RULES[rule], **STATES[state])
        params = problem.init(0)
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        buffers = [leaf for leaf in jax.tree.leaves(jax.eval_shape(tx.init, params)) if leaf.ndim]
        rows.append(
            {
                "rule": rule,
                "state": state,
                "bytes_per_parameter": sum(b.size * b.dtype.itemsize for b in buffers) / size,
                "accuracy": train(tx, problem, args),
            }
        )
    result = {
        "software": f"JAX {jax.__version__}",
        "options": {"learning_rate": args.learning_rate, "updates": args.updates},
        "rows": rows,
    }
    print(table(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def train(tx, problem, args) -> list[float]:
    """The test accuracy after the last update, for every seed."""

    @jax.jit
    def run(params, order, x, y):
        def step(carry, chosen):
            params, computed_at, state = carry
            grads = jax.grad(problem.loss)(computed_at, x[chosen], y[chosen])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), params, state), None

        (params, _, _), _ = jax.lax.scan(step, (params, params, tx.init(params)), order)
        return params

    error, accuracies = jax.jit(problem.metric), []
    for seed in range(args.seeds):
        order = np.random.default_rng(seed).integers(
            len(problem.train[1]), size=(args.updates, problem.batch)
        )
        params = jax.tree.map(jnp.float32, problem.init(seed))
        params = run(params, order, *problem.train)
        accuracies.append(1 - float(error(params, *problem.test)))
    return accuracies


def table(result: dict) -> str:
    """Bytes a parameter, the accuracy's mean ± standard deviation, what failed; as Markdown."""
    lines = ["| | state, bytes a parameter | test accuracy |", "|---|---|---|"]
    for row in result["rows"]:
        accuracy = f"{100 * np.mean(row['accuracy']):.1f}"
        if len(row["accuracy"]) > 1:
            accuracy += f" ± {100 * np.std(row['accuracy'], ddof=1):.1f}"
        failed = sum(a < 0.2 for a in row["accuracy"])
        note = f", {failed} of {len(row['accuracy'])} failed" if failed else ""
        cells = [f"{row['rule']}; {row['state']}", f"{row['bytes_per_parameter']:.0f}"]
        lines.append(f"| {' | '.join(cells)} | {accuracy} %{note} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
