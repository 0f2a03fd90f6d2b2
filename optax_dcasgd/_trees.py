"""Pytree helpers of the transformations: copies, dtypes, maps with several results."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec


def dtype_of(x: Any) -> Any:
    """The dtype of an array, a Python scalar or a ``jax.ShapeDtypeStruct``."""
    return x.dtype if isinstance(x, jax.ShapeDtypeStruct) else jnp.result_type(x)


def is_none(x: Any) -> bool:
    """The `is_leaf` of trees in which a parameter may have no gradient."""
    return x is None


def is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def map_leaves(
    function: Callable[..., tuple[Any, ...]], num_results: int, updates: Any, *trees: Any
) -> tuple[Any, ...]:
    """``jax.tree.map`` over ``updates`` for a function of several results, one tree for each.

    Args:
      function: Takes a leaf of ``updates`` (``None`` where a parameter has no gradient) and what
        stands there in each of ``trees``; returns ``num_results`` leaves.
      num_results: The number of trees to return.
      updates: The tree that gives the structure.
      *trees: Trees of that structure; a tree that is ``None`` gives ``None`` at every leaf.
    """
    return map_rows(lambda rows: [function(*row) for row in rows], num_results, updates, *trees)


def map_rows(
    function: Callable[[list[tuple[Any, ...]]], list[tuple[Any, ...]]],
    num_results: int,
    updates: Any,
    *trees: Any,
) -> tuple[Any, ...]:
    """`map_leaves` for a function that takes and returns the rows of all leaves at once."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(updates, is_leaf=is_none)
    columns = [
        [None] * len(leaves) if tree is None else treedef.flatten_up_to(tree) for tree in trees
    ]
    rows = function(list(zip(leaves, *columns, strict=True)))
    return tuple(treedef.unflatten([row[i] for row in rows]) for i in range(num_results))


def copy(tree: Any) -> Any:
    """Copies every leaf into a buffer of its own, so that the original can be donated."""

    def copy_leaf(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return x
        return jnp.array(x, dtype=dtype_of(x), copy=True)  # the dtype keeps it from being weak

    return jax.tree.map(copy_leaf, tree)


def stack_copies(x: Any, num: int) -> Any:
    """Copies one leaf ``num`` times along a new leading axis, sharded as the leaf is."""
    if isinstance(x, jax.ShapeDtypeStruct):
        sharding = x.sharding
        if isinstance(sharding, NamedSharding):
            sharding = sharding.update(spec=PartitionSpec(None, *sharding.spec))
        return jax.ShapeDtypeStruct((num, *x.shape), x.dtype, sharding=sharding)
    return jnp.stack([jnp.asarray(x, dtype_of(x))] * num)


def zeros_like(x: Any, dtype: Any = None) -> Any:
    """Zeros with the shape and the sharding of ``x``.

    Inside ``jit`` the plain constant that ``jnp.zeros_like`` makes would be replicated on an
    automatically partitioned mesh; a select that never takes ``x`` lets its sharding propagate.
    """
    zeros = jnp.zeros_like(x, dtype=dtype)
    if isinstance(x, jax.core.Tracer):
        like = x if jnp.iscomplexobj(zeros) else x.real
        return jnp.where(False, like.astype(zeros.dtype), zeros)
    return zeros


def own_copy(count: jax.Array, x: Any, like: jax.Array) -> jax.Array:
    """Returns ``x`` in a buffer of its own, with the dtype of ``like``, once ``like`` is computed.

    A bare ``x`` would hand the caller's own buffer back as state, and donating it later would
    delete the state. This is a select whose predicate is always true, but only at run time.
    """
    return jnp.where(count >= 0, jnp.asarray(x, like.dtype), like)


@jax.jit  # traced once a shape, and XLA sees no difference
def _own_copy(count: jax.Array, x: Any, like: Any) -> Any:
    return own_copy(count, x, like)


def renew(count: jax.Array, params: Any, remembered: Any) -> Any:
    """Copies of the parameters, in the dtypes and the place of those that are remembered."""
    return jax.tree.map(lambda old, w: _own_copy(count, w, old), remembered, params)


def is_narrow(dtype: Any) -> bool:
    """Whether it is a floating-point dtype of less than 32 bits."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def compute_dtype(*arrays: Any) -> Any:
    """The dtype of the arithmetic on these arrays (``None`` left out): at least float32."""
    return _widest(*(dtype_of(array) for array in arrays if array is not None))


@functools.lru_cache
def _widest(*dtypes: Any) -> Any:
    widest = jnp.dtype(jnp.float32)
    with jax.numpy_dtype_promotion("standard"):  # what is cast to it is cast explicitly
        for dtype in dtypes:
            # JAX promotes float8 and float4 to no other dtype by itself.
            widest = widest if is_narrow(dtype) else jnp.promote_types(widest, dtype)
    return widest


def real_dtype(dtype: Any) -> Any:
    """float64 for complex128, float32 for complex64, and any real dtype itself."""
    return jnp.finfo(dtype).dtype


def init_accumulator(params: Any, accumulator_dtype: Any, *, real: bool) -> Any:
    """Zeros for a running sum over each parameter.

    Args:
      params: The parameters.
      accumulator_dtype: The user's choice (complex parameters get its complex counterpart), or None
        for the wider of float32 and the parameter's dtype: a running sum in bfloat16 stops moving
        once it is 2⁸ times larger than what is added.
      real: Whether the sum is of |x|² and so is real for complex parameters too.
    """

    def leaf(p: Any) -> Any:
        dtype = compute_dtype(p)
        if accumulator_dtype is not None:
            dtype = (
                jnp.promote_types(accumulator_dtype, jnp.complex64)
                if jnp.issubdtype(dtype, jnp.complexfloating)
                else accumulator_dtype
            )
        return zeros_like(p, real_dtype(dtype) if real else dtype)

    return jax.tree.map(leaf, params)
