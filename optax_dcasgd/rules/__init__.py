"""Rules: what is done about a stale gradient, as transformations to put before an optimizer.

A rule is one function of arrays, ``(g, w − w_s, ν, hyperparameters) -> (g̃, ν')``. `transformation`
makes an Optax transformation of it. A rule remembers no parameters: ``w_s`` comes from a source
around it (`optax_dcasgd.sources`), or from who calls ``update``.
"""

from optax_dcasgd.rules._compensation import add_delay_compensation
from optax_dcasgd.rules._driver import RuleState, transformation
from optax_dcasgd.rules._gap import ScaleByGapState, scale_by_gap
from optax_dcasgd.rules._robust import robust_delay_compensation
from optax_dcasgd.rules._staleness import scale_by_staleness

__all__ = [
    "RuleState",
    "ScaleByGapState",
    "add_delay_compensation",
    "robust_delay_compensation",
    "scale_by_gap",
    "scale_by_staleness",
    "transformation",
]
