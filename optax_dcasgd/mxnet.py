"""MXNet's own constructor for `dcasgd`, for people who move a training script to JAX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_dcasgd import _arguments, _checks, _trees
from optax_dcasgd._arguments import ScalarOrSchedule
from optax_dcasgd._dcasgd import dcasgd
from optax_dcasgd._mixed_precision import with_master_weights
from optax_dcasgd.rules import add_delay_compensation
from optax_dcasgd.sources import remember_params

_NOT_HERE = {
    "param_idx2name": "parameters have no index here: give lr_mult and wd_mult as a prefix tree of "
    "floats over the parameters (MXNet 1.x also switches weight decay off by these names, for all "
    "but _weight and _gamma: give these others a wd_mult of 0)",
    "sym": "there is no symbol graph here: give lr_mult and wd_mult as a prefix tree of floats "
    "over the parameters",
    "param_dict": "there are no Gluon parameters here: give lr_mult and wd_mult as a prefix tree "
    "of floats over the parameters",
    "aggregate_num": "one jitted update covers all parameters already: leave it out",
}


def DCASGD(  # noqa: N802 (MXNet's name)
    learning_rate: float | None = 0.1,
    momentum: ScalarOrSchedule = 0.0,
    lamda: float = 0.04,
    use_fused_step: bool = False,
    *,
    wd: float = 0.0,
    rescale_grad: float = 1.0,
    clip_gradient: float | None = None,
    lr_scheduler: Callable[[Any], Any] | None = None,
    begin_num_update: int = 0,
    multi_precision: bool = False,
    lr_mult: Any = None,
    wd_mult: Any = None,
    version: int = 2,
    **not_here: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""``mxnet.optimizer.DCASGD`` step for step, under MXNet's own argument names.

    With :math:`c` for ``clip_gradient`` and :math:`w_{prev}` the parameters one update ago,

    .. math::
      g &= \mathrm{clip}(\text{rescale\_grad} \cdot \text{grad}, \pm c)
           + \text{wd} \cdot \text{wd\_mult} \cdot w \\
      m' &= \text{momentum} \cdot m - \text{lr} \cdot \text{lr\_mult}
            \cdot (g + \lambda\, g^2 (w - w_{prev})) \\
      w' &= w + m'

    With ``version=1`` (MXNet 1.x) the weight decay stands outside the square: the compensation is
    :math:`\lambda\,\mathrm{clip}(\cdot)^2 (w - w_{prev})`. (MXNet 1.x itself fails for a momentum
    other than 0; here it works.)

    Args:
      learning_rate: lr. None for that of ``lr_scheduler``, or 0.01 without one. MXNet overwrites
        ``lr_scheduler.base_lr`` with it; here a scheduler with another ``base_lr`` is refused.
        (MXNet 1.x has no default of its own for DCASGD and trains with 0.01.) A schedule of
        Optax's, which MXNet has not, does instead of ``lr_scheduler``.
      momentum: In [0, 1); or a schedule.
      lamda: :math:`\lambda \ge 0`; or a schedule.
      use_fused_step: Must be False: MXNet has no fused step for DCASGD. See `fused_dcasgd`.
      wd: Weight decay.
      rescale_grad: Multiplies the gradient first, 1/batch_size for summed losses.
      clip_gradient: Clips the rescaled gradient elementwise to ± this, or None.
      lr_scheduler: A function of MXNet's ``num_update``, traceable by JAX: it gets an int32 scalar,
        ``begin_num_update + 1`` on the first update, and returns the learning rate.
      begin_num_update: Where ``num_update`` starts counting.
      multi_precision: Whether to keep float32 masters of parameters in low precision, by
        `with_master_weights` (MXNet: of float16 only; here of bfloat16 and float8 too).
      lr_mult: None, or a prefix tree of floats over the parameters.
      wd_mult: None, or a prefix tree of floats over the parameters.
      version: 2 or 1, whose rule to follow.
      **not_here: MXNet's other arguments, which have no meaning here, are refused by name.

    Under ``optax.inject_hyperparams`` the integers have to be listed, and a scheduler, which is no
    schedule of Optax's: ``static_args=("begin_num_update", "version", "lr_scheduler")``. On
    bfloat16 parameters it needs ``hyperparam_dtype=jnp.float32``: a momentum of 0.999 is 1 in
    bfloat16, and 1 is refused.

    Returns:
      A transformation for ``optax.apply_updates``. For float32 parameters its updates are those of
      MXNet to float32 rounding; for half-precision ones the arithmetic is in float32, which MXNet's
      is not (with ``version=1`` the compensated gradient is rounded in between). ``update`` takes
      ``stale_params`` as `dcasgd` does.

    Raises:
      ValueError: If an argument is out of range, or the scheduler's ``base_lr`` is not
        ``learning_rate``.
      TypeError: For an argument that MXNet has and that means nothing here (the message says what
        to use instead), or that MXNet has not either.
      NotImplementedError: If ``use_fused_step`` is true.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax_dcasgd import mxnet
      >>> tx = mxnet.DCASGD(learning_rate=0.1, momentum=0.9, wd=1e-4, rescale_grad=1 / 32)
      >>> params = {"w": jnp.ones(3)}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.full(3, 32.0)}, state, params)
      >>> print(optax.apply_updates(params, updates)["w"])
      [0.89999 0.89999 0.89999]

    References:
      Apache MXNet 2.0.0 and 1.9.1, ``python/mxnet/optimizer``.
    """
    not_here.pop("not_here", None)  # optax.inject_hyperparams passes the empty dict by its name
    for name in not_here:
        hint = _NOT_HERE.get(name)
        raise TypeError(
            f"{name}: {hint}." if hint else f"DCASGD has no argument {name!r}, nor has MXNet's."
        )
    if use_fused_step:
        raise NotImplementedError(
            "use_fused_step=True: MXNet has no fused step for DCASGD. "
            "optax_dcasgd.fused_dcasgd is one; it takes what dcasgd takes."
        )
    _arguments.check_integer("version", version, minimum=1)
    _arguments.check_choice("version", version, (1, 2))
    _arguments.check_scalar("momentum", momentum, minimum=0.0, below=1.0)
    _arguments.check_scalar("learning_rate", learning_rate, optional=True)
    _arguments.check_scalar("lamda", lamda, minimum=0.0)
    _arguments.check_scalar("wd", wd, schedule=False)
    _arguments.check_scalar("rescale_grad", rescale_grad, schedule=False)
    _arguments.check_scalar(
        "clip_gradient", clip_gradient, minimum=0.0, optional=True, schedule=False
    )
    _arguments.check_integer("begin_num_update", begin_num_update, minimum=0)
    for name, mult in (("lr_mult", lr_mult), ("wd_mult", wd_mult)):
        for path, leaf in jax.tree_util.tree_flatten_with_path(mult)[0]:
            _arguments.check_scalar(f"{name}{jax.tree_util.keystr(path)}", leaf, schedule=False)
    schedule = _schedule(_at_least_float32(learning_rate), lr_scheduler, begin_num_update)

    prepare: list[optax.GradientTransformation] = [
        _widen(),
        optax.scale(_at_least_float32(rescale_grad)),
    ]
    if clip_gradient is not None:
        prepare.append(optax.clip(_at_least_float32(clip_gradient)))
    has_decay = wd_mult is not None or not _is_zero(wd)
    decayed_weights = [_add_decayed_weights(wd, wd_mult)] if has_decay else []
    buffer = None if _is_zero(momentum) else momentum
    # A constant factor commutes with the momentum, so it may stand behind it.
    scale = [] if lr_mult is None else [_scale_by_tree("lr_mult", lr_mult)]
    if version == 2:
        optimizer = optax.chain(*prepare, *decayed_weights, dcasgd(schedule, buffer, lamda), *scale)
    else:
        compensation = add_delay_compensation(lamda, decay=None, clip=None)
        # Compensated before: of dcasgd the momentum remains, with lr inside, in float32.
        sgd = (
            optax.scale_by_learning_rate(schedule)
            if buffer is None
            else dcasgd(schedule, buffer, 0.0, store="updates")
        )
        optimizer = remember_params(
            optax.chain(*prepare, compensation, *decayed_weights, sgd, *scale)
        )
    return with_master_weights(optimizer) if multi_precision else optimizer


def _schedule(learning_rate: Any, lr_scheduler: Any, begin_num_update: int) -> Any:
    if lr_scheduler is None:
        return 0.01 if learning_rate is None else learning_rate
    if not callable(lr_scheduler):
        raise TypeError(f"lr_scheduler must be a function of num_update; got {lr_scheduler!r}.")
    base_lr = getattr(lr_scheduler, "base_lr", learning_rate)
    is_known = not isinstance(learning_rate, jax.core.Tracer)  # not so where it is injected
    if learning_rate is not None and is_known and base_lr != learning_rate:
        raise ValueError(
            f"learning_rate={learning_rate} would overwrite lr_scheduler.base_lr={base_lr} in "
            "MXNet. Pass learning_rate=None for the scheduler's own, or make them equal."
        )
    return lambda count: lr_scheduler(begin_num_update + 1 + count)


def _at_least_float32(x: Any) -> Any:
    """For the links of Optax: what is injected has the dtype of the parameters, maybe narrow."""
    return x.astype(_trees.compute_dtype(x)) if isinstance(x, jax.Array) else x


def _is_zero(x: Any) -> bool:
    """Whether it is the number 0; an injected or traced 0 is not known to be."""
    return isinstance(x, int | float) and x == 0


def _widen() -> optax.GradientTransformation:
    """Casts gradients to at least float32, in which the links of Optax then leave them."""

    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        _checks.check_updates(updates, params)
        return jax.tree.map(lambda g: jnp.asarray(g, _trees.compute_dtype(g)), updates)

    return optax.stateless(update)


def _add_decayed_weights(wd: Any, wd_mult: Any) -> optax.GradientTransformation:
    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        _checks.check_updates(updates, params)

        def leaf(grad: Any, param: Any, mult: Any) -> Any:
            if grad is None:
                return None
            dtype = _trees.compute_dtype(grad, param)
            decay = jnp.asarray(wd * mult, dtype) * jnp.asarray(param, dtype)
            decayed = jnp.asarray(grad, dtype) + decay
            # What the compensation of version 1 has rounded stays in the parameter's dtype.
            rounded = _trees.dtype_of(grad) == _trees.dtype_of(param)
            return decayed.astype(_trees.dtype_of(param)) if rounded else decayed

        mult = _checks.broadcast_prefix("wd_mult", 1.0 if wd_mult is None else wd_mult, updates)
        return jax.tree.map(leaf, updates, params, mult, is_leaf=_trees.is_none)

    return optax.stateless(update)


def _scale_by_tree(name: str, factors: Any) -> optax.GradientTransformation:
    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params

        def leaf(update: Any, factor: Any) -> Any:
            dtype = _trees.compute_dtype(update)
            product = jnp.asarray(update, dtype) * jnp.asarray(factor, dtype)
            return product.astype(_trees.dtype_of(update))

        return jax.tree.map(leaf, updates, _checks.broadcast_prefix(name, factors, updates))

    return optax.stateless(update)
