"""Hyperparameters by name: schedules evaluated, numbers in the dtype of the arithmetic.

A rule or an optimizer keeps what its user passed in one dictionary, say ``{"lamda": 8.0, "decay":
schedule, "clip": None}``. `at_count` evaluates the schedules for one update; `cast` gives the
scalars that the arithmetic on arrays of one dtype takes. ``None`` stays ``None``.
"""

from typing import Any

import jax
import numpy as np

from optax_dcasgd import _arguments

Hyperparameters = dict[str, Any]


def at_count(hyperparams: Hyperparameters, count: jax.Array) -> Hyperparameters:
    """Evaluates the schedules at an update count.

    Raises:
      ValueError: Names the schedule that does not return a number, or no legal one.
    """

    def value(name: str, hyperparam: Any) -> Any:
        if not callable(hyperparam):
            return hyperparam
        now = hyperparam(count)
        if now is None or np.shape(now) != ():
            raise ValueError(f"{name} is a schedule and must return a scalar; it returned {now!r}.")
        if name in ("decay", "momentum"):  # one of 1, maybe by rounding, never forgets
            _arguments.check_scalar(name, now, minimum=0.0, below=1.0, schedule=False)
        return now

    return {name: value(name, hyperparam) for name, hyperparam in hyperparams.items()}


def cast(hyperparams: Hyperparameters, dtype: Any) -> Hyperparameters:
    """Casts the numbers of one update to a real dtype; beside ``decay`` it gives ``1 - decay``.

    Each is rounded once: 1 − 0.999, with 0.999 rounded to float32 first, is off by 1e-5, and a
    moving average with it for good.
    """
    numbers: Hyperparameters = {
        name: None if x is None else as_dtype(x, dtype) for name, x in hyperparams.items()
    }
    decay = hyperparams.get("decay")
    if decay is not None:
        is_array = isinstance(decay, jax.Array)
        numbers["1 - decay"] = (
            1 - numbers["decay"] if is_array else as_dtype(1 - float(decay), dtype)
        )
    return numbers


def as_dtype(x: Any, dtype: Any) -> Any:
    """A scalar of that dtype: JAX's where ``x`` is one of JAX's, else NumPy's."""
    return x.astype(dtype) if isinstance(x, jax.Array) else np.asarray(x, dtype)
