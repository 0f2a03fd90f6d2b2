"""What gets to the actors: trees of any node types, JAX's settings; without Ray."""

import collections
import dataclasses
import pickle

import equinox as eqx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ray import cloudpickle

from optax_dcasgd.parameter_server import _settings, _travel
from optax_dcasgd.parameter_server._transport import Layout


class Scaled(eqx.Module):
    w: jax.Array
    activation: object = eqx.field(static=True)
    name: str = eqx.field(static=True, default="scaled")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    w: jax.Array
    size: int = dataclasses.field(metadata={"static": True})


@flax.struct.dataclass
class Struct:
    w: jax.Array
    inner: dict
    size: int = flax.struct.field(pytree_node=False, default=3)


@jax.tree_util.register_pytree_node_class
class Own:
    def __init__(self, w):
        self.w = w

    def tree_flatten(self):
        return (self.w,), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


TREES = {
    "Equinox, static lambda": Scaled(np.ones(2), lambda x: x + 1),
    "Equinox, static custom_jvp": [Scaled(np.ones(2), jax.nn.relu), eqx.nn.LayerNorm(2)],
    "flax.struct": Struct(np.ones(2), {"b": np.zeros(1)}),
    "dataclass": {"a": Data(np.ones(2), 5)},
    "nnx.State": nnx.state(nnx.Linear(1, 2, rngs=nnx.Rngs(0)), nnx.Param),
    "own": Own(np.ones(2)),
    "None": {"a": None, "b": (np.ones(2), collections.OrderedDict(c=np.ones(1)))},
}


@pytest.mark.parametrize("name", TREES)
def test_what_is_sent_together_fits_together(name):
    """Structures that were equal are, where they arrive: as `tx`, `grad_fn` and params need it."""
    tree = jax.tree.map(np.asarray, TREES[name])
    mask = jax.tree.map(jnp.isfinite, tree)  # as an optimizer may hold one
    parcel = _travel.Parcel({"params": tree}, (Layout(tree), tree, Layout(tree), lambda: mask))
    layout, params, other, mask = pickle.loads(cloudpickle.dumps(parcel))
    assert layout.difference("x", params) is None
    assert layout.treedef == other.treedef == jax.tree.structure(mask())
    leaves = jax.tree.leaves(params)
    np.testing.assert_equal(leaves, jax.tree.leaves(tree))
    again = layout.treedef.unflatten(leaves)
    assert type(again) is type(tree)


def in_main(cls, monkeypatch):
    monkeypatch.setattr(cls, "__module__", "__main__")


@pytest.mark.parametrize("tree", [Own(np.ones(2)), TREES["Equinox, static lambda"]])
def test_what_cannot_travel_is_refused(tree, monkeypatch):
    name = type(tree).__name__
    in_main(type(tree), monkeypatch)
    with pytest.raises(
        TypeError, match=f"batches has a node .* {name}, .*Put class {name} in a mod"
    ):
        _travel.Parcel({"params": np.ones(2), "batches": [(tree,)]}, ())


def test_a_dataclass_of_the_script_is_made_known(monkeypatch):
    """As it is where it arrives: with nothing on JAX's list of node types."""
    in_main(Struct, monkeypatch)
    parcel = _travel.Parcel({"params": [TREES["flax.struct"]]}, ())
    ((cls, names),) = parcel.dataclasses
    assert (cls, names) == (Struct, ("w", "inner"))
    arrived = dataclasses.make_dataclass("Struct", ["w", "inner", "size"], frozen=True)
    _travel._register([(arrived, names)] * 2)  # the second time it is known
    node = arrived(np.ones(2), {"b": np.zeros(1)}, 3)
    leaves, treedef = jax.tree.flatten(node)
    assert len(leaves) == 2
    assert treedef == jax.tree.structure(arrived(0, {"b": 0}, 3))
    assert treedef != jax.tree.structure(arrived(0, {"b": 0}, 4))
    doubled = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree))(node)
    assert (type(doubled), doubled.size, doubled.w[0]) == (arrived, 3, 2)
    assert [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(node)] == [
        *(".w", ".inner['b']"),
    ]


def test_a_type_that_is_not_known_where_it_arrives_is_named():
    class Unknown:
        pass

    with pytest.raises(TypeError, match=r"Unknown is not known to JAX as a type of nodes"):
        _travel.to_treedef([0, Unknown()])


# Settings.

CHANGES_NUMBERS = [
    "jax_accurate_erf_inv",
    "jax_allow_f16_reductions",
    "jax_default_device",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_x64",
    "jax_high_dynamic_range_gumbel",
    "jax_num_cpu_devices",
    "jax_numpy_dtype_promotion",
    "jax_optimization_level",
    "jax_platform_name",
    "jax_platforms",
    "jax_random_seed_offset",
    "jax_softmax_custom_jvp",
    "jax_threefry_partitionable",
    "jax_use_hlo_logistic_lowering",
]


def test_settings_of_the_caller():
    with jax.default_matmul_precision("highest"), jax.default_device(jax.devices("cpu")[0]):
        values = _settings.of_caller({"JAX_ENABLE_X64": "0"})
    assert values["jax_default_matmul_precision"] == "highest"
    assert values["jax_default_device"] == "cpu"  # a device of another process is none
    assert values["jax_cpu_enable_async_dispatch"] is False
    assert "jax_enable_x64" not in values  # the user has set it for the actor
    assert not [name for name in values if "guard" in name or "cache" in name]
    assert not [name for name in CHANGES_NUMBERS if _settings._LOCAL.search(name)]
    assert pickle.loads(pickle.dumps(values)) == values
    before = dict(jax.config.values)
    _settings.apply({**_settings.of_caller({}), "jax_of_another_release": 1})
    after = jax.config.values
    assert {name for name in before if before[name] != after[name]} <= {
        "jax_cpu_enable_async_dispatch"
    }
    jax.config.update("jax_cpu_enable_async_dispatch", before["jax_cpu_enable_async_dispatch"])
