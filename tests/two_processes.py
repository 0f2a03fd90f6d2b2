"""Run by test_processes.py, once for each process: trains on a mesh over all of them.

    two_processes.py NUM_PROCESSES PROCESS_ID PORT FOLDER

It checks in place what a process can check by itself, and leaves its parameters in FOLDER.
"""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_dcasgd as dc

DEVICES, UPDATES, RESUME_AT, BATCH = 8, 6, 3, 16
SHAPES = {"bias": (8,), "kernel": (4, 8), "scale": ()}
SPECS = {"bias": P("y"), "kernel": P("x", "y"), "scale": P()}
OVERLAPPED = dc.OverlapReductionState(count=P(), grads=P("x"), inner_state=P())
SHARDED = {  # optimizers of parameters that are split over both axes of the mesh
    "dcasgd": dc.dcasgd(0.02, 0.9, 0.5, decay=0.9),
    "delay": dc.delay_gradients(
        dc.dcasgd(0.02, 0.9, 0.5, store=None), {"bias": 0, "kernel": 2, "scale": 1}
    ),
}


def start():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=s).astype(np.float32) for name, s in SHAPES.items()}


def batch(t):
    rng = np.random.default_rng(100 + t)
    return rng.normal(size=(BATCH, 4)).astype(np.float32)


def loss(params, x):
    hidden = jnp.tanh(x @ params["kernel"] + params["bias"])
    return jnp.mean(jnp.sum((params["scale"] * hidden - 0.5) ** 2, axis=-1))


def mesh_of(*shape):
    axis_types = (AxisType.Auto,) * 2
    return jax.make_mesh(shape, ("x", "y"), axis_types)


def place(tree, specs, mesh):
    """Arrays over all processes, each of which has the whole value."""

    def leaf(x, spec):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])

    return jax.tree.map(leaf, tree, specs)


def train_step(tx, params, state, x):
    updates, state = tx.update(jax.grad(loss)(params, x), state, params)
    return optax.apply_updates(params, updates), state


def train_sharded(tx, mesh, params, state, updates):
    """Partitioned automatically: the batch over x, the parameters over both axes."""
    step = jax.jit(functools.partial(train_step, tx), donate_argnums=(0, 1))
    for t in updates:
        x = place(batch(t), P("x"), mesh)
        # One step at a time, as virtual devices share their threads.
        params, state = jax.block_until_ready(step(params, state, x))
    return params, state


def train_overlapped(mesh):
    """Replicated parameters, and the mean of the gradients one update late."""
    tx = dc.overlap_reduction(dc.dcasgd(0.02, 0.9, 0.5, store="updates"), "x")

    def step(params, state, x):
        grads = jax.grad(loss)(jax.lax.pcast(params, "x", to="varying"), x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    shard_map = functools.partial(jax.shard_map, mesh=mesh)
    init = jax.jit(shard_map(tx.init, in_specs=P(), out_specs=OVERLAPPED))
    step = jax.jit(shard_map(step, in_specs=(P(), OVERLAPPED, P("x")), out_specs=(P(), OVERLAPPED)))
    params = place(start(), dict.fromkeys(SHAPES, P()), mesh)
    state = init(params)
    for t in range(UPDATES):
        x = place(batch(t), P("x"), mesh)
        params, state = jax.block_until_ready(step(params, state, x))
    return params


def assert_sharded_like_params(state, mesh):
    """Every leaf that belongs to a parameter, so that no process keeps more than its share."""
    found = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        if names:
            in_front = leaf.ndim - len(SHAPES[names[-1]])
            wanted = NamedSharding(mesh, P(*[None] * in_front, *SPECS[names[-1]]))
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (path, leaf.sharding)
            found.add(names[-1])
    assert found == set(SHAPES)


def main(num_processes, process_id, port, folder):
    folder = pathlib.Path(folder)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES // num_processes)
    if num_processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"localhost:{port}", num_processes, process_id, initialization_timeout=60
        )
    assert jax.device_count() == DEVICES
    assert jax.local_device_count() == DEVICES // num_processes
    results = {"overlapped": train_overlapped(mesh_of(8, 1))}
    for name, tx in SHARDED.items():
        mesh, other = mesh_of(4, 2), mesh_of(2, 4)
        params = place(start(), SPECS, mesh)
        state = jax.jit(tx.init)(params)
        assert_sharded_like_params(state, mesh)
        params, state = train_sharded(tx, mesh, params, state, range(RESUME_AT))
        assert_sharded_like_params(state, mesh)

        # Every process writes its shards, and reads those that it has on the other mesh.
        path = folder / f"{name}-of-{num_processes}"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, {"params": params, "state": state})
            checkpointer.wait_until_finished()
            new_params = place(start(), SPECS, other)
            target = {"params": new_params, "state": jax.jit(tx.init)(new_params)}
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
            resumed = checkpointer.restore(path, target)
        assert_sharded_like_params(resumed["state"], other)
        results[f"{name} resumed"], _ = train_sharded(
            tx, other, resumed["params"], resumed["state"], range(RESUME_AT, UPDATES)
        )
        results[name], _ = train_sharded(tx, mesh, params, state, range(RESUME_AT, UPDATES))

    def whole(x):
        replicated = NamedSharding(x.sharding.mesh, P())
        return np.asarray(jax.jit(jnp.copy, out_shardings=replicated)(x).addressable_data(0))

    gathered = {
        f"{name}/{leaf}": whole(x) for name, params in results.items() for leaf, x in params.items()
    }
    np.savez(folder / f"{num_processes}-{process_id}.npz", **gathered)
    if num_processes > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
