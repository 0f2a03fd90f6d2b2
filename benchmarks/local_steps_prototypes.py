"""Outer rules for local steps that were measured and are not in the library.

* ``delayed``: delayed Nesterov (Liu et al., arXiv 2401.09135, Algorithm 3), whose momentum acts at
  every M-th push alone;
* ``robust-delayed``: the same behind `robust_delay_compensation`;
* ``robust-Nesterov``: there Nesterov momentum that acts at every push;
* ``gated``: steps gated by staleness (arXiv 2605.09126), e^(−ατ) times a cosine that is zero from a
  cutoff on.

They train what ``examples/local_steps.py --quick`` trains, with its tables. Other options
are passed on to it:

    python benchmarks/local_steps_prototypes.py --out out
    python benchmarks/local_steps_prototypes.py --out out --problem mnist --batches 4096
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_dcasgd import robust_delay_compensation

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import local_steps

RATES = (0.03125, 0.125, 0.5, 1.0, 2.0)


class DelayedNesterovState(NamedTuple):
    """Trees like the parameters, but for the count."""

    count: Any
    momentum: Any
    total: Any  # of the pseudo-gradients since momentum last acted


def delayed_nesterov(learning_rate: float, period: int, decay: float = 0.9) -> Any:
    """Algorithm 3 with c = 0."""

    def init(params: Any) -> DelayedNesterovState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return DelayedNesterovState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        total = jax.tree.map(jnp.add, state.total, grads)
        acts = (state.count + 1) % period == 0
        momentum = jax.tree.map(
            lambda m, t: jnp.where(acts, decay * m + t / period, m), state.momentum, total
        )
        updates = jax.tree.map(
            lambda m, g: -learning_rate * (jnp.where(acts, decay, 0.0) * m + g / period),
            momentum,
            grads,
        )
        total = jax.tree.map(lambda t: jnp.where(acts, 0.0, t), total)
        return updates, DelayedNesterovState(state.count + 1, momentum, total)

    return optax.GradientTransformationExtraArgs(init, update)


def gate(alpha: float, cutoff: float) -> Any:
    def update(grads: Any, state: Any, params: Any = None, *, staleness: Any, **extra: Any) -> Any:
        tau = jnp.asarray(staleness, jnp.float32)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(tau / cutoff, 1.0)))
        return jax.tree.map(lambda g: jnp.exp(-alpha * tau) * cosine * g, grads), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def prototypes(num_workers: int) -> dict[str, Any]:
    # The rate of delayed Nesterov is that of the mean of M pushes: M times as large.
    def delayed(rate: float, _: float) -> Any:
        return delayed_nesterov(rate * num_workers, num_workers)

    def behind_robust(outer: Any) -> Any:
        return lambda rate, momentum: optax.chain(
            robust_delay_compensation(), outer(rate, momentum)
        )

    return {
        "delayed": delayed,
        "robust-delayed": behind_robust(delayed),
        "robust-Nesterov": behind_robust(lambda rate, _: optax.sgd(rate, 0.9, nesterov=True)),
        "gated": lambda rate, _: optax.chain(
            gate(0.2 / num_workers, 8.0 * num_workers), optax.sgd(rate)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for each M is made in it")
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 16], metavar="M")
    args, others = parser.parse_known_args()  # the others are those of local_steps.py
    for num_workers in args.workers:
        local_steps.METHODS.update(prototypes(num_workers))
        methods = ["ASGD", "robust", *prototypes(num_workers)]
        options = ["--quick", "--steps", "16", "--workers", str(num_workers), "--methods", *methods]
        rates = map(str, RATES)
        out = str(args.out / f"M{num_workers}")
        local_steps.main([*options, "--rates", *rates, "--out", out, *others])


if __name__ == "__main__":
    main()
