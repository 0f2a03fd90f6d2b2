"""`remember_params`: the stale parameters from memory, one update ago or a backup per worker."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_dcasgd import _arguments, _checks, _stale_params, _trees


class RememberParamsState(NamedTuple):
    """State of `remember_params`; the fields about workers are ``None`` without ``num_workers``."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32: updates so far
    inner_state: Any
    last_worker: jax.Array | None  # shape=(), dtype=int32: who pushed last; M for nobody yet
    prev_params: Any  # like params, in their dtypes; with num_workers=M one more axis in front
    pulled_at: jax.Array | None  # shape=(M,), dtype=int32: updates before each backup was made


def remember_params(
    inner: optax.GradientTransformation, *, num_workers: int | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Tells ``inner`` at which parameters each gradient was computed, from what it remembers.

    Put it around the whole chain::

        tx = remember_params(optax.chain(robust_delay_compensation(), optax.sgd(0.1)))

    ``inner.update`` receives the extra arguments ``stale_params``, :math:`w_s`, and ``staleness``,
    :math:`\tau`:

    * Without ``num_workers``, :math:`w_s` are the parameters of the previous ``update`` call and
      :math:`\tau = 1`: right for gradients that are exactly one update old, and MXNet's rule. On
      the first call :math:`w_s = w` and :math:`\tau = 0`.
    * With ``num_workers=M``, ``update(..., worker=i)`` says whose gradient it is: Algorithm 2 of
      the paper. :math:`w_s` are the parameters as they stood once worker i's previous update had
      been applied (at first the initial ones), and :math:`\tau` is the number of updates since.
      With M = 1 every gradient is fresh, and ``inner`` is told so while tracing: the program is
      that of ``inner`` alone, bit for bit.

    What the caller passes as ``stale_params`` or ``staleness`` wins, each by itself.

    What is remembered are the parameters that ``update`` was called with. If a wrapper around it,
    such as ``optax.apply_if_finite``, keeps a call from reaching it, :math:`w_s` is older once.

    Args:
      inner: Any Optax optimizer, with as many rules in it as you like.
      num_workers: M, or None. The state keeps M copies of the parameters, in their dtypes.
        (``optax.inject_hyperparams`` needs it listed: ``static_args=("num_workers",)``.)

    Returns:
      A transformation with state `RememberParamsState`. ``worker`` is an int, or an integer array
      of shape (); a JAX array out of range is clamped to it. Other extra arguments reach ``inner``
      as they are, and so does ``worker``.

    Raises:
      ValueError: If ``num_workers`` is below 1; in ``update``, if ``params`` is missing, if
        ``worker`` is missing with ``num_workers`` or passed without (unless ``stale_params`` is
        passed too), if it is out of range, if a tree does not fit ``params`` (the message names
        the leaf), or if the state was made for another ``num_workers``.
      TypeError: If ``inner`` is no transformation, ``num_workers`` or ``worker`` no integer, or a
        parameter is an integer array.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_dcasgd import add_delay_compensation, remember_params
      >>> rule = add_delay_compensation(0.5, decay=None)
      >>> tx = remember_params(optax.chain(rule, optax.sgd(0.1)), num_workers=2)
      >>> gradient = jax.grad(lambda w: w**2)
      >>> params = jnp.array(1.0)
      >>> state, pulled = tx.init(params), [params, params]
      >>> for worker in [0, 0, 1]:  # the gradient of worker 1 is two updates old
      ...   updates, state = tx.update(gradient(pulled[worker]), state, params, worker=worker)
      ...   params = pulled[worker] = optax.apply_updates(params, updates)
      ...   print(round(float(params), 3))
      0.8
      0.64
      0.512

    References:
      Zheng et al., `Asynchronous Stochastic Gradient Descent with Delay Compensation
      <https://arxiv.org/abs/1609.08326>`_, 2017: Algorithm 2; Apache MXNet, ``DCASGD``.
    """
    _arguments.check_transformation("inner", inner)
    if num_workers is not None:
        _arguments.check_integer("num_workers", num_workers, minimum=1)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> RememberParamsState:
        _checks.check_params(params)
        if num_workers is None:
            prev_params, last_worker, pulled_at = _trees.copy(params), None, None
        else:
            prev_params = jax.tree.map(lambda p: _trees.stack_copies(p, num_workers), params)
            last_worker = jnp.full((), num_workers, jnp.int32)
            pulled_at = jnp.zeros(num_workers, jnp.int32)
        count = jnp.zeros((), jnp.int32)
        return RememberParamsState(count, inner.init(params), last_worker, prev_params, pulled_at)

    def update_fn(
        updates: optax.Updates,
        state: RememberParamsState,
        params: optax.Params | None = None,
        *,
        stale_params: optax.Params | None = None,
        staleness: Any = None,
        worker: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RememberParamsState]:
        _checks.check_updates(updates, params)
        if stale_params is not None:
            stale_params = _stale_params.check(stale_params, params, state, staleness)
        elif num_workers is None and worker is not None:
            raise ValueError(
                "worker was passed, but num_workers is None: one copy of the parameters is "
                "remembered, not one a worker. Pass remember_params(..., num_workers=M), or leave "
                "worker out."
            )
        if num_workers is not None and worker is None:
            raise ValueError(
                f"worker is required because num_workers={num_workers}: pass update(..., "
                "worker=i), the index of the worker whose gradient this is."
            )
        _check_memory(params, state, num_workers)
        if num_workers is None:
            found, age, memory = _one_copy(state, params)
        else:
            index = _arguments.check_worker(worker, num_workers)
            found, age, memory = _backups(state, params, index, num_workers)
        if worker is not None:
            extra_args["worker"] = worker
        updates, inner_state = inner.update(
            updates,
            state.inner_state,
            params,
            stale_params=found if stale_params is None else stale_params,
            staleness=age if staleness is None else staleness,
            **extra_args,
        )
        return updates, memory._replace(
            count=optax.safe_increment(state.count), inner_state=inner_state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _one_copy(state: RememberParamsState, params: Any) -> tuple[Any, Any, RememberParamsState]:
    """w_s, τ and the new memory: the parameters of the previous call."""
    stale = jax.tree.map(functools.partial(_unless_first, state.count), state.prev_params, params)
    memory = _trees.renew(state.count, params, state.prev_params)
    return stale, jnp.minimum(state.count, 1), state._replace(prev_params=memory)


def _backups(
    state: RememberParamsState, params: Any, worker: jax.Array, num_workers: int
) -> tuple[Any, Any, RememberParamsState]:
    """w_s, τ and the new memory: the backup of a worker.

    The algorithm backs up, for worker i, the parameters *with its own update applied*. ``update``
    does not see those, but it sees them as ``params`` of the next call, whoever makes it. So the
    backup of the last worker is filled in there, before any backup is read.
    """
    assert state.last_worker is not None
    assert state.pulled_at is not None
    fill = functools.partial(_fill_row, state.last_worker)
    backups = jax.tree.map(fill, state.prev_params, params)
    memory = state._replace(
        last_worker=worker,
        prev_params=backups,
        pulled_at=state.pulled_at.at[worker].set(optax.safe_increment(state.count)),
    )
    if num_workers == 1:
        # Nobody pushed in between. Known while tracing, so that the compiled program is that of the
        # inner optimizer; a run-time zero leaves the compiler free to round that one differently.
        return params, 0, memory
    stale = jax.tree.map(
        lambda backup, w: _unless_first(state.count, _row(backup, worker), w), backups, params
    )
    return stale, state.count - state.pulled_at[worker], memory


# Jitted, so that parameters of one shape are traced once; inlined, so that XLA sees no difference.
@jax.jit
def _unless_first(count: jax.Array, remembered: Any, param: Any) -> Any:
    return jnp.where(count == 0, jnp.asarray(param, remembered.dtype), remembered)


@jax.jit
def _row(stacked: Any, index: Any) -> Any:
    return lax.dynamic_index_in_dim(stacked, index, 0, keepdims=False)


@jax.jit
def _fill_row(last_worker: jax.Array, backups: Any, param: Any) -> Any:
    """Writes the parameters into the backup of the last worker; nowhere if there was none."""
    num_workers = backups.shape[0]
    index = jnp.minimum(last_worker, num_workers - 1)
    new = jnp.where(
        last_worker < num_workers, jnp.asarray(param, backups.dtype), _row(backups, index)
    )
    return lax.dynamic_update_index_in_dim(backups, new, index, 0)


def _check_memory(params: Any, state: RememberParamsState, num_workers: int | None) -> None:
    """Checks that the state was made for these parameters and for this number of workers.

    Raises:
      ValueError: Names the parameter that differs, or says what the state was made for.
    """
    made_for = None if state.pulled_at is None else jnp.shape(state.pulled_at)[0]
    if made_for != num_workers:
        raise ValueError(
            f"num_workers={num_workers}, but the optimizer state was made with "
            f"num_workers={made_for}. Make a new state with init(params), or pass the number it "
            "was made with."
        )
    stacked = num_workers is not None
    _checks.check_state(params, state.prev_params, stacked=stacked, same_dtype=True)
