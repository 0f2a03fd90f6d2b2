"""What Ray's metrics show of a run (``ray.util.metrics``, for Prometheus and the dashboard)."""

from typing import Any

import numpy as np
from ray.util import metrics

_PREFIX = "optax_dcasgd_"


class Metrics:
    """Counters and gauges, tagged with the run's name."""

    def __init__(self, name: str | None):
        tags = {"run": name or ""}

        def made(kind: Any, name: str, description: str, *keys: str) -> Any:
            metric = kind(_PREFIX + name, description, tag_keys=("run", *keys))
            metric.set_default_tags(tags)
            return metric

        self._updates = made(metrics.Counter, "updates", "Gradients applied.")
        self._events = made(
            metrics.Counter, "events", "Refused or dropped gradients, lost workers, ...", "kind"
        )
        self._loss = made(metrics.Gauge, "loss", "Mean loss of the last updates.")
        self._staleness = made(metrics.Gauge, "staleness", "Mean staleness of the last updates.")

    def updates(self, rows: np.ndarray) -> None:
        """Adds rows of the history."""
        if rows.size:
            self._updates.inc(rows.size)
            self._loss.set(float(rows["loss"].mean()))
            self._staleness.set(float(rows["staleness"].mean()))

    def event(self, kind: str) -> None:
        """Counts an `Event`."""
        self._events.inc(1, {"kind": kind})
