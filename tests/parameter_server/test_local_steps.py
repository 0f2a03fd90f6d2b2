"""`parameter_server.train` with workers that take steps of their own."""

import numpy as np
import optax
import parameter_server_cases as cases
import pytest
from parameter_server_runs import ON_RAY, assert_sound, kinds, train

from optax_dcasgd import robust_delay_compensation, simulation

pytestmark = ON_RAY


def test_a_killed_worker_loses_its_round_and_nothing_is_done_twice(tmp_path):
    rounds = {
        "grad_fn": cases.rounds_of_four,
        "tx": optax.chain(robust_delay_compensation(), optax.sgd(1.0)),
    }
    # Long enough for Ray to notice both.
    result = train(1200, batches=cases.Faulty(tmp_path, {20, 50}, cases.die), **rounds)
    assert kinds(result)["worker lost"] == 2
    assert result.history.staleness.max() > 0
    assert_sound(result, **rounds)


def test_unequal_workers_use_each_batch_once_though_some_are_killed(tmp_path):
    """The run is resumed, and replayed from its file."""
    of_rounds = {
        "grad_fn": cases.Rounds.grad_fn,
        "tx": optax.chain(robust_delay_compensation(), optax.sgd(1.0)),
    }
    run = {**of_rounds, "batches": cases.Rounds(tmp_path, {60, 150}, pause=0.01)}
    run |= {"checkpoint_dir": tmp_path / "run", "local_steps": [1, 2, 4]}
    assert kinds(train(1000, **run))["worker lost"] == 2
    result = train(1200, **run)
    assert kinds(result) == {"resumed": 1}
    for worker, num_steps in enumerate(run["local_steps"]):
        of_worker = result.history.num_steps[result.history.worker == worker]
        assert np.bincount(of_worker).argmax() == num_steps  # but for some in the place of others

    result.arrivals.save(tmp_path / "arrivals")
    loaded = simulation.Arrivals.load(tmp_path / "arrivals")
    result = result._replace(arrivals=loaded)
    assert_sound(result, batches=cases.Rounds(), under_way=3 * 4, **of_rounds)

    run |= {"local_steps": None, "batches": (cases.X, cases.Y), "grad_fn": cases.rounds_of_four}
    with pytest.raises(ValueError, match="local_steps: given there and local_steps: no here"):
        train(1300, **run)
