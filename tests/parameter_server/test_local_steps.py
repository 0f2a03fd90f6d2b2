"""`parameter_server.train` with workers that take steps of their own."""

import optax
import parameter_server_cases as cases
from parameter_server_runs import ON_RAY, assert_sound, kinds, train

from optax_dcasgd import robust_delay_compensation

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
