"""Checks of trees: each raises an error that names the argument, the leaf and the remedy."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_dcasgd import _trees

# The sentence Optax's own transformations raise with; Optax does not export it.
NO_PARAMS_MSG = (
    "You are using a transformation that requires the current value of "
    "parameters, but you are not passing `params` when calling `update`."
)

# An Equinox module has its activation functions and flags among its leaves.
OF_EQUINOX = "Of an Equinox model pass eqx.filter(model, eqx.is_inexact_array)."


def _children(node: Any) -> tuple[dict[str, Any] | None, Any]:
    """The children of one pytree node by their path, ``None`` for a leaf; and the node's type."""
    treedef: Any
    entries, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    if len(entries) == 1 and not entries[0][0]:
        return None, treedef
    return {jax.tree_util.keystr(path): child for path, child in entries}, treedef


def _difference(name: str, tree: Any, like: Any, like_name: str, skip: Any) -> str | None:
    """Says at which leaf or node ``tree`` has another structure than ``like``; None if nowhere."""
    if skip(tree, like):
        return None
    (found, treedef), (expected, expected_treedef) = _children(tree), _children(like)
    if expected is not None and found is not None:
        for key in expected:
            if key not in found:
                return f"{name}{key} is missing"
        for key in found:
            if key not in expected:
                return f"{name}{key} has no counterpart in {like_name}"
        if treedef == expected_treedef:
            differences = (
                _difference(name + key, found[key], expected[key], like_name, skip) for key in found
            )
            return next((difference for difference in differences if difference), None)
    elif expected is None and found is None:
        return None
    elif expected:
        return f"{name}{next(iter(expected))} is missing, as {name} is a leaf"
    kinds = [
        "a leaf" if c is None else type(x).__name__ for c, x in ((found, tree), (expected, like))
    ]
    hint = f". {OF_EQUINOX[:-1]}" if like is None else ""
    return f"{name} is {kinds[0]} where {like_name} has {kinds[1]}{hint}"


def _check_structure(
    name: str,
    tree: Any,
    like: Any,
    like_name: str = "params",
    skip: Callable[[Any, Any], bool] = lambda tree, like: False,
) -> None:
    same: Any = jax.tree.structure(like)
    if jax.tree.structure(tree) == same:
        return
    difference = _difference(name, tree, like, like_name, skip)
    if difference:
        raise ValueError(f"{name} must have the structure of {like_name}: {difference}.")


def _dtype(name: str, path: Any, leaf: Any) -> Any:
    """The dtype of a leaf, or None if JAX can make no array of it."""
    _check_byte_order(name, path, leaf)
    if isinstance(leaf, jax.Ref):
        where = name + jax.tree_util.keystr(path)
        raise TypeError(f"{where} is a Ref, which others may write. Pass what it holds, ref[...].")
    try:
        return _trees.dtype_of(leaf)
    except TypeError:
        return None


def _check_byte_order(name: str, path: Any, leaf: Any) -> None:
    if isinstance(leaf, np.ndarray | np.generic) and not leaf.dtype.isnative:
        raise TypeError(
            f"{name}{jax.tree_util.keystr(path)} has dtype {leaf.dtype}, whose byte order JAX does "
            "not take. Convert it: x.astype(x.dtype.newbyteorder('='))."
        )


def _kind(leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", None)
    return f"is a {type(leaf).__name__}" if dtype is None else f"has dtype {dtype}"


def check_arrays(name: str, tree: Any, remedy: str = "") -> None:
    """Checks that JAX can make an array of every leaf.

    Args:
      name: What the caller's signature calls the tree, for the message.
      tree: The tree.
      remedy: What to do about a leaf that is no array, for the message.

    Raises:
      TypeError: Names the first leaf of which it cannot.
    """

    def is_iterator(x: Any) -> bool:  # of which JAX warns where it meets one
        return isinstance(x, Iterator)

    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_iterator)[0]:
        if is_iterator(leaf) or _dtype(name, path, leaf) is None:
            name += jax.tree_util.keystr(path)
            raise TypeError(f"{name} {_kind(leaf)}, and can be no array of JAX. {remedy}".rstrip())


def _check_shape(name: str, path: Any, leaf: Any, shape: tuple[int, ...], like_name: str) -> None:
    _check_byte_order(name, path, leaf)
    if np.shape(leaf) != shape:
        raise ValueError(
            f"{name}{jax.tree_util.keystr(path)} has shape {np.shape(leaf)}, but {like_name} has "
            f"shape {shape}."
        )


def _check_real(name: str, path: Any, leaf: Any, param: Any) -> None:
    if jnp.iscomplexobj(leaf) and not jnp.iscomplexobj(param):
        name += jax.tree_util.keystr(path)
        raise TypeError(f"{name} is complex, but the parameter is real.")


def check_params(params: Any) -> None:
    """Checks that every parameter can have a gradient: real or complex floating point.

    Raises:
      TypeError: Names the first leaf of another dtype.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        dtype = _dtype("params", path, leaf)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} {_kind(leaf)}, but only floating-point and "
                "complex parameters can be trained. Keep it out with optax.masked or "
                f"optax.partition. {OF_EQUINOX}"
            )


def check_updates(updates: Any, params: Any, argument: str = "updates") -> None:
    """Checks that gradients fit the parameters; a gradient that is ``None`` fits any subtree.

    Args:
      updates: The gradients.
      params: The parameters.
      argument: What the caller's signature calls the gradients, for the message.

    Raises:
      ValueError: If ``params`` is missing, or names the leaf whose structure or shape differs.
      TypeError: Names the complex gradient of a real parameter, or one that is no number.
    """
    if params is None:
        raise ValueError(NO_PARAMS_MSG)
    _check_structure(argument, updates, params, skip=lambda update, _: update is None)

    def check(path: Any, update: Any, param: Any) -> None:
        if update is not None:
            dtype = getattr(update, "dtype", type(update))
            if not jnp.issubdtype(dtype, jnp.number):
                name = argument + jax.tree_util.keystr(path)
                raise TypeError(f"{name} {_kind(update)}, which is no gradient.")
            _check_byte_order("params", path, param)
            _check_shape(argument, path, update, np.shape(param), "the parameter")
            _check_real(argument, path, update, param)

    jax.tree_util.tree_map_with_path(check, updates, params, is_leaf=_trees.is_none)


def check_mode(state: Any, field: str, argument: str, value: Any, *, kept: bool) -> None:
    """Checks that a field of a state is there, or is ``None``, as an argument makes it.

    Raises:
      ValueError: If the state was made with another value of the argument.
    """
    if (getattr(state, field) is not None) != kept:
        raise ValueError(
            f"{argument}={value!r}, but the optimizer state was made with another {argument}: it "
            f"has {'no ' if kept else ''}{field}. Make a new state with init(params), or pass the "
            f"{argument} it was made with."
        )


def check_state(
    params: Any,
    *trees: Any,
    stacked: bool = False,
    same_dtype: bool = False,
    whole: bool = False,
) -> None:
    """Checks that the parameters are those the state was made for.

    Args:
      params: What ``update`` got.
      *trees: Trees of the state that are like the parameters, or ``None``; a leaf that is
        ``optax.MaskedNode()`` fits any parameter.
      stacked: Whether their leaves have one more axis in front.
      same_dtype: Whether they have the dtypes of the parameters.
      whole: Whether the parameters may be those around a mask, of which the state sees a part.

    Raises:
      ValueError: Names the parameter whose structure, shape or dtype differs.
    """

    def check(path: Any, kept: Any, param: Any) -> None:
        if not _trees.is_masked(kept):
            shape = jnp.shape(kept)[int(stacked) :]
            _check_shape("params", path, param, shape, "in the optimizer state it")
            if same_dtype and _trees.dtype_of(param) != _trees.dtype_of(kept):
                name = f"params{jax.tree_util.keystr(path)}"
                raise ValueError(
                    f"{name} has dtype {_trees.dtype_of(param)}, but in the optimizer state it has "
                    f"dtype {_trees.dtype_of(kept)}."
                )

    def fits(param: Any, kept: Any) -> bool:
        is_leaf = whole or _trees.is_masked(param) or jax.tree_util.all_leaves([param])
        return _trees.is_masked(kept) and is_leaf

    for tree in trees:
        if tree is not None:
            _check_structure("params", params, tree, "the optimizer state", fits)
            jax.tree_util.tree_map_with_path(check, tree, params, is_leaf=_trees.is_masked)


def align(name: str, tree: Any, params: Any) -> Any:
    """Returns ``tree`` with the structure of ``params``.

    ``optax.masked`` and ``optax.partition`` hide leaves of the parameters behind
    ``optax.MaskedNode`` but hand extra arguments on whole, so what stands behind a mask is dropped.

    Raises:
      ValueError: Names the leaf whose structure or shape differs.
      TypeError: Names the complex leaf where the parameter is real.
    """
    if tree is params:
        return tree
    _check_structure(name, tree, params, skip=lambda _, param: _trees.is_masked(param))

    def leaf(path: Any, param: Any, value: Any) -> Any:
        if _trees.is_masked(param):
            return param
        _check_shape(name, path, value, np.shape(param), "the parameter")
        _check_real(name, path, value, param)
        return value

    return jax.tree_util.tree_map_with_path(leaf, params, tree, is_leaf=_trees.is_masked)


def broadcast_prefix(
    name: str, prefix: Any, tree: Any, is_leaf: Callable[[Any], bool] = lambda _: False
) -> Any:
    """Returns a tree like ``tree`` whose leaves are those of the prefix tree above them.

    Where ``tree`` has no leaves (behind a mask, ``None``, the placeholder that
    ``optax.tree.map_params`` makes) the prefix may have any.

    Args:
      name: What the caller's signature calls the prefix, for the message.
      prefix: The prefix tree.
      tree: The tree.
      is_leaf: What is a leaf of the prefix, though it is a pytree too.

    Raises:
      ValueError: If ``prefix`` is not a prefix; names the first node that differs.
    """
    if not jax.tree.leaves(tree):
        return tree
    values, treedef = (None, None) if is_leaf(prefix) else _children(prefix)
    if values is None:
        return jax.tree.map(lambda _: prefix, tree)
    children, tree_treedef = _children(tree)
    if children is None or values.keys() != children.keys() or treedef != tree_treedef:
        difference = _difference(name, prefix, tree, "the tree", lambda *_: False)
        raise ValueError(f"{name} must be one value or a prefix tree of params: {difference}.")
    return tree_treedef.unflatten(
        broadcast_prefix(name + key, value, children[key], is_leaf) for key, value in values.items()
    )
