"""JAX's configuration of the caller, which every actor gets: its numbers and its platform."""

import re
from collections.abc import Mapping
from typing import Any

import jax

# What belongs to a process, and changes no number: where it writes, what it logs and checks, which
# other processes it knows.
_LOCAL = re.compile(
    "cache|captured|collectives|cross_host|debug|distributed|dump|explain|export|guard|log_|logging|"
    "mock|mtls|no_execution|no_tracing|pgle|pprint|preemption|proxy|recoverability|serialization|"
    "share_binary|source|topology|trace|verbose|visible_devices"
)


def of_caller(environment: Mapping[str, str]) -> dict[str, Any]:
    """The values to `apply` in an actor.

    Those that have a value, JAX's default too: an actor whose machine sets ``JAX_ENABLE_X64``, say,
    has to compute as the caller does without. What has none (``None`` or an empty string), such as
    a precision or a platform that nobody chose, stays as the actor's machine has it.

    Args:
      environment: Variables that the user has set for the actor, which go before.
    """
    values = {
        name: value
        for name, value in jax.config.values.items()
        if value not in (None, "") and not _LOCAL.search(name) and name.upper() not in environment
    }
    if isinstance(device := values.get("jax_default_device"), jax.Device):
        values["jax_default_device"] = device.platform  # a device is one of a process
    if "JAX_CPU_ENABLE_ASYNC_DISPATCH" not in environment:
        # An actor waits for each result at once, so a thread for dispatch only costs time.
        values["jax_cpu_enable_async_dispatch"] = False
    return values


def apply(values: Mapping[str, Any]) -> None:
    """Sets what differs here; before anything is computed."""
    here = jax.config.values
    for name, value in values.items():
        if name in here and here[name] != value:
            jax.config.update(name, value)
