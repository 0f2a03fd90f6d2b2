"""The faults of workers, nodes and gradients, really made: what dies, what is bad, what leaves."""

import contextlib
import pathlib
import re
import time

import numpy as np
import parameter_server_cases as cases
import psutil
import pytest
from parameter_server_runs import (
    BOTH_SIZES,
    LARGE,
    ON_RAY,
    assert_sound,
    kinds,
    meanwhile,
    processes_of,
    run_python,
    train,
    wait_for_server,
    wait_until,
)

from optax_dcasgd import parameter_server
from optax_dcasgd.parameter_server import _driver

pytestmark = ON_RAY


def refusals(result):
    return [event for event in result.events if event.kind == "refused"]


# Workers.


@BOTH_SIZES
def test_workers_that_are_killed(model, tmp_path):
    indices = {20, 21, 60, 61, 62, 100, 140}
    # Long enough for Ray to notice the last one too.
    result = train(1200, batches=cases.Faulty(tmp_path, indices, cases.die), **model)
    lost = [event.message for event in result.events if event.kind == "worker lost"]
    assert len(lost) == len(indices), result.events
    assert all(re.search(r"^\w+: [^\n]*it (was killed|died) [^\n]*$", line) for line in lost), lost
    assert kinds(result)["worker back"] >= 3
    assert indices <= set(result.history.batch.tolist())
    assert_sound(result, **model)


@BOTH_SIZES
def test_workers_that_wait_are_killed_too(model):
    """With this bound, one computes at a time."""

    def kill_all():
        wait_for_server()
        time.sleep(6)
        for process in processes_of("Worker"):
            with contextlib.suppress(psutil.NoSuchProcess):  # one of the run before
                process.kill()

    with meanwhile(kill_all):
        result = train(500, batches=cases.Batches(0.02), max_staleness=0, **model)
    assert {event.worker for event in result.events if event.kind == "worker lost"}
    assert set(result.history.worker[-100:].tolist()) == {0, 1, 2}
    assert_sound(result, **model)


def test_workers_that_cannot_be_started():
    line = "No worker is left; the last one: ModuleNotFoundError: no module named as my data set"
    with pytest.raises(RuntimeError, match=f"^{line}$"):
        train(batches=cases.Unloadable())


def test_workers_that_nobody_has_room_for(monkeypatch, caplog):
    """While another one pushes."""
    monkeypatch.setattr(_driver, "_PATIENCE", 2.0)
    options = {"worker_options": {"num_cpus": 5}, "num_workers": 3}
    result = train(800, batches=cases.Batches(0.01), **options)
    before, *waiting = (event.message for event in result.events)
    assert "1 of 3 workers fit the cluster at a time" in before
    assert len(result.workers) == 1
    late = [m for m in waiting if re.match(r"workers \[.*\] have not .* each asks for 5 CPU; ", m)]
    mentioned = {int(i) for m in late for i in re.findall(r"\d+", m.partition("]")[0])}
    assert {0, 1, 2} - set(result.workers) <= mentioned
    assert "1 of 3 workers took part" in caplog.text


def test_a_server_that_nobody_has_room_for(monkeypatch):
    """It is said; here, that ends the run."""

    def note(driver, kind, message):
        raise InterruptedError(f"{kind}: {message}")

    monkeypatch.setattr(_driver, "_PATIENCE", 1.0)
    monkeypatch.setattr(_driver.Driver, "_note", note)
    with pytest.raises(InterruptedError, match=r"waiting: the server has not .* 1 CPU, 1 nobody;"):
        train(server_options={"resources": {"nobody": 1}})


@BOTH_SIZES
def test_a_batch_that_kills_every_worker_is_given_up(model):
    result = train(1000, batches=cases.Deadly(0.02, {20}), **model)
    assert kinds(result)["worker lost"] == 4, result.events
    (refused,) = refusals(result)
    assert refused.message == "4 workers were lost over batch 20"
    assert_sound(result, skipped={20}, **model)


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

    with meanwhile(resize):
        batches = cases.Signed(tmp_path, pause=0.02)
        result = train(2500, batches=batches, num_workers=2, name="elastic")
    last = {i: np.flatnonzero(result.history.worker == i)[-1] for i in range(4)}
    assert last[3] < 2450 < last[0]  # it left, and the first stayed
    assert not result.events
    assert_sound(result)


def test_a_worker_that_could_not_be_started_is_tried_again(tmp_path):
    """By a wish for the number that there should be already."""
    signs = tmp_path / "signs"
    signs.mkdir()

    def wish():
        wait_until(lambda: len(list(signs.iterdir())) == 2)
        wait_until((tmp_path / "signs-failed").exists)
        time.sleep(3)
        parameter_server.resize("again", 3)
        wait_until(lambda: len(list(signs.iterdir())) == 3)

    with meanwhile(wish):
        result = train(2000, batches=cases.UnloadableOnce(signs, pause=0.02), name="again")
    assert kinds(result) == {"worker gone": 1}
    assert set(result.history.worker[-100:].tolist()) == {0, 1, 2}
    assert_sound(result)


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
    refused = refusals(result)
    assert len(refused) == 3
    for event in refused:
        assert re.search(message, event.message)
        assert event.worker in (0, 1, 2)
    assert_sound(result, skipped={5, 30, 31})


def test_a_bad_large_gradient_is_refused(tmp_path):
    result = train(60, batches=cases.Faulty(tmp_path, {20}, cases.not_a_number), **LARGE)
    (event,) = result.events
    assert event.kind == "refused"
    assert "grads['model']['hidden']['b'] is not finite (batch 20)" in event.message
    assert_sound(result, skipped={20}, **LARGE)


def test_too_many_bad_gradients_stop_training(tmp_path):
    bad = cases.Faulty(tmp_path, {10, 20, 30, 40}, cases.not_a_number)
    checkpoints = tmp_path / "checkpoints"
    options = {"max_bad_pushes": 3, "checkpoint_dir": checkpoints}
    with pytest.raises(RuntimeError, match=r"4 gradients were refused.*not finite"):
        train(100, batches=bad, **options)
    (checkpoint,) = (int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
    assert 20 < checkpoint < 45
    result = train(100, batches=bad, **{**options, "max_bad_pushes": 4})
    assert_sound(result, skipped=bad.indices)


# Clusters.

CLUSTER = """
import sys
sys.path.insert(0, sys.argv[1])
import pathlib, threading, time
import parameter_server_cases as cases
from ray import cloudpickle
cloudpickle.register_pickle_by_value(cases)
import ray
from ray.cluster_utils import Cluster
from optax_dcasgd import parameter_server
from optax_dcasgd.parameter_server import _driver

directory = sys.argv[2]
batches = cases.Faulty(directory, {400}, lambda batch: batch, pause=0.03)  # only a sign

def remove(node):
    while not pathlib.Path(directory, "fault-400").exists():
        time.sleep(0.1)
    cluster.remove_node(node, allow_graceful=False)

cluster = Cluster(
    initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
)
try:
    nodes = [cluster.add_node(num_cpus=2, resources={"side": 2}) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    removed = threading.Thread(target=remove, args=(nodes[1],), daemon=True)
    removed.start()
    result = parameter_server.train(
        cases.grad_fn, cases.PARAMS, cases.TX, batches, num_workers=4, num_updates=1500,
        progress=False, worker_options={"resources": {"side": 1}},
    )
    removed.join()
    lost = {event.worker for event in result.events if event.kind == "worker lost"}
    assert len(lost) == 2, result.events
    last = {i: (result.history.worker == i).nonzero()[0][-1] for i in range(4)}
    assert all((last[i] > 1450) == (i not in lost) for i in last), last
    used = result.history.batch.tolist()
    assert len(set(used)) == len(used) == 1500
finally:
    ray.shutdown()
    cluster.shutdown()
"""


def test_a_node_that_disappears_costs_its_workers_only(tmp_path):
    run_python(CLUSTER, pathlib.Path(__file__).parent, tmp_path)
