"""A small model for the parameter server, and faults to build into its batches.

The workers are other processes, so that a fault has to be in what they are sent: `batches` with a
fault at some index, which happens once (a file says whether it has).
"""

import os
import pathlib
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_dcasgd import add_delay_compensation, local_updates

_rng = np.random.default_rng(0)
X = _rng.normal(size=(64, 16, 6)).astype(np.float32)
Y = np.tanh(X @ _rng.normal(size=(6, 3))).astype(np.float32)
PARAMS = {
    "hidden": {"w": _rng.normal(size=(6, 8)).astype(np.float32) * 0.4, "b": np.zeros(8, "f4")},
    "out": _rng.normal(size=(8, 3)).astype(np.float32) * 0.4,
}
PARTS_PARAMS = {"w": np.linspace(-1, 1, 6, dtype=np.float32), "b": np.float32(0.5)}
TX = optax.chain(add_delay_compensation(), optax.sgd(0.02, momentum=0.9))


def loss(params, batch, key):
    del key
    x, y = batch
    h = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return jnp.mean((h @ params["out"] - y) ** 2)


grad_fn = jax.value_and_grad(loss)


_local = local_updates(grad_fn, optax.sgd(0.02), num_steps=4)


def rounds_of_four(params, batch, key):
    """The 16 examples of a batch as four batches of four, one a local step."""
    return _local(params, jax.tree.map(lambda x: x.reshape(4, 4, -1), batch), key)


class Rounds:
    """At most four batches, from number ``first`` on; who computes one of these numbers dies once.

    ``pause`` is of one step, and five times as long in one of the workers.
    """

    grad_fn = staticmethod(_local)

    def __init__(self, directory=None, indices=(), pause=0.0, slow_process=None):
        self.directory, self.indices, self.pause = str(directory), indices, pause
        self.slow = slow_process

    def __call__(self, first, num_steps):
        if isinstance(first, int):  # on Ray
            time.sleep(num_steps * self.pause)
            if self.slow is not None and first > 0 and slowest(self.slow):
                time.sleep(4 * num_steps * self.pause)
            for i in self.indices:
                if first <= i < first + num_steps and once(f"{self.directory}/fault-{i}"):
                    die(None)
        index = (first + jnp.arange(4)) % 64
        return jnp.asarray(X)[index], jnp.asarray(Y)[index]


def numpy_round(params, first, num_steps, rate=0.02):
    """The mean loss and the sum of the steps, negative, by hand."""
    hidden, out, losses = dict(params["hidden"]), params["out"], []
    for i in range(first, first + num_steps):
        x, y = X[i % 64], Y[i % 64]
        h = np.tanh(x @ hidden["w"] + hidden["b"])
        losses.append(np.mean((h @ out - y) ** 2))
        error = 2 * (h @ out - y) / y.size
        inner = error @ out.T * (1 - h**2)
        hidden["w"], hidden["b"] = (
            hidden["w"] - rate * x.T @ inner,
            hidden["b"] - rate * inner.sum(0),
        )
        out = out - rate * h.T @ error
    after = {"hidden": hidden, "out": out}
    return np.mean(losses), jax.tree.map(lambda before, now: before - now, params, after)


def padded(params):
    """Too large for a message."""
    return {"model": params, "padding": np.ones((300, 200), np.float32)}


def padded_grad_fn(params, batch, key):
    value, grads = grad_fn(params["model"], batch, key)
    return value, {"model": grads, "padding": 1e-3 * params["padding"]}


class Batches:
    """Batch i is entry i % 64, after a pause that is 20 times as long in one of the workers."""

    def __init__(self, pause=0.0, slow_process=None):
        self.pause, self.slow = pause, slow_process

    def __call__(self, i):
        time.sleep(self.pause)
        if self.slow is not None and i > 0 and slowest(self.slow):  # the caller tries batch 0
            time.sleep(20 * self.pause)
        return X[i % 64], Y[i % 64]


def slowest(path):
    """Whether this process was the first to ask, for the file at this path."""
    try:
        with open(path, "x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return pathlib.Path(path).read_text() == str(os.getpid())
    return True


def once(path):
    """True the first time anybody asks."""
    try:
        with open(path, "x"):
            return True
    except FileExistsError:
        return False


class Signed(Batches):
    """Each process that computes leaves a file with its name."""

    def __init__(self, directory, pause):
        super().__init__(pause)
        self.directory = str(directory)

    def __call__(self, i):
        if i > 0:  # the caller tries batch 0
            once(f"{self.directory}/{os.getpid()}")
        return super().__call__(i)


class Faulty(Batches):
    """With ``fault(i)`` called at some batches, each of which has it once."""

    def __init__(self, directory, indices, fault, pause=0.005):
        super().__init__(pause)
        self.directory, self.indices, self.fault = str(directory), indices, fault

    def __call__(self, i):
        batch = super().__call__(i)
        if i in self.indices and once(f"{self.directory}/fault-{i}"):
            return self.fault(batch)
        return batch


class Deadly(Batches):
    """Who computes one of these batches dies, every time."""

    def __init__(self, pause, indices):
        super().__init__(pause)
        self.indices = indices

    def __call__(self, i):
        if i in self.indices:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(i)


class Unloadable(Batches):
    """Fails to arrive in another process."""

    def __setstate__(self, state):
        raise ModuleNotFoundError("no module named as my data set")


class UnloadableOnce(Signed):
    """Fails to arrive in the first process."""

    def __setstate__(self, state):
        self.__dict__.update(state)
        if once(f"{self.directory}-failed"):
            raise ModuleNotFoundError("no module named as my data set")


def deadly_tx(caller, at, error=None):
    """Ends the server, and not the calling process, at its start or at its sixth update."""

    def end(count):
        if os.getpid() != caller and (at == "start" or count == 5):
            if error is not None:
                raise error
            os.kill(os.getpid(), signal.SIGKILL)

    def init(params):
        if at == "start":
            end(0)
        return jnp.zeros((), jnp.int32)

    def update(updates, count, params=None, **extra):
        if at == "update":
            jax.debug.callback(end, count)
        return updates, count + 1

    return optax.chain(optax.GradientTransformationExtraArgs(init, update), TX)


def die(batch):
    os.kill(os.getpid(), signal.SIGKILL)
    return batch


def not_a_number(batch):
    return batch[0] * np.nan, batch[1]


def another_shape(batch):
    """For `sized_grad_fn`."""
    return batch[0][:7], batch[1][:7]


def fail(batch):
    raise LookupError("no such image")


def sized_grad_fn(params, batch, key):
    """Whose gradient has the wrong shape if the batch has."""
    value, grads = grad_fn(params, batch, key)
    if batch[0].shape[0] != 16:
        grads = {**grads, "out": grads["out"][:5]}
    return value, grads
