"""Runs of `parameter_server.train` on a Ray of the tests, and what each of them has to fulfil."""

import collections
import contextlib
import subprocess
import sys
import time
from concurrent import futures

import chex
import numpy as np
import psutil
import pytest
from parameter_server_cases import PARAMS, TX, X, Y, grad_fn, padded, padded_grad_fn

from optax_dcasgd import parameter_server, simulation

# What a file of such tests sets as its `pytestmark`.
ON_RAY = [pytest.mark.ray, pytest.mark.usefixtures("started_ray", "nothing_left_running")]
LARGE = {"params": padded(PARAMS), "grad_fn": padded_grad_fn}  # through the object store
BOTH_SIZES = pytest.mark.parametrize("model", [{}, LARGE], ids=["small", "large"])


def train(num_updates=100, tx=TX, batches=(X, Y), grad_fn=grad_fn, params=PARAMS, **options):
    options = {"num_workers": 3, "progress": False, "compensation_every": None, **options}
    return parameter_server.train(grad_fn, params, tx, batches, num_updates=num_updates, **options)


def numbers(history):
    """Each batch that was used, in the order of the updates."""
    rounds = zip(history.batch, history.num_steps, strict=True)
    return [int(i) for first, num_steps in rounds for i in range(first, first + num_steps)]


def assert_sound(
    result, skipped=(), tx=TX, grad_fn=grad_fn, params=PARAMS, batches=(X, Y), under_way=4
):
    """Nothing was applied twice or lost for good; the recorded order trains to the same."""
    used = collections.Counter(numbers(result.history))
    assert max(used.values()) == 1
    missing = set(range(max(used))) - set(used) - set(skipped)
    assert not set(skipped) & set(used)
    assert len(missing) <= under_way  # at the end
    if len(used) >= 500:  # in a short run that may be what a slow starter got at its beginning
        assert all(i > 0.8 * max(used) for i in missing), missing
    replayed = simulation.run(grad_fn, params, tx, batches, result.arrivals)
    chex.assert_trees_all_close(result.params, replayed.params, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(result.history.loss, replayed.history.loss, 1e-4)


def kinds(result):
    return collections.Counter(event.kind for event in result.events)


# Processes.


def actors():
    """The processes, started from here, of Ray's actors and of those that may become one."""
    return [p for p in psutil.Process().children(recursive=True) if "ray::" in name_of(p)]


def name_of(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


def processes_of(kind):
    return [p for p in actors() if f"ray::{kind}" in name_of(p)]


def kill_server(until, times=1):
    """Kills the server's process, so many times, each after ``until()`` returned."""
    for _ in range(times):
        until()
        (server,) = processes_of("Server")
        server.kill()


def wait_until(condition, seconds=90):
    """Waits for what another thread or process does; returns what ``condition()`` returned."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def wait_for_server():
    wait_until(lambda: processes_of("Server"))


@contextlib.contextmanager
def meanwhile(function, *args):
    """Calls it in another thread, and waits for its end; what it raises is raised here."""
    with futures.ThreadPoolExecutor(1) as executor:
        future = executor.submit(function, *args)
        yield
        future.result(timeout=60)


def run_python(code, *args, timeout=180):
    """Runs code, or a script, in a process of its own; returns what it printed to both streams."""
    start = ["-c", code] if "\n" in code else [code]
    command = [sys.executable, *start, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr
