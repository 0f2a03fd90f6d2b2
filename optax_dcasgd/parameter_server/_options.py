"""What the server has to know of a run."""

import dataclasses

from optax_dcasgd.parameter_server._fingerprint import Fingerprint
from optax_dcasgd.parameter_server._local_steps import LocalSteps


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of `train`, and what is found out from them and about ``checkpoint_dir``."""

    mode: str
    num_workers: int
    num_updates: int
    max_staleness: int | None
    on_stale: str
    checkpoint_dir: str | None
    checkpoint_every: int
    compensation_every: int | None
    max_bad_pushes: int
    name: str | None
    signature: list[str]
    local_steps: LocalSteps = dataclasses.field(default_factory=lambda: LocalSteps(None))
    fingerprint: Fingerprint = dataclasses.field(default_factory=dict)
    lock: str | None = None  # the token of `_lock.held`
