"""What a ``grad_fn`` and its ``batches`` are, for everything that computes gradients by itself."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_dcasgd import _checks

# (params, batch, key) -> (loss, grads), such as jax.value_and_grad of a loss.
GradFn = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]


class LocalBatches(NamedTuple):
    """The batches of a round that may end early, for a worker of its own speed.

    Examples:
      Three batches of one number, of which the first two are used:

      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_dcasgd import LocalBatches, local_updates
      >>> grad_fn = jax.value_and_grad(lambda w, x, key: 0.5 * (w - x) ** 2)
      >>> local = local_updates(grad_fn, optax.sgd(0.5), num_steps=3)
      >>> round_of_two = LocalBatches(jnp.ones(3), num_steps=2)
      >>> loss, pseudo_gradient = local(jnp.array(0.0), round_of_two, jax.random.key(0))
      >>> print(pseudo_gradient)  # from 0 to 0.5 to 0.75
      -0.75
    """

    batches: Any  # leading axis of every leaf: the num_steps of `local_updates`, the most there are
    num_steps: Any  # shape=(), int: how many of them are used, at least 1; may be traced


def row(tree: Any, index: Any) -> Any:
    """Entry ``index`` of the leading axis of every leaf."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, 0, keepdims=False), tree)


def batch_at(
    batches: Any,
    data: Any,
    index: Any,
    num_steps: Any = None,
    *,
    entry: Callable[[Any, Any], Any] = row,
) -> Any:
    """Batch ``index``, an integer scalar: ``batches(index)``, or entry ``index`` of the arrays.

    ``data`` are the arrays as the surrounding trace holds them; None where ``batches`` is a
    function. Past the last entry it starts again with the first. ``entry`` takes one of an array.
    With ``num_steps`` it is the round of so many batches, from this one on.
    """
    if num_steps is not None:
        return round_at(batches, index, num_steps)
    if callable(batches):
        return batches(index)
    return jax.tree.map(lambda x: entry(x, index % x.shape[0]), data)


def round_at(batches: Callable[[Any, Any], Any], first: Any, num_steps: Any) -> LocalBatches:
    """The round of ``num_steps`` batches from batch ``first`` on, either of which may be traced.

    Raises:
      TypeError: If the function returns `LocalBatches` by itself.
      ValueError: If it returns fewer batches than are used, as far as that is known.
    """
    stack = batches(first, num_steps)
    if isinstance(stack, LocalBatches):
        raise TypeError(
            "batches(first, num_steps) must return stacked batches alone, of which the first "
            "num_steps are used; it returned LocalBatches, which is made of them here."
        )
    if not isinstance(num_steps, jax.core.Tracer):
        check_round(stack, num_steps)
    return LocalBatches(stack, num_steps)


def check_round(stack: Any, num_steps: int) -> None:
    """Checks that there are so many batches in a stack of them."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(stack)[0]:
        if jnp.shape(leaf)[:1] < (num_steps,):
            raise ValueError(
                f"batches(first, num_steps) must return a stack of num_steps batches or more; of "
                f"num_steps={num_steps} it returned shape {jnp.shape(leaf)} for "
                f"batches{jax.tree_util.keystr(path)}."
            )


_BATCHES = (
    "batches must be a pytree of arrays, with one batch a row of each, or a function from t to "
    "batch t. Of a list, a data set or a generator make the arrays, jax.tree.map(lambda *x: "
    "jnp.stack(x), *batches), or, for parameter_server.train, pass lambda i: batches[i]"
)


def _check_rounds(batches: Any) -> None:
    """Checks that ``batches`` is a function of the first batch and of how many there are.

    Raises:
      TypeError: If it is no such function.
    """
    is_legal = callable(batches)
    if is_legal:
        try:
            inspect.signature(batches).bind(0, 1)
        except TypeError:
            is_legal = False
        except ValueError:  # one that Python knows no signature of
            pass
    if not is_legal:
        raise TypeError(
            "Where workers take unequal numbers of local steps, batches must be a function "
            "(first, num_steps) -> stack: as many batches as the longest round has, along a new "
            "leading axis, of which the first num_steps are used, from batch number first on; got "
            f"{batches!r}."
        )


def check_batches(batches: Any, num_batches: int | None, *, in_rounds: bool = False) -> None:
    """Checks that every leaf has a leading axis of this one size, or of any; a function passes.

    Raises:
      TypeError: For a list of batches, an iterator, or anything else of which JAX makes no array;
        ``in_rounds``, of unequal numbers of batches, for all but a function of two arguments.
      ValueError: Names the leaf with another leading axis.
    """
    if in_rounds:
        _check_rounds(batches)
    if callable(batches):
        return
    _checks.check_arrays("batches", batches, f"{_BATCHES}.")
    if _is_list_of_batches(batches):
        raise TypeError(
            f"{_BATCHES}; got a list of {len(batches)} batches. (If it is one pytree, of arrays "
            "that are alike, make it a tuple.)"
        )
    for path, leaf in jax.tree_util.tree_flatten_with_path(batches)[0]:
        shape = jnp.shape(leaf)
        if num_batches is None and shape[:1] > (0,):
            num_batches = shape[0]
        if num_batches is None or shape[:1] != (num_batches,):
            size = "at least 1" if num_batches is None else f"size {num_batches}"
            raise ValueError(
                f"batches{jax.tree_util.keystr(path)} has shape {shape}, but needs a leading axis "
                f"of {size}, one entry a push. {_BATCHES}."
            )


def _is_list_of_batches(batches: Any) -> bool:
    """Whether it is a list of what is alike: trees of one structure, or arrays of one shape.

    As a pytree it would be sliced along the first axis of what each batch holds.
    """
    if not isinstance(batches, list) or not batches:
        return False
    if jax.tree_util.all_leaves(batches):
        return len(batches) > 1 and len({np.shape(batch) for batch in batches}) == 1
    return len({jax.tree.structure(batch) for batch in batches}) == 1


def check_grad_fn(
    grad_fn: GradFn, params: Any, batches: Any, key: Any, num_steps: Any = None
) -> None:
    """Evaluates the shapes that ``grad_fn`` returns for the first batch, and checks them.

    Without this, a wrong ``grad_fn`` shows as an error of the scan around it. ``num_steps`` are
    those of all rounds, if the batches come in rounds.
    """
    is_known = num_steps is not None and not isinstance(num_steps, jax.core.Tracer)
    most = int(np.asarray(num_steps).max()) if is_known else None

    def first(params: Any, data: Any, key: Any, one: Any) -> Any:
        try:
            batch = batch_at(batches, data, jnp.zeros((), jnp.int32), one)
        except jax.errors.JAXTypeError as error:
            raise TypeError(
                "batches is called inside a compiled loop, with a traced int32, which can index "
                "arrays of JAX but no list and no array of NumPy. Of a list make arrays, "
                "jax.tree.map(lambda *x: jnp.stack(x), *batches)."
            ) from error
        if most is not None:
            check_round(batch.batches, most)
        return grad_fn(params, batch, key)

    data = None if callable(batches) else batches
    one = None if num_steps is None else np.int32(1)
    returned = jax.eval_shape(first, params, data, key, one)
    check_returned(returned, params)


def batch_of_push(arrivals: Any, t: Any) -> tuple[jax.Array, jax.Array | None]:
    """On what push t of `simulation.Arrivals` was computed: ``index`` and ``num_steps``."""
    if arrivals.batch is None:
        return t, None
    index = jnp.asarray(arrivals.batch, jnp.int32)[t]
    steps = arrivals.num_steps
    return index, None if steps is None else jnp.asarray(steps, jnp.int32)[t]


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
