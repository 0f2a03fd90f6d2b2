"""Parameters and optimizer state, and the compiled functions that work on them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import ray

from optax_dcasgd.parameter_server._transport import Layout, from_raw, to_raw


class Update:
    """What the server does to the parameters.

    On a CPU the parameters are updated in place, since a version that is sent out is a copy of its
    own (the message, or the object in Ray's store), and that copy is also what the workers' stale
    parameters refer to. On an accelerator they stay where they are: each update makes new ones, and
    a version that is sent out lives as long as somebody works with it.
    """

    def __init__(
        self, tx: optax.GradientTransformation, params: Any, layouts: tuple[Layout, Layout]
    ):
        """``layouts``: those of the parameters, and of a gradient as grad_fn returns it."""
        self._layout, of_grads = layouts
        self._params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
        optimizer = optax.with_extra_args_support(tx)
        self._state = optimizer.init(self._params)
        self._on_cpu = jax.default_backend() == "cpu"
        dtypes = of_grads.dtypes  # as grad_fn returns them, whatever they were sent as

        def unflatten(grads: list[Any]) -> Any:
            leaves = [g.astype(dtype) for g, dtype in zip(grads, dtypes, strict=True)]
            return self._layout.treedef.unflatten(leaves)

        def apply(params: Any, state: Any, grads: Any, stale: Any, worker: Any, tau: Any) -> Any:
            updates, state = optimizer.update(
                unflatten(grads), state, params, stale_params=stale, worker=worker, staleness=tau
            )
            return optax.apply_updates(params, updates), state

        def compensation(
            params: Any, state: Any, grads: Any, stale: Any, worker: Any, tau: Any
        ) -> Any:
            def update(grads: Any, stale: Any) -> Any:
                extra = {"stale_params": stale, "worker": worker, "staleness": tau}
                return optimizer.update(grads, state, params, **extra)[0]

            grads = unflatten(grads)
            plain = update(grads, params)
            nothing = update(jax.tree.map(jnp.zeros_like, grads), params)
            added = optax.tree.norm(optax.tree.sub(update(grads, stale), plain))
            return added / optax.tree.norm(optax.tree.sub(plain, nothing))

        def mean(grads: list[Any]) -> Any:
            return [
                jnp.mean(jnp.stack([leaf.astype(dtype) for leaf in leaves]), 0)
                for leaves, dtype in zip(zip(*grads, strict=True), dtypes, strict=True)
            ]

        self._apply = jax.jit(apply, donate_argnums=(0, 1) if self._on_cpu else 1)
        self._compensation = jax.jit(compensation)
        self._mean = jax.jit(mean)

    def publish(self) -> tuple[Any, Any]:
        """The current version: what is sent to workers, and what it is known by here."""
        packed = self._layout.pack(self.params_to_host())
        if isinstance(packed, bytes):
            return packed, self._layout.treedef.unflatten(self._layout.unpack(packed))
        message = ray.put(packed)
        if not self._on_cpu:
            return message, self._params
        leaves = self._layout.unpack(ray.get(message))
        return message, self._layout.treedef.unflatten(_put(leaves))

    def apply(self, grads: Any, stale: Any, worker: int, staleness: int) -> None:
        """One update."""
        self._params, self._state = self._apply(
            *(self._params, self._state, self._place(grads), stale),
            *(np.int32(worker), np.int32(staleness)),
        )

    def compensation(self, grads: Any, stale: Any, worker: int, staleness: int) -> float:
        r"""How much of what an update does is due to the staleness of its gradient.

        :math:`\|u(g, w_s) - u(g, w)\| / \|u(g, w) - u(0, w)\|` with the optimizer's update u: for
        an optimizer that is linear in the gradient, the norm of the compensation over that of the
        gradient.
        """
        return float(
            self._compensation(
                *(self._params, self._state, self._place(grads), stale),
                *(np.int32(worker), np.int32(staleness)),
            )
        )

    def mean(self, grads: list[list[Any]]) -> list[Any]:
        """The mean of several gradients."""
        mean: list[Any] = self._mean(grads)
        return mean

    def _place(self, grads: list[Any]) -> list[Any]:
        return grads if self._layout.is_small else _put(grads)

    def params_to_host(self) -> list[np.ndarray]:
        """The leaves; on a CPU, only until the next update."""
        return [np.asarray(leaf) for leaf in jax.tree.leaves(self._params)]

    def state_to_host(self) -> list[np.ndarray]:
        """The leaves, random keys as their data; on a CPU, only until the next update."""
        return [np.asarray(leaf) for leaf in to_raw(self._state)]

    def like(self) -> tuple[list[Any], list[Any]]:
        """What `restore` takes, in shapes and dtypes."""
        params, state = jax.eval_shape(lambda: (to_raw(self._params), to_raw(self._state)))
        return params, state

    def restore(self, params: list[np.ndarray], state: list[np.ndarray]) -> None:
        """Puts values in, which are copied."""
        self._params = from_raw(self._params, params)
        self._state = from_raw(self._state, state)


def _put(leaves: list[Any]) -> list[Any]:
    """To the device; without a copy where that is the host's memory."""
    return [jax.device_put(leaf) for leaf in leaves]
