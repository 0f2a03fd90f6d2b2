"""The check of `stale_params`, also that they are not the current ones under another name.

A Flax ``nnx.Variable`` is written in place. ``nnx.state(model)`` and ``nnx.split(model)`` return
the model's own Variables, so that such a tree, put aside, follows the model, and nothing is ever
compensated. Equal arrays prove nothing, as the worker that pulled last really holds the current
parameters. The same Variable in both trees does. ``nnx.Optimizer.update`` hands on arrays alone, so
where all of them are shared its frame is asked which Variables they came from.
"""

import sys
from typing import Any

import jax
import optax

from optax_dcasgd import _checks

_OF_FLATTEN = (
    "If this is inside optax.flatten: it makes one vector of params and not of stale_params. Put "
    "the source inside it too, as in optax.flatten(remember_params(...)), or pass "
    "jax.flatten_util.ravel_pytree(stale_params)[0]."
)


def check(stale_params: Any, params: Any, state: Any, staleness: Any) -> Any:
    """Returns ``stale_params``, given to a rule, with the structure of ``params``.

    Args:
      stale_params: As ``update`` got it.
      params: The parameters.
      state: The state of the rule, which counts its updates.
      staleness: As ``update`` got it, or None.

    Raises:
      ValueError: If it is missing, holds the nnx Variables of ``params``, or names the leaf whose
        structure or shape differs.
      TypeError: Names the complex leaf where the parameter is real.
    """
    if stale_params is None:
        raise ValueError(
            "stale_params is required: what was the gradient computed at? Either wrap the whole "
            "optimizer in optax_dcasgd.remember_params (one update ago, or with num_workers=M the "
            "backup of update(..., worker=i)), or in optax_dcasgd.delay_gradients, or pass "
            "update(..., stale_params=tree)."
        )
    try:
        aligned = _checks.align("stale_params", stale_params, params)
    except ValueError as error:
        is_leaf = jax.tree_util.all_leaves([stale_params])
        if getattr(params, "ndim", None) == 1 and not is_leaf:
            raise ValueError(f"{error} {_OF_FLATTEN}") from None
        raise
    if stale_params is not params and _is_live(stale_params, aligned, params):
        # Fresh gradients, and the first update, whose w_s may well be w.
        known = [staleness, [c for _, c in optax.tree.get_all_with_path(state, "count")]]
        if not any(_is_zero(x) for x in known):
            raise ValueError(
                "stale_params holds the nnx.Variables of params, which follow the model, and so is "
                "never stale. When the parameters are read, keep a copy: "
                "jax.tree.map(jnp.copy, nnx.state(model, nnx.Param)). (If the gradient is fresh, "
                "pass staleness=0 too.)"
            )
    return aligned


def _is_live(stale_params: Any, aligned: Any, params: Any) -> bool:
    """Whether the two trees share a Variable of nnx."""
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is None:
        return False

    def variables(tree: Any) -> set[int]:
        leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
        return {id(x) for x in leaves if isinstance(x, nnx.Variable)}

    if variables(stale_params) & variables(params):
        return True
    pairs = zip(jax.tree.leaves(aligned), jax.tree.leaves(params), strict=True)
    if any(x is not y for x, y in pairs):
        return False
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "flax.nnx.training.optimizer":
            passed = frame.f_locals.get("kwargs", {})
            if "stale_params" in passed and "model" in frame.f_locals:
                model = nnx.state(frame.f_locals["model"])
                return bool(variables(passed["stale_params"]) & variables(model))
        frame = frame.f_back
    return False


def _is_zero(tree: Any) -> bool:
    """Whether all numbers of a tree are known to be zero."""
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and all(not isinstance(x, jax.core.Tracer) and bool(x == 0) for x in leaves)
