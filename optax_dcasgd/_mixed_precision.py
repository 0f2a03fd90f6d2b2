"""`with_master_weights`: train parameters of low precision through float32 copies."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_dcasgd import _arguments, _checks, _stale_params, _trees


class MasterWeightsState(NamedTuple):
    """State of `with_master_weights`."""

    inner_state: Any  # of the inner optimizer, initialised with the master weights
    master: Any  # like params: float32 for narrow parameters, optax.MaskedNode() for others


def with_master_weights(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Runs ``inner`` on float32 copies of all floating-point parameters narrower than that.

    These are bfloat16, float16, float8 and float4. Gradients are cast to float32, ``inner`` sees
    and updates the float32 masters, and ``optax.apply_updates`` lands on the rounded master:

        master' = master + inner's update;   params' = round(master')

    Parameters of other dtypes go to ``inner`` as they are. This is MXNet's ``multi_precision``, for
    every narrow dtype and around any optimizer.

    Put it outermost: what changes its updates, behind or around it, changes the parameters alone,
    and the masters lose what the parameters cannot hold (below). Nothing raises for ``optax.scale``
    or ``optax.add_decayed_weights`` behind it. The sums of ``optax.ema``, ``optax.trace`` and
    ``optax.apply_every`` start in bfloat16 there and are float32 after one update, which
    ``jax.lax.scan`` refuses ("carry output must have equal types"). Around it, ``jax.lax.cond`` in
    ``optax.apply_if_finite``, ``optax.conditionally_transform`` and ``optax.conditionally_mask``
    finds float32 in one branch and bfloat16 in the other, and refuses that ("cond branches must
    have equal output types").

    The updates of narrow parameters are float32 where JAX adds that to the parameter by itself: not
    every bfloat16 number can be reached from another by adding a third, and ``optax.apply_updates``
    casts the sum back. For float8 and float4, and under strict dtype promotion, the update has the
    parameter's dtype; a step of more than half the parameter may then end next to the rounded
    master. Wherever a parameter is not the rounded master (so, or because something else wrote it:
    a checkpoint, a projection) the master follows the parameter.

    Args:
      inner: Any Optax optimizer. Its state is float32, whatever the parameters are.

    Returns:
      A transformation. Extra arguments reach ``inner`` unchanged, but for the narrow parameters in
      ``stale_params``, which are cast to float32.

    Raises:
      TypeError: If a parameter is an integer array.
      ValueError: In ``update``, if ``params`` is missing or a tree does not fit it.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax_dcasgd import with_master_weights
      >>> tx = with_master_weights(optax.sgd(1.0))
      >>> params = jnp.array(1.0, jnp.bfloat16)
      >>> state = tx.init(params)
      >>> for _ in range(4):  # each step is a quarter of what bfloat16 resolves at 1.0
      ...   updates, state = tx.update(jnp.array(-(2.0**-9), jnp.bfloat16), state, params)
      ...   params = optax.apply_updates(params, updates)
      >>> print(params, state.master)
      1.00781 1.0078125

    References:
      Micikevicius et al., `Mixed Precision Training <https://arxiv.org/abs/1710.03740>`_, 2018,
      section 3.1.
    """
    _arguments.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> MasterWeightsState:
        _checks.check_params(params)
        master = jax.tree.map(
            lambda p: _to_float32(p) if _is_narrow(p) else optax.MaskedNode(), params
        )
        return MasterWeightsState(inner.init(_merge(master, params)), master)

    def update_fn(
        updates: optax.Updates,
        state: MasterWeightsState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MasterWeightsState]:
        _checks.check_updates(updates, params)
        _checks.check_state(params, state.master)
        if extra_args.get("stale_params") is not None:
            # Here, as the inner optimizer sees the masters in the place of the parameters.
            stale_params = _stale_params.check(
                extra_args["stale_params"], params, state, extra_args.get("staleness")
            )
            extra_args["stale_params"] = _widen(stale_params)
        master = jax.tree.map(
            lambda p, m: _follow(m, p) if _is_narrow(p) else m, params, state.master
        )
        inner_updates, inner_state = inner.update(
            _widen(updates), state.inner_state, _merge(master, params), **extra_args
        )

        def add(update: Any, param: Any, master: Any) -> tuple[Any, Any]:
            if update is None or not _is_narrow(param):
                return update, master
            param = jnp.asarray(param)
            master = optax.apply_updates(master, update)
            rounded = master.astype(param.dtype)
            update = rounded.astype(jnp.float32) - param.astype(jnp.float32)
            update = update.astype(_update_dtype(param.dtype))
            return update, _follow(master, optax.apply_updates(param, update))

        new_updates, master = _trees.map_leaves(add, 2, inner_updates, params, master)
        return new_updates, MasterWeightsState(inner_state, master)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_narrow(x: Any) -> bool:
    return _trees.is_narrow(_trees.dtype_of(x))


def _update_dtype(dtype: Any) -> Any:
    """float32 where JAX adds it to an array of that dtype by itself, else that dtype."""
    try:
        return jnp.promote_types(dtype, jnp.float32)
    except jax.dtypes.TypePromotionError:
        return dtype


def _to_float32(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
    return jnp.asarray(x).astype(jnp.float32)


def _widen(tree: Any) -> Any:
    return jax.tree.map(lambda x: _to_float32(x) if _is_narrow(x) else x, tree)


def _merge(master: Any, params: Any) -> Any:
    """The tree that ``inner`` optimizes: the masters, and the parameters that need none."""
    return jax.tree.map(lambda p, m: m if _is_narrow(p) else p, params, master)


def _follow(master: jax.Array, param: Any) -> jax.Array:
    """The master, except where it does not round to the parameter."""
    param = jnp.asarray(param)
    return jnp.where(master.astype(param.dtype) == param, master, param.astype(master.dtype))
