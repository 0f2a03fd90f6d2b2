"""What is said of ends of actors and of too few resources; without Ray."""

import re

import pytest
import ray

from optax_dcasgd.parameter_server import _reasons, _resources

DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: Worker
\tpid: 4711
\tip: 10.0.0.1
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit \
detail: Worker unexpectedly exits with a connection error code 2. End of file. Some common causes \
include: (1) the process was killed by the OOM killer due to high memory usage, (2) ...
The actor never ran."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            ray.exceptions.RayActorError(error_msg=DIED),
            "RayActorError: process 4711: it was killed (for want of memory, say) or crashed",
        ),
        (
            ray.exceptions.RayActorError(
                error_msg="The actor died because of\n  File ...\n_reasons.StartError: OSError: no",
                actor_init_failed=True,
            ),
            "OSError: no",
        ),
        (
            ray.exceptions.ActorUnavailableError(
                "The actor f7 is unavailable: RpcError: RPC error: Socket closed rpc_code: 14. The",
                None,
            ),
            "ActorUnavailableError: it died or cannot be reached (Socket closed)",
        ),
        (
            ray.exceptions.RaySystemError("no", "Traceback (most recent call last):\nOSError: no"),
            "OSError: no",
        ),
        (
            ray.exceptions.RuntimeEnvSetupError("no such package\n" + 10_000 * "x"),
            "RuntimeEnvSetupError: Failed to set up runtime environment. no such package xxx",
        ),
        (
            ray.exceptions.RayTaskError(
                "gradient", "Traceback ...:\n  File ...\nOSError: no", OSError()
            ),
            "OSError: no",
        ),
        (ValueError("two\n  lines"), "ValueError: two lines"),
    ],
)
def test_what_ray_writes_pages_about_is_one_line(error, line):
    told = _reasons.one_line(error)
    assert told.startswith(line)
    assert len(told) < 600
    assert "\n" not in told


@pytest.mark.parametrize(
    ("num_workers", "options", "told"),
    [
        (16, {}, None),
        (1000, {}, "1000 workers are as many processes on 2 CPUs, and take 150 GB or more"),
        (2, {"num_cpus": 1}, None),
        (
            4,
            {"num_cpus": 1},
            "2 of 4 workers fit .* each asks for 1 CPU; the cluster has 2 CPU, of",
        ),
        (1, {"resources": {"a": 3}}, r"0 of 1 .* 1 CPU, 3 a; .* 0 a, .* \(no node has as much"),
        (2, {"num_gpus": 2}, "0 of 2 .* 2 GPU; the cluster has 2 CPU, 1 GPU, .*free: 0 CPU, 1 GPU"),
    ],
)
def test_more_workers_than_the_cluster_has_room_for(num_workers, options, told, monkeypatch):
    there = {"CPU": 2.0, "GPU": 1.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    monkeypatch.setattr(ray, "available_resources", lambda: {"GPU": 1.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": there}])
    message = _resources.too_many(num_workers, options)
    assert (message is None) if told is None else re.search(told, message)


def test_an_actor_that_asks_for_nothing_waits(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "available_resources", dict)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    told = _resources.why_it_waits({"num_cpus": 0})
    assert told.startswith("each asks for nothing (so that there is room: ")
