"""`overlap_reduction`: data parallelism whose all-reduce runs under the next step's compute."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec

from optax_dcasgd import _arguments, _checks, _trees


class OverlapReductionState(NamedTuple):
    """State of `overlap_reduction`."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32: updates so far
    # Like params, one more axis in front: of length 1 inside shard_map, and of the length of the
    # mesh axis outside of it, where each device's entry is its own.
    grads: Any  # the local gradients of the last update, which are still to be reduced
    inner_state: Any
    # Like params: where the caller said that `grads` were computed. The default is the partition
    # spec of replicated parameters, so that the specs of a state can be written without it.
    stale_params: Any = PartitionSpec()


def overlap_reduction(
    inner: optax.GradientTransformation,
    axis_name: str | tuple[str, ...],
    *,
    reduction: Callable[[Any, Any], Any] = lax.pmean,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages gradients over devices one update late, so that no step has to wait for it.

    In a data-parallel step inside ``jax.shard_map``, each device k hands its local gradient
    :math:`g^k_t`, computed at :math:`w_t`, to ``update``, which keeps it and applies the mean of
    those of the step before:

    .. math::
      w_{t+1} = w_t + \mathrm{inner}(\bar g_{t-1}, w_t), \qquad
      \bar g_{t-1} = \frac 1 K \sum_{k=1}^{K} g^k_{t-1} .

    The sum depends on nothing that step t computes, so the compiler is free to run it while step t
    computes its gradients; the sum of a synchronous step depends on all of them. What this costs
    is that :math:`\bar g_{t-1}` is exactly one update old. ``inner`` is told ``staleness=1``. What
    its rules compare the parameters with, it remembers by itself::

        tx = overlap_reduction(dcasgd(0.1, momentum=0.9, lamda=2.0, store="updates"), "data")
        sgd = optax.sgd(0.1, momentum=0.9)
        tx = overlap_reduction(
            remember_params(optax.chain(robust_delay_compensation(), sgd)), "data")

    Gradients that are computed elsewhere than at the current parameters (at predicted ones, see
    `predict_params`) are passed with ``update(..., stale_params=tree)``. It is kept, and handed to
    ``inner`` together with these gradients, one update later. Pass it at every step or at none.

    Args:
      inner: Any Optax optimizer.
      axis_name: The mesh axis, or axes, over which the batch is split.
      reduction: ``reduction(grads, axis_name)`` is the mean over devices of a tree of local
        gradients: a ``jax.lax.pmean`` of bfloat16, say, or one made of ``jax.lax.ppermute``.

    Returns:
      A transformation. ``init`` and ``update`` have to be called inside ``jax.shard_map`` over
      ``axis_name``. ``update`` takes the local gradients, in place of their mean. The first update
      is zero and leaves the state of ``inner`` untouched.

      The state keeps one gradient a device, and a copy of the parameters for ``stale_params``, both
      in the dtype of the parameters. Its partition specs are
      ``OverlapReductionState(count=P(), grads=P(axis_name), inner_state=P())`` where the parameters
      are replicated. Other extra arguments reach ``inner`` as they are. A gradient that is
      ``None`` counts as zero.

    Raises:
      TypeError: If ``inner`` is no transformation, ``reduction`` no function, or a parameter is an
        integer array.
      ValueError: If ``axis_name`` is no axis of a surrounding ``jax.shard_map``; in ``update``, if
        the gradients have been summed over the axis already, if ``stale_params`` differs between
        devices, if ``params`` is missing or a tree does not fit it. (Under ``shard_map`` with
        ``check_vma=True``, its default, ``jax.grad`` with respect to replicated parameters sums
        over the devices by itself. ``jax.lax.pcast(params, axis_name, to="varying")`` gives the
        parameters to differentiate at.)

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax.sharding import PartitionSpec as P
      >>> from optax_dcasgd import OverlapReductionState, dcasgd, overlap_reduction
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> tx = overlap_reduction(dcasgd(0.1, lamda=0.5), "data")
      >>> specs = OverlapReductionState(count=P(), grads=P("data"), inner_state=P())
      >>> def step(params, state, batch):
      ...   local = jax.lax.pcast(params, "data", to="varying")
      ...   grads = jax.grad(lambda p: jnp.mean((p - batch) ** 2))(local)
      ...   updates, state = tx.update(grads, state, params)
      ...   return optax.apply_updates(params, updates), state
      >>> with jax.set_mesh(mesh):
      ...   init = jax.jit(jax.shard_map(tx.init, in_specs=P(), out_specs=specs))
      ...   step = jax.jit(jax.shard_map(
      ...     step, in_specs=(P(), specs, P("data")), out_specs=(P(), specs)))
      ...   params = jnp.array(1.0)
      ...   batch = jax.device_put(jnp.zeros(jax.device_count()), P("data"))
      ...   state = init(params)
      ...   for _ in range(4):
      ...     params, state = step(params, state, batch)
      ...     print(round(float(params), 3))
      1.0
      0.8
      0.64
      0.5

    References:
      Li et al., `Pipe-SGD: A Decentralized Pipelined SGD Framework for Distributed Deep Net
      Training <https://arxiv.org/abs/1811.03619>`_, 2018, with a pipeline of width 2.
    """
    _arguments.check_transformation("inner", inner)
    _arguments.check_callable("reduction", reduction, "(grads, axis_name) -> grads")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> OverlapReductionState:
        _check_axis(axis_name)
        _checks.check_params(params)

        def zeros(p: Any) -> Any:
            entry = _trees.zeros_like(p)[None]
            # Its type from the start, or it could not be the carry of a scan inside shard_map.
            return entry if _varies(entry, axis_name) else lax.pcast(entry, axis_name, to="varying")

        return OverlapReductionState(
            count=jnp.zeros((), jnp.int32),
            grads=jax.tree.map(zeros, params),
            inner_state=inner.init(params),
            stale_params=_trees.copy(params),
        )

    def keep_params(path: Any, stale: Any, kept: Any) -> Any:
        if _varies(stale, axis_name) and not _varies(kept, axis_name):
            raise ValueError(
                f"stale_params{jax.tree_util.keystr(path)} differs between the devices of the axis "
                f"{axis_name!r}. Pass the replicated parameters, from before jax.lax.pcast."
            )
        return jnp.array(stale, kept.dtype)

    def update_fn(
        updates: optax.Updates,
        state: OverlapReductionState,
        params: optax.Params | None = None,
        *,
        stale_params: optax.Params | None = None,
        staleness: Any = 0,
        **extra_args: Any,
    ) -> tuple[optax.Updates, OverlapReductionState]:
        _check_axis(axis_name)
        _checks.check_updates(updates, params)
        _checks.check_state(params, state.grads, stacked=True)
        _checks.check_state(params, state.stale_params, same_dtype=True)
        kept_params = state.stale_params
        if stale_params is not None:
            extra_args["stale_params"] = kept_params
            stale_params = _checks.align("stale_params", stale_params, params)
            kept_params = jax.tree_util.tree_map_with_path(keep_params, stale_params, kept_params)

        def keep(path: Any, grad: Any, param: Any, kept: Any) -> Any:
            if grad is None:
                return jax.tree.map(jnp.zeros_like, kept)
            if _varies(kept, axis_name) and not _varies(grad, axis_name):
                raise ValueError(
                    f"updates{jax.tree_util.keystr(path)} is the same on all devices of the axis "
                    f"{axis_name!r}: it has been summed already. overlap_reduction takes local "
                    "gradients: leave out the pmean, and differentiate at "
                    f"jax.lax.pcast(params, {axis_name!r}, to='varying'). (delay_gradients goes "
                    "inside overlap_reduction, not around it.)"
                )
            return jnp.asarray(grad, kept.dtype)[None]

        grads = jax.tree_util.tree_map_with_path(
            keep, updates, params, state.grads, is_leaf=_trees.is_none
        )
        reduced = reduction(jax.tree.map(lambda g: jnp.squeeze(g, 0), state.grads), axis_name)
        new_updates, inner_state = inner.update(
            reduced,
            state.inner_state,
            params,
            staleness=jax.tree.map(lambda age: age + 1, staleness),
            **extra_args,
        )
        started = state.count >= 1
        return (
            jax.tree.map(lambda u: jnp.where(started, u, jnp.zeros_like(u)), new_updates),
            OverlapReductionState(
                count=optax.safe_increment(state.count),
                grads=grads,
                inner_state=jax.tree.map(
                    lambda new, old: jnp.where(started, new, old), inner_state, state.inner_state
                ),
                stale_params=kept_params,
            ),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_axis(axis_name: str | tuple[str, ...]) -> None:
    try:
        lax.axis_size(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name={axis_name!r} is no axis of a surrounding jax.shard_map: call init and "
            "update of overlap_reduction inside jax.shard_map over a mesh with that axis."
        ) from error


def _varies(x: Any, axis_name: str | tuple[str, ...]) -> bool:
    """Whether the type of ``x`` says that it differs between devices; False if types do not say."""
    names = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    kind = getattr(jax.typeof(x), "manual_axis_type", None)
    return kind is not None and names <= set(kind.varying)
