"""`collect` and `pairs` against float64 NumPy, and what `diagnose` says."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import simulation_cases as cases

from optax_dcasgd import add_delay_compensation, diagnostics, simulation
from optax_dcasgd.diagnostics import Pairs


@pytest.mark.parametrize(("num_pairs", "replayed"), [(7, False), (40, True)])
@pytest.mark.usefixtures("x64")
def test_pairs_of_a_run(num_pairs, replayed):
    """Against the float64 server: w, w_s, ν over all updates, both gradients on the same batch."""
    arrivals, batches, batch = cases.arrivals(), cases.BATCHES, np.arange(40)
    if replayed:  # a run that went twelve batches over and over, in an order of its own
        batch = np.roll(batch, 5)
        arrivals = dataclasses.replace(arrivals, batch=batch)
        batches = {name: x[:12] for name, x in batches.items()}
    staleness = np.asarray(arrivals.staleness)
    updates = [[(batch[t] % len(batches["x"]), tau)] for t, tau in enumerate(staleness)]
    versions, _ = cases.numpy_run(updates, lamda=0.0)
    versions = [reference.wide(cases.PARAMS), *versions]

    def gradient(version, t):
        return cases.numpy_grad_fn(
            versions[version], *(cases.BATCHES[k][updates[t][0][0]] for k in "xy")
        )[1]

    nu, nus = reference.zeros(cases.PARAMS), []
    for t, tau in enumerate(staleness):
        nu = {k: 0.8 * nu[k] + 0.2 * g**2 for k, g in gradient(t - tau, t).items()}
        nus.append(nu)

    pairs = diagnostics.collect(
        cases.grad_fn,
        cases.as_jax(cases.PARAMS),
        optax.sgd(cases.LEARNING_RATE),
        cases.as_jax(batches),
        arrivals,
        num_pairs=num_pairs,
        decay=0.8,
    )
    recorded = {7: [4, 10, 16, 21, 27, 33, 39], 40: range(40)}[num_pairs]
    for row, t in enumerate(recorded):
        expected = Pairs(
            versions[t],
            versions[t - staleness[t]],
            gradient(t, t),
            gradient(t - staleness[t], t),
            nus[t],
        )
        actual = jax.tree.map(lambda x, row=row: x[row], pairs)
        chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_fresh_gradients_of_a_real_run_are_right():
    """Each on the batch and with the key that it was computed with."""
    arrivals = simulation.arrivals(jax.random.key(0), 1, 24)
    arrivals = dataclasses.replace(arrivals, batch=np.random.default_rng(0).permutation(24))

    def grad_fn(w, batch, key):
        return jnp.zeros(()), w - batch + jax.random.normal(key)

    for batches in (jnp.arange(5.0), lambda i: 2.0 * i):
        pairs = diagnostics.collect(
            grad_fn, jnp.zeros(()), optax.sgd(0.1), batches, arrivals, num_pairs=8
        )
        np.testing.assert_array_equal(pairs.grads, pairs.stale_grads)

    @jax.jit
    def of_traced(batch):
        traced = dataclasses.replace(arrivals, batch=batch)
        return diagnostics.collect(
            grad_fn, jnp.zeros(()), optax.sgd(0.1), jnp.arange(24.0), traced, num_pairs=8
        )

    pairs = of_traced(arrivals.batch)
    np.testing.assert_allclose(pairs.grads, pairs.stale_grads, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_pairs_of_a_trajectory_of_ones_own():
    """ν over the pairs as given, each pair on its own batch and key."""
    rng = np.random.default_rng(0)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(4), jnp.arange(3))
    noise = jax.vmap(jax.random.normal)(keys)
    w, w_s, b = rng.normal(size=(3, 3, 2))

    def grad_fn(w, batch, key):
        return jnp.zeros(()), batch * w + jax.random.normal(key)

    pairs = diagnostics.pairs(
        grad_fn,
        w,
        w_s,
        lambda k: jnp.asarray(b)[k],
        decay=0.5,
        key=jax.random.key(4),
    )
    stale_grads = b * w_s + noise[:, None]
    np.testing.assert_allclose(pairs.stale_grads, stale_grads)
    np.testing.assert_allclose(pairs.grads, b * w + noise[:, None])
    nu = np.zeros(2)
    for row, g in zip(pairs.nu, stale_grads, strict=True):
        nu = 0.5 * nu + 0.5 * g**2
        np.testing.assert_allclose(row, nu)


def diagnose(loss, **options):
    t = np.arange(100)  # eight workers that take turns
    arrivals = simulation.Arrivals(t % 8, np.minimum(t, 7), t + 1.0)
    return diagnostics.diagnose(
        jax.value_and_grad(loss),
        jnp.array([0.5, -0.5]),
        optax.sgd(0.1),
        jnp.ones(100),
        arrivals,
        **options,
    )


def test_the_verdict_where_compensation_pays():
    report = diagnose(lambda w, x, key: jnp.sum(jax.nn.softplus(3 * w) + jax.nn.softplus(-w)))
    best = report.fits[report.best]
    assert best.relative_error == min(f.relative_error for f in report.fits.values())
    assert best.relative_error < report.stale.relative_error
    assert report.staleness == pytest.approx(7, abs=0.5)
    check_arguments(report, decay=0.95, clip=1.0)


def test_the_verdict_where_it_does_not():
    # The curvature is negative, so g² stands for the wrong thing.
    concave = diagnose(lambda w, x, key: -jnp.sum(jax.nn.softplus(w**2 / 2)))
    assert concave.verdict.startswith("Compensation does not pay: at its best it removes 0% of")
    assert concave.best is None
    assert concave.arguments == {"lamda": 0.0}

    linear = diagnose(lambda w, x, key: jnp.sum(w))
    assert linear.verdict.startswith("Nothing to compensate: stale gradients are off by only 0.0%")
    assert linear.best is None


def check_arguments(report, decay, clip, **adaptive):
    """Called with the arguments, or as the verdict says, `add_delay_compensation` does the best."""
    is_adaptive = report.best.startswith("DC-a")
    assert report.arguments == {
        "lamda": report.fits[report.best].lamda,
        "decay": decay if is_adaptive else None,
        "clip": clip if "clip" in report.best else None,
    } | (adaptive if is_adaptive else {})
    add_delay_compensation(**report.arguments)
    pays, call = re.match(r"(.*): add_delay_compensation\((.*)\) removes", report.verdict).groups()
    assert pays == "Compensation pays"
    expected = {
        name: value if value is None else pytest.approx(value, rel=0.01)
        for name, value in report.arguments.items()
    }
    assert eval(f"dict({call})") == expected


def test_the_report_prints_a_table():
    report = diagnose(lambda w, x, key: jnp.sum(w**2), decay=0.5, eps=1e-6, clip=0.5)
    lines = str(report).splitlines()
    assert lines[0] == f"32 gradients, {report.staleness:.1f} updates old on average"
    assert [line[:16].strip() for line in lines[2:7]] == [
        "stale gradient",
        "DC-a, clip=0.5",
        "DC-a",
        "DC-c, clip=0.5",
        "DC-c",
    ]
    for line, of in zip(lines[2:7], [report.stale, *report.fits.values()], strict=True):
        assert line.split()[-2:] == [f"{of.relative_error:.3f}", f"{of.cosine:.3f}"]
    assert " ".join(lines[7:]) == report.verdict
    assert report.best == "DC-a"
    check_arguments(report, decay=0.5, clip=0.5, eps=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_pairs": 0}, ValueError, "num_pairs must be at least 1"),
        ({"num_pairs": 101}, ValueError, "num_pairs=101 is more than the 100 updates"),
        ({"decay": 1.0}, ValueError, "decay must be finite and at least 0 and below 1"),
        ({"clip": -1.0}, ValueError, "clip must be finite and at least 0"),
        ({"clip": None}, TypeError, "clip must be a number"),
        ({"eps": -1.0}, ValueError, "eps must be finite and at least 0"),
        ({"key": 0}, TypeError, "key must be one JAX random key"),
    ],
)
def test_wrong_arguments(change, error, message):
    with pytest.raises(error, match=message):
        diagnose(lambda w, x, key: jnp.sum(w**2), **change)
