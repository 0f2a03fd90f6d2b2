"""The worker: one gradient at the parameters that it is sent."""

import operator
import time
import traceback
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_dcasgd._gradients import batch_at
from optax_dcasgd.parameter_server._transport import Layout, Packed


class Task(NamedTuple):
    """What a gradient is computed on."""

    batch: int  # the number of the batch, or of the first
    num_steps: int | None = None  # how many there are from it on, for a round of local steps

    def __str__(self) -> str:
        last = self.batch + (self.num_steps or 1) - 1
        return f"batch {last}" if last == self.batch else f"batches {self.batch} to {last}"


class Computed(NamedTuple):
    """The answer to a task: a gradient."""

    loss: float
    seconds: float  # that it took
    packed: Packed


class Refused(NamedTuple):
    """The answer to a task without a gradient."""

    reason: str
    not_finite: bool = False  # a gradient, which may be the fault of the parameters


class _RefusedError(Exception):
    """What is wrong with a gradient."""


class _NotFiniteError(_RefusedError):
    """A gradient of the right shapes that is not finite."""


def get_batch(batches: Any, task: Task) -> Any:
    """A batch, on the host if its arrays are there, or a round of batches.

    Numbers are Python's, so that compiled functions see one type.
    """
    return batch_at(batches, batches, *task, entry=operator.getitem)


def to_host(x: Any) -> Any:
    """The array in the host's memory; random keys, which NumPy cannot hold, as they are."""
    is_key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return x if is_key else np.asarray(x)


class Worker:
    """An actor that computes gradients. It has no state: a restarted one is as good."""

    def __init__(
        self,
        grad_fn: Any,
        batches: Any,
        key: jax.Array,
        params: Layout,
        grads: Layout,  # what grad_fn has to return
        transported: Layout,  # what is sent
        num_steps: int | None = None,  # of a round to compile for, where there are rounds
    ):
        self._batches, self._first = batches, Task(0, num_steps)
        # As data: JAX dispatches calls with a typed key more slowly.
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        impl = jax.random.key_impl(key) if typed else None
        self._key = np.asarray(jax.random.key_data(key) if typed else key)
        self._params = params
        self._transported = transported

        @jax.jit
        def gradient(params: Any, batch: Any, key: Any, index: Any) -> Any:
            key = key if impl is None else jax.random.wrap_key_data(key, impl=impl)
            loss, value = grad_fn(params, batch, jax.random.fold_in(key, index))
            if difference := grads.difference("grads", value):
                raise _RefusedError(difference)
            leaves = jax.tree.leaves(value)
            sent = [
                leaf.astype(dtype) for leaf, dtype in zip(leaves, transported.dtypes, strict=True)
            ]
            # What is sent has to be finite too. The barrier keeps the compiler from looking at what
            # it was before it was rounded.
            return loss, sent, _finite(leaves), _finite(jax.lax.optimization_barrier(sent))

        self._gradient = gradient

    def ready(self) -> None:
        """Compiles the gradient, so that the first real one is not stale for that."""
        try:
            like = zip(self._params.shapes, self._params.dtypes, strict=True)
            zeros = [np.zeros(*x) for x in like]
            batch = get_batch(self._batches, self._first)
            params = self._params.treedef.unflatten(zeros)
            jax.block_until_ready(self._gradient(params, batch, self._key, np.int32(0)))
        except BaseException as error:  # what is wrong shows with the real ones
            if _ends_the_process(error):
                raise

    def gradient(self, index: int, num_steps: int | None, packed: Packed) -> Computed | Refused:
        """Computes the gradient of a `Task` at the packed parameters."""
        task = Task(index, num_steps)
        start = time.perf_counter()
        leaves: list[Any] = self._params.unpack(packed)
        if not self._params.is_small:
            leaves = [jax.device_put(leaf) for leaf in leaves]  # without a copy, on a CPU
        try:
            batch = get_batch(self._batches, task)
            loss, grads, *finite = self._gradient(
                self._params.treedef.unflatten(leaves), batch, self._key, np.int32(index)
            )
            computed, sent = map(np.asarray, finite)
            if not (computed & sent).all():
                leaf = int((computed & sent).argmin())
                dtype = self._transported.dtypes[leaf]
                where = f" as {dtype}, the transport_dtype" if computed[leaf] else ""
                raise _NotFiniteError(f"grads{self._params.paths[leaf]} is not finite{where}")
        except _RefusedError as refused:
            return _refused(f"{refused} ({task})", isinstance(refused, _NotFiniteError))
        except BaseException as error:  # a data loader may raise KeyboardInterrupt, CancelledError
            if _ends_the_process(error):
                raise
            return _refused(f"grad_fn or batches failed on {task}:\n{traceback.format_exc()}")
        packed = self._transported.pack([np.asarray(leaf) for leaf in grads])
        return Computed(float(loss), time.perf_counter() - start, packed)


def _ends_the_process(error: BaseException) -> bool:
    """Whether Ray was told to."""
    return hasattr(error, "ray_terminate_msg")


def _finite(leaves: list[jax.Array]) -> jax.Array:
    """Which leaves are, of floating-point or other arrays."""
    # Not by the largest number: on a CPU the maximum of a large array loses a NaN.
    return jnp.array([jnp.isfinite(leaf).all() for leaf in leaves], bool)


def _refused(reason: str, not_finite: bool = False) -> Refused:
    """Escapes lone surrogates, which a log could not be written with."""
    return Refused(reason.encode(errors="backslashreplace").decode(), not_finite)
