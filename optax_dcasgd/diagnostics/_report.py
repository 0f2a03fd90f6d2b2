"""`diagnose`: what the pairs of one run say, in words."""

import textwrap
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from optax_dcasgd import _arguments
from optax_dcasgd._gradients import GradFn
from optax_dcasgd.diagnostics._fit import DEFAULT_EPS, Quality, fit, quality
from optax_dcasgd.diagnostics._pairs import collect, recorded_at
from optax_dcasgd.simulation import Arrivals

# The verdict's thresholds: a relative error of stale gradients that does no harm, and a share of
# the squared error that is worth the trouble of removing.
_HARMLESS_ERROR = 0.05
_WORTHWHILE_SHARE = 0.1


class Report(NamedTuple):
    """What `diagnose` found; ``print`` it."""

    num_pairs: int
    staleness: float  # the mean over the pairs, in updates
    stale: Quality  # the stale gradients as they are
    fits: dict[str, Quality]  # the best of each form of compensation, by what the form is called
    best: str | None  # the form with the smallest error; None if compensation does not pay
    arguments: dict[str, float | None]  # what to call `add_delay_compensation` with
    verdict: str  # in words

    def __str__(self) -> str:
        rows = [("", "lamda", "relative error", "cosine")]
        for name, of in [("stale gradient", self.stale), *self.fits.items()]:
            lamda = "" if of is self.stale else f"{of.lamda:.3g}"
            rows.append((name, lamda, f"{of.relative_error:.3f}", f"{of.cosine:.3f}"))
        title = f"{self.num_pairs} gradients, {self.staleness:.1f} updates old on average"
        lines = [f"{a:<26}{b:>8}{c:>17}{d:>9}" for a, b, c, d in rows]
        return "\n".join([title, *lines, *textwrap.wrap(self.verdict, 80)])


def diagnose(
    grad_fn: GradFn,
    params: optax.Params,
    tx: optax.GradientTransformation,
    batches: Any,
    arrivals: Arrivals,
    *,
    num_pairs: int = 32,
    decay: float = 0.95,
    eps: float = DEFAULT_EPS,
    clip: float = 1.0,
    key: jax.Array | None = None,
) -> Report:
    """Says whether delay compensation brings stale gradients closer to the true ones, and which λ.

    It trains with ``tx`` and judges the gradients along the way (`collect`, `fit`). Let ``tx`` be
    what you train with now, without compensation. The verdict is that compensation pays where stale
    gradients are off by more than 5 % and compensation removes a tenth or more of their squared
    error. This is about gradients. It does not say how much sooner training is done, or how much
    larger a learning rate may be: `simulation.run` with and without compensation shows that. A λ
    above the one that fits, with a clip, may well train better.

    Args:
      grad_fn: As for `simulation.run`, like the next four.
      params: The initial parameters.
      tx: Any Optax optimizer.
      batches: The batches.
      arrivals: The order of the pushes, and on which batch each was computed.
      num_pairs: How many gradients to judge.
      decay: m of DC-ASGD-a.
      eps: As for `add_delay_compensation`.
      clip: As for `add_delay_compensation`; judged beside no clip.
      key: A JAX random key, by default ``jax.random.key(0)``.

    Returns:
      What was found; ``print`` it to read it.

    Raises:
      TypeError: If an argument has no legal type.
      ValueError: If an argument is out of range or does not fit, or the run is not finite.

    Examples:
      Logistic regression, whose Hessian is nearly what the squared gradient stands for:

      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_dcasgd import diagnostics, simulation
      >>> x = jax.random.normal(jax.random.key(0), (300, 8, 5))
      >>> batches = x, jax.random.bernoulli(jax.random.key(1), jax.nn.sigmoid(x.sum(-1)))
      >>> def loss(w, batch, key):
      ...   return optax.sigmoid_binary_cross_entropy(batch[0] @ w, batch[1]).mean()
      >>> report = diagnostics.diagnose(
      ...   jax.value_and_grad(loss), jnp.zeros(5), optax.sgd(2.0), batches,
      ...   simulation.arrivals(jax.random.key(2), num_workers=8, num_updates=300))
      >>> print(report)
      32 gradients, 6.2 updates old on average
                                   lamda   relative error   cosine
      stale gradient                                0.644    0.798
      DC-a, clip=1                 0.423            0.484    0.878
      DC-a                         0.159            0.509    0.863
      DC-c, clip=1                  2.46            0.475    0.882
      DC-c                         0.903            0.509    0.863
      Compensation pays: add_delay_compensation(lamda=2.46, decay=None, clip=1)
      removes 46% of the squared error of stale gradients.
    """
    _arguments.check_scalar("eps", eps, minimum=0.0, schedule=False)
    _arguments.check_scalar("clip", clip, minimum=0.0, schedule=False)
    found = collect(
        grad_fn, params, tx, batches, arrivals, num_pairs=num_pairs, decay=decay, key=key
    )
    adaptive: dict[str, float | None] = {"decay": decay}
    if eps != DEFAULT_EPS:
        adaptive["eps"] = eps
    forms: dict[str, dict[str, float | None]] = {
        f"DC-a, clip={clip:g}": {**adaptive, "clip": clip},
        "DC-a": {**adaptive, "clip": None},
        f"DC-c, clip={clip:g}": {"decay": None, "clip": clip},
        "DC-c": {"decay": None, "clip": None},
    }
    fits = {
        name: fit(found, adaptive=form["decay"] is not None, eps=eps, clip=form["clip"])
        for name, form in forms.items()
    }
    stale = quality(found, 0.0)
    best = min(fits, key=lambda name: fits[name].relative_error)
    share = 0.0
    if stale.relative_error > 0:
        share = 1 - (fits[best].relative_error / stale.relative_error) ** 2
    arguments: dict[str, float | None] = {"lamda": fits[best].lamda, **forms[best]}
    call = ", ".join(
        f"{name}={value}" if value is None else f"{name}={value:.3g}"
        for name, value in arguments.items()
    )
    pays = False
    if stale.relative_error < _HARMLESS_ERROR:
        verdict = (
            f"Nothing to compensate: stale gradients are off by only {stale.relative_error:.1%}."
        )
    elif share < _WORTHWHILE_SHARE:
        verdict = (
            f"Compensation does not pay: at its best it removes {share:.0%} of the squared error "
            "of stale gradients. Smaller steps (scale_by_staleness, scale_by_gap) may help."
        )
    else:
        pays = True
        verdict = (
            f"Compensation pays: add_delay_compensation({call}) removes {share:.0%} of the squared "
            "error of stale gradients."
        )
    return Report(
        num_pairs=num_pairs,
        staleness=float(np.mean(np.asarray(arrivals.staleness)[recorded_at(arrivals, num_pairs)])),
        stale=stale,
        fits=fits,
        best=best if pays else None,
        arguments=arguments if pays else {"lamda": 0.0},
        verdict=verdict,
    )
