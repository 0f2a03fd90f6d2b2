"""Runs of `parameter_server.train` on a Ray of the test's own, and what every run has to fulfil.

A test file imports the fixtures too: they start Ray, and look for processes left behind.
"""

import collections
import time
import warnings

import jax
import numpy as np
import parameter_server_cases as cases
import psutil
import pytest
import ray
from parameter_server_cases import PARAMS, TX, X, Y, grad_fn

from optax_dcasgd import parameter_server, simulation


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
    wait_until(lambda: all(p.pid in before or "IDLE" in name_of(p) for p in actors()), seconds=20)


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
    missing = set(range(max(used))) - set(used) - set(skipped)
    assert len(missing) <= 4  # what was still under way at the end
    if len(used) >= 500:  # in a short run that may be what a slow starter got at its beginning
        assert all(i > 0.8 * max(used) for i in missing), missing


def wait_until(condition, seconds=90):
    """Waits for what another thread or process does; returns what ``condition()`` returned."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def kinds(result):
    return collections.Counter(event.kind for event in result.events)
