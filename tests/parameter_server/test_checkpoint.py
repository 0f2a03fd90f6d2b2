"""What is written to a checkpoint is read again; what cannot be written, or not be read."""

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
import pathlib, resource, sys
import numpy as np
from optax_dcasgd.parameter_server import _checkpoint
checkpoints = _checkpoint.Checkpoints(sys.argv[1])
params = [np.random.default_rng(0).normal(size=100_000)]
snapshot = _checkpoint.Snapshot(params, [], {"loss": np.zeros(1)}, {"history": {"loss": "<f8"}})
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # as if the disk were full
checkpoints.save(1, snapshot)
told = _checkpoint.reason(checkpoints.settle())
assert told == "OSError: [Errno 27] File too large", told
assert checkpoints.latest() is None
assert not list(pathlib.Path(sys.argv[1]).iterdir())  # its parts take no space
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


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("a"), "KeyError: 'a'"),
        (ValueError("one\n\ntwo"), "ValueError: one"),
        (ValueError(500 * "x"), f"ValueError: {200 * 'x'}..."),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_reason_is_one_short_line(error, told):
    assert _checkpoint.reason(error) == told


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


DAMAGED = """
import os, pathlib, shutil, sys
import numpy as np
from optax_dcasgd.parameter_server import _checkpoint

def flip(path):
    content = bytearray(path.read_bytes())
    batch = content.find(b'"next_batch": 20')  # which becomes 30
    content[len(content) // 2 if batch < 0 else batch + 14] ^= 1
    path.write_bytes(content)

damages = {
    "removed": lambda path: shutil.rmtree(path) if path.is_dir() else path.unlink(),
    "empty": lambda path: os.truncate(path, 0),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "another bit": flip,
}
intact = pathlib.Path(sys.argv[1], "intact")
rng = np.random.default_rng(0)
params, state = [rng.normal(size=3000), np.arange(5)], [rng.normal(size=300)]
checkpoints = _checkpoint.Checkpoints(intact)
for version in (1, 2):
    meta = {"history": {"loss": "<f8"}, "next_batch": 10 * version}
    scaled = [version * x for x in params]
    snapshot = _checkpoint.Snapshot(scaled, state, {"loss": np.arange(version) / 3}, meta)
    checkpoints.save(version, snapshot)
checkpoints.wait()
checkpoints.close()
read = []
for path in sorted((intact / "2").rglob("*")):
    for damage in damages if path.is_file() else ["removed"]:
        directory = shutil.copytree(intact, intact.with_name(f"damaged{len(read)}"))
        damages[damage](directory / path.relative_to(intact))
        checkpoints = _checkpoint.Checkpoints(directory)
        load = lambda version: checkpoints.load(version, params, state)
        version, loaded, damaged = checkpoints.newest(load)
        checkpoints.close()
        assert [each.version for each in damaged] == ([2] if version == 1 else []), damaged
        assert all(len(each.reason) < 250 for each in damaged), damaged
        expected = [*(version * x for x in params), *state, np.arange(version) / 3]
        got = [*loaded.params, *loaded.state, loaded.history["loss"]]
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_array_equal(x, y, str((path, damage)))
        assert loaded.meta["next_batch"] == 10 * version
        read.append(version)
assert len(read) > 40 and min(read.count(1), read.count(2)) > 10, read
"""


@pytest.mark.slow
def test_a_damaged_checkpoint_is_read_as_it_was_or_the_one_before_is(tmp_path):
    """With each file and directory damaged in turn; a process of its own, as above."""
    run_python(DAMAGED, tmp_path)


def test_a_directory_without_a_checkpoint_that_can_be_read(tmp_path):
    for version in (3, 8):
        (tmp_path / str(version)).mkdir()
    message = f"(?s)holds no checkpoint.*can be read.*remove {tmp_path}/8, {tmp_path}/3"
    with (
        pytest.raises(ValueError, match=message),
        _checkpoint.claimed(tmp_path, [], resume=True, num_updates=10),
    ):
        pass


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_checkpoint_of_another_release_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_checkpoint, "_FORMAT", "optax_dcasgd.parameter_server/2")
    checkpoints = _checkpoint.Checkpoints(str(tmp_path))
    checkpoints.save(5, snapshot(5, [np.ones(3)], []))
    checkpoints.wait()
    checkpoints.close()
    monkeypatch.undo()
    with (
        pytest.raises(ValueError, match=r"can be read \(5: .* of another release, .*server/2'\)"),
        _checkpoint.claimed(tmp_path, ["lines"], resume=True, num_updates=10),
    ):
        pass


@pytest.mark.parametrize(
    ("errors", "version"),
    [
        ([OSError("busy")], 8),  # as a network's file system may be for a moment
        ([ValueError("... os_error_code='5' ...")], 8),  # by TensorStore
        ([OSError("no"), OSError("no")], 3),
        ([ValueError("its checksum is another")], 3),
    ],
)
def test_an_error_that_passes_is_no_damage(errors, version, tmp_path, monkeypatch):
    checkpoints = _checkpoint.Checkpoints(str(tmp_path))
    monkeypatch.setattr(checkpoints._manager, "all_steps", lambda: [3, 8])

    def read(step):
        if errors:
            raise errors.pop()
        return "what it has"

    found, content, damaged = checkpoints.newest(read)
    assert (found, content) == (version, "what it has")
    assert [each.version for each in damaged] == [8][: version == 3]

    errors.append(MemoryError())  # of this process, which has room for no other either
    with pytest.raises(MemoryError):
        checkpoints.newest(read)
    checkpoints.close()
