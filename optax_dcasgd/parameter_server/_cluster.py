"""Ray: that which runs, or one of our own on this machine."""

import contextlib
import copy
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

_EMBEDDED = {
    "address": "local",
    "include_dashboard": False,
    # Ray gives memory of the object store free every second; until then each version and each
    # gradient is written to pages that are new to its process, which takes longer than to write it.
    "_system_config": {"free_objects_period_milliseconds": 0},
}


def import_ray() -> Any:
    """Returns the module, or says how it is installed."""
    try:
        import ray
    except ImportError as error:
        raise ImportError('parameter_server needs Ray: pip install "optax-dcasgd[ray]".') from error
    return ray


def check_options(name: str, options: Mapping[str, Any], *, is_server: bool) -> None:
    """Refuses what Ray would do with an actor, and the library cannot work with."""
    if options.get("lifetime") == "detached":
        raise ValueError(
            f"{name}['lifetime'] must not be 'detached': the actors end with train. Leave it out."
        )
    if is_server and (threads := options.get("max_concurrency")) not in (None, 1):
        raise ValueError(
            f"{name}['max_concurrency'] must be 1, since the server works in one thread; got "
            f"{threads!r}. Leave it out."
        )


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """With Ray as it is initialised, at that address, or started here and stopped at the end."""
    ray = import_ray()
    if ray.is_initialized():
        if address is not None:
            raise ValueError("address has no effect: Ray is initialised already. Leave it out.")
        yield
        return
    with warnings.catch_warnings():
        # Ray starts programs of its own, which never return to the forked process.
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        # Set where a job has been submitted to a cluster.
        address = address or os.environ.get("RAY_ADDRESS")
        # Ray adds to the configuration that it is given.
        ray.init(**({"address": address} if address else copy.deepcopy(_EMBEDDED)))
    try:
        yield
    finally:
        ray.shutdown()
