"""Set-up that has to happen before JAX starts, and what files of several folders ask for."""

import os

import jax
import pytest

# Sharding is tested on eight virtual devices. XLA reads the variable once, when the first array is
# made, so this cannot wait for a fixture.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
