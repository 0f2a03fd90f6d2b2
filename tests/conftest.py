"""Set-up that has to happen before JAX starts, and what files of several folders ask for."""

import os
import re

import jax
import pytest

# Sharding is tested on eight virtual devices. XLA reads the variable once, when the first array is
# made, so this cannot wait for a fixture.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()


def pytest_configure(config):
    """The suite runs on CPU devices wherever it is started; only ``-m gpu`` leaves JAX its GPU."""
    if re.match(r"\s*\(*\s*gpu\b", config.option.markexpr):
        config.option.reportchars += "s"  # why it was skipped, where there is no GPU
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # for pytest -n 2
        return
    os.environ["JAX_PLATFORMS"] = "cpu"  # for the processes that tests start
    jax.config.update("jax_platforms", "cpu")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
