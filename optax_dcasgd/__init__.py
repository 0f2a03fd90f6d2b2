"""Delay compensation for stale gradients, as Optax gradient transformations."""

import importlib
from typing import TYPE_CHECKING, Any

from optax_dcasgd import mxnet, rules, sources
from optax_dcasgd._dcasgd import DCASGDState, FusedOptimizer, dcasgd, fused_dcasgd
from optax_dcasgd._gradients import LocalBatches
from optax_dcasgd._local_updates import local_updates
from optax_dcasgd._mixed_precision import MasterWeightsState, with_master_weights
from optax_dcasgd.rules import (
    RuleState,
    ScaleByGapState,
    add_delay_compensation,
    robust_delay_compensation,
    scale_by_gap,
    scale_by_staleness,
)
from optax_dcasgd.sources import (
    DelayGradientsState,
    OverlapReductionState,
    RememberParamsState,
    TrackVelocityState,
    delay_gradients,
    overlap_reduction,
    pipeline_delays,
    predict_params,
    remember_params,
    track_velocity,
)

if TYPE_CHECKING:
    from optax_dcasgd import diagnostics, parameter_server, simulation

__version__ = "0.1.0"

__all__ = [
    "DCASGDState",
    "DelayGradientsState",
    "FusedOptimizer",
    "LocalBatches",
    "MasterWeightsState",
    "OverlapReductionState",
    "RememberParamsState",
    "RuleState",
    "ScaleByGapState",
    "TrackVelocityState",
    "add_delay_compensation",
    "dcasgd",
    "delay_gradients",
    "diagnostics",
    "fused_dcasgd",
    "local_updates",
    "mxnet",
    "overlap_reduction",
    "parameter_server",
    "pipeline_delays",
    "predict_params",
    "remember_params",
    "robust_delay_compensation",
    "rules",
    "scale_by_gap",
    "scale_by_staleness",
    "simulation",
    "sources",
    "track_velocity",
    "with_master_weights",
]


def __getattr__(name: str) -> Any:
    if name in ("diagnostics", "parameter_server", "simulation"):  # loaded when they are used
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
