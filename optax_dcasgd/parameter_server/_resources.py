"""What actors ask for, what the cluster has, and what follows from both."""

from collections.abc import Mapping
from typing import Any

import ray

_MOST_A_CPU = 8  # processes
_MEMORY = 0.15  # GB a process, with JAX and no model


def _asked(options: Mapping[str, Any]) -> dict[str, float]:
    named = {name: options.get(f"num_{name.lower()}s") for name in ("CPU", "GPU")}
    of_actor = {**named, "memory": options.get("memory"), **(options.get("resources") or {})}
    return {name: amount for name, amount in of_actor.items() if amount}


def _text(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())


def why_it_waits(options: Mapping[str, Any]) -> str:
    """Why actors with these options may not have started."""
    # Without a number of CPUs an actor needs one to be placed, and none to run.
    asked = {**({"CPU": 1} if options.get("num_cpus") is None else {}), **_asked(options)}
    there, free = ray.cluster_resources(), ray.available_resources()
    there, free = ({name: of.get(name, 0) for name in asked} for of in (there, free))
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    note = ""
    if not any(all(node.get(k, 0) >= asked[k] for k in asked) for node in nodes):
        note = " (no node has as much as one asks for)"
    elif all(free[k] >= asked[k] for k in asked):
        note = " (so that there is room: it takes long, or its process dies; see Ray's logs)"
    if not asked:
        return f"each asks for nothing{note}"
    return (
        f"each asks for {_text(asked)}; the cluster has {_text(there)}, of which free: "
        f"{_text(free)}{note}"
    )


def too_many(num_workers: int, options: Mapping[str, Any]) -> str | None:
    """What will happen to so many workers with these options, if it is not what one expects."""
    asked, there = _asked(options), ray.cluster_resources()
    fit = min((int(there.get(name, 0) / asked[name]) for name in asked), default=num_workers)
    if fit < num_workers:
        return (
            f"{fit} of {num_workers} workers fit the cluster at a time, the others wait: "
            f"{why_it_waits(options)}"
        )
    cpus = there.get("CPU", 0)
    if num_workers > _MOST_A_CPU * cpus:
        return (
            f"{num_workers} workers are as many processes on {cpus:g} CPUs, and take "
            f"{num_workers * _MEMORY:.0f} GB or more; they compute in turns, and the gradients "
            "of fewer are less stale"
        )
    return None
