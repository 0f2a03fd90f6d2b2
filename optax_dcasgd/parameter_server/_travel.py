"""How trees with nodes of the user's own types get to another process.

JAX keeps a list of node types in each process. A type of an imported module is put on it by the
import. A type of the script itself travels by value, and nobody puts it on the list where it
arrives: that is done here for dataclasses. All that an actor gets is pickled at once, since node
types may compare by identity what they hold beside their children.
"""

import contextlib
import dataclasses
import sys
from typing import Any

import jax

_Dataclass = tuple[type, tuple[str, ...]]  # and the names of the fields that are children


class Parcel:
    """What an actor is made of, with the node types that have to be made known there."""

    def __init__(self, trees: dict[str, Any], contents: tuple[Any, ...]):
        """Checks that the nodes of these trees, by the argument that they are of, can travel."""
        found: dict[type, tuple[str, ...]] = {}
        for name, tree in trees.items():
            _collect(name, tree, found)
        self.dataclasses = list(found.items())
        self.contents = contents

    def __reduce__(self) -> Any:
        # In this order: trees are only understood when their node types are known.
        return _unpack, (_Registered(self.dataclasses), self.contents)


class _Registered:
    def __init__(self, dataclasses: list[_Dataclass]):
        self.dataclasses = dataclasses

    def __reduce__(self) -> Any:
        return _register, (self.dataclasses,)


def _unpack(_: None, contents: tuple[Any, ...]) -> tuple[Any, ...]:
    return contents


def _register(types: list[_Dataclass]) -> None:
    for cls, names in types:
        others = tuple(f.name for f in dataclasses.fields(cls) if f.name not in names)
        _register_dataclass(cls, names, others)


def _register_dataclass(cls: Any, names: tuple[str, ...], others: tuple[str, ...]) -> None:
    def flatten(node: Any) -> tuple[Any, Any]:
        children = [(jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in names]
        return children, tuple(getattr(node, name) for name in others)

    def unflatten(aux: Any, children: Any) -> Any:
        node = object.__new__(cls)
        for name, value in zip((*names, *others), (*children, *aux), strict=True):
            object.__setattr__(node, name, value)  # it may be frozen
        return node

    with contextlib.suppress(ValueError):  # it is known here already
        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)


def _collect(name: str, tree: Any, found: dict[type, tuple[str, ...]]) -> None:
    """Adds the dataclasses among the node types of a tree that travel by value."""
    one_level = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)[0]
    if any(not path for path, _ in one_level):
        return  # a leaf
    cls = type(tree)
    is_builtin = cls.__module__ == "builtins" or hasattr(cls, "_fields")  # None, named tuples
    if not is_builtin and _travels_by_value(cls) and cls not in found:
        keys = [path[0] for path, _ in one_level]
        fields = {field.name for field in dataclasses.fields(cls)} if _is_plain(cls) else set()
        names = tuple(key.name for key in keys if isinstance(key, jax.tree_util.GetAttrKey))
        if len(names) < len(keys) or not fields.issuperset(names) or not fields:
            raise TypeError(
                f"{name} has a node of the type {cls.__qualname__}, which workers cannot be sent: "
                f"it is defined in {cls.__module__}, and they would not know how to flatten it. "
                f"Put class {cls.__name__} in a module of its own and import it."
            )
        found[cls] = names
    for _, child in one_level:
        _collect(name, child, found)


def _is_plain(cls: type) -> bool:
    """Whether it is a dataclass whose metaclass does nothing when the class arrives."""
    return dataclasses.is_dataclass(cls) and type(cls) is type


def _travels_by_value(cls: type) -> bool:
    """Whether pickle does not find it by its name in a module."""
    from ray import cloudpickle

    module = cls.__module__
    found: Any = sys.modules.get(module)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    return (
        module == "__main__"
        or module in cloudpickle.list_registry_pickle_by_value()
        or found is not cls
    )


def to_tree(treedef: Any) -> Any:
    """A tree of this structure, which travels where a treedef does not."""
    return treedef.unflatten(range(treedef.num_leaves))


def to_treedef(tree: Any) -> Any:
    """Undoes `to_tree`, in another process."""
    leaves, treedef = jax.tree.flatten(tree)
    if leaves != list(range(len(leaves))):
        unknown = sorted({type(leaf).__qualname__ for leaf in leaves} - {"int"})
        raise TypeError(
            f"{', '.join(unknown) or 'a node type'} is not known to JAX as a type of nodes in the "
            "process of a worker or the server: register it in the module that defines it."
        )
    return treedef
