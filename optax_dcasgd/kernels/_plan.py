"""What a kernel has to do for one array, whatever the memory it works in."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_dcasgd._hyperparameters import Hyperparameters
from optax_dcasgd.kernels import reference
from optax_dcasgd.kernels.reference import Operands


class Plan:
    """Which arrays are read, which are written and in whose place, and what is computed between.

    Attributes:
      given: The arrays, by their names in `Operands`.
      read: The names of those that the formula reads.
      results: The names in `Results` of what is written, each with the array whose dtype it has.
      in_place: Those of the results that are written over that array.
      scalars: The numbers that the formula takes, as one float32 vector.
    """

    def __init__(
        self, operands: Operands, count: jax.Array, numbers: Hyperparameters, *, step: bool
    ) -> None:
        self.given = {name: x for name, x in operands._asdict().items() if x is not None}
        # A caller's w_s replaces that in memory, which is then only written.
        self.read = [k for k in self.given if k != "prev" or operands.stale is None]
        self.results = {"out": "param"} | {
            k: k for k in ("prev", "momentum", "nu") if k in self.given
        }
        self.in_place = {k: v for k, v in self.results.items() if k != "out" or step}
        self._treedef: Any
        leaves, self._treedef = jax.tree.flatten(numbers)
        first = jnp.asarray(count == 0, jnp.float32)
        self.scalars = jnp.stack([first, *(jnp.asarray(x, jnp.float32) for x in leaves)])
        self._step = step

    def compute(self, scalars: Any, blocks: dict[str, Any]) -> dict[str, Any]:
        """The blocks to write, by their names in `results`, each in the dtype of its array.

        Args:
          scalars: The numbers in `scalars`, or a reference to them.
          blocks: The blocks of the arrays in `read`.
        """
        numbers: Any = self._treedef.unflatten(
            [scalars[1 + i] for i in range(self._treedef.num_leaves)]
        )
        operands = Operands(*(blocks.get(k) for k in Operands._fields))
        new = reference.block(operands, scalars[0] > 0, numbers, step=self._step)
        return {k: getattr(new, k).astype(self.given[v].dtype) for k, v in self.results.items()}
