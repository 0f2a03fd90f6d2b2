"""What a ``grad_fn`` and its ``batches`` are, for everything that computes gradients by itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_dcasgd import _checks

# (params, batch, key) -> (loss, grads), such as jax.value_and_grad of a loss.
GradFn = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]


def row(tree: Any, index: Any) -> Any:
    """Entry ``index`` of the leading axis of every leaf."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, 0, keepdims=False), tree)


def batch_at(batches: Any, data: Any, index: Any) -> Any:
    """Batch ``index``, an int32 scalar: ``batches(index)``, or row ``index`` of the arrays.

    ``data`` are the arrays as the surrounding trace holds them; None where ``batches`` is a
    function. Past the last row it starts again with the first.
    """
    if callable(batches):
        return batches(index)
    return jax.tree.map(lambda x: row(x, index % x.shape[0]), data)


def check_batches(batches: Any, num_batches: int | None) -> None:
    """Checks that every leaf has a leading axis of this one size, or of any; a function passes.

    Raises:
      ValueError: Names the leaf with another leading axis.
    """
    if callable(batches):
        return
    for path, leaf in jax.tree_util.tree_flatten_with_path(batches)[0]:
        shape = jnp.shape(leaf)
        if num_batches is None and shape[:1] > (0,):
            num_batches = shape[0]
        if num_batches is None or shape[:1] != (num_batches,):
            size = "at least 1" if num_batches is None else f"size {num_batches}"
            raise ValueError(
                f"batches{jax.tree_util.keystr(path)} has shape {shape}, but needs a leading axis "
                f"of {size}, one entry a push (or pass a function from t to batch t)."
            )


def check_grad_fn(grad_fn: GradFn, params: Any, batches: Any, key: Any) -> None:
    """Evaluates the shapes that ``grad_fn`` returns for the first batch, and checks them.

    Without this, a wrong ``grad_fn`` shows as an error of the scan around it.
    """

    def first(params: Any, data: Any, key: Any) -> Any:
        batch = batches(jnp.zeros((), jnp.int32)) if callable(batches) else row(data, 0)
        return grad_fn(params, batch, key)

    returned = jax.eval_shape(first, params, None if callable(batches) else batches, key)
    check_returned(returned, params)


def check_returned(returned: Any, params: Any) -> None:
    """Checks what ``grad_fn`` returned, or the shapes of it: a scalar loss, grads like ``params``.

    Raises:
      TypeError: If it is no pair, or the loss no scalar.
      ValueError: Names the leaf of the gradient that does not fit.
    """
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(
            f"grad_fn must return (loss, grads), as jax.value_and_grad does; got {returned!r}."
        )
    loss, grads = returned
    if getattr(loss, "shape", None) != ():
        raise TypeError(f"grad_fn must return a scalar loss (no auxiliary output); got {loss!r}.")
    _checks.align("grads", grads, params)
