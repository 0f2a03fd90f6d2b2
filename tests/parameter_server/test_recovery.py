"""Checkpoints, really written: a server dies, a run goes on, a disk is full, Ctrl-C."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import chex
import jax
import numpy as np
import optax
import parameter_server_cases as cases
import psutil
import pytest
from parameter_server_cases import PARAMS, X
from parameter_server_runs import (
    ON_RAY,
    assert_sound,
    kill_server,
    kinds,
    meanwhile,
    train,
    wait_for_server,
    wait_until,
)

from optax_dcasgd import add_delay_compensation, parameter_server
from optax_dcasgd.parameter_server import _driver

pytestmark = ON_RAY


def versions(directory):
    """Those of the checkpoints that are complete."""
    return {int(p.name) for p in directory.iterdir() if p.name.isdigit()}


def test_a_server_that_is_killed_goes_on_from_its_checkpoint(tmp_path):
    seen = set()

    def until():
        seen.update(wait_until(lambda: versions(tmp_path) - seen))
        time.sleep(0.3)
        with pytest.raises(ValueError, match="is in use by another run"):
            train(900, checkpoint_dir=tmp_path)

    with meanwhile(kill_server, until, 2):
        options = {"checkpoint_dir": tmp_path, "checkpoint_every": 100}
        result = train(900, batches=cases.Batches(0.01), **options)
    assert kinds(result)["server lost"] == 2
    assert kinds(result)["resumed"] == 2
    assert len(result.history.loss) == 900
    assert_sound(result)


def test_a_server_that_dies_before_its_last_checkpoint(tmp_path, monkeypatch):
    """The updates since the one before are done again."""
    save, killed = _driver.Driver._save, []

    def kill_and_save(driver):
        if not killed:
            killed.append(True)
            kill_server(wait_for_server)
        return save(driver)

    monkeypatch.setattr(_driver.Driver, "_save", kill_and_save)
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 100}
    result = train(250, batches=cases.Batches(0.005), **options)
    assert len(result.history.loss) == 250
    assert [event.kind for event in result.events] == ["server lost", "resumed"]
    assert_sound(result)
    assert 250 in versions(tmp_path)


def test_a_server_that_dies_after_the_number_of_workers_has_changed(tmp_path):
    """The new one knows the workers that there are, not those of the beginning."""
    signs, checkpoints = tmp_path / "signs", tmp_path / "checkpoints"
    signs.mkdir()

    def disturb():
        wait_until(lambda: list(signs.iterdir()))
        for num_workers, signatures in [(3, 3), (1, 3), (3, 5)]:
            parameter_server.resize("resized", num_workers)
            wait_until(lambda: len(list(signs.iterdir())) == signatures)  # noqa: B023
        kill_server(wait_for_server)

    with meanwhile(disturb):
        options = {"checkpoint_dir": checkpoints, "checkpoint_every": 100, "name": "resized"}
        result = train(2000, batches=cases.Signed(signs, pause=0.02), **options)
    assert kinds(result) == {"server lost": 1, "resumed": 1}
    assert set(result.history.worker[-200:].tolist()) == {0, 1, 2}
    assert_sound(result)


@pytest.mark.parametrize("at", ["start", "update"])
def test_a_server_that_dies_again_and_again(at, tmp_path):
    """Before its first checkpoint: it would do so for ever."""
    tx = cases.deadly_tx(os.getpid(), at)
    died = r"The server died 3 times without a new checkpoint, .*process \d+: it was killed"
    with pytest.raises(RuntimeError, match=died):
        train(tx=tx, checkpoint_dir=tmp_path)


def test_a_server_that_cannot_be_started(tmp_path):
    tx = cases.deadly_tx(os.getpid(), "start", error=MemoryError("too\nlarge"))
    with pytest.raises(RuntimeError, match=r"^The server could not .*: MemoryError: too large"):
        train(tx=tx, checkpoint_dir=tmp_path)
    tx = cases.deadly_tx(os.getpid(), "start")
    with pytest.raises(RuntimeError, match=r"^The server died when it was started, and witho"):
        train(tx=tx)


def test_without_checkpoints_a_dead_server_is_an_error():
    def until():
        wait_for_server()
        time.sleep(3)

    with (
        meanwhile(kill_server, until),
        pytest.raises(RuntimeError, match=r"The server died .* without checkpoint_dir"),
    ):
        train(100_000, batches=cases.Batches(0.005))


def test_resumed_by_default(tmp_path):
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 30}
    first = train(80, **options)
    result = train(200, **options)
    chex.assert_trees_all_equal(
        first.history, type(first.history)(*(c[:80] for c in result.history))
    )
    assert [event.kind for event in result.events] == ["resumed"]
    assert_sound(result)
    again = train(200, **options)  # nothing is left to do
    chex.assert_trees_all_equal((again.params, again.state), (result.params, result.state))

    wider = {**PARAMS, "out": np.zeros((8, 4), np.float32)}
    of_wider = {"params": wider, "batches": (X, np.zeros((64, 16, 4), np.float32))}
    for num_updates, more, message in [
        (100, {}, "num_updates must be at least 200"),
        (300, {"resume": False}, "holds a run of 200 updates"),
        (300, of_wider, r"another model: .*\['out'\]: float32\[8, 3\] there"),
        (300, {"tx": optax.sgd(0.1)}, "holds another model"),
        (300, {"mode": "sync"}, "mode: async there and mode: sync here"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(num_updates, **more, **options)


def test_resumed_from_an_older_checkpoint_and_with_another_key(tmp_path):
    """The newest is damaged. This loss does not use the key, so that it replays all the same."""
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 30}
    train(80, **options)
    (tmp_path / "80" / "meta" / "metadata").write_text("{")
    result = train(120, key=jax.random.key(1), **options)
    assert [event.kind for event in result.events] == ["checkpoint damaged", "resumed", "changed"]
    damaged, _, changed = result.events
    assert "20 updates are lost" in damaged.message
    assert changed.message.startswith("key differ")
    assert_sound(result)


def test_a_run_that_diverges_goes_on_from_its_last_checkpoint(tmp_path):
    """With a rate of 1e30 no gradient is finite before the parameters are infinite."""

    def tx(rate):
        rates = [optax.constant_schedule(rate) for rate in (0.02, rate)]
        return optax.chain(add_delay_compensation(), optax.sgd(optax.join_schedules(rates, [65])))

    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 30}
    told = r"No gradient is finite with such parameters \(params\['.*e\+\d\d\).*of 60 updates"
    with pytest.raises(RuntimeError, match=f"Training has diverged. {told}"):
        train(200, tx=tx(1e30), **options)
    assert versions(tmp_path) == {30, 60}
    result = train(200, tx=tx(0.02), **options)
    assert [event.kind for event in result.events] == ["resumed", "changed"]
    given_up = set(range(200)) - set(result.history.batch.tolist())
    assert_sound(result, skipped=given_up, tx=tx(0.02))


def test_a_directory_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"checkpoint_dir .*file/run cannot be written"):
        train(checkpoint_dir=tmp_path / "file" / "run")
    other = tmp_path / "other"
    (other / "7").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds no checkpoint .* can be read .*remove .*other/7"):
        train(checkpoint_dir=other)


def test_a_full_disk_does_not_end_training(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    options = {"checkpoint_dir": small, "checkpoint_every": 20}
    try:
        if mounted:
            result = train(200, **options)
        else:  # who may not mount loses the directory instead
            thread = threading.Timer(6, lambda: (small.rename(tmp_path / "gone"), small.touch()))
            thread.start()
            result = train(1000, batches=cases.Batches(0.03), **options)
    finally:
        if mounted:
            subprocess.run(["umount", str(small)], check=True)
    assert kinds(result)["checkpoint failed"] > 0
    assert_sound(result)


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path.insert(0, sys.argv[1])
import parameter_server_cases as cases
from ray import cloudpickle
cloudpickle.register_pickle_by_value(cases)
from optax_dcasgd import parameter_server
parameter_server.train(
    cases.grad_fn, cases.PARAMS, cases.TX, cases.Batches(0.01), num_workers=2,
    num_updates=1_000_000, checkpoint_dir=sys.argv[2], checkpoint_every=50, progress=False,
)
"""


def in_session(leader):
    """The names of the processes that it has started, and they."""
    found = []
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            if os.getsid(process.pid) == leader:
                found.append(process.info["name"])
    return found


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_script_that_ends_leaves_a_checkpoint_and_no_processes(by, tmp_path):
    """Where it is killed no actors are left, and another can go on from its checkpoint at once."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(pathlib.Path(__file__).parent), str(tmp_path)],
        env={**environment, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: process.poll() is not None or max(versions(tmp_path), default=0) >= 100)
    assert process.poll() is None, process.communicate()
    assert any("raylet" in name for name in in_session(process.pid))
    if by == signal.SIGINT:
        os.killpg(process.pid, by)  # as a terminal does
    else:
        os.kill(process.pid, by)
    if by == signal.SIGKILL:
        process.wait(timeout=60)
        options = {"num_workers": 2, "batches": cases.Batches(), "checkpoint_dir": tmp_path}
        result = train(max(versions(tmp_path)) + 100, **options)
        assert [event.kind for event in result.events] == ["resumed"]
        assert_sound(result)
        # Two agents of Ray's own outlive the rest by a minute, and hold the pipes.
        process.stdout.close()
        process.stderr.close()
        actors = ("ray::Server", "ray::Worker")
        wait_until(lambda: not any(name.startswith(actors) for name in in_session(process.pid)))
        return
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert ("KeyboardInterrupt" in errors) == (by == signal.SIGINT)
    assert "Interrupted; a checkpoint of" in errors
    assert int(errors.split("Interrupted; a checkpoint of ")[1].split()[0]) in versions(tmp_path)
    wait_until(lambda: not in_session(process.pid))
