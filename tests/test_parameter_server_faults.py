"""The faults of a cluster, really made: what dies, what breaks, what is bad, what is full."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import optax
import parameter_server_cases as cases
import psutil
import pytest
from parameter_server_cases import PARAMS, X, grad_fn, padded, padded_grad_fn
from parameter_server_runs import (  # noqa: F401 (fixtures among them)
    actors,
    assert_each_batch_once,
    assert_replays,
    kinds,
    name_of,
    nothing_left_running,
    server_process,
    started_ray,
    train,
    wait_until,
)

from optax_dcasgd import parameter_server
from optax_dcasgd.parameter_server import _driver, _link

pytestmark = pytest.mark.ray


# Workers.


def test_workers_that_are_killed(tmp_path):
    indices = {20, 21, 60, 61, 62, 100, 140}
    # Long enough for Ray to notice the last one too.
    result = train(1200, batches=cases.Faulty(tmp_path, indices, cases.die))
    assert kinds(result)["worker lost"] == len(indices), result.events
    assert kinds(result)["worker back"] >= 3
    assert_each_batch_once(result)
    assert indices <= set(result.history.batch.tolist())
    assert_replays(result)


def all_workers_killed():
    """Once those of a run have been started, all of them, and so those that only wait too."""
    wait_until(server_process)
    time.sleep(6)
    for process in [p for p in actors() if "ray::Worker" in name_of(p)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # one of the run before
            process.kill()


@pytest.mark.parametrize("large", [False, True])
def test_workers_that_wait_are_killed_too(large):
    """With this bound, one computes at a time."""
    params, gradient = (padded(PARAMS), padded_grad_fn) if large else (PARAMS, grad_fn)
    thread = threading.Thread(target=all_workers_killed, daemon=True)
    thread.start()
    options = {"params": params, "grad_fn": gradient}
    result = train(500, batches=cases.Batches(0.02), max_staleness=0, **options)
    thread.join()
    assert {event.worker for event in result.events if event.kind == "worker lost"}
    assert set(result.history.worker[-100:].tolist()) == {0, 1, 2}
    assert_each_batch_once(result)
    assert_replays(result, **options)


def test_a_worker_whose_connection_breaks(tmp_path):
    result = train(1000, batches=cases.Faulty(tmp_path, {30, 60, 61}, cases.disconnect, 0.02))
    assert kinds(result) == {"worker lost": 3, "worker back": 3}, result.events
    assert_each_batch_once(result)
    assert {30, 60, 61} <= set(result.history.batch.tolist())
    assert_replays(result)


def test_workers_that_cannot_connect():
    message = r"No worker is left.*cannot reach the server at .*, port \d+: TimeoutError"
    with pytest.raises(RuntimeError, match=message):
        train(batches=cases.Unreachable())


@pytest.mark.parametrize("large", [False, True])
def test_a_batch_that_kills_every_worker_is_given_up(large):
    params, gradient = (padded(PARAMS), padded_grad_fn) if large else (PARAMS, grad_fn)
    options = {"params": params, "grad_fn": gradient}
    result = train(1000, batches=cases.Deadly(0.02, {20}), **options)
    assert kinds(result)["worker lost"] == 4, result.events
    (refused,) = (event for event in result.events if event.kind == "refused")
    assert refused.message == "4 workers were lost over batch 20"
    assert_each_batch_once(result, skipped={20})
    assert_replays(result, **options)


def test_strangers_who_connect_to_the_server(tmp_path):
    """One that is silent, one that makes noise, one with another key: training goes on."""
    connected, refused = [], []

    def intrude():
        wait_until((tmp_path / "fault-20").exists)
        for listening in server_process().net_connections("tcp"):
            if listening.status != psutil.CONN_LISTEN:
                continue
            silent = socket.create_connection(listening.laddr[:2], timeout=2)
            connected.append(silent)
            try:
                if b"#CHALLENGE#" not in silent.recv(100):
                    continue  # a port of Ray's
            except TimeoutError:
                continue
            noisy = socket.create_connection(listening.laddr[:2])
            connected.append(noisy)
            noisy.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with pytest.raises(ConnectionError):
                _link.connect(_link.Address(*listening.laddr[:2]), 0)
            refused.append(listening)

    thread = threading.Thread(target=intrude, daemon=True)
    thread.start()
    result = train(1200, batches=cases.Faulty(tmp_path, {20}, lambda batch: batch, pause=0.02))
    thread.join()
    for each in connected:
        each.close()
    assert len(refused) == 1
    assert not result.events
    assert_each_batch_once(result)
    assert_replays(result)


def test_workers_that_come_and_go(tmp_path):
    """Two at first, four when the new ones have come, one for a second, then three."""

    def resize():
        wait_until(lambda: list(tmp_path.iterdir()))
        parameter_server.resize("elastic", 4)
        wait_until(lambda: len(list(tmp_path.iterdir())) == 4)
        time.sleep(0.5)
        parameter_server.resize("elastic", 1)
        time.sleep(1.0)
        parameter_server.resize("elastic", 3)

    thread = threading.Thread(target=resize, daemon=True)
    thread.start()
    batches = cases.Signed(tmp_path, pause=0.02)
    result = train(2500, batches=batches, num_workers=2, name="elastic")
    thread.join(timeout=10)
    assert not thread.is_alive()
    last = {i: np.flatnonzero(result.history.worker == i)[-1] for i in range(4)}
    assert last[3] < 2450 < last[0]  # it left, and the first stayed
    assert not result.events
    assert_each_batch_once(result)
    assert_replays(result)


def test_resizing_what_is_not_there():
    with pytest.raises(ValueError, match="no run of the name 'nobody'"):
        parameter_server.resize("nobody", 3)


# Bad gradients.


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (cases.not_a_number, r"grads\['hidden'\]\['b'\] is not finite"),
        (cases.another_shape, r"grads\['out'\] is float32\[5, 3\], not float32\[8, 3\]"),
        (cases.fail, "LookupError: no such image"),
    ],
)
def test_bad_gradients_are_refused(fault, message, tmp_path):
    batches = cases.Faulty(tmp_path, {5, 30, 31}, fault)
    result = train(100, batches=batches, grad_fn=cases.sized_grad_fn)
    refused = [event for event in result.events if event.kind == "refused"]
    assert len(refused) == 3
    for event in refused:
        assert re.search(message, event.message)
        assert event.worker in (0, 1, 2)
    assert not {5, 30, 31} & set(result.history.batch.tolist())
    assert_each_batch_once(result, skipped={5, 30, 31})
    assert_replays(result)


def test_a_bad_large_gradient_is_refused(tmp_path):
    options = {"params": padded(PARAMS), "grad_fn": padded_grad_fn}
    result = train(60, batches=cases.Faulty(tmp_path, {20}, cases.not_a_number), **options)
    (event,) = result.events
    assert event.kind == "refused"
    assert "grads['model']['hidden']['b'] is not finite (batch 20)" in event.message
    assert_each_batch_once(result, skipped={20})
    assert_replays(result, **options)


def test_too_many_bad_gradients_stop_training(tmp_path):
    bad = cases.Faulty(tmp_path, {10, 20, 30, 40}, cases.not_a_number)
    checkpoints = tmp_path / "checkpoints"
    options = {"max_bad_pushes": 3, "checkpoint_dir": checkpoints}
    with pytest.raises(RuntimeError, match=r"4 gradients were refused.*not finite"):
        train(100, batches=bad, **options)
    (checkpoint,) = (int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
    assert 20 < checkpoint < 45
    result = train(100, batches=bad, **{**options, "max_bad_pushes": 4})
    assert_each_batch_once(result, skipped=bad.indices)
    assert_replays(result)


# Checkpoints.


def kill_server(until, times=1):
    """Kills the server's process, so many times, each after ``until()`` returned."""
    for _ in range(times):
        until()
        server_process().kill()


def test_a_server_that_is_killed_goes_on_from_its_checkpoint(tmp_path):
    seen = set()

    def until():
        seen.update(
            wait_until(lambda: {p.name for p in tmp_path.iterdir() if p.name.isdigit()} - seen)
        )
        time.sleep(0.3)

    thread = threading.Thread(target=kill_server, args=(until, 2), daemon=True)
    thread.start()
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 100}
    result = train(900, batches=cases.Batches(0.01), **options)
    thread.join()
    assert kinds(result)["server lost"] == 2
    resumed = [event for event in result.events if event.kind == "resumed"]
    assert len(resumed) == 2
    assert_each_batch_once(result)
    assert_replays(result)
    assert len(result.history.loss) == 900


def test_a_server_that_dies_before_its_last_checkpoint(tmp_path, monkeypatch):
    """The updates since the one before are done again."""
    save, killed = _driver.Driver._save, []

    def kill_and_save(driver):
        if not killed:
            killed.append(server_process())
            killed[0].kill()
        return save(driver)

    monkeypatch.setattr(_driver.Driver, "_save", kill_and_save)
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 100}
    result = train(250, batches=cases.Batches(0.005), **options)
    assert len(result.history.loss) == 250
    assert [event.kind for event in result.events] == ["server lost", "resumed"]
    assert_each_batch_once(result)
    assert_replays(result)
    assert (tmp_path / "250").is_dir()


def test_without_checkpoints_a_dead_server_is_an_error():
    def until():
        wait_until(server_process)
        time.sleep(3)

    thread = threading.Thread(target=kill_server, args=(until,), daemon=True)
    thread.start()
    with pytest.raises(RuntimeError, match=r"The server died .* without checkpoint_dir"):
        train(100_000, batches=cases.Batches(0.005))
    thread.join()


def test_resumed_by_default(tmp_path):
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 30}
    first = train(80, **options)
    result = train(200, **options)
    for column, whole in zip(first.history, result.history, strict=True):
        np.testing.assert_array_equal(column, whole[:80])
    assert [event.kind for event in result.events] == ["resumed"]
    assert_each_batch_once(result)
    assert_replays(result)
    again = train(200, **options)  # nothing is left to do
    jax.tree.map(np.testing.assert_array_equal, again.params, result.params)
    jax.tree.map(np.testing.assert_array_equal, again.state, result.state)

    with pytest.raises(ValueError, match="num_updates must be at least 200"):
        train(100, **options)
    with pytest.raises(ValueError, match="holds a run of 200 updates"):
        train(300, resume=False, **options)
    wider = {**PARAMS, "out": np.zeros((8, 4), np.float32)}
    with pytest.raises(ValueError, match=r"another model: .*\['out'\]: float32\[8, 3\] there"):
        train(300, params=wider, batches=(X, np.zeros((64, 16, 4), np.float32)), **options)
    with pytest.raises(ValueError, match="holds another model"):
        train(300, tx=optax.sgd(0.1), **options)
    with pytest.raises(ValueError, match="mode: async there and mode: sync here"):
        train(300, mode="sync", **options)


def test_a_directory_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"checkpoint_dir .*file/run cannot be written"):
        train(checkpoint_dir=tmp_path / "file" / "run")
    other = tmp_path / "other"
    (other / "7").mkdir(parents=True)
    with pytest.raises(ValueError, match="none of the parameter server's"):
        train(checkpoint_dir=other)


def test_a_full_disk_does_not_end_training(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        if mounted:
            options = {"checkpoint_dir": small, "checkpoint_every": 20}
            result = train(200, **options)
        else:  # who may not mount loses the directory instead
            thread = threading.Timer(6, lambda: (small.rename(tmp_path / "gone"), small.touch()))
            thread.start()
            result = train(
                1000, batches=cases.Batches(0.03), checkpoint_dir=small, checkpoint_every=20
            )
    finally:
        if mounted:
            subprocess.run(["umount", str(small)], check=True)
    assert kinds(result)["checkpoint failed"] > 0
    assert_replays(result)


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path.insert(0, {tests!r})
import parameter_server_cases as cases
from ray import cloudpickle
cloudpickle.register_pickle_by_value(cases)
from optax_dcasgd import parameter_server
print("started", flush=True)
parameter_server.train(
    cases.grad_fn, cases.PARAMS, cases.TX, cases.Batches(0.01), num_workers=2,
    num_updates=1_000_000, checkpoint_dir={directory!r}, checkpoint_every=50, progress=False,
)
"""


def test_an_interrupt_leaves_a_checkpoint_and_nothing_else(tmp_path):
    before = {p.pid for p in psutil.process_iter()}
    script = SCRIPT.format(tests=str(pathlib.Path(__file__).parent), directory=str(tmp_path))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**environment, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(
        lambda: (
            process.poll() is not None
            or any(p.name.isdigit() and int(p.name) >= 100 for p in tmp_path.iterdir())
        )
    )
    assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert "Interrupted; a checkpoint of" in errors
    written = int(errors.split("Interrupted; a checkpoint of ")[1].split()[0])
    assert (tmp_path / str(written)).is_dir()

    def strays():
        return [
            p
            for p in psutil.process_iter(["name", "cmdline"])
            if p.pid not in before and "ray" in " ".join(p.info["cmdline"] or [p.info["name"]])
        ]

    wait_until(lambda: not strays())


# Clusters.


def test_a_node_that_disappears_costs_its_workers_only(tmp_path):
    script = CLUSTER_SCRIPT.format(
        tests=str(pathlib.Path(__file__).parent), directory=str(tmp_path)
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "as it should" in done.stdout


CLUSTER_SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import pathlib, threading, time
import parameter_server_cases as cases
from ray import cloudpickle
cloudpickle.register_pickle_by_value(cases)
import ray
from ray.cluster_utils import Cluster
from optax_dcasgd import parameter_server

batches = cases.Faulty({directory!r}, {{400}}, lambda batch: batch, pause=0.03)  # only a sign

def remove(node):
    while not pathlib.Path({directory!r}, "fault-400").exists():
        time.sleep(0.1)
    cluster.remove_node(node, allow_graceful=False)

cluster = Cluster(
    initialize_head=True, head_node_args={{"num_cpus": 2, "include_dashboard": False}}
)
try:
    nodes = [cluster.add_node(num_cpus=2, resources={{"side": 2}}) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    removed = threading.Thread(target=remove, args=(nodes[1],), daemon=True)
    removed.start()
    result = parameter_server.train(
        cases.grad_fn, cases.PARAMS, cases.TX, batches, num_workers=4, num_updates=1500,
        progress=False, worker_options={{"resources": {{"side": 1}}}},
    )
    removed.join()
    lost = {{event.worker for event in result.events if event.kind == "worker lost"}}
    assert len(lost) == 2, result.events
    last = {{i: (result.history.worker == i).nonzero()[0][-1] for i in range(4)}}
    assert all((last[i] > 1450) == (i not in lost) for i in last), last
    used = result.history.batch.tolist()
    assert len(set(used)) == len(used) == 1500
    print("as it should")
finally:
    ray.shutdown()
    cluster.shutdown()
"""
