"""What the actors get of the caller, on Ray: JAX's settings, and trees of any node type."""

import pytest
from parameter_server_runs import run_python

pytestmark = pytest.mark.ray

SETTINGS = """
import os, pickle, sys
import jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_default_prng_impl", "rbg")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_default_device", jax.devices("cpu")[1])
import jax.numpy as jnp, numpy as np, optax
from optax_dcasgd import parameter_server, simulation
driver, directory, data = os.getpid(), sys.argv[1], np.random.default_rng(0).normal(size=(50, 3))
grad_fn = jax.value_and_grad(lambda w, batch, key: jnp.sum((w - batch) ** 2))

def note(kind):
    if os.getpid() != driver:
        with open(f"{directory}/{kind}", "wb") as file:
            pickle.dump(jax.config.values, file)

def init(params):
    note("server")
    return optax.EmptyState()

def batches(i):
    if i == 1:
        note("worker")
    return data[i % 50]

tx = optax.chain(optax.GradientTransformation(init, lambda u, s, p: (u, s)), optax.sgd(0.1))
result = parameter_server.train(
    grad_fn, jnp.zeros(3), tx, batches, num_workers=2, num_updates=50, progress=False
)
assert result.params.dtype == jnp.float64
assert not result.events, result.events
replayed = simulation.run(grad_fn, jnp.zeros(3), tx, data, result.arrivals)
np.testing.assert_allclose(result.params, replayed.params, rtol=1e-13)
for kind in ("server", "worker"):
    values = pickle.load(open(f"{directory}/{kind}", "rb"))
    differ = {name for name, value in jax.config.values.items() if values[name] != value}
    assert differ == {"jax_cpu_enable_async_dispatch", "jax_default_device"}, differ
    assert values["jax_default_device"] == "cpu"
"""


def test_the_actors_have_the_settings_of_the_caller(tmp_path):
    """And compute in float64 where it does."""
    run_python(SETTINGS, tmp_path)


TREES = """
import dataclasses
import equinox as eqx
import flax.struct
import jax, jax.numpy as jnp, numpy as np, optax, ray
from optax_dcasgd import add_delay_compensation, parameter_server, simulation

@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    w: jax.Array
    power: int = dataclasses.field(metadata={"static": True})

@flax.struct.dataclass
class Struct:
    data: Data
    activation: object = flax.struct.field(pytree_node=False)

def check(params, apply, tx, data):
    def loss(params, batch, key):
        x = jax.random.normal(batch["key"], (8, 3))
        return jnp.mean((apply(params, x) - x.sum(-1)) ** 2)

    grad_fn = jax.value_and_grad(loss)
    result = parameter_server.train(
        grad_fn, params, tx, data, num_workers=2, num_updates=40, progress=False
    )
    assert not result.events, result.events
    replayed = simulation.run(grad_fn, params, tx, data, result.arrivals)
    trees = result.params, replayed.params, params
    for a, b, c in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert np.abs(a - c).max() > 1e-3
    assert jax.tree.structure(result.params) == jax.tree.structure(params)

keys = {"key": jax.random.split(jax.random.key(0), 40)}
sgd = optax.chain(add_delay_compensation(), optax.sgd(0.02))
ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)

params = Struct(Data(jnp.ones(3), 1), lambda x: x + 0.1)
check(params, lambda p, x: p.activation(x @ p.data.w**p.data.power), sgd, keys)

norm = eqx.nn.LayerNorm(3)
gru = eqx.nn.GRUCell(3, 3, key=jax.random.key(1))
params, static = eqx.partition((norm, gru), eqx.is_array)

def apply(params, x):
    norm, gru = eqx.combine(params, static)
    return jax.vmap(lambda row: gru(norm(row), row).sum())(x)

masked = optax.masked(sgd, jax.tree.map(lambda x: True, params))
check(params, apply, masked, keys)
ray.shutdown()
"""


def test_trees_of_any_node_type(tmp_path):
    """Those of the script itself, what their static fields compare by identity, keys as data."""
    script = tmp_path / "script.py"
    script.write_text(TREES)
    run_python(str(script), timeout=300)
