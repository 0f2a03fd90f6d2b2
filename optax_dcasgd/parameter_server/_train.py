"""`train`: its arguments, checked, and what they are made into."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_dcasgd import _arguments, _checks, _trees
from optax_dcasgd._gradients import check_batches, check_returned
from optax_dcasgd.parameter_server import _checkpoint, _cluster, _local_steps
from optax_dcasgd.parameter_server._fingerprint import fingerprint
from optax_dcasgd.parameter_server._history import Result
from optax_dcasgd.parameter_server._options import Options
from optax_dcasgd.parameter_server._transport import Layout
from optax_dcasgd.parameter_server._travel import Parcel
from optax_dcasgd.parameter_server._worker import Task, get_batch, to_host


def train(
    grad_fn: Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]],
    params: optax.Params,
    tx: optax.GradientTransformation,
    batches: Any,
    *,
    num_workers: int,
    num_updates: int,
    mode: str = "async",
    max_staleness: int | None = None,
    on_stale: str = "wait",
    key: jax.Array | None = None,
    checkpoint_dir: Any = None,
    checkpoint_every: int = 1000,
    resume: bool = True,
    progress: bool = True,
    transport_dtype: Any = None,
    compensation_every: int | None = 100,
    max_bad_pushes: int = 10,
    local_steps: Any = None,
    name: str | None = None,
    address: str | None = None,
    worker_options: Mapping[str, Any] | None = None,
    server_options: Mapping[str, Any] | None = None,
) -> Result:
    r"""Trains with workers that compute gradients at the same time, on Ray.

    With :math:`w_v` for the parameters after v updates: a worker gets the newest parameters
    :math:`w_v` and the next batch, and computes :math:`g` there. When its answer is applied, the
    parameters are :math:`w_t`, and the optimizer's ``update`` gets the extra arguments
    ``stale_params`` (:math:`w_v`), ``worker`` and ``staleness`` (t − v). With
    ``optax.chain(add_delay_compensation(), ...)`` this is DC-ASGD.

    Args:
      grad_fn: ``grad_fn(params, batch, key) -> (loss, grads)``, such as
        ``jax.value_and_grad(loss_fn)``; compiled by each worker. The key of batch i is
        ``jax.random.fold_in(key, i)``.
      params: The initial parameters, a pytree of arrays. Its nodes may be of any type of an
        imported module; of the types that a script defines itself, dataclasses can be sent.
      tx: Any Optax optimizer whose ``update`` needs no more than ``stale_params``, ``worker`` and
        ``staleness``.
      batches: A function from an int i to batch i, called by the workers (for batch 0 also to
        compile, and by the caller to check the shapes); or a pytree whose leaves have a leading
        axis of any size n: batch i is ``leaf[i % n]``. (Of a list, ``lambda i: batches[i]``.) A
        batch that was lost with a worker, or dropped, goes to another worker. If more workers die
        over it than there are, it is refused.
      num_workers: M, the number of workers.
      num_updates: How many gradients to apply, with those before a resumed checkpoint.
      mode: "async", or "sync": one update with the mean of all workers' gradients at the same
        parameters.
      max_staleness: The largest staleness a gradient may be applied with, in updates; None for any.
        Below M − 1 not all workers can compute at the same time.
      on_stale: "wait" lets a fast worker wait while it would make a slower one's gradient too
        stale; "drop" discards and counts a gradient that is too stale.
      key: A JAX random key, by default ``jax.random.key(0)``.
      checkpoint_dir: Where to write checkpoints, and to find them; needs Orbax. On a cluster, a
        directory that all nodes share. None for none; the run then ends if its server dies.
      checkpoint_every: Write one after every so many updates.
      resume: Whether to go on from the last checkpoint in ``checkpoint_dir`` that can be read, if
        there is one. An event says so if ``grad_fn``, ``tx``, ``batches`` or ``key`` are not those
        that it was written with, as far as that can be seen: of a function ``batches``, in batch 0.
        If False, a checkpoint there is an error.
      progress: Whether to show a tqdm bar (if tqdm is installed).
      transport_dtype: A dtype such as ``jnp.bfloat16`` in which gradients are sent; None for their
        own. They are rounded to it.
      compensation_every: Measure ``history.compensation`` at every so many updates, which costs
        three more evaluations of the optimizer; None for never.
      max_bad_pushes: How many gradients may be refused, since training was begun or resumed, before
        it stops.
      local_steps: For a ``grad_fn`` by `local_updates`, how many batches a worker takes at a time,
        if that is not to be the same for all. One integer: as many as the fastest takes; the others
        take fewer, by the time that a batch takes them, so that all push equally often; one that
        is new, or was lost, takes one at first. M integers, one a worker; a worker that `resize`
        adds takes the least of them. Or a function from a worker's index to its number. A worker of
        n takes the next n batches, from number ``first`` on. ``batches`` is then a function
        ``(first, num_steps) -> stack`` of as many batches as the longest round has, along a new
        leading axis, of which the first ``num_steps`` are used; ``grad_fn`` gets them as
        `LocalBatches`, and ``fold_in(key, first)``. A lost round goes to another worker as it is.
      name: A name for the run, by which `resize` finds it and metrics are tagged.
      address: Of a running Ray cluster, as in ``ray.init``: "auto" on one of its nodes. Without it,
        without the environment's RAY_ADDRESS, and if Ray is not initialised, Ray is started on this
        machine, and stopped at the end.
      worker_options: Options of Ray for each worker's actor, such as ``{"num_gpus": 1}`` or
        ``{"num_cpus": 4, "resources": {...}}``. By default workers are spread over the nodes.
      server_options: The same for the server's, but for its name, restarts and threads. Neither
        may be detached.

    Returns:
      The last parameters and the optimizer's last state, as JAX arrays; the `History`, with one
      column for each thing recorded; the `simulation.Arrivals` with which `simulation.run` trains
      to the same parameters; what went wrong on the way; and which workers took part.

    Raises:
      ImportError: If Ray, or Orbax where it is needed, is not installed.
      TypeError: If an argument has a wrong type, or is a tree with nodes that cannot be sent.
      ValueError: If an argument is out of range, a gradient does not fit the parameters, ``name``
        is that of another run, or ``checkpoint_dir`` is in use by another run, holds another model
        or a run in another mode, or checkpoints none of which says what it is of.
      OSError: If ``checkpoint_dir`` cannot be written.
      RuntimeError: If more than ``max_bad_pushes`` gradients were refused, no worker is left, the
        server cannot be started (if the arrays of no checkpoint can be read, say), or it died and
        there is no checkpoint to go on from (or three times without a new one). If parameters or
        optimizer state are no longer finite (no checkpoint is written of them).

    A gradient with the wrong structure, shape or dtype, or one that is not finite as it is sent, is
    refused, and so is one whose computation raised: training goes on, and the event says whose it
    was and which leaf. Whatever ends ``train`` early, an interrupt (Ctrl-C, SIGTERM) or an error, a
    checkpoint is written first and the actors are stopped.

    The actors get JAX's configuration as it is set here, but for what belongs to a process (caches,
    logs, debugging); what ``runtime_env`` sets in its ``env_vars`` goes before.

    Examples:
      (Marked so that doctest does not start Ray; a test marked ``ray`` runs it.)

      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_dcasgd import add_delay_compensation, parameter_server
      >>> grad_fn = jax.value_and_grad(lambda w, x, key: jnp.mean((x @ w - x.sum(-1)) ** 2))
      >>> tx = optax.chain(add_delay_compensation(0.1, decay=None, clip=None), optax.sgd(0.05))
      >>> batches = jax.random.normal(jax.random.key(0), (200, 32, 3))
      >>> options = dict(num_workers=2, num_updates=200, progress=False)
      >>> result = parameter_server.train(  # doctest: +SKIP
      ...   grad_fn, jnp.zeros(3), tx, batches, **options
      ... )
      >>> print(result.params.round(2), len(result.history.staleness))  # doctest: +SKIP
      [1. 1. 1.] 200

      The same order again, as one compiled loop:

      >>> from optax_dcasgd import simulation
      >>> replayed = simulation.run(  # doctest: +SKIP
      ...   grad_fn, jnp.zeros(3), tx, batches, result.arrivals
      ... )
      >>> print(jnp.abs(replayed.params - result.params).max() < 1e-6)  # doctest: +SKIP
      True

    References:
      Zheng et al., `Asynchronous Stochastic Gradient Descent with Delay Compensation
      <https://arxiv.org/abs/1609.08326>`_, 2017: Algorithms 1 and 2. Ho et al., `More Effective
      Distributed ML via a Stale Synchronous Parallel Parameter Server`, 2013: bounded staleness.
    """
    _arguments.check_callable("grad_fn", grad_fn, "(params, batch, key) -> (loss, grads)")
    _arguments.check_transformation("tx", tx)
    _arguments.check_integer("num_workers", num_workers, minimum=1)
    _arguments.check_integer("num_updates", num_updates, minimum=1)
    _arguments.check_choice("mode", mode, ("async", "sync"))
    _arguments.check_choice("on_stale", on_stale, ("wait", "drop"))
    if max_staleness is not None:
        _arguments.check_integer("max_staleness", max_staleness, minimum=0)
        if mode == "sync":
            raise ValueError('max_staleness has no meaning with mode="sync": nothing is stale.')
    _arguments.check_integer("checkpoint_every", checkpoint_every, minimum=1)
    _arguments.check_integer("max_bad_pushes", max_bad_pushes, minimum=0)
    if compensation_every is not None:
        _arguments.check_integer("compensation_every", compensation_every, minimum=1)
    if transport_dtype is not None:
        transport_dtype = _check_transport_dtype(transport_dtype)
    worker_options, server_options = worker_options or {}, server_options or {}
    _cluster.check_options("worker_options", worker_options, is_server=False)
    _cluster.check_options("server_options", server_options, is_server=True)
    key = jax.random.key(0) if key is None else key
    _arguments.check_key("key", key)
    _checks.check_arrays("params", params, _checks.OF_EQUINOX)
    params = _trees.copy(params)
    local_steps = _local_steps.check(local_steps, num_workers)
    in_rounds = (most := local_steps.most(num_workers)) is not None
    check_batches(batches, None, in_rounds=in_rounds)
    if not callable(batches):
        batches = jax.tree.map(to_host, batches)
    _cluster.import_ray()
    # The shortest round, whose batch 0 is compared with that of other runs.
    first = Task(0, 1 if in_rounds else None)
    batch = get_batch(batches, first)
    if in_rounds:
        _check_rounds(batches, batch, most)
    returned = jax.eval_shape(grad_fn, params, batch, key)
    check_returned(returned, params)
    of_grads = Layout(returned[1])
    state_like = jax.eval_shape(tx.init, params)
    # What the optimizer has against such an update is better said here than by the server.
    jax.eval_shape(
        optax.with_extra_args_support(tx).update,
        returned[1],
        state_like,
        params,
        stale_params=params,
        worker=np.int32(0),
        staleness=np.int32(0),
    )
    layouts = Layout(params), of_grads, of_grads.cast(transport_dtype)
    of_worker = Parcel(
        {"params": params, "batches": batch}, (grad_fn, batches, key, *layouts, first.num_steps)
    )
    of_server = Parcel(
        {"params": params, "the state of tx": state_like},
        (tx, jax.tree.map(np.asarray, params), layouts),
    )

    # The rows of a history are of one kind.
    signature = [f"mode: {mode}", f"local_steps: {'given' if in_rounds else 'no'}"]
    signature += _checkpoint.signature(params=params, state=state_like)
    claimed = _checkpoint.claimed(checkpoint_dir, signature, resume=resume, num_updates=num_updates)
    with claimed as (checkpoint_dir, lock):
        from optax_dcasgd.parameter_server._driver import Driver

        options = Options(
            mode=mode,
            num_workers=num_workers,
            num_updates=num_updates,
            max_staleness=max_staleness,
            on_stale=on_stale,
            checkpoint_dir=checkpoint_dir,
            checkpoint_every=checkpoint_every,
            compensation_every=compensation_every,
            max_bad_pushes=max_bad_pushes,
            name=name,
            signature=signature,
            local_steps=local_steps,
            fingerprint={}
            if checkpoint_dir is None
            else fingerprint(grad_fn, params, tx, batches, batch, key, first),
            lock=lock,
        )
        with (
            _cluster.connected(address),
            Driver(
                *(of_worker, of_server, (params, state_like), options),
                *(worker_options, server_options),
            ) as driver,
        ):
            return driver.train(progress)


def _check_rounds(batches: Any, shortest: Any, num_steps: int) -> None:
    """Checks that the longest round can be had, and that others are of its shapes."""
    longest = get_batch(batches, Task(0, num_steps))
    shapes = [jax.tree.map(jnp.shape, stack.batches) for stack in (shortest, longest)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "batches(first, num_steps) must return stacks of one shape, that of the longest round, "
            f"whatever num_steps is; batches(0, 1) has {shapes[0]}, and batches(0, {num_steps}) "
            f"{shapes[1]}."
        )


def _check_transport_dtype(dtype: Any) -> np.dtype[Any]:
    """Returns the dtype that NumPy makes of it."""
    try:
        found: np.dtype[Any] = np.dtype(dtype)
        if jnp.issubdtype(found, jnp.floating):
            return found
    except TypeError:  # it makes none
        pass
    raise TypeError(
        f"transport_dtype must be a floating-point dtype such as jnp.bfloat16; got {dtype!r}."
    )
