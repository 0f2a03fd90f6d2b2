"""`parameter_server.train` with Ray, and the faults of a cluster, really made."""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parameter_server_cases as cases
import psutil
import pytest
import ray
from parameter_server_cases import PARAMS, TX, X, Y, grad_fn, padded, padded_grad_fn

from optax_dcasgd import add_delay_compensation, parameter_server, simulation
from optax_dcasgd.parameter_server import _link

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def started_ray():
    ray.cloudpickle.register_pickle_by_value(cases)  # the workers cannot import it
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def actors():
    """The processes, started from here, of Ray's actors and of those that may become one."""
    return [p for p in psutil.Process().children(recursive=True) if "ray::" in name_of(p)]


def name_of(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


@pytest.fixture(autouse=True)
def nothing_left_running():
    before = {p.pid for p in actors()}
    yield
    deadline = time.monotonic() + 20
    while left := [p for p in actors() if p.pid not in before and "IDLE" not in name_of(p)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def server_process():
    return next((p for p in actors() if "ray::Server" in name_of(p)), None)


def train(num_updates=100, tx=TX, batches=(X, Y), grad_fn=grad_fn, params=PARAMS, **options):
    options = {"num_workers": 3, "progress": False, "compensation_every": None, **options}
    return parameter_server.train(grad_fn, params, tx, batches, num_updates=num_updates, **options)


def assert_replays(result, tx=TX, batches=(X, Y), grad_fn=grad_fn, params=PARAMS, rtol=1e-6):
    """In one process, the same order trains to the same parameters."""
    replayed = simulation.run(grad_fn, params, tx, batches, result.arrivals)
    for got, want in zip(
        jax.tree.leaves(result.params), jax.tree.leaves(replayed.params), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(want).max())
    np.testing.assert_allclose(result.history.loss, replayed.history.loss, 1e-4)


def assert_each_batch_once(result, skipped=()):
    """Nothing was applied twice, and nothing was lost for good."""
    used = collections.Counter(result.history.batch.tolist())
    assert max(used.values()) == 1
    wanted = [i for i in range(max(used)) if i not in skipped]
    assert len(set(wanted) - set(used)) <= 4  # what was still under way at the end


def kinds(result):
    return collections.Counter(event.kind for event in result.events)


# What is trained.


def test_a_recorded_run_is_replayed_from_its_file(tmp_path):
    slow = cases.Batches(0.001, str(tmp_path / "slow"))
    result = train(400, batches=slow, num_workers=4, compensation_every=7)
    history = result.history
    assert history.staleness.max() > 3
    assert len(set(history.staleness.tolist())) > 3
    np.testing.assert_array_equal(history.version, np.arange(400) - history.staleness)
    assert np.all(np.diff(history.time) >= 0)
    assert set(history.worker.tolist()) == {0, 1, 2, 3}
    assert_each_batch_once(result)
    assert list(np.flatnonzero(np.isfinite(history.compensation))) == list(range(0, 400, 7))
    assert 0 < np.nanmax(history.compensation) <= 1  # by its clip
    assert not result.events

    result.arrivals.save(tmp_path / "arrivals")
    loaded = simulation.Arrivals.load(tmp_path / "arrivals")
    assert_replays(result._replace(arrivals=loaded))
    fresh = dataclasses.replace(loaded, staleness=np.zeros(400, int))
    in_order = simulation.run(grad_fn, PARAMS, TX, (X, Y), fresh)
    assert abs(in_order.params["out"] - result.params["out"]).max() > 1e-4  # it does matter


def test_the_slow_worker_is_reported(tmp_path, caplog):
    result = train(500, batches=cases.Batches(0.004, str(tmp_path / "slow")))
    slow = int(np.bincount(result.history.worker).argmin())
    (straggler,) = result.stragglers()
    assert straggler.worker == slow
    assert straggler.ratio > 5
    assert f"worker {slow} takes" in caplog.text


def test_large_parameters_go_through_the_object_store():
    """And are the same, to the bit, as in a message."""
    params = padded(PARAMS)
    result = train(100, params=params, grad_fn=padded_grad_fn, num_workers=2)
    assert_replays(result, params=params, grad_fn=padded_grad_fn)


def test_one_worker_is_sequential_training():
    result = train(60, num_workers=1)
    assert not result.history.staleness.any()
    assert result.history.batch.tolist() == list(range(60))
    plain = optax.sgd(0.02, momentum=0.9)
    params, state = PARAMS, plain.init(PARAMS)
    for i in range(60):
        _, grads = grad_fn(params, (X[i % 64], Y[i % 64]), None)
        updates, state = plain.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), result.params, params)


def test_sync_is_the_simulations_sync():
    result = train(40, mode="sync", tx=optax.sgd(0.1), num_workers=3)
    assert result.arrivals is None
    arrivals = simulation.arrivals(jax.random.key(0), 3, 120)
    want = simulation.run(
        grad_fn, PARAMS, optax.sgd(0.1),
        lambda t: (jnp.array(X)[t % 64], jnp.array(Y)[t % 64]), arrivals, mode="sync",
    )  # fmt: skip
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), result.params, want.params
    )
    assert result.history.batch.tolist() == list(range(0, 120, 3))


def test_narrow_transport_rounds_the_gradient():
    def rounded_grad_fn(params, batch, key):
        value, grads = grad_fn(params, batch, key)
        return value, jax.tree.map(
            lambda g: jax.lax.reduce_precision(g, exponent_bits=8, mantissa_bits=7), grads
        )

    result = train(60, transport_dtype=jnp.bfloat16)

    def distance(grad_fn):
        replayed = simulation.run(grad_fn, PARAMS, TX, (X, Y), result.arrivals)
        return optax.tree.norm(optax.tree.sub(replayed.params, result.params))

    # Not to the bit: what is off by a rounding may be rounded to another bfloat16.
    assert distance(rounded_grad_fn) < 0.5 * distance(grad_fn)


def test_an_optimizer_with_a_random_key_in_its_state(tmp_path):
    tx = optax.chain(optax.add_noise(0.01, 0.5, jax.random.key(3)), optax.sgd(0.05))
    result = train(30, tx=tx, checkpoint_dir=tmp_path, checkpoint_every=10)
    assert_replays(result, tx=tx)
    result = train(60, tx=tx, checkpoint_dir=tmp_path, checkpoint_every=10)
    assert_replays(result, tx=tx)


# Bounded staleness.


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_fast_workers_wait(max_staleness, tmp_path):
    slow = cases.Batches(0.002, str(tmp_path / "slow"))
    result = train(150, batches=slow, max_staleness=max_staleness)
    assert result.history.staleness.max() == max_staleness
    assert not result.events
    assert_each_batch_once(result)
    assert_replays(result)


def test_stale_gradients_are_dropped_and_their_batches_kept(tmp_path):
    slow = cases.Batches(0.002, str(tmp_path / "slow"))
    result = train(150, batches=slow, max_staleness=3, on_stale="drop")
    assert result.history.staleness.max() <= 3
    assert kinds(result)["dropped"] > 0
    assert_each_batch_once(result)
    assert_replays(result)


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
    while server_process() is None:
        time.sleep(0.05)
    time.sleep(6)
    for process in [p for p in actors() if "ray::Worker" in name_of(p)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # one of the run before
            process.kill()


@pytest.mark.parametrize("large", [False, True])
def test_workers_that_wait_are_killed_too(large):
    """With this bound, one computes at a time."""
    params, gradient = (padded(PARAMS), padded_grad_fn) if large else (PARAMS, grad_fn)
    thread = threading.Thread(target=all_workers_killed)
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
    assert_replays(result)


def test_workers_that_cannot_connect():
    message = r"No worker is left.*cannot reach the server at .*, port \d+: TimeoutError"
    with pytest.raises(RuntimeError, match=message):
        train(batches=cases.Unreachable())


def test_strangers_who_connect_to_the_server(tmp_path):
    """One that is silent, one that makes noise, one with another key: training goes on."""
    connected, refused = [], []

    def intrude():
        while not (tmp_path / "fault-20").exists():
            time.sleep(0.05)
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

    thread = threading.Thread(target=intrude)
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
        while not list(tmp_path.iterdir()):
            time.sleep(0.05)
        parameter_server.resize("elastic", 4)
        while len(list(tmp_path.iterdir())) < 4:
            time.sleep(0.05)
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
        while not (new := {p.name for p in tmp_path.iterdir() if p.name.isdigit()} - seen):
            time.sleep(0.05)
        seen.update(new)
        time.sleep(0.3)

    thread = threading.Thread(target=kill_server, args=(until, 2))
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


def test_without_checkpoints_a_dead_server_is_an_error():
    def until():
        while server_process() is None:
            time.sleep(0.05)
        time.sleep(3)

    thread = threading.Thread(target=kill_server, args=(until,))
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
import sys
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
    deadline = time.monotonic() + 90
    while not any(p.name.isdigit() and int(p.name) >= 100 for p in tmp_path.iterdir()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
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

    while strays():
        assert time.monotonic() < deadline + 30, strays()
        time.sleep(0.2)


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
    removed = threading.Thread(target=remove, args=(nodes[1],))
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


# What is passed.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_workers": 0}, ValueError, "num_workers must be at least 1"),
        ({"num_workers": 2.0}, TypeError, "num_workers must be a Python integer"),
        ({"num_updates": 0}, ValueError, "num_updates must be at least 1"),
        ({"mode": "eager"}, ValueError, "mode must be one of 'async', 'sync'"),
        ({"on_stale": "ignore"}, ValueError, "on_stale must be one of 'wait', 'drop'"),
        ({"max_staleness": -1}, ValueError, "max_staleness must be at least 0"),
        ({"max_staleness": 1, "mode": "sync"}, ValueError, "max_staleness has no meaning"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1"),
        ({"max_bad_pushes": -1}, ValueError, "max_bad_pushes must be at least 0"),
        ({"compensation_every": 0}, ValueError, "compensation_every must be at least 1"),
        ({"transport_dtype": jnp.int8}, TypeError, "transport_dtype must be a floating-point"),
        ({"key": 3}, TypeError, "key must be one JAX random key"),
        ({"grad_fn": 3}, TypeError, "grad_fn must be a function"),
        ({"tx": 3}, TypeError, "tx must be an optax.GradientTransformation"),
        ({"batches": (X, Y[:5])}, ValueError, r"batches\[1\] has shape \(5, 16, 3\)"),
        ({"grad_fn": lambda p, b, k: p}, TypeError, r"grad_fn must return \(loss, grads\)"),
        ({"grad_fn": lambda p, b, k: (jnp.zeros(()), p["out"])}, ValueError, "grads"),
        ({"address": "auto"}, ValueError, "address has no effect: Ray is initialised already"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        train(**options)


def test_compensation_of_plain_sgd_is_that_of_the_gradient():
    """By the formula: λ g ⊙ g ⊙ (w − w_s), over g."""
    lamda, rate = 3.0, 0.3
    tx = optax.chain(add_delay_compensation(lamda, store=None), optax.sgd(rate))
    result = train(40, tx=tx, compensation_every=1)
    versions, history = [PARAMS], result.history
    for t in range(40):
        stale, batch = versions[history.version[t]], history.batch[t] % 64
        _, grads = grad_fn(stale, (X[batch], Y[batch]), None)
        added = jax.tree.map(lambda g, w, s: lamda * g * g * (w - s), grads, versions[-1], stale)
        ratio = optax.tree.norm(added) / optax.tree.norm(grads)
        np.testing.assert_allclose(history.compensation[t], ratio, 1e-3, 1e-5)
        versions.append(
            jax.tree.map(lambda w, g, c: w - rate * (g + c), versions[-1], grads, added)
        )


# The example.


def test_the_example(tmp_path):
    example = pathlib.Path(__file__).parents[1] / "examples" / "ray_parameter_server.py"
    options = ["--gradients", "120", "--compute-time", "0.005", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(example), *options],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p.name for p in tmp_path.iterdir()} == {
        *("asgd.npz", "dc-asgd.npz", "results.json", "staleness.png"),
    }
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows["SSGD"]["updates"] == 30
    assert rows["SSGD"]["largest staleness"] == 0 < rows["ASGD"]["largest staleness"]
    for method in ("SSGD", "ASGD", "DC-ASGD"):
        assert re.search(rf"^{method} +[\d.]+%", done.stdout, re.MULTILINE)
    arrivals = simulation.Arrivals.load(tmp_path / "asgd.npz")
    assert len(arrivals.worker) == 120
