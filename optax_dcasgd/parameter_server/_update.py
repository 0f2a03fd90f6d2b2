"""Parameters and optimizer state, and the compiled functions that work on them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import ray

from optax_dcasgd.parameter_server._transport import Layout, Packed, from_raw, to_raw

_AT_ONCE = 8  # small gradients applied by one call


class Version(NamedTuple):
    """The parameters after so many updates, as they were sent out."""

    number: int
    message: Any  # bytes, or a reference to what is in Ray's object store
    params: Any  # the same, as a tree


class Gradient(NamedTuple):
    """A gradient to apply."""

    packed: Packed
    version: Version  # of the parameters that it was computed at
    worker: int
    staleness: int


class Update:
    """The parameters and the optimizer's state, and what the server does to them.

    On a CPU the parameters are updated in place, since a version that is sent out is a copy of its
    own (the message, or the object in Ray's store), and that copy is also what the workers' stale
    parameters refer to. On an accelerator they stay where they are: each update makes new ones, and
    a version that is sent out lives as long as somebody works with it.
    """

    def __init__(
        self,
        tx: optax.GradientTransformation,
        params: Any,
        layouts: tuple[Layout, Layout, Layout],  # of parameters, gradients, gradients as sent
    ):
        self._layout, of_grads, self._transported = layouts
        self._params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
        optimizer = optax.with_extra_args_support(tx)
        state = optimizer.init(self._params)
        self._state = from_raw(state, to_raw(state))  # it may hold the parameters' own buffers
        self._on_cpu = jax.default_backend() == "cpu"
        dtypes = of_grads.dtypes  # as grad_fn returns them, whatever they were sent as
        treedef = self._layout.treedef

        def step(params: Any, state: Any, grads: Any, stale: Any, worker: Any, tau: Any) -> Any:
            extra = {"stale_params": stale, "worker": worker, "staleness": tau}
            return optimizer.update(grads, state, params, **extra)

        def to_tree(grads: list[Any]) -> Any:
            leaves = [g.astype(dtype) for g, dtype in zip(grads, dtypes, strict=True)]
            return treedef.unflatten(leaves)

        def apply(params: Any, state: Any, grads: Any, *rest: Any) -> Any:
            updates, state = step(params, state, to_tree(grads), *rest)
            return optax.apply_updates(params, updates), state

        def apply_stacked(params: Any, state: Any, num: Any, stacked: Any) -> Any:
            def one(i: Any, carry: Any) -> Any:
                grads, stale, worker, tau = jax.tree.map(lambda x: x[i], stacked)
                return apply(*carry, grads, treedef.unflatten(stale), worker, tau)

            return jax.lax.fori_loop(0, num, one, (params, state))

        def compensation(params: Any, state: Any, grads: Any, stale: Any, *rest: Any) -> Any:
            def update(grads: Any, stale: Any) -> Any:
                return step(params, state, grads, stale, *rest)[0]

            grads = to_tree(grads)
            plain = update(grads, params)
            nothing = update(jax.tree.map(jnp.zeros_like, grads), params)
            added = optax.tree.norm(optax.tree.sub(update(grads, stale), plain))
            return added / optax.tree.norm(optax.tree.sub(plain, nothing))

        def apply_mean(params: Any, state: Any, grads: Any, *rest: Any) -> Any:
            mean = [
                jnp.mean(jnp.stack([leaf.astype(dtype) for leaf in leaves]), 0)
                for leaves, dtype in zip(zip(*grads, strict=True), dtypes, strict=True)
            ]
            return apply(params, state, mean, *rest)

        donated = (0, 1) if self._on_cpu else 1
        self._apply = jax.jit(apply, donate_argnums=donated)
        self._apply_stacked = jax.jit(apply_stacked, donate_argnums=donated)
        self._apply_mean = jax.jit(apply_mean, donate_argnums=donated)
        self._compensation = jax.jit(compensation)
        self._finite = jax.jit(lambda leaves: jnp.array([_is_finite(x) for x in leaves], bool))
        trees = {"params": self._params, "state": self._state}
        self._paths = [
            jax.tree_util.keystr(path[:1], simple=True) + jax.tree_util.keystr(path[1:])
            for path, _ in jax.tree_util.tree_flatten_with_path(trees)[0]
        ]
        # What is infinite from the start is meant to be, such as a mask or the best loss so far.
        self._was_finite = self._are_finite()

    def publish(self, number: int) -> Version:
        """Returns the current parameters, packed to be sent out."""
        packed = self._layout.pack(self.params_to_host())
        if isinstance(packed, bytes):
            return Version(number, packed, self._tree(self._layout.unpack(packed)))
        message = ray.put(packed)
        if not self._on_cpu:
            return Version(number, message, self._params)
        leaves = self._layout.unpack(ray.get(message))
        return Version(number, message, self._tree(_put(leaves)))

    def apply(self, grads: list[Gradient]) -> None:
        """Applies gradients, one update after another.

        Small gradients go into one compiled loop, however many they are: the same program for one
        and for several, so that the result is the same to the bit.
        """
        if not (self._layout.is_small and self._transported.is_small):
            for gradient in grads:
                arguments = self._arguments(gradient)
                self._params, self._state = self._apply(self._params, self._state, *arguments)
            return
        for start in range(0, len(grads), _AT_ONCE):
            some = grads[start : start + _AT_ONCE]
            unused = [0] * (_AT_ONCE - len(some))
            stacked = (
                self._transported.unpack_stacked([g.packed for g in some], _AT_ONCE),
                self._layout.unpack_stacked([g.version.message for g in some], _AT_ONCE),
                np.array([g.worker for g in some] + unused, np.int32),
                np.array([g.staleness for g in some] + unused, np.int32),
            )
            self._params, self._state = self._apply_stacked(
                self._params, self._state, np.int32(len(some)), stacked
            )

    def apply_mean(self, grads: list[Gradient]) -> None:
        """Makes one update with the mean of gradients of the current version."""
        leaves = [self._arguments(gradient)[0] for gradient in grads]
        rest = (grads[0].version.params, np.int32(0), np.int32(0))
        self._params, self._state = self._apply_mean(self._params, self._state, leaves, *rest)

    def compensation(self, gradient: Gradient) -> float:
        r"""How much of what an update does is due to the staleness of its gradient.

        :math:`\|u(g, w_s) - u(g, w)\| / \|u(g, w) - u(0, w)\|` with the optimizer's update u: for
        an optimizer that is linear in the gradient, the norm of the compensation over that of the
        gradient.
        """
        return float(self._compensation(self._params, self._state, *self._arguments(gradient)))

    def _arguments(self, gradient: Gradient) -> tuple[Any, Any, Any, Any]:
        leaves = self._transported.unpack(gradient.packed)
        if not self._transported.is_small:
            leaves = _put(leaves)
        return (
            leaves,
            gradient.version.params,
            np.int32(gradient.worker),
            np.int32(gradient.staleness),
        )

    def _tree(self, leaves: list[Any]) -> Any:
        return self._layout.treedef.unflatten(leaves)

    def params_to_host(self) -> list[np.ndarray]:
        """Returns the leaves of the parameters; on a CPU they are valid until the next update."""
        return [np.asarray(leaf) for leaf in jax.tree.leaves(self._params)]

    def state_to_host(self) -> list[np.ndarray]:
        """Returns the leaves of the state; on a CPU they are valid until the next update."""
        return [np.asarray(leaf) for leaf in to_raw(self._state)]

    def not_finite(self) -> list[str]:
        """The leaves of parameters and state that were finite at first and are not now."""
        are_finite = self._are_finite()
        return [
            path
            for path, was, is_ in zip(self._paths, self._was_finite, are_finite, strict=True)
            if was and not is_
        ]

    def largest(self) -> str:
        """The parameter of the largest absolute value, and that value."""
        leaves = [np.abs(leaf).max(initial=0) for leaf in self.params_to_host()]
        index = int(np.argmax([float(leaf) for leaf in leaves]))
        return f"{self._paths[index]}: {float(leaves[index]):.3g}"

    def _are_finite(self) -> np.ndarray:
        return np.asarray(self._finite([*to_raw(self._params), *to_raw(self._state)]))

    def like(self) -> tuple[list[Any], list[Any]]:
        """Returns the shapes and dtypes that `restore` takes."""
        params, state = jax.eval_shape(lambda: (to_raw(self._params), to_raw(self._state)))
        return params, state

    def restore(self, params: list[np.ndarray], state: list[np.ndarray]) -> None:
        """Replaces parameters and state by copies of these values."""
        self._params = from_raw(self._params, params)
        self._state = from_raw(self._state, state)


def _is_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()


def _put(leaves: list[Any]) -> list[Any]:
    """Puts an array on the device; without a copy where that is the host's memory."""
    return [jax.device_put(leaf) for leaf in leaves]
