r"""Published ideas about stale pipelines, on top of "strong" (docs/pipelines.md).

* warmed-up: the first 100 updates wait for the pipeline to drain, and so have no delay (PipeMare,
  arXiv 1910.05124, T3);
* annealed: steps are divided by τ^p, p from 1 to 0 over the first 250 updates (PipeMare, T1);
* momentum-up: rises from the last stage to the first, from what it is to 0.99 (arXiv 2505.01099);
  momentum-down: falls to 0.5; fresh+momentum-up: what the first gives gradients without delay;
* SOAP, an optimizer: Adam in the eigenbases of the averaged GGᵀ and GᵀG (arXiv 2409.11321; for
  stale pipelines 2602.03515). They are refreshed every 10 updates; strong+by-age: every 5 in the
  older half of the stages, and every 20 in the other.

It trains what ``examples/pipeline_delay.py`` trains, prints the same tables, and goes on where it
was interrupted:

    python benchmarks/pipeline_ideas.py --out out
    python benchmarks/pipeline_ideas.py --out out --stages 4 8 16 --sgd-rates 0.1 0.2 0.4 \
        --adam-rates 0.002 0.004 0.006 --muon-rates 0.006 0.01 \
        --methods fresh stale strong strong+momentum-up
    python benchmarks/pipeline_ideas.py --out out --sgd-rates --adam-rates --muon-rates \
        --soap-rates 0.003 0.006 --methods fresh stale strong strong+by-age
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any, NamedTuple

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
import stale_methods
import stale_report
from pipeline_delay import EVALUATE_EVERY

IDEAS = ("warmed-up", "annealed", "momentum-up", "momentum-down")
METHODS = ["fresh", "fresh+momentum-up", "stale", "strong"]
METHODS += [*(f"strong+{idea}" for idea in IDEAS), "strong+by-age"]
WARM_UP, ANNEAL = 100, 250  # updates
FIRST_MOMENTUM = {"momentum-up": 0.99, "momentum-down": 0.5}  # of the first stage
CHUNK = 5  # updates between two refreshes of the oldest bases
FULL: dict[str, Any] = {"stages": [8], "updates": 1000, "seeds": 5}
FULL |= {"methods": METHODS[:-1]}
FULL |= {"sgd_rates": [0.1], "adam_rates": [0.002], "muon_rates": [0.006], "soap_rates": []}


class SoapState(NamedTuple):
    """Of `soap`: a list each, an entry a parameter."""

    count: Any
    mu: Any
    nu: Any  # in the bases
    second: Any  # the averaged GGᵀ and GᵀG; () if the parameter is no matrix
    bases: Any


def soap(learning_rate: Any, b1: float = 0.95, b2: float = 0.95) -> optax.GradientTransformation:
    """Adam in bases that `refresh_bases` turns into eigenbases."""

    def into(x: jax.Array, bases: Any) -> jax.Array:
        return bases[0].T @ x @ bases[1] if bases else x

    def out_of(x: jax.Array, bases: Any) -> jax.Array:
        return bases[0] @ x @ bases[1].T if bases else x

    def init(params: Any) -> SoapState:
        leaves = jax.tree.leaves(params)
        zeros = [jnp.zeros_like(p) for p in leaves]
        eyes = [tuple(map(jnp.eye, p.shape)) if p.ndim == 2 else () for p in leaves]
        second = jax.tree.map(jnp.zeros_like, eyes)
        return SoapState(jnp.zeros((), jnp.int32), zeros, zeros, second, eyes)

    def update(grads: Any, state: SoapState, params: Any = None) -> tuple[Any, SoapState]:
        leaves, structure = jax.tree.flatten(grads)
        count, bases = state.count + 1, state.bases
        mu = [b1 * m + (1 - b1) * g for m, g in zip(state.mu, leaves, strict=True)]
        nu, second, updates = [], [], []
        for i, g in enumerate(leaves):
            nu.append(b2 * state.nu[i] + (1 - b2) * into(g, bases[i]) ** 2)
            products = (g @ g.T, g.T @ g) if bases[i] else ()
            averaged = zip(state.second[i], products, strict=True)
            second.append(tuple(b2 * s + (1 - b2) * p for s, p in averaged))
            scale = jnp.sqrt(nu[i] / (1 - b2**count)) + 1e-8
            direction = into(mu[i], bases[i]) / (1 - b1**count) / scale
            updates.append(-learning_rate * out_of(direction, bases[i]))
        return structure.unflatten(updates), SoapState(count, mu, nu, second, bases)

    return optax.GradientTransformation(init, update)


def refresh_bases(opt_state: Any, due: list[Any]) -> Any:
    """The state with one step of power iteration in the bases of the parameters that are due."""

    def refresh(state: Any) -> Any:
        if not isinstance(state, SoapState):
            return state
        bases = [
            tuple(
                jnp.where(now, jnp.linalg.qr(s @ q)[0], q) for s, q in zip(second, old, strict=True)
            )
            for second, old, now in zip(state.second, state.bases, due, strict=True)
        ]
        return state._replace(bases=bases)

    return jax.tree.map(refresh, opt_state, is_leaf=lambda x: isinstance(x, SoapState))


def inner(optimizer: str, rate: Any, momentum: float | None) -> optax.GradientTransformation:
    """The optimizer, with its usual momentum or with this one; a step stays as long.

    Under Muon it is that of the matrices.
    """
    if momentum is None:
        return stale_methods.OPTIMIZERS[optimizer](rate)
    if optimizer == "SGD":
        return optax.sgd(rate * (1 - momentum) / (1 - 0.9), momentum)
    if optimizer == "Adam":
        return optax.adam(rate, momentum)
    if optimizer == "Muon":
        return optax.contrib.muon(rate, beta=momentum)
    return soap(rate, momentum)


class Trainer(pipeline_delay.Trainer):
    """Trains cells, all seeds at once."""

    def _program(self, stages: int, optimizer: str, method: str) -> Any:
        graphdef, all_params, delays = self.models(stages)
        ideas = method.split("+")
        leaves = jax.tree.leaves(delays)

        of_first_stage = [FIRST_MOMENTUM[idea] for idea in ideas if idea in FIRST_MOMENTUM]

        def by_stage(rate: Any) -> optax.GradientTransformation:
            usual = 0.9 if optimizer in ("SGD", "Adam") else 0.95
            momentum = {
                d: usual + (of_first_stage[0] - usual) * d / (stages - 1) for d in {*leaves}
            }
            kinds = {d: inner(optimizer, rate, value) for d, value in momentum.items()}
            return optax.partition(kinds, delays)

        def make(rate: Any) -> optax.GradientTransformationExtraArgs:
            tx = by_stage(rate) if of_first_stage else inner(optimizer, rate, None)
            links = [tx]
            if "strong" in ideas:
                extrapolated = optax.scale_by_optimistic_gradient(beta=(stages - 1) / 2)
                links = [robust_delay_compensation(), tx, extrapolated]
            if "annealed" in ideas:
                links.append(scale_by_staleness(optax.linear_schedule(1.0, 0.0, ANNEAL)))
            return optax.chain(*links, track_velocity(0.0))

        def start(params: Any, seed: jax.Array, fresh: bool) -> Any:
            tx = delay_gradients(make(0.1), 0 if fresh else delays)
            return jax.tree.map(jnp.copy, params), tx.init(params), jax.random.key(seed)

        def advance(state: Any, rate: jax.Array, count: jax.Array, fresh: bool) -> Any:
            tx = delay_gradients(make(rate), 0 if fresh else delays)
            most = 2 if "strong" in ideas and not fresh else 0
            ahead = jax.tree.map(lambda delay: min(delay, most), delays)

            def chunk(state: Any, i: jax.Array) -> tuple[Any, None]:
                params, opt_state, key = self.train(graphdef, tx, ahead, state, CHUNK)
                if optimizer == "SOAP":
                    done = count // CHUNK + i + 1
                    is_old = [2 * d >= stages for d in leaves]
                    every = [(1 if old else 4) if "by-age" in ideas else 2 for old in is_old]
                    due = [(done % n == 0) | (done == 1) for n in every]
                    opt_state = refresh_bases(opt_state, due)
                return (params, opt_state, key), None

            state, _ = jax.lax.scan(chunk, state, jnp.arange(EVALUATE_EVERY // CHUNK))
            return state, pipeline_delay.loss_fn(graphdef, state[0], self.text[1])

        def compiled(fresh: bool) -> tuple[Any, Any]:
            one_start = functools.partial(start, fresh=fresh)
            one_advance = functools.partial(advance, fresh=fresh)
            seeds = jnp.arange(self.args.seeds)
            return (
                functools.partial(jax.jit(jax.vmap(one_start)), all_params, seeds),
                jax.jit(jax.vmap(one_advance, (0, None, None)), donate_argnums=0),
            )

        return compiled(fresh=False), compiled(fresh=True)

    def __call__(self, name: stale_methods.Cell, bar: tqdm) -> dict[str, list[list[float]]]:
        """The validation losses after every `EVALUATE_EVERY` updates."""
        method, updates = name["method"], self.args.updates
        (start, advance), (start_fresh, advance_fresh) = self.program(
            name["stages"], name["optimizer"], method
        )
        drained = WARM_UP if "warmed-up" in method else 0  # updates without delay
        if method.startswith("fresh"):
            drained = updates
        state, losses = start_fresh() if drained else start(), []
        for count in range(0, updates, EVALUATE_EVERY):
            if count == drained > 0:  # the pipeline fills again; the optimizer's state is kept
                params, opt_state, key = state
                empty = start()[1]
                state = params, empty._replace(inner_state=opt_state.inner_state), key
            step = advance_fresh if count < drained else advance
            state, loss = step(state, name["learning_rate"], count)
            losses.append(np.asarray(loss))
            bar.update(EVALUATE_EVERY)
        return {"loss": np.stack(losses, 1).tolist()}


def main() -> None:
    stale_methods.OPTIMIZERS["SOAP"] = soap  # type: ignore[assignment]
    stale_methods.METHODS.clear()
    stale_methods.METHODS.update(dict.fromkeys(METHODS, ()))
    looks = stale_report.STYLES
    spare = [look for name, look in looks.items() if name not in METHODS]
    looks.update(zip([name for name in METHODS if name not in looks], spare, strict=False))
    parser = argparse.ArgumentParser("pipeline_ideas.py", description=__doc__.partition("\n")[0])
    args = stale_methods.parse_args(parser, None, FULL, {}, EVALUATE_EVERY)
    args.blocks = 4
    settings = {"blocks": 4, "text": pipeline_delay.TEXT}
    stale_report.run(args, settings, Trainer, pipeline_delay.MEASURE, EVALUATE_EVERY)


if __name__ == "__main__":
    main()
