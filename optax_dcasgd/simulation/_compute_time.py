"""How long a worker computes one gradient: distributions for `arrivals`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_dcasgd import _arguments

# A random key in, seconds out (a real scalar above zero), traceable by JAX.
ComputeTime = Callable[[jax.Array], Any]


def deterministic(seconds: float | jax.Array = 1.0) -> ComputeTime:
    """Every gradient takes the same time.

    Args:
      seconds: That time, above zero.

    Returns:
      A ``compute_time`` for `arrivals`.

    Raises:
      TypeError: If ``seconds`` is no number.
      ValueError: If it is not above zero.

    Examples:
      Workers of one speed take turns, and after the first turn every gradient is M − 1 updates old:

      >>> import jax
      >>> from optax_dcasgd import simulation
      >>> compute_time = simulation.deterministic(0.5)
      >>> arrivals = simulation.arrivals(jax.random.key(0), 3, 6, compute_time=compute_time)
      >>> print(arrivals.worker, arrivals.staleness, arrivals.time)
      [0 1 2 0 1 2] [0 1 2 2 2 2] [0.5 0.5 0.5 1.  1.  1. ]
    """
    _arguments.check_scalar("seconds", seconds, above=0.0, schedule=False)
    return lambda key: seconds


def exponential(mean: float | jax.Array = 1.0) -> ComputeTime:
    """Exponentially distributed times: every worker is equally likely to push next.

    Args:
      mean: The mean time in seconds, above zero.

    Returns:
      A ``compute_time`` for `arrivals`.

    Raises:
      TypeError: If ``mean`` is no number.
      ValueError: If it is not above zero.

    Examples:
      >>> import jax
      >>> from optax_dcasgd import simulation
      >>> compute_time = simulation.exponential(0.1)
      >>> arrivals = simulation.arrivals(jax.random.key(0), 8, 4000, compute_time=compute_time)
      >>> print(arrivals.staleness.mean().round())  # seven others push meanwhile
      7.0
    """
    _arguments.check_scalar("mean", mean, above=0.0, schedule=False)
    return lambda key: mean * jax.random.exponential(key)


def lognormal(mean: float | jax.Array = 1.0, sigma: float | jax.Array = 0.5) -> ComputeTime:
    r"""Log-normally distributed times: mostly similar, with a straggler now and then.

    They are :math:`\text{mean}\cdot e^{\sigma z - \sigma^2/2}`, where :math:`z` is standard normal.

    Args:
      mean: The mean time in seconds, above zero.
      sigma: The standard deviation of the time's logarithm, at least zero.

    Returns:
      A ``compute_time`` for `arrivals`.

    Raises:
      TypeError: If an argument is no number.
      ValueError: If an argument is out of range.

    Examples:
      >>> import jax
      >>> from optax_dcasgd import simulation
      >>> keys = jax.random.split(jax.random.key(0), 10_000)
      >>> seconds = jax.vmap(simulation.lognormal(2.0, sigma=0.5))(keys)
      >>> print(seconds.mean().round(1))
      2.0
    """
    _arguments.check_scalar("mean", mean, above=0.0, schedule=False)
    _arguments.check_scalar("sigma", sigma, minimum=0.0, schedule=False)
    return lambda key: mean * jnp.exp(sigma * jax.random.normal(key) - sigma**2 / 2)
