"""A small transformer that predicts the next character of Python's language reference.

The text is the one behind ``help("topics")``, which every Python has.
"""

import platform
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

WIDTH, HEADS, CONTEXT = 32, 2, 32
# The text is another one in every release. Finished runs keep its name, so that a run that goes on
# under another Python trains them anew instead of mixing the two.
TEXT = f"of Python {platform.python_version()}"


class Block(nnx.Module):
    """Causal self-attention and a perceptron, each behind a layer norm and beside a residual."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.Dict(
            norm=nnx.LayerNorm(WIDTH, use_bias=False, rngs=rngs),
            heads=nnx.Linear(WIDTH, 3 * WIDTH, use_bias=False, rngs=rngs),
            out=nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs),
        )
        self.perceptron = nnx.Dict(
            norm=nnx.LayerNorm(WIDTH, use_bias=False, rngs=rngs),
            up=nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs),
            down=nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x of shape (batch, context, width) with what the block adds to it."""
        heads = self.attention.heads(self.attention.norm(x))
        query, key, value = jnp.split(heads.reshape(*x.shape[:-1], HEADS, -1), 3, axis=-1)
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention.out(attended.reshape(x.shape))
        hidden = nnx.relu(self.perceptron.up(self.perceptron.norm(x)))
        return x + self.perceptron.down(hidden)


class Transformer(nnx.Module):
    """Predicts the next character from up to `CONTEXT` of them."""

    def __init__(self, num_characters: int, num_blocks: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(num_characters, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(num_blocks)])
        self.norm = nnx.LayerNorm(WIDTH, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(WIDTH, num_characters, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        """Returns logits of shape (batch, context, characters)."""
        x = self.embed(text) + self.positions(jnp.arange(text.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def load_text() -> tuple[np.ndarray, np.ndarray]:
    """The training and the validation text, the last tenth, as indices of characters."""
    topics = pydoc_data.topics.topics
    text = "".join(topics[topic] for topic in sorted(topics))
    codes = np.frombuffer(text.encode("ascii", "ignore"), np.uint8)
    _, indices = np.unique(codes, return_inverse=True)
    split = len(indices) * 9 // 10
    return indices[:split].astype(np.int32), indices[split:].astype(np.int32)
