"""Delays of a pipeline's stages, and parameters predicted for when a gradient will be applied."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_dcasgd import _arguments, _checks, _trees
from optax_dcasgd._hyperparameters import as_dtype, cast
from optax_dcasgd._mathematics import scale


def pipeline_delays(params: Any, layers: Sequence[str | tuple[str, ...]], num_stages: int) -> Any:
    """The tree of delays for `delay_gradients` of a stack of layers split into pipeline stages.

    The layers are split into P contiguous stages of as equal a number of layers as can be, the
    larger ones first. With one weight update a batch and no flush in between, stage s (from 0)
    applies its gradient P − 1 − s updates after its forward pass: the first stage is the stalest,
    and the last one, whose backward pass follows at once, is fresh.

    Args:
      params: The parameters, or anything of their structure.
      layers: The paths of the layers in the order of the forward pass, as
        ``jax.tree_util.keystr(path, simple=True, separator="/")`` writes them:
        ``"params/Dense_0"``, ``"blocks/3"``. Each stands for all parameters below it. A tuple of
        paths is one layer that is not split: ``[("embed", "block_0"), "block_1", ...]``.
      num_stages: P ≥ 1.

    Returns:
      A tree like ``params`` of Python integers from 0 to P − 1.

    Raises:
      ValueError: If ``num_stages`` is below 1 or above the number of layers; if a layer is not in
        ``params``; or if a parameter is in no layer, or in two.
      TypeError: If ``num_stages`` is no integer, ``layers`` is one string, or a layer is an empty
        tuple, or no string and no tuple of strings.

    Examples:
      >>> from optax_dcasgd import pipeline_delays
      >>> params = {"embed": 0.0, "block_0": {"w": 0.0}, "block_1": {"w": 0.0}, "head": 0.0}
      >>> pipeline_delays(params, [("embed", "block_0"), ("block_1", "head")], num_stages=2)
      {'block_0': {'w': 1}, 'block_1': {'w': 0}, 'embed': 1, 'head': 0}

    References:
      Narayanan et al., `PipeDream: Generalized Pipeline Parallelism for DNN Training
      <https://arxiv.org/abs/1806.03377>`_, 2019: the staleness of its weight stashing.
    """
    _arguments.check_integer("num_stages", num_stages, minimum=1)
    if isinstance(layers, str) or () in layers:
        raise TypeError(f"layers must be a list of paths, with no empty tuple; got {layers!r}.")
    if num_stages > len(layers):
        raise ValueError(
            f"num_stages must be at most the number of layers, {len(layers)}; got {num_stages}."
        )
    delay_of: dict[str, int] = {}
    for stage, indices in enumerate(np.array_split(np.arange(len(layers)), num_stages)):
        for index in indices:
            layer = layers[index]
            for path in layer if isinstance(layer, tuple) else (layer,):
                if not isinstance(path, str):
                    raise TypeError(
                        f"layers[{index}] must be a path like 'block_0' or a tuple of paths; "
                        f"got {layer!r}."
                    )
                if path in delay_of:
                    raise ValueError(f"layers[{index}] names {path!r} a second time.")
                delay_of[path] = num_stages - 1 - stage
    unused = set(delay_of)

    def delay(path: Any, _: Any) -> int:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        above = [layer for layer in delay_of if f"{name}/".startswith(f"{layer}/")]
        if len(above) != 1:
            found = f"in two layers, {above[0]!r} and {above[1]!r}" if above else "in no layer"
            raise ValueError(f"layers must contain each parameter once, but {name!r} is {found}.")
        unused.discard(above[0])
        return delay_of[above[0]]

    delays = jax.tree_util.tree_map_with_path(delay, params)
    if unused:
        raise ValueError(f"layers names {min(unused)!r}, but params has no such path.")
    return delays


class TrackVelocityState(NamedTuple):
    """State of `track_velocity`."""

    velocity: Any  # like params, at least float32: a moving average of the updates


def track_velocity(
    decay: float | jax.Array = 0.9, *, accumulator_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Passes updates on as they are and remembers their moving average, for `predict_params`.

    .. math:: \delta_t = \gamma\,\delta_{t-1} + (1 - \gamma)\,u_t, \qquad \delta_0 = 0

    Put it last in the chain, where updates are what is added to the parameters.

    Args:
      decay: :math:`\gamma` in [0, 1). With 0, the velocity is the last update.
        (``optax.inject_hyperparams`` needs ``hyperparam_dtype=jnp.float32`` for bfloat16
        parameters: 0.999 is 1 in bfloat16, and a decay of 1 is refused.)
      accumulator_dtype: The dtype of the average; by default float32 or that of the parameter,
        whichever is wider.

    Returns:
      A transformation with state `TrackVelocityState`.

    Raises:
      ValueError: If ``decay`` is out of range, or a tree does not fit.
      TypeError: If an argument has no legal type, or a parameter is an integer array.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax_dcasgd import predict_params, track_velocity
      >>> tx = optax.chain(optax.sgd(1.0), track_velocity(0.5))
      >>> params = jnp.array(3.0)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array(1.0), state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(params, predict_params(params, state, 2))  # two updates of −0.5 ahead
      2.0 1.0

    References:
      Yang et al., `PipeMare: Asynchronous Pipeline Parallel DNN Training
      <https://arxiv.org/abs/1910.05124>`_, 2021, section 3.2: the average δ.
    """
    _arguments.check_scalar("decay", decay, minimum=0.0, below=1.0, schedule=False)
    accumulator_dtype = _arguments.check_accumulator_dtype(accumulator_dtype)

    def init_fn(params: optax.Params) -> TrackVelocityState:
        _checks.check_params(params)
        return TrackVelocityState(_trees.init_accumulator(params, accumulator_dtype, real=False))

    def update_fn(
        updates: optax.Updates,
        state: TrackVelocityState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TrackVelocityState]:
        del params, extra_args
        _checks.check_updates(updates, state.velocity)

        def average(update: Any, velocity: Any) -> Any:
            if update is None:  # leaves the parameters below where they are: counts as zero
                return jax.tree.map(lambda v: average(0, v), velocity)
            dtype = _trees.compute_dtype(velocity)
            numbers = cast({"decay": decay}, _trees.real_dtype(dtype))
            old = scale(velocity.astype(dtype), numbers["decay"])
            new = scale(jnp.asarray(update, dtype), numbers["1 - decay"])
            return (old + new).astype(velocity.dtype)

        velocity = jax.tree.map(average, updates, state.velocity, is_leaf=_trees.is_none)
        return updates, TrackVelocityState(velocity)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def predict_params(params: optax.Params, state: Any, steps: Any) -> optax.Params:
    r"""The parameters as they will be some updates from now, if updates go on as they did.

    .. math:: \hat w = w + s\,\delta

    with :math:`\delta` from `track_velocity`. A gradient that will be applied s updates late is
    computed at :math:`\hat w` instead of :math:`w`, so that it is less stale when it arrives.

    Args:
      params: w, the current parameters.
      state: An optimizer state that holds exactly one `TrackVelocityState`, however deep. (With
        nnx, both as plain trees: ``nnx.as_pure(...)``.) Parameters that a mask keeps out of it stay
        as they are.
      steps: s ≥ 0, a number, or a prefix tree of numbers over the parameters: the delays of a
        pipeline's stages, as `pipeline_delays` makes them. Where it is the Python integer 0, the
        parameter itself is returned.

    Returns:
      The parameters to differentiate at, in the dtypes of ``params``. `delay_gradients` should be
      told of them, ``update(grads, state, params, stale_params=predicted)``, if what it wraps uses
      ``stale_params``.

    Raises:
      ValueError: If ``state`` holds no `TrackVelocityState` or several, if a number of steps is
        negative, or if a tree does not fit ``params``.
      TypeError: If a number of steps is no number.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_dcasgd import delay_gradients, predict_params, track_velocity
      >>> delay = {"first": 1, "last": 0}
      >>> tx = delay_gradients(optax.chain(optax.sgd(0.1), track_velocity(0.0)), delay)
      >>> params = {"first": jnp.array(1.0), "last": jnp.array(1.0)}
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...   predicted = predict_params(params, state, delay)
      ...   grads = jax.grad(lambda p: p["first"] ** 2 + p["last"] ** 2)(predicted)
      ...   updates, state = tx.update(grads, state, params, stale_params=predicted)
      ...   params = optax.apply_updates(params, updates)
      ...   print(params["first"].round(3), predicted["first"].round(3))
      1.0 1.0
      0.8 1.0
      0.6 0.6

    References:
      Chen et al., `Efficient and Robust Parallel DNN Training through Model Parallelism on
      Multi-GPU Platform <https://arxiv.org/abs/1809.02839>`_ (SpecTrain), 2018, with the momentum
      of SGD for δ; PipeMare (see `track_velocity`) for the average of any optimizer's updates.
    """
    found = [
        node
        for node in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, TrackVelocityState))
        if isinstance(node, TrackVelocityState)
    ]
    if len(found) != 1:
        raise ValueError(
            f"state must hold one TrackVelocityState, but it holds {len(found)}. Put "
            "track_velocity() last in the chain, once."
        )
    for path, leaf in jax.tree_util.tree_flatten_with_path(steps)[0]:
        name = f"steps{jax.tree_util.keystr(path)}"
        _arguments.check_scalar(name, leaf, minimum=0.0, schedule=False)
    steps = _checks.broadcast_prefix("steps", steps, params)
    velocity = found[0].velocity
    _checks.check_state(params, velocity, whole=True)

    def ahead(delta: Any, param: Any, s: Any) -> Any:
        if _trees.is_masked(delta) or (isinstance(s, int) and s == 0):
            return param
        dtype = _trees.compute_dtype(param, delta)
        moved = scale(delta.astype(dtype), as_dtype(s, _trees.real_dtype(dtype)))
        predicted = jnp.asarray(param, dtype) + moved
        return predicted.astype(_trees.dtype_of(param))

    return jax.tree.map(ahead, velocity, params, steps, is_leaf=_trees.is_masked)
