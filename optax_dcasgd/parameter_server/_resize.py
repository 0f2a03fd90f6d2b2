"""`resize`: another number of workers for a run under way."""

import time
import uuid

from optax_dcasgd import _arguments
from optax_dcasgd.parameter_server import _cluster

_ASK_AGAIN = 0.1  # seconds, until the driver has done what is wished
_JOIN = 'In another process than that of the run, call ray.init(address="auto") first.'


def resize(name: str, num_workers: int) -> None:
    """Changes the number of workers of a run under way, from another thread, process or machine.

    It returns when the run knows of it. New workers take part as soon as they have started. Those
    that leave finish what they are computing first. The highest indices come last and go first.
    Workers that would not come back ("worker gone") are replaced, also if the number is the same.

    Args:
      name: The ``name`` that `train` was called with.
      num_workers: How many workers there shall be.

    Raises:
      ImportError: If Ray is not installed.
      TypeError: If num_workers is no Python integer.
      ValueError: If it is below 1, or there is no such run. Ray must have been initialised, in
        another process than the run's with the cluster's address: ``ray.init(address="auto")``.

    Examples:
      While ``train(..., num_workers=2, name="run", address="auto")`` runs, from another terminal::

        import ray
        from optax_dcasgd import parameter_server
        ray.init(address="auto")
        parameter_server.resize("run", 4)
    """
    _arguments.check_integer("num_workers", num_workers, minimum=1)
    ray = _cluster.import_ray()
    if not ray.is_initialized():  # Ray would start a cluster of its own
        raise ValueError(f"Ray has not been initialised in this process. {_JOIN}")
    from optax_dcasgd.parameter_server._calls import ENDED
    from optax_dcasgd.parameter_server._driver import NAMESPACE

    wish, is_done = uuid.uuid4().hex, False
    while not is_done:
        try:
            server = ray.get_actor(name, namespace=NAMESPACE)
            is_done = ray.get(server.resize.remote(num_workers, wish))
        except ValueError as error:
            raise ValueError(
                f"There is no run of the name {name!r} on this Ray cluster. {_JOIN}"
            ) from error
        except ENDED:
            pass  # another server takes its place, or the run has ended
        time.sleep(_ASK_AGAIN)
