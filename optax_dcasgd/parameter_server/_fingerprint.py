"""What a run was trained with, as far as it can be compared with what it is resumed with.

Functions are compared by what JAX traces them to, the numbers in them included. Another release of
JAX traces them differently, so that they are compared under the same release only.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from optax_dcasgd.parameter_server._transport import to_raw
from optax_dcasgd.parameter_server._worker import Task, get_batch

_FIRST = Task(0)
Fingerprint = dict[str, str | None]  # by argument of `train`; None for what cannot be compared


def checksum(arrays: list[Any], start: int = 0) -> int:
    """CRC-32 of the bytes of arrays, after those of which ``start`` is the checksum."""
    for array in map(np.asarray, arrays):
        start = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, start)
    return start


def fingerprint(
    grad_fn: Callable[..., Any],
    params: Any,
    tx: Any,
    batches: Any,
    batch: Any,
    key: Any,
    first: Task = _FIRST,
) -> Fingerprint:
    """The fingerprint of these arguments of `train`.

    Args:
      grad_fn: As for `train`.
      params: As for `train`.
      tx: As for `train`.
      batches: As for `train`. Of a function, batch 0 is compared.
      batch: Batch 0.
      key: As for `train`.
      first: What batch 0 is.
    """
    optimizer = optax.with_extra_args_support(tx)

    def init_and_update(params: Any) -> Any:
        state, extra = optimizer.init(params), {"worker": np.int32(0), "staleness": np.int32(0)}
        return state, optimizer.update(params, state, params, stale_params=params, **extra)

    return {
        "grad_fn": _of_function(grad_fn, params, batch, key),
        "tx": _of_function(init_and_update, params),
        "batches": _of_batch(batches, batch, first) if callable(batches) else _of_tree(batches),
        "key": _of_tree(key),
        "jax": f"{jax.__version__} {jax.default_backend()}",
    }


def changes(before: Fingerprint, now: Fingerprint) -> list[str]:
    """The arguments of `train` that are seen to differ."""
    compared = ["batches", "key"]
    if before.get("jax") == now.get("jax"):
        compared += ["grad_fn", "tx"]
    return [
        name
        for name in sorted(compared)
        if None not in (was := before.get(name), now.get(name)) and was != now.get(name)
    ]


def _of_function(function: Callable[..., Any], *args: Any) -> str | None:
    try:
        traced = jax.make_jaxpr(function)(*args)
        text = str(traced.jaxpr).encode()  # without the addresses of Python objects
        return f"{checksum(to_raw(traced.consts), zlib.crc32(text)):08x}"
    except Exception:  # it is compared where that can be, and no more
        return None


def _of_batch(batches: Callable[..., Any], batch: Any, task: Task) -> str | None:
    """None for what is another one each time, or is not to be had twice."""
    try:
        again = _of_tree(get_batch(batches, task))
    except Exception:
        return None
    return again if again == _of_tree(batch) else None


def _of_tree(tree: Any) -> str | None:
    try:
        leaves = [np.asarray(leaf) for leaf in to_raw(jax.tree.map(_as_array, tree))]
    except Exception:  # likewise
        return None
    text = "".join(f"{leaf.dtype}{leaf.shape}" for leaf in leaves)
    return f"{checksum(leaves, zlib.crc32(text.encode())):08x}"


def _as_array(leaf: Any) -> Any:
    return leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
