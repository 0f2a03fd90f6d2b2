"""How far to predict and to extrapolate in a stale pipeline: settings tried for docs/pipelines.md.

Trains what ``examples/pipeline_delay.py`` trains, 1000 updates and three seeds, and prints the
validation loss at the end of each setting:

    python benchmarks/pipeline_settings.py
    python benchmarks/pipeline_settings.py --stages 16

A setting says how many updates are predicted for a delay of d, mult · (1 + γ + … + γ^(d−1)) and at
most ``cap``, and the β of the extrapolation, the same for all stages or (``by_stage``) in
proportion to the delay. ``before``: the velocity is that before the extrapolation.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from optax_dcasgd import (
    delay_gradients,
    robust_delay_compensation,
    scale_by_staleness,
    track_velocity,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import pipeline_delay

SEEDS, UPDATES = 3, 1000
DEFAULT: dict[str, float] = {"b1": 0.9, "b2": 0.999, "beta": 1.0, "gamma": 1.0, "mult": 1.0}
DEFAULT |= {"cap": 1e6, "by_stage": 0.0, "robust": 0.0, "scaled": 0.0}
OPTIMIZERS = {
    "Adam": lambda rate, on: optax.adam(rate, on["b1"], on["b2"]),
    "Muon": lambda rate, on: optax.contrib.muon(rate),
    "SGD": lambda rate, on: optax.sgd(rate, 0.9),
}
RATES = {"Adam": 0.002, "Muon": 0.006, "SGD": 0.1}
STRONG = [("beta", 4.0), ("beta", 6.0), ("beta", 8.0)]
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "Adam": [
        {}, {"mult": 1.5}, {"gamma": 0.9}, {"gamma": 0.7}, {"beta": 2.0}, {"beta": 3.0},
        {"beta": 3.0, "gamma": 0.7}, {"beta": 4.0, "gamma": 0.5}, {"by_stage": 1.0},
        {"before": True}, {"scaled": 0.25}, {"b1": 0.8}, {"b1": 0.95}, {"b2": 0.95},
    ],
    "Muon": [],
    "SGD": [],
}  # fmt: skip
for of_optimizer in SETTINGS.values():
    of_optimizer += [{"cap": 2.0, "robust": 1.0, name: value} for name, value in STRONG]
    of_optimizer += [{"robust": 1.0, "beta": 4.0}]  # as far as the delay


def extrapolate(betas: Any) -> optax.GradientTransformation:
    """Optax's `scale_by_optimistic_gradient` with a β for each parameter."""

    def init(params: Any) -> Any:
        return jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        count, last = state
        new = jax.tree.map(
            lambda u, v, b: u + jnp.where(count > 0, b, 0.0) * (u - v), updates, last, betas
        )
        return new, (count + 1, updates)

    return optax.GradientTransformation(init, update)


class Trainer(pipeline_delay.Trainer):
    """Trains one setting, all seeds at once."""

    def _program(self, stages: int, optimizer: str, before: bool) -> Any:
        graphdef, all_params, delays = self.models(stages)

        def make(rate: Any, on: dict[str, Any]) -> Any:
            betas = jax.tree.map(
                lambda d: on["beta"] * jnp.where(on["by_stage"] > 0, d / (stages - 1), 1.0), delays
            )
            links = [extrapolate(betas), scale_by_staleness(on["scaled"]), track_velocity(0.0)]
            robust = robust_delay_compensation(
                8.0 * on["robust"],
                max_norm=jnp.where(on["robust"] > 0, 2.0, jnp.inf),
                power=0.25 * on["robust"],
            )
            if before:
                links = [links[2], *links[:2]]
            return delay_gradients(
                optax.chain(robust, OPTIMIZERS[optimizer](rate, on), *links), delays
            )

        def run(params: Any, seed: jax.Array, rate: jax.Array, on: dict[str, Any]) -> jax.Array:
            def predicted(d: int) -> Any:
                powers = on["gamma"] ** jnp.arange(d)
                return jnp.minimum(on["mult"] * jnp.sum(powers), on["cap"])

            ahead, tx = jax.tree.map(predicted, delays), make(rate, on)
            state = params, tx.init(params), jax.random.key(seed)
            state = self.train(graphdef, tx, ahead, state, UPDATES)
            return pipeline_delay.loss_fn(graphdef, state[0], self.text[1])

        program = jax.jit(jax.vmap(run, in_axes=(0, 0, None, None)))
        return functools.partial(program, all_params, jnp.arange(SEEDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", type=int, default=8, metavar="P")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    args = parser.parse_args()
    args.seeds, args.blocks = SEEDS, 4
    trainer = Trainer(args)
    wanted = [(name, setting) for name in args.optimizers for setting in SETTINGS[name]]
    for name, setting in tqdm(wanted, unit="setting"):
        on = {key: jnp.float32(setting.get(key, value)) for key, value in DEFAULT.items()}
        run = trainer.program(args.stages, name, "before" in setting)
        losses = np.asarray(run(jnp.float32(RATES[name]), on))
        said = ", ".join(f"{key} {value:g}" for key, value in setting.items())
        tqdm.write(f"{name} {said or 'predicted + extrapolated'}: {losses.mean():.3f} nats")


if __name__ == "__main__":
    main()
