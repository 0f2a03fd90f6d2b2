"""How wrong stale gradients are on *your* model and data, and what compensation makes of them.

    print(diagnostics.diagnose(grad_fn, params, tx, batches, arrivals))

trains as `simulation.run` does. Along the way it compares the stale gradient and the compensated
one with the gradient that a fresh worker would have sent. The other functions are its parts:
`collect` and `pairs` compute the `Pairs` of gradients, `fit` finds the best λ, and `quality` judges
a given one. `overhead` compares training as a whole: how many more updates stale gradients need.
"""

from optax_dcasgd.diagnostics._fit import Quality, fit, quality
from optax_dcasgd.diagnostics._overhead import Overhead, overhead
from optax_dcasgd.diagnostics._pairs import Pairs, collect, pairs
from optax_dcasgd.diagnostics._report import Report, diagnose

__all__ = [
    "Overhead",
    "Pairs",
    "Quality",
    "Report",
    "collect",
    "diagnose",
    "fit",
    "overhead",
    "pairs",
    "quality",
]
