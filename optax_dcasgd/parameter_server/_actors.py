"""Server and worker as Ray's actors: how what they are made of gets there."""

from typing import Any

import ray

from optax_dcasgd.parameter_server import _server, _settings, _worker
from optax_dcasgd.parameter_server._reasons import StartError, one_line


def _contents(settings: dict[str, Any], parcel: list[Any]) -> tuple[Any, ...]:
    """What an actor is made of.

    Args:
      settings: JAX's, which have to be set before a first array arrives.
      parcel: A reference to the rest, in a list: Ray would look up a bare one too early.
    """
    _settings.apply(settings)
    contents: tuple[Any, ...] = ray.get(parcel[0])
    return contents


class Server(_server.Server):
    """The server, as it is sent."""

    def __init__(self, settings: dict[str, Any], parcel: list[Any], *rest: Any):
        try:
            super().__init__(*_contents(settings, parcel), *rest)
        except BaseException as error:
            raise StartError(one_line(error)) from error


class Worker(_worker.Worker):
    """A worker, as it is sent."""

    def __init__(self, settings: dict[str, Any], parcel: list[Any]):
        try:
            super().__init__(*_contents(settings, parcel))
        except BaseException as error:
            raise StartError(one_line(error)) from error
