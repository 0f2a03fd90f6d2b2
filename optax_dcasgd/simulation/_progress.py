"""A progress bar for a compiled loop, which calls Python about once a second."""

import concurrent.futures
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import io_callback
from jax.extend.core import get_opaque_trace_state

_INTERVAL = 1.0  # seconds


class Bar:
    """Shows a tqdm bar, and tells the loop at which update to report next.

    The loop carries that number and calls the host when it gets there. Before that it needs neither
    a clock nor a callback.
    """

    def __init__(self, total: int):
        try:
            import tqdm
        except ImportError as error:
            raise ImportError("progress=True needs tqdm: pip install tqdm.") from error
        self._bar = tqdm.tqdm(total=total, unit="update")
        self._start = time.monotonic()
        self._next = 0

    def _report(self) -> np.int32:
        done, total = self._next, self._bar.total
        self._bar.update(done - self._bar.n)
        if done:
            # As many updates as the mean speed so far gives, but never more than twice those done:
            # the first updates of a run may be slow, or fast.
            per_update = (time.monotonic() - self._start) / done
            stretch = min(max(int(_INTERVAL / per_update), 1), 2 * done)
        else:
            self._start, stretch = time.monotonic(), 1
        self._next = min(done + stretch, total)
        return np.int32(self._next)

    def first(self) -> jax.Array:
        """The carry to start with."""
        return jnp.zeros((), jnp.int32)

    def step(self, t: jax.Array, report_at: jax.Array) -> Any:
        """To be called in the loop, before update t, with the carry; returns the next carry."""
        return lax.cond(
            t == report_at,
            lambda: io_callback(self._report, jax.ShapeDtypeStruct((), jnp.int32), ordered=False),
            lambda: report_at,
        )

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, exc_type: Any, *exc_info: Any) -> None:
        if exc_type is None:
            self._bar.update(self._bar.total - self._bar.n)
        self._bar.close()


def is_traced() -> bool:
    """Whether this is called under ``jit``, ``vmap`` or the like, whatever it is called with."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:  # in which nothing is traced
        return bool(thread.submit(get_opaque_trace_state).result() != get_opaque_trace_state())
