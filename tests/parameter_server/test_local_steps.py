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


def usual(history, worker):
    """How many steps it takes, but for some rounds in the place of others."""
    return np.bincount(history.num_steps[history.worker == worker]).argmax()


def test_unequal_workers_use_each_batch_once_though_some_are_killed(tmp_path):
    """The run is resumed, with numbers by the workers' speed, and replayed from its file."""
    of_rounds = {
        "grad_fn": cases.Rounds.grad_fn,
        "tx": optax.chain(robust_delay_compensation(), optax.sgd(1.0)),
    }
    run = {**of_rounds, "batches": cases.Rounds(tmp_path, {60, 150}, pause=0.01)}
    run |= {"checkpoint_dir": tmp_path / "run", "local_steps": [1, 2, 4]}
    first = train(1000, **run)
    assert kinds(first)["worker lost"] == 2
    assert [usual(first.history, worker) for worker in range(3)] == [1, 2, 4]
    run |= {"batches": cases.Rounds(None, (), 0.01, str(tmp_path / "slow")), "local_steps": 4}
    result = train(1200, **run)
    assert kinds(result) == {"resumed": 1}
    last = type(result.history)(*(column[1000:] for column in result.history))
    assert sorted(usual(last, worker) for worker in range(3)) == [1, 4, 4]
    pushes = np.bincount(last.worker)
    assert pushes.max() < 2 * pushes.min()  # and not five times as many

    result.arrivals.save(tmp_path / "arrivals")
    loaded = simulation.Arrivals.load(tmp_path / "arrivals")
    result = result._replace(arrivals=loaded)
    assert_sound(result, batches=cases.Rounds(), under_way=3 * 4, **of_rounds)

    run |= {"local_steps": None, "batches": (cases.X, cases.Y), "grad_fn": cases.rounds_of_four}
    with pytest.raises(ValueError, match="local_steps: given there and local_steps: no here"):
        train(1300, **run)
