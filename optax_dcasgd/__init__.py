"""Delay compensation for stale gradients, as Optax gradient transformations."""

from optax_dcasgd import diagnostics, mxnet, parameter_server, simulation
from optax_dcasgd._compensation import AddDelayCompensationState, add_delay_compensation
from optax_dcasgd._dcasgd import DCASGDState, FusedOptimizer, dcasgd, fused_dcasgd
from optax_dcasgd._delay import DelayGradientsState, delay_gradients
from optax_dcasgd._mixed_precision import MasterWeightsState, with_master_weights
from optax_dcasgd._overlap import OverlapReductionState, overlap_reduction
from optax_dcasgd._pipeline import (
    TrackVelocityState,
    pipeline_delays,
    predict_params,
    track_velocity,
)
from optax_dcasgd._robust import RobustState, robust
from optax_dcasgd._staleness import ScaleByGapState, scale_by_gap, scale_by_staleness

__version__ = "0.1.0"

__all__ = [
    "AddDelayCompensationState",
    "DCASGDState",
    "DelayGradientsState",
    "FusedOptimizer",
    "MasterWeightsState",
    "OverlapReductionState",
    "RobustState",
    "ScaleByGapState",
    "TrackVelocityState",
    "add_delay_compensation",
    "dcasgd",
    "delay_gradients",
    "diagnostics",
    "fused_dcasgd",
    "mxnet",
    "overlap_reduction",
    "parameter_server",
    "pipeline_delays",
    "predict_params",
    "robust",
    "scale_by_gap",
    "scale_by_staleness",
    "simulation",
    "track_velocity",
    "with_master_weights",
]
