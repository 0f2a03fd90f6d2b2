"""Asynchronous training of M workers as one compiled program, in virtual time.

    arrivals = simulation.arrivals(key, num_workers=8, num_updates=2000)
    result = simulation.run(grad_fn, params, tx, batches, arrivals)

`arrivals` says in which order the workers' gradients reach the server, and how stale each one is.
`run` trains in that order.
"""

from optax_dcasgd.simulation._arrivals import Arrivals
from optax_dcasgd.simulation._compute_time import deterministic, exponential, lognormal
from optax_dcasgd.simulation._events import arrivals
from optax_dcasgd.simulation._run import History, Result, run

__all__ = [
    "Arrivals",
    "History",
    "Result",
    "arrivals",
    "deterministic",
    "exponential",
    "lognormal",
    "run",
]
