"""What is seen to differ when a run is resumed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parameter_server_cases import PARAMS, TX, Rounds, X, Y, grad_fn

from optax_dcasgd import add_delay_compensation
from optax_dcasgd.parameter_server._fingerprint import changes, fingerprint
from optax_dcasgd.parameter_server._worker import Task, get_batch

COUNT = itertools.count()


def loss(scale, params, batch, key):
    return scale * jax.nn.gelu(batch[0] @ params["hidden"]["w"]).sum()


def watched():
    """What it is traced to names a Python object, which is another one each time."""

    def loss_fn(params, batch, key):
        jax.debug.callback(lambda x: None, 1.0)
        return loss(1.0, params, batch, key)

    return jax.value_and_grad(loss_fn)


def of(**other):
    """Of these arguments, made anew as another process would."""
    rebuilt = optax.chain(add_delay_compensation(), optax.sgd(0.02, momentum=0.9))
    run = {"grad_fn": grad_fn, "params": PARAMS, "tx": rebuilt, "batches": (X, Y), **other}
    batch = get_batch(run["batches"], run.get("first", Task(0)))
    return fingerprint(**{"key": jax.random.key(0), **run}, batch=batch)


@pytest.mark.parametrize(
    ("name", "this", "other"),
    [
        ("tx", TX, optax.chain(add_delay_compensation(), optax.sgd(0.03, momentum=0.9))),
        ("tx", TX, optax.chain(add_delay_compensation(4.0), optax.sgd(0.02, momentum=0.9))),
        *(
            ("tx", made(1.0), made(2.0))
            for made in (
                lambda x: optax.adam(optax.cosine_decay_schedule(x, 100)),
                lambda x: optax.inject_hyperparams(optax.adam)(x),  # in its state
                lambda x: optax.add_noise(0.1, 0.5, jax.random.key(int(x))),
                lambda x: optax.stateless(lambda g, p: optax.tree.scale(x * jnp.ones(3)[0], g)),
            )
        ),
        ("grad_fn", *(jax.value_and_grad(lambda *a, x=x: loss(x, *a)) for x in (1.0, 2.0))),
        ("batches", (X, Y), (X, np.roll(Y, 1))),
        ("batches", (X, Y), (X[:32], Y[:32])),
        ("batches", lambda i: (X[i], Y[i]), lambda i: (X[i + 1], Y[i + 1])),
        ("key", jax.random.key(0), jax.random.key(1)),
    ],
)
def test_what_has_changed_is_seen(name, this, other):
    assert changes(of(**{name: this}), of(**{name: this})) == []
    assert changes(of(**{name: this}), of(**{name: other})) == [name]


def test_another_round_is_seen():
    def of_rounds(shift):
        return of(
            grad_fn=Rounds.grad_fn,
            batches=lambda first, num_steps: (X[first + shift :][:4], Y[first + shift :][:4]),
            first=Task(0, 1),
        )

    assert changes(of_rounds(0), of_rounds(0)) == []
    assert changes(of_rounds(0), of_rounds(1)) == ["batches"]


def test_what_cannot_be_compared_does_not_differ():
    once = iter([(X[0], Y[0])])
    assert of(batches=lambda i: next(once))["batches"] is None
    draw = of(batches=lambda i: (next(COUNT) + X[i], Y[i]))  # another one at each call
    assert draw["batches"] is None
    assert changes(draw, of()) == changes(of(), draw) == []
    assert changes(of(grad_fn=watched()), of(grad_fn=watched())) == []
    older = {**of(), "jax": "0.1 cpu"}
    other = of(tx=optax.sgd(3.0, momentum=0.9), key=jax.random.key(1))
    assert changes(older, other) == ["key"]
    assert changes({}, other) == []
