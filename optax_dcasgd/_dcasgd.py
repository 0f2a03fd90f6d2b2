"""`dcasgd`, MXNet's optimizer as one Optax transformation, and `fused_dcasgd`, which applies it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_dcasgd import _arguments, _checks, _stale_params, _trees, kernels
from optax_dcasgd._arguments import ScalarOrSchedule
from optax_dcasgd._hyperparameters import at_count
from optax_dcasgd.kernels import Operands, Results


class DCASGDState(NamedTuple):
    """State of `dcasgd` and `fused_dcasgd`; fields that the mode does not need are ``None``."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32: updates so far
    momentum: Any  # like params, at least float32; with store="updates" it is the last update
    nu: Any  # like params, real, at least float32
    prev_params: Any  # like params, in their dtypes: the parameters of the previous update


class FusedOptimizer(NamedTuple):
    """An optimizer that writes the new parameters itself.

    Attributes:
      init: ``init(params) -> state``.
      step: ``step(grads, state, params, **extra_args) -> (params, state)``.
    """

    init: Callable[[optax.Params], Any]
    step: Callable[..., tuple[optax.Params, Any]]


def dcasgd(
    learning_rate: optax.ScalarOrSchedule = 0.1,
    momentum: ScalarOrSchedule | None = None,
    lamda: ScalarOrSchedule = 0.04,
    *,
    decay: ScalarOrSchedule | None = None,
    eps: ScalarOrSchedule = 1e-7,
    clip: ScalarOrSchedule | None = None,
    store: str | None = "params",
    accumulator_dtype: Any = None,
    implementation: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""MXNet's ``DCASGD``: SGD with momentum on delay-compensated gradients.

    .. math::
      \tilde g &= g + \lambda_t \odot g \odot g \odot (w - w_s) \\
      m_{t+1} &= \mu\, m_t - \eta_t\, \tilde g \\
      w_{t+1} &= w_t + m_{t+1}

    with :math:`\lambda_t` as in `add_delay_compensation`. :math:`w_s` is ``stale_params`` where
    ``update`` is passed it, else the parameters of the previous call, and :math:`w` on the first.
    The learning rate stands *inside* the momentum, as in MXNet: a schedule changes what is added
    from now on, where ``optax.sgd`` rescales the whole buffer. For a constant learning rate the two
    agree.

    Args:
      learning_rate: :math:`\eta`, a float or a schedule.
      momentum: :math:`\mu` in [0, 1), a schedule, or None to keep no buffer.
      lamda: :math:`\lambda_0 \ge 0`, a float or a schedule; 0.04 is MXNet's default.
      decay: :math:`m` in [0, 1) of DC-ASGD-a, a schedule, or None for DC-ASGD-c (MXNet's). On
        injecting it, or ``momentum``, for bfloat16 parameters see below.
      eps: :math:`\varepsilon` of DC-ASGD-a, inside the square root; a float or a schedule.
      clip: None, or the largest :math:`|\tilde g - g| / |g|` of a component; a float or a schedule.
      store: What the state remembers to know :math:`w - w_s`.

        * ``"params"``: the parameters of the previous call, MXNet's rule. 2 buffers with momentum.
        * ``"updates"``: the last update alone, since :math:`w - w_{prev}` *is* the last update.
          With momentum that is the momentum buffer itself, so the state is as large as that of
          ``optax.sgd(momentum)``, and a step moves as many bytes. This holds if each update is
          added to the parameters as it is: nothing that changes it stands behind `dcasgd` in
          the chain, and nothing else writes the parameters. `fused_dcasgd` adds it itself;
          around `dcasgd` it cannot be checked. A parameter gets a gradient at every update, or
          never: after a ``None`` the momentum is not the last update. In bfloat16 or float16 the
          addition rounds, and :math:`w - w_{prev}` with it, so prefer ``"params"`` there, or
          `with_master_weights` around it.
        * None: nothing; ``stale_params`` comes from a source or the caller. Algorithm 2, one
          backup a worker, is ``remember_params(dcasgd(..., store=None), num_workers=M)``.
      accumulator_dtype: The dtype of the momentum and of ν; by default float32 or that of the
        parameter, whichever is wider.
      implementation: None or ``"xla"`` for XLA; ``"pallas"`` for kernels, for arrays in float32,
        bfloat16 or (on GPUs, from Hopper on: 64 arrays a kernel for `fused_dcasgd`) float16.

        On a mesh with Explicit axes the kernel runs on each shard. On one with Auto axes it has to
        be called inside ``jax.shard_map`` over all (on GPUs with ``check_vma=False``). Under
        ``jax.vmap`` it runs once a member, one after another.

    All but ``store``, ``accumulator_dtype`` and ``implementation`` can be injected by
    ``optax.inject_hyperparams``; there, a dtype class has to be listed, as in
    ``static_args=("accumulator_dtype",)``. On bfloat16 parameters it needs
    ``hyperparam_dtype=jnp.float32``: a ``momentum`` or ``decay`` of 0.999 is 1 in bfloat16, and 1
    is refused.

    Returns:
      A transformation with state `DCASGDState`, whose updates have the dtype of their parameter.
      ``update`` takes ``stale_params``, a tree like the parameters. ``worker`` without it is an
      error, as one copy is remembered and not one a worker.

    Raises:
      ValueError: If an argument is out of range; in ``update``, as `add_delay_compensation`.
      TypeError: If an argument has no legal type, or a parameter is an integer array.
      NotImplementedError: If ``implementation="pallas"`` cannot run; the message says why. For a
        platform or a mesh that is known only when the update is compiled, it comes then.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_dcasgd import dcasgd
      >>> tx = dcasgd(learning_rate=0.1, momentum=0.9, lamda=0.04)
      >>> params = {"w": jnp.array([1.0, -2.0])}
      >>> state = tx.init(params)
      >>> for _ in range(3):  # each gradient is one update old from the second on
      ...   grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(state.prev_params)
      ...   updates, state = tx.update(grads, state, params)
      ...   params = optax.apply_updates(params, updates)
      >>> print(params["w"].round(3))
      [-0.072  0.085]

    References:
      Apache MXNet 2.0, ``mxnet.optimizer.DCASGD``; Zheng et al.,
      `Asynchronous Stochastic Gradient Descent with Delay Compensation
      <https://arxiv.org/abs/1609.08326>`_, 2017.
    """
    init_fn, advance = _make(
        learning_rate, momentum, lamda, decay, eps, clip, store, accumulator_dtype, implementation
    )

    def update_fn(
        updates: optax.Updates,
        state: DCASGDState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DCASGDState]:
        return advance(False, updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def fused_dcasgd(
    learning_rate: optax.ScalarOrSchedule = 0.1,
    momentum: ScalarOrSchedule | None = None,
    lamda: ScalarOrSchedule = 0.04,
    *,
    decay: ScalarOrSchedule | None = None,
    eps: ScalarOrSchedule = 1e-7,
    clip: ScalarOrSchedule | None = None,
    store: str | None = "params",
    accumulator_dtype: Any = None,
    implementation: str | None = None,
) -> FusedOptimizer:
    """`dcasgd` that returns the new parameters instead of the updates, from the same pass.

    The arguments, the errors, the state and its values are those of `dcasgd`, so a checkpoint of
    one loads in the other. The new parameters are ``w + m`` rounded once, where
    ``optax.apply_updates`` rounds the update first: in float32 the same but for the last bit, in
    bfloat16 and float16 closer.

    Donate parameters and state, and return them in the order in which you take them, as in the
    example. (JAX pairs donated arguments with results of the same shape in order, and
    ``jax.jit(optimizer.step)`` itself takes the state first.) Then every new array is written over
    an old one, without a temporary of a parameter's size:

    =====================  =====================================  ==================================
    compiled for           in the order taken                     in another order
    =====================  =====================================  ==================================
    TPU, by XLA            in place                               in place
    TPU, Pallas            in place                               arrays are copied
    GPU, by XLA            in place                               in place
    GPU, Pallas            in place                               arrays are copied
    CPU                    in place with momentum, and with       the state taken first and returned
                           ``store="updates"``; a temporary       last: in place with momentum,
                           a parameter without, or in bfloat16    ``store="params"`` and no
                           on JAX 0.10                            ``decay``; else arrays are copied
    =====================  =====================================  ==================================

    Returns:
      A `FusedOptimizer`; its ``step`` takes the extra arguments that ``update`` of `dcasgd` takes.

    Examples:
      >>> import functools
      >>> import jax, jax.numpy as jnp
      >>> from optax_dcasgd import fused_dcasgd
      >>> optimizer = fused_dcasgd(0.1, momentum=0.9)
      >>> params = {"w": jnp.array([1.0, -2.0])}
      >>> state = optimizer.init(params)
      >>> @functools.partial(jax.jit, donate_argnums=(0, 1))
      ... def train_step(params, state):
      ...   grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
      ...   return optimizer.step(grads, state, params)
      >>> params, state = train_step(params, state)
      >>> print(params["w"])
      [ 0.8 -1.6]
    """
    init_fn, advance = _make(
        learning_rate, momentum, lamda, decay, eps, clip, store, accumulator_dtype, implementation
    )

    def step_fn(
        grads: optax.Updates, state: DCASGDState, params: optax.Params, **extra_args: Any
    ) -> tuple[optax.Params, DCASGDState]:
        return advance(True, grads, state, params, **extra_args)

    return FusedOptimizer(init_fn, step_fn)


def _make(
    learning_rate: Any,
    momentum: Any,
    lamda: Any,
    decay: Any,
    eps: Any,
    clip: Any,
    store: str | None,
    accumulator_dtype: Any,
    implementation: str | None,
) -> tuple[Callable[[optax.Params], DCASGDState], Callable[..., tuple[Any, DCASGDState]]]:
    """Checks the arguments; returns ``init`` and what ``update`` and ``step`` have in common."""
    _arguments.check_scalar("learning_rate", learning_rate)
    _arguments.check_scalar("momentum", momentum, minimum=0.0, below=1.0, optional=True)
    compensation = {"lamda": lamda, "decay": decay, "eps": eps, "clip": clip}
    _arguments.check_compensation(**compensation)
    _arguments.check_choice("store", store, ("params", "updates", None))
    accumulator_dtype = _arguments.check_accumulator_dtype(accumulator_dtype)
    kernels.check_implementation(implementation)
    hyperparams = {"learning_rate": learning_rate, "momentum": momentum, **compensation}
    keeps_buffer = momentum is not None or store == "updates"

    def init_fn(params: optax.Params) -> DCASGDState:
        _checks.check_params(params)

        def zeros(*, real: bool) -> Any:
            return _trees.init_accumulator(params, accumulator_dtype, real=real)

        return DCASGDState(
            count=jnp.zeros((), jnp.int32),
            momentum=zeros(real=False) if keeps_buffer else None,
            nu=None if decay is None else zeros(real=True),
            prev_params=_trees.copy(params) if store == "params" else None,
        )

    def advance(
        step: bool,
        grads: optax.Updates,
        state: DCASGDState,
        params: optax.Params | None,
        /,  # what else is called step or grads is an extra argument
        *,
        stale_params: optax.Params | None = None,
        worker: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, DCASGDState]:
        _checks.check_updates(grads, params, "grads" if step else "updates")
        _checks.check_mode(state, "prev_params", "store", store, kept=store == "params")
        _checks.check_mode(state, "momentum", "momentum", momentum, kept=keeps_buffer)
        _checks.check_mode(state, "nu", "decay", decay, kept=decay is not None)
        _checks.check_state(params, state.momentum, state.nu)
        _checks.check_state(params, state.prev_params, same_dtype=True)
        if stale_params is not None or store is None:
            stale_params = _stale_params.check(
                stale_params, params, state, extra_args.get("staleness")
            )
        elif worker is not None:
            raise ValueError(
                f"worker was passed, but store={store!r} remembers one copy of the parameters, not "
                "one a worker. Use remember_params(dcasgd(..., store=None), num_workers=M), or "
                "leave worker out."
            )

        def skip(row: tuple[Any, ...]) -> Results:
            """What becomes of a parameter without a gradient, or of all below such a node."""
            _, param, _, prev, buffer, nu = row
            if prev is not None:
                prev = _trees.renew(state.count, param, prev)
            if momentum is None and buffer is not None:  # the last update
                buffer = jax.tree.map(jnp.zeros_like, buffer)
            return Results(param if step else None, prev, buffer, nu)

        def compute(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
            arrays = [Operands(*row) for row in rows if row[0] is not None]
            now = at_count(hyperparams, state.count)
            new = iter(
                kernels.update(arrays, state.count, now, step=step, implementation=implementation)
            )
            return [skip(row) if row[0] is None else next(new) for row in rows]

        out, prev_params, buffer, nu = _trees.map_rows(
            compute, 4, grads, params, stale_params, state.prev_params, state.momentum, state.nu
        )
        return out, DCASGDState(
            count=optax.safe_increment(state.count),
            momentum=None if state.momentum is None else buffer,
            nu=None if state.nu is None else nu,
            prev_params=None if state.prev_params is None else prev_params,
        )

    return init_fn, advance
