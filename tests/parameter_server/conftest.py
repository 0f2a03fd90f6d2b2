"""Ray for the tests that ask for it, and a look at what they leave behind."""

import warnings

import parameter_server_cases as cases
import pytest
import ray
from parameter_server_runs import actors, name_of, wait_until


@pytest.fixture(scope="module")
def started_ray():
    ray.cloudpickle.register_pickle_by_value(cases)  # the workers cannot import it
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def nothing_left_running():
    before = {p.pid for p in actors()}
    yield
    wait_until(lambda: all(p.pid in before or "IDLE" in name_of(p) for p in actors()), seconds=20)
