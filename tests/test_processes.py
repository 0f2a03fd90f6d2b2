"""Two processes that train together, against one process and one device.

What each process does, and checks by itself, is in `two_processes.py`.
"""

import functools
import os
import pathlib
import socket
import subprocess
import sys

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import reference
import two_processes
from jax.sharding import NamedSharding

TESTS = pathlib.Path(__file__).parent
SECONDS = 240


def launch(num_processes, folder):
    """Runs them to their end; whatever happens, none is left behind."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = dict(os.environ)
    env.pop("XLA_FLAGS", None)  # the virtual devices of conftest.py
    env["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), env.get("PYTHONPATH", "")])
    script = str(TESTS / "two_processes.py")
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", script, *map(str, (num_processes, i, port, folder))],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(num_processes)
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * num_processes, outputs
    return [dict(np.load(folder / f"{num_processes}-{i}.npz")) for i in range(num_processes)]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def two(folder):
    return launch(2, folder)


def on_one_device(name, num_updates=two_processes.UPDATES):
    """The parameters and the state after a plain loop on one device."""
    tx, step = two_processes.SHARDED[name], jax.jit(two_processes.train_step, static_argnums=0)
    params = two_processes.start()
    state = tx.init(params)
    for t in range(num_updates):
        params, state = step(tx, params, state, two_processes.batch(t))
    return params, state


assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


def of(results, name):
    return {leaf: results[f"{name}/{leaf}"] for leaf in two_processes.SHAPES}


def test_both_processes_end_with_the_same_parameters(two):
    chex.assert_trees_all_equal(*two)


@pytest.mark.parametrize("name", two_processes.SHARDED)
def test_sharded_training_is_that_of_one_device(two, name):
    expected, _ = on_one_device(name)
    assert_close(of(two[0], name), expected)
    assert np.max(np.abs(expected["kernel"] - two_processes.start()["kernel"])) > 0.05


@pytest.mark.parametrize("name", two_processes.SHARDED)
def test_both_resume_on_a_mesh_of_another_shape(two, name):
    assert_close(of(two[0], f"{name} resumed"), of(two[0], name))


@pytest.mark.parametrize("name", two_processes.SHARDED)
def test_one_process_reads_what_two_have_written(two, folder, name):
    params, state = on_one_device(name, two_processes.RESUME_AT)
    mesh, specs = two_processes.mesh_of(1, 8), two_processes.SPECS
    placed = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in params.items()}
    target = {"params": placed, "state": jax.jit(two_processes.SHARDED[name].init)(placed)}
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            folder / f"{name}-of-2", jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        )
    two_processes.assert_sharded_like_params(restored["state"], mesh)
    assert jax.tree.structure(restored["state"]) == jax.tree.structure(state)
    assert_close(restored, {"params": params, "state": state})


def test_overlapped_training_is_a_loop_that_is_one_update_late(two):
    def grads(params, t):
        with jax.enable_x64(True):
            return jax.jit(jax.grad(two_processes.loss))(params, two_processes.batch(t))

    expected = reference.one_update_old(
        grads, two_processes.start(), two_processes.UPDATES - 1, lr=0.02, momentum=0.9, lamda=0.5
    )
    assert_close(of(two[0], "overlapped"), expected[-1])
