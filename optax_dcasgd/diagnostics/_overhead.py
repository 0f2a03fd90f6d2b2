"""How many more updates stale training needs, and how much faster a step has to be for that."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from optax_dcasgd import _arguments


class Overhead(NamedTuple):
    """What `overhead` found; ``print`` it."""

    # Stale updates over fresh updates at the same loss: 1.2 is 20 % more updates. inf: the stale
    # runs never get there; 0: the fresh runs never do; nan: neither do.
    ratio: float
    standard_error: float  # of the ratio, over seeds; nan from one seed, or where a ratio is inf
    loss: float  # the loss at which updates were counted
    fresh_updates: float  # until the mean of the fresh runs is there; inf if it never is
    stale_updates: float  # the same of the stale runs

    def __str__(self) -> str:
        if not (math.isfinite(self.ratio) and self.ratio > 0):
            who = {math.inf: "The stale runs never reach", 0.0: "The fresh runs never reach"}
            return f"{who.get(self.ratio, 'No runs reach')} a loss of {self.loss:.4g}."
        error = "" if math.isnan(self.standard_error) else f" ± {self.standard_error:.2g}"
        return (
            f"{self.ratio:.3g}{error} times as many updates: to a loss of {self.loss:.4g}, "
            f"{self.stale_updates:.4g} stale and {self.fresh_updates:.4g} fresh ones."
        )

    def break_even(self, fresh_step: float, stale_step: float) -> str:
        """Says whether the faster step of stale training pays for its additional updates.

        Args:
          fresh_step: The measured time of one step with fresh gradients, in any unit.
          stale_step: The same of one step with stale gradients, in the same unit.

        Returns:
          A few sentences.

        Raises:
          TypeError: If a time is no number.
          ValueError: If a time is not above 0.
        """
        for name, time in (("fresh_step", fresh_step), ("stale_step", stale_step)):
            _arguments.check_scalar(name, np.asarray(time).item(), above=0.0, schedule=False)
        if not (math.isfinite(self.ratio) and self.ratio > 0):
            return f"{self} There is no break-even."
        speed = fresh_step / stale_step
        words = (
            f"Staleness pays if a step is more than {self.ratio:.3g} times as fast.\n"
            f"It is {speed:.3g} times as fast. To the same loss, training takes "
            f"{self.ratio / speed:.3g} times as long: "
        )
        error = 0.0 if math.isnan(self.standard_error) else 2 * self.standard_error
        if abs(speed - self.ratio) <= error:
            return f"{words}no clear difference (within two standard errors)."
        return words + ("staleness pays." if speed > self.ratio else "staleness does not pay.")


def overhead(fresh: Any, stale: Any, updates: Any = None, *, loss: float | None = None) -> Overhead:
    r"""How many times as many updates stale training needs for the same loss.

    .. math:: \text{ratio} = T_\text{stale}(\ell) \,/\, T_\text{fresh}(\ell)

    where :math:`T(\ell)` is the number of updates after which the mean curve over seeds has fallen
    to :math:`\ell`, interpolated linearly between evaluations. The curve is first replaced by the
    nearest one that never rises (least squares), so that noise neither hides nor fakes a crossing.

    Args:
      fresh: Losses of training with fresh gradients, shape (seeds, evaluations) or (evaluations,).
        From a loss on that is not finite a run has diverged, and the mean curve ends.
      stale: The same with stale gradients. It may have other numbers of seeds and evaluations.
      updates: How many updates were done at each evaluation, increasing, as many as the longer of
        the two curves has evaluations. By default 1, 2, 3, ...: evaluations evenly apart.
      loss: :math:`\ell`. By default the lowest loss that both mean curves reach, where the worse of
        the two ends. (If one curve ends above the start of the other, the loss at that start. If
        one diverges, the loss at which the other ends.)

    Returns:
      The ratio, its standard error over seeds (the jackknife: from leaving out one run after the
      other) and the counts of updates.

    Raises:
      TypeError: If an argument has no legal type.
      ValueError: If a shape does not fit, ``updates`` does not increase, a first loss of ``fresh``
        is not finite, or ``loss`` is above the first loss of a curve.

    Examples:
      >>> import numpy as np
      >>> from optax_dcasgd import diagnostics
      >>> t = np.arange(1, 101)
      >>> found = diagnostics.overhead(fresh=1 / t, stale=1 / (t / 1.2))
      >>> print(found)
      1.2 times as many updates: to a loss of 0.012, 100 stale and 83.34 fresh ones.
      >>> print(found.break_even(fresh_step=0.50, stale_step=0.30))
      Staleness pays if a step is more than 1.2 times as fast.
      It is 1.67 times as fast. To the same loss, training takes 0.72 times as long: staleness pays.
    """
    curves = {"fresh": _losses("fresh", fresh), "stale": _losses("stale", stale)}
    longest = max(runs.shape[1] for runs in curves.values())
    at = np.arange(1.0, longest + 1) if updates is None else np.asarray(updates, np.float64)
    if at.shape != (longest,) or not np.all(np.isfinite(at)) or np.any(np.diff(at, prepend=0) <= 0):
        raise ValueError(
            f"updates must be {longest} increasing numbers above 0, one for each evaluation of the "
            f"longer curve; got an array of shape {at.shape}: {updates!r}."
        )
    _arguments.check_scalar("loss", loss, optional=True, schedule=False)
    for name, runs in curves.items():
        first = runs[:, 0].mean()
        if loss is not None and math.isfinite(first) and loss > first:
            raise ValueError(
                f"loss={loss!r} is above the first loss of {name}, {first:.4g}: nobody knows when "
                "it was reached. Pass a lower one, or None."
            )
    if not np.isfinite(curves["fresh"][:, 0]).all():
        raise ValueError("fresh has a run whose first loss is not finite: there is no curve.")
    found = _ratio(curves["fresh"], curves["stale"], at, loss)
    variance = 0.0
    for name, runs in curves.items():
        if len(runs) == 1:
            return found._replace(standard_error=math.nan)
        without = [curves | {name: np.delete(runs, i, 0)} for i in range(len(runs))]
        ratios = np.array([_ratio(c["fresh"], c["stale"], at, loss).ratio for c in without])
        if not np.isfinite(ratios).all():
            return found._replace(standard_error=math.nan)
        variance += (len(runs) - 1) * ratios.var()
    return found._replace(standard_error=math.sqrt(variance))


def _losses(name: str, losses: Any) -> np.ndarray:
    """As an array of shape (seeds, evaluations)."""
    runs = np.asarray(losses)
    if not (jnp.issubdtype(runs.dtype, jnp.floating) or jnp.issubdtype(runs.dtype, jnp.integer)):
        raise TypeError(f"{name} must be an array of losses; got dtype {runs.dtype}.")
    if runs.ndim not in (1, 2) or not runs.size:
        raise ValueError(
            f"{name} must have shape (seeds, evaluations) or (evaluations,); got {runs.shape}."
        )
    return np.atleast_2d(runs).astype(np.float64)


def _ratio(fresh: np.ndarray, stale: np.ndarray, at: np.ndarray, loss: float | None) -> Overhead:
    curves = [_falling(runs.mean(0), at) for runs in (fresh, stale)]
    if loss is None:
        # Where the worse of the two ends; but not above where either starts.
        starts = [values[0] for _, values in curves if values.size]
        whole = [bool(np.isfinite(runs).all()) for runs in (fresh, stale)]
        ends = [
            values[-1]
            for (_, values), is_whole in zip(curves, whole, strict=True)
            if values.size and (is_whole or not any(whole))
        ]
        loss = float(min(max(ends), *starts))
    fresh_updates, stale_updates = (_updates_to(loss, *curve) for curve in curves)
    if math.isinf(fresh_updates):
        ratio = math.nan if math.isinf(stale_updates) else 0.0
    else:
        ratio = stale_updates / fresh_updates
    return Overhead(ratio, math.nan, loss, fresh_updates, stale_updates)


def _falling(losses: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest curve that never rises: stretches that do become one point, their mean."""
    blocks: list[tuple[int, float, float]] = []  # how many evaluations, mean update, mean loss
    for update, loss in zip(at, losses, strict=False):
        if not math.isfinite(loss):
            break
        size, mean_update, mean_loss = 1, float(update), float(loss)
        while blocks and blocks[-1][2] <= mean_loss:
            n, *means = blocks.pop()
            mean_update, mean_loss = (
                (n * x + size * y) / (n + size)
                for x, y in zip(means, (mean_update, mean_loss), strict=True)
            )
            size += n
        blocks.append((size, mean_update, mean_loss))
    _, updates, values = np.array(blocks, np.float64).reshape(-1, 3).T
    return updates, values


def _updates_to(loss: float, updates: np.ndarray, values: np.ndarray) -> float:
    """When a falling curve gets to a loss; inf if never."""
    # The mean of a stretch can be rounded to just above itself.
    if not values.size or values[-1] > loss * (1 + np.sign(loss) * 1e-12):
        return math.inf
    return float(np.interp(-loss, -values, updates))
