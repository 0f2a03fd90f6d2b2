"""On which devices the suite runs, wherever it is started."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

TESTS = pathlib.Path(__file__).parent


def run_pytest(*options, platforms=None):
    """A pytest of its own, on a machine where JAX is told these platforms, or none."""
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    env["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), env.get("PYTHONPATH", "")])
    if platforms:
        env["JAX_PLATFORMS"] = platforms
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    return subprocess.run(
        command, cwd=TESTS.parent, env=env, capture_output=True, text=True, check=False
    )


def test_here_and_in_processes_that_tests_start_it_is_eight_cpu_devices():
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8
    assert os.environ["JAX_PLATFORMS"] == "cpu"


@pytest.mark.slow
def test_a_machine_that_prefers_a_gpu_runs_the_suite_on_its_cpu():
    run = run_pytest("tests/test_devices.py", platforms="cuda")
    assert run.returncode == 0, run.stdout
    assert "1 passed" in run.stdout


@pytest.mark.slow
def test_what_needs_a_gpu_says_why_it_was_skipped():
    run = run_pytest("-m", "gpu", "tests/kernels/test_gpu.py", "-k", "chain")
    assert run.returncode == 0, run.stdout
    assert "1 passed" in run.stdout or "JAX finds no NVIDIA GPU" in run.stdout
