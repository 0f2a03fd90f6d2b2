"""Sources: where ``w_s`` comes from, as wrappers around an optimizer.

A source hands the optimizer inside it ``stale_params`` (w_s) and ``staleness`` (τ) with each
gradient. Every rule inside reads the same ones.
"""

from optax_dcasgd.sources._delay import DelayGradientsState, delay_gradients
from optax_dcasgd.sources._overlap import OverlapReductionState, overlap_reduction
from optax_dcasgd.sources._pipeline import (
    TrackVelocityState,
    pipeline_delays,
    predict_params,
    track_velocity,
)
from optax_dcasgd.sources._remember import RememberParamsState, remember_params

__all__ = [
    "DelayGradientsState",
    "OverlapReductionState",
    "RememberParamsState",
    "TrackVelocityState",
    "delay_gradients",
    "overlap_reduction",
    "pipeline_delays",
    "predict_params",
    "remember_params",
    "track_velocity",
]
