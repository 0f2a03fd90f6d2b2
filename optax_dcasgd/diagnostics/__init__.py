"""How wrong stale gradients are on *your* model and data, and what compensation makes of them.

    print(diagnostics.diagnose(grad_fn, params, tx, batches, arrivals))

trains as `simulation.run` does, and compares along the way the stale gradient, and the compensated
one, with the gradient that a fresh worker would have sent. The rest of this module is that in
parts: `collect` or `pairs` make the `Pairs` to look at, `fit` finds λ, `quality` judges one.
"""

from optax_dcasgd.diagnostics._fit import Quality, fit, quality
from optax_dcasgd.diagnostics._pairs import Pairs, collect, pairs
from optax_dcasgd.diagnostics._report import Report, diagnose

__all__ = ["Pairs", "Quality", "Report", "collect", "diagnose", "fit", "pairs", "quality"]
