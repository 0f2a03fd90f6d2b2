"""`simulation.arrivals` against a discrete-event calculation, and `Arrivals` as files."""

import dataclasses
import functools
import heapq
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_dcasgd import simulation
from optax_dcasgd.simulation import Arrivals

KEY = jax.random.key(5)
INF = math.inf

COMPUTE_TIMES = {
    "deterministic": simulation.deterministic(0.5),  # with ties
    "exponential": simulation.exponential(2.0),
}
# slowdown, start, stop
PRESENT = ([1.0] * 5, [0.0] * 5, [INF] * 5)
CLUSTERS = [
    PRESENT,
    ([1.0, 4.1, 1.0, 1.37, 1.0], *PRESENT[1:]),
    (*PRESENT[:2], [0.0, INF, 6.5, INF, INF]),
    (PRESENT[0], [0.0, 3.5, 0.0, 0.0, 8.0], PRESENT[2]),
    ([1.0, 4.1, 1.37, 0.61, 1.0], [0.0, 3.3, 2.2, 0.0, 0.0], [INF, 30.0, 7.0, 4.4, INF]),
]


def durations(compute_time, num_workers, num_each):
    """The times that `arrivals` documents, one by one."""

    def draw(i, k):
        return jnp.float32(compute_time(jax.random.fold_in(jax.random.fold_in(KEY, i), k)))

    grid = np.mgrid[:num_workers, :num_each]
    return np.asarray(jax.jit(jax.vmap(jax.vmap(draw)))(*grid), float)


def event_queue(times, num_updates, slowdown, start, stop):
    """A queue of joins (first at any moment after pushes) and pushes, in float64."""
    num_workers = len(times)
    queue = [(start[i], 1, i, 0) for i in range(num_workers)]
    heapq.heapify(queue)
    version, pulled, pushes = 0, [0] * num_workers, []
    while len(pushes) < num_updates:
        now, is_join, i, k = heapq.heappop(queue)
        if not is_join:
            pushes.append((i, version - pulled[i], now))
            version += 1
        pulled[i] = version
        done = now + times[i][k] * slowdown[i]
        if done <= stop[i]:
            heapq.heappush(queue, (done, 0, i, k + 1))
    return tuple(np.array(column) for column in zip(*pushes, strict=True))


@pytest.mark.parametrize("compute_time", COMPUTE_TIMES)
def test_a_discrete_event_calculation(compute_time):
    num_workers, num_updates = 5, 60
    compute_time = COMPUTE_TIMES[compute_time]
    times = durations(compute_time, num_workers, num_updates + 1)

    @jax.jit
    def simulated(slowdown, start, stop):
        options = {"slowdown": slowdown, "start": start, "stop": stop}
        return simulation.arrivals(
            KEY, num_workers, num_updates, compute_time=compute_time, **options
        )

    for slowdown, start, stop in CLUSTERS:
        arrivals = simulated(*map(jnp.array, (slowdown, start, stop)))
        worker, staleness, time = event_queue(times, num_updates, slowdown, start, stop)
        np.testing.assert_allclose(arrivals.time, time, 1e-5)
        np.testing.assert_array_equal(arrivals.worker, worker)
        np.testing.assert_array_equal(arrivals.staleness, staleness)
        assert arrivals.num_workers == num_workers

        now = 0.0
        for k, row in enumerate(arrivals.barrier):
            ready = [now + times[i][k] * slowdown[i] for i in range(num_workers)]
            takes_part = [start[i] <= now and ready[i] <= stop[i] for i in range(num_workers)]
            np.testing.assert_allclose(row, np.where(takes_part, ready, INF), 1e-5)
            now = max(t for t, part in zip(ready, takes_part, strict=True) if part)
        assert arrivals.barrier.shape == (12, 5)


def test_workers_by_mapping_or_by_number():
    arrivals = functools.partial(simulation.arrivals, KEY, 3, 20, compute_time=1.0)
    by_mapping = arrivals(slowdown={1: 4}, start={2: 3.0}, stop={0: 2})
    by_number = arrivals(slowdown=(1, 4, 1), start=np.array([0, 0, 3]), stop=[2.0, INF, INF])
    chex.assert_trees_all_equal(by_mapping, by_number)


def test_ties_of_unequal_workers_stay_ties():
    """0.1 + 0.1 and 2·0.1 come at the same moment, to the end; ties go by index."""
    arrivals = simulation.arrivals(KEY, 3, 300, compute_time=0.1, slowdown=[2.0, 1.0, 2.0])
    np.testing.assert_array_equal(arrivals.worker, ([1, 0, 1, 2] * 75))
    np.testing.assert_array_equal(arrivals.staleness[4:], ([1, 3, 1, 3] * 74))


@pytest.mark.parametrize(
    ("compute_time", "mean", "std"),
    [
        (simulation.deterministic(3.0), 3.0, 0.0),
        (simulation.exponential(3.0), 3.0, 3.0),
        (simulation.lognormal(3.0, 0.5), 3.0, 3.0 * math.sqrt(math.exp(0.25) - 1)),
    ],
)
def test_moments(compute_time, mean, std):
    times = jax.vmap(lambda key: jnp.float32(compute_time(key)))(jax.random.split(KEY, 20_000))
    np.testing.assert_allclose(times.mean(), mean, 0.03)
    np.testing.assert_allclose(times.std(), std, 0.06, atol=1e-6)


def test_time_does_not_lose_small_steps_in_a_long_run():
    """A sum of many small steps; a running float32 sum would stand still or drift."""
    arrivals = simulation.arrivals(KEY, 1, 2**18, compute_time=0.001)
    np.testing.assert_allclose(arrivals.time[-1], 0.001 * 2**18, 1e-5)


@pytest.mark.parametrize("recorded", [False, True])
def test_saved_and_loaded(tmp_path, recorded):
    t = np.arange(20, dtype=np.int32)
    arrivals = Arrivals(t % 3, np.minimum(t, 2), np.float32(0.3) * t)
    if recorded:
        arrivals = dataclasses.replace(
            arrivals, batch=t[::-1], num_steps=t + 1, num_workers=4, local_steps=t[1:5]
        )
    else:
        barrier = np.arange(18, dtype=np.float32).reshape(6, 3)
        arrivals = dataclasses.replace(arrivals, barrier=barrier)
    path = tmp_path / "no suffix"
    arrivals.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["no suffix"]
    loaded = Arrivals.load(str(path))
    expected = dataclasses.replace(arrivals, num_workers=4 if recorded else 3)
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded, expected)
    chex.assert_trees_all_equal(loaded, expected)


def test_a_wrong_file_is_refused(tmp_path):
    path = tmp_path / "arrivals.npz"
    with pytest.raises(FileNotFoundError):
        Arrivals.load(path)
    for contents in [b"", b"worker,staleness\n0,0\n", b"PK\x03\x04 no zip after all"]:
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=r"arrivals\.npz is no file of arrivals"):
            Arrivals.load(path)
    np.save(path.with_suffix(".npy"), np.zeros(3))
    with pytest.raises(ValueError, match="is no file of arrivals"):
        Arrivals.load(path.with_suffix(".npy"))

    entries = {
        "format": "optax_dcasgd.Arrivals",
        "version": 1,
        "num_workers": 2,
        "worker": np.array([0, 1]),
        "staleness": np.array([0, 1]),
        "time": np.array([0.5, 1.0]),
    }
    for change, message in [
        ({"format": "another"}, "is no file of arrivals: its entry 'format'"),
        ({"format": None}, "is no file of arrivals: its entry 'format'"),
        ({"time": None}, "damaged file of arrivals: time is missing"),
        ({"num_workers": None}, "damaged file of arrivals: num_workers is missing"),
        ({"version": 2}, "of version 2; this release reads version 1"),
        ({"worker": np.array([0, 2])}, r"damaged file .*worker\[1\] must be at least 0 and at m"),
        ({"staleness": np.array([0.0, 1.0])}, "damaged file .*staleness must be of integer"),
    ]:
        changed = {k: v for k, v in (entries | change).items() if v is not None}
        np.savez(path, **changed)
        with pytest.raises(ValueError, match=message):
            Arrivals.load(path)
    np.savez(path, **entries)
    np.testing.assert_array_equal(Arrivals.load(path).worker, [0, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"key": jax.random.split(KEY)}, TypeError, "key must be one JAX random key"),
        ({"num_workers": 0}, ValueError, "num_workers must be at least 1"),
        ({"num_updates": 0}, ValueError, "num_updates must be at least 1"),
        ({"compute_time": 0.0}, ValueError, "compute_time must be finite and above 0"),
        ({"compute_time": "exponential"}, TypeError, "compute_time must be a number"),
        (
            {"compute_time": lambda key: jax.random.normal(key, 4)},
            ValueError,
            r"compute_time must return a scalar.*shape \(4,\)",
        ),
        (
            {"local_steps": 0},
            ValueError,
            "local_steps, where it is one for all, must be at least 1",
        ),
        (
            {"local_steps": 2.0},
            TypeError,
            "local_steps, where it is one .* must be a Python integer",
        ),
        ({"local_steps": [1, 0, 2]}, ValueError, "local_steps must be integers of at least 1"),
        ({"local_steps": [1, 1.5, 2]}, ValueError, "local_steps must be integers of at least 1"),
        ({"slowdown": 2.0}, ValueError, "slowdown must be 3 numbers"),
        ({"slowdown": {0: "a"}}, ValueError, "slowdown must be 3 numbers"),
        ({"slowdown": {3: 1.0}}, ValueError, "slowdown names worker 3"),
        ({"slowdown": {-1: 1.0}}, ValueError, "slowdown must be at least 0"),
        ({"slowdown": {0: 0.0}}, ValueError, "slowdown must be finite and above 0"),
        ({"start": {0: -1.0}}, ValueError, "start must be finite and at least 0"),
        ({"stop": {0: math.nan}}, ValueError, "stop must be no NaN"),
        ({"stop": {0: 1.0, 1: 1.0}, "start": {2: 1.0}}, ValueError, "start and stop leave no"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    arguments = {"key": KEY, "num_workers": 3, "num_updates": 5} | arguments
    with pytest.raises(error, match=message):
        simulation.arrivals(**arguments)


def test_wrong_parameters_of_compute_times():
    with pytest.raises(ValueError, match="seconds must be finite and above 0"):
        simulation.deterministic(0.0)
    with pytest.raises(ValueError, match="mean must be finite and above 0"):
        simulation.exponential(-1.0)
    with pytest.raises(ValueError, match="sigma must be finite and at least 0"):
        simulation.lognormal(1.0, -1.0)
    with pytest.raises(TypeError, match="mean must be a number"):
        simulation.lognormal("1")


@pytest.mark.parametrize(("illegal", "seen"), [(-1.0, False), (INF, True), (math.nan, True)])
def test_illegal_compute_times(illegal, seen):
    """Also of a worker that would push too late to be seen."""
    first = jax.random.key_data(jax.random.fold_in(jax.random.fold_in(KEY, 1), 0))

    def compute_time(key):
        return jnp.where(seen | jnp.all(jax.random.key_data(key) == first), illegal, 1.0)

    with pytest.raises(ValueError, match="compute_time must return finite numbers, none below"):
        simulation.arrivals(KEY, 2, 5, compute_time=compute_time, start={1: 3.0})
