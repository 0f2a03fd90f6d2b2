"""What is passed to `train` and `resize` that is refused before anything starts; without Ray."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ray

from optax_dcasgd import parameter_server


@pytest.mark.parametrize(
    ("is_initialized", "told"),
    [
        (False, r'not been initialised.* ray\.init\(address="auto"\)'),
        (True, r"no run of the name 'run' on this .*ray\.init\(address="),
    ],
)
def test_resizing_where_there_is_no_run(is_initialized, told, monkeypatch):
    """Ray would start a cluster of its own to look for it, and leave it running."""

    def get_actor(name, namespace):
        assert is_initialized
        raise ValueError("Failed to look up actor")

    monkeypatch.setattr(ray, "is_initialized", lambda: is_initialized)
    monkeypatch.setattr(ray, "get_actor", get_actor)
    with pytest.raises(ValueError, match=told):
        parameter_server.resize("run", 2)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        (
            {"server_options": {"max_concurrency": 2}},
            ValueError,
            r"server_options\['max_concurrency'\] must be 1.* Leave it out",
        ),
        (
            {"server_options": {"lifetime": "detached"}},
            ValueError,
            r"server_options\['lifetime'\] must not be 'detached'.* Leave it out",
        ),
        ({"worker_options": {"lifetime": "detached"}}, ValueError, "worker_options.*Leave it out"),
        ({"transport_dtype": "bf16"}, TypeError, "transport_dtype must be a float.* got 'bf16'"),
        ({"transport_dtype": np.ones(2)}, TypeError, "transport_dtype must be a float.* such as"),
        ({"transport_dtype": jnp.int8}, TypeError, "transport_dtype must be a float.* got.*int8"),
        ({"local_steps": [1, 2]}, ValueError, "local_steps must be one integer, .* or 1, one a"),
        (
            {"local_steps": 3},
            TypeError,
            r"batches must be a function \(first, num_steps\) -> stack",
        ),
        (
            {"local_steps": 3, "batches": lambda i, n: np.ones(2)},
            ValueError,
            r"num_steps=3 it returned shape \(2,\) for batches\.$",
        ),
        (
            {"local_steps": 3, "batches": lambda i, n: np.ones(n)},
            ValueError,
            r"of one shape.* batches\(0, 1\) has \(1,\), and batches\(0, 3\) \(3,\)",
        ),
    ],
)
def test_what_train_refuses(options, error, told, monkeypatch):
    monkeypatch.setattr(ray, "init", None)  # or it would be a test of Ray
    params = jnp.zeros(2)
    with pytest.raises(error, match=told):
        parameter_server.train(
            lambda params, batch, key: (params.sum(), params),
            params,
            optax.sgd(0.1),
            **{"batches": jnp.ones((3, 2)), "num_workers": 1, "num_updates": 1, **options},
        )
