"""How trees of arrays travel between processes.

A small tree is one ``bytes``, which Ray carries within its call. A large one is a list of arrays in
Ray's object store: a reader maps it without a copy, and a node receives it once, however many of
its workers read it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_dcasgd.parameter_server import _travel

_SMALL = 64 * 1024  # bytes; Ray carries up to 100 KiB within a call, without its object store
_ALIGNMENT = 16  # bytes; of each leaf within a message

Packed = bytes | list[np.ndarray]


class Layout:
    """The structure, shapes and dtypes of a tree, and how such trees are packed."""

    def __init__(self, tree: Any):
        """Describes a tree of arrays or of ``jax.ShapeDtypeStruct``."""
        paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
        self.treedef: Any = treedef
        self.paths = [jax.tree_util.keystr(path) for path, _ in paths_and_leaves]
        self.shapes = [tuple(leaf.shape) for _, leaf in paths_and_leaves]
        self.dtypes = [np.dtype(leaf.dtype) for _, leaf in paths_and_leaves]
        sizes = [
            int(np.prod(shape)) * dtype.itemsize
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]
        padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        self._ends = np.cumsum([0, *padded]).tolist()
        self._sizes = sizes
        self.is_small = self._ends[-1] <= _SMALL

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "treedef": _travel.to_tree(self.treedef)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, treedef=_travel.to_treedef(state["treedef"]))

    def cast(self, dtype: Any) -> "Layout":
        """Returns this layout, with that dtype for each real floating-point leaf that is wider."""
        if dtype is None:
            return self

        def leaf(shape: Any, old: Any) -> jax.ShapeDtypeStruct:
            narrows = jnp.issubdtype(old, jnp.floating) and old.itemsize > np.dtype(dtype).itemsize
            return jax.ShapeDtypeStruct(shape, dtype if narrows else old)

        leaves = [leaf(*x) for x in zip(self.shapes, self.dtypes, strict=True)]
        return Layout(self.treedef.unflatten(leaves))

    def difference(self, name: str, tree: Any) -> str | None:
        """Says which leaf of ``tree`` does not fit, and how; None if the whole tree fits."""
        other = Layout(tree)
        if other.treedef != self.treedef:
            return (
                f"{name} has another structure than the parameters: {other.treedef}, not "
                f"{self.treedef}"
            )
        for i, path in enumerate(self.paths):
            got, wanted = (
                f"{np.dtype(x.dtypes[i]).name}{list(x.shapes[i])}" for x in (other, self)
            )
            if got != wanted:
                return f"{name}{path} is {got}, not {wanted}"
        return None

    def pack(self, leaves: list[Any]) -> Packed:
        """Packs leaves of these shapes and dtypes; what is small is copied."""
        arrays = [np.ascontiguousarray(leaf).reshape(-1).view(np.uint8) for leaf in leaves]
        assert [array.size for array in arrays] == self._sizes
        if not self.is_small:
            return arrays
        message = bytearray(self._ends[-1])
        for array, start in zip(arrays, self._ends[:-1], strict=True):
            message[start : start + array.size] = array.data
        return bytes(message)

    def unpack(self, packed: Any) -> list[np.ndarray]:
        """Returns the leaves, as read-only views of what was packed."""
        if self.is_small:
            packed = [
                np.frombuffer(packed, np.uint8, size, start) if size else np.empty(0, "u1")
                for size, start in zip(self._sizes, self._ends[:-1], strict=True)
            ]
        return [
            array.view(dtype).reshape(shape)
            for array, dtype, shape in zip(packed, self.dtypes, self.shapes, strict=True)
        ]

    def unpack_stacked(self, messages: list[Any], size: int) -> list[np.ndarray]:
        """Stacks the leaves of small trees along a leading axis, padded with zeros to ``size``."""
        whole = np.zeros((size, self._ends[-1]), np.uint8)
        for row, message in zip(whole, messages, strict=False):
            row[:] = np.frombuffer(message, np.uint8)
        return [
            np.ascontiguousarray(whole[:, start : start + nbytes]).view(dtype).reshape(size, *shape)
            for start, nbytes, dtype, shape in zip(
                self._ends[:-1], self._sizes, self.dtypes, self.shapes, strict=True
            )
        ]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def to_raw(tree: Any) -> list[Any]:
    """Returns the leaves; of random keys, their data."""
    leaves = jax.tree.leaves(tree)
    return [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in leaves]


def from_raw(like: Any, leaves: list[Any]) -> Any:
    """Undoes `to_raw`, for a tree of arrays or ``jax.ShapeDtypeStruct``; copies the values."""

    def leaf(old: Any, new: Any) -> Any:
        if _is_key(old):
            impl = jax.random.key_impl(jnp.empty((), old.dtype))
            return jax.random.wrap_key_data(jnp.array(new), impl=impl)
        return jnp.array(new, old.dtype, copy=True)

    like_leaves = jax.tree.leaves(like)
    restored = [leaf(*x) for x in zip(like_leaves, leaves, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), restored)
