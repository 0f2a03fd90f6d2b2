"""What is written to a checkpoint is read again, and what cannot be written."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from parameter_server_runs import run_python

from optax_dcasgd.parameter_server import _checkpoint, _history


def snapshot(version, params, state):
    rows = np.zeros(version, _history.DTYPE)
    rows["loss"] = np.arange(version)
    meta = {
        "signature": ["lines"],
        "history": {name: rows.dtype[name].str for name in _history.History._fields},
        "next_batch": 7,
    }
    return _checkpoint.Snapshot(params, state, _history.to_columns(rows)._asdict(), meta)


@pytest.mark.parametrize("version", [0, 5])
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_saved_and_loaded(version, tmp_path):
    params = [np.arange(3.0), np.zeros((0, 2), np.float32), np.float32(2)]
    state = [np.array([1, 2], np.uint32), np.ones(2, jnp.bfloat16), np.zeros(0, np.int32)]
    checkpoints = _checkpoint.Checkpoints(str(tmp_path))
    assert checkpoints.latest() is None
    checkpoints.save(version, snapshot(version, params, state))
    checkpoints.wait()
    assert checkpoints.latest() == version
    loaded = checkpoints.load(version, params, state)
    checkpoints.close()
    chex.assert_trees_all_equal(
        loaded.params + loaded.state, [np.asarray(x) for x in params + state], strict=True
    )
    assert loaded.meta["next_batch"] == 7
    if version:
        np.testing.assert_array_equal(loaded.history["loss"], np.arange(version))
        rows = _history.to_rows(loaded.history)
        assert rows.dtype == _history.DTYPE


FULL = """
import resource, sys
import numpy as np
from optax_dcasgd.parameter_server import _checkpoint
checkpoints = _checkpoint.Checkpoints(sys.argv[1])
params = [np.random.default_rng(0).normal(size=100_000)]
snapshot = _checkpoint.Snapshot(params, [], {"loss": np.zeros(1)}, {"history": {"loss": "<f8"}})
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # as if the disk were full
checkpoints.save(1, snapshot)
assert checkpoints.settle() is not None
assert checkpoints.latest() is None
resource.setrlimit(resource.RLIMIT_FSIZE, before)
checkpoints.save(1, snapshot)
assert checkpoints.settle() is None
assert checkpoints.latest() == 1
np.testing.assert_array_equal(checkpoints.load(1, params, []).params[0], params[0])
checkpoints.close()
"""


def test_a_checkpoint_is_written_though_the_one_before_failed(tmp_path):
    """In a process of its own, for what Orbax's threads leave behind then."""
    run_python(FULL, tmp_path)


def test_a_failed_checkpoint_does_not_keep_the_next_from_being_written(tmp_path, monkeypatch):
    checkpoints = _checkpoint.Checkpoints(str(tmp_path))
    params = [np.ones(3)]
    checkpoints.save(1, snapshot(1, params, []))
    wait, failures = checkpoints.wait, [OSError("full")]

    def fail_once():
        wait()
        if failures:
            raise failures.pop()

    monkeypatch.setattr(checkpoints, "wait", fail_once)
    with pytest.raises(OSError, match="full"):
        checkpoints.save(2, snapshot(2, params, []))
    checkpoints.wait()
    assert checkpoints.latest() == 2
    checkpoints.close()
