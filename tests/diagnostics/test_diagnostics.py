"""`diagnostics` on problems whose answers are known, against brute force, and along a run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import simulation_cases as cases

from optax_dcasgd import add_delay_compensation, diagnostics, simulation
from optax_dcasgd.diagnostics import Pairs


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def random_pairs(num_pairs=3, complex_numbers=False, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        x = rng.normal(size=shape)
        return x + 1j * rng.normal(size=shape) if complex_numbers else x

    def tree():
        return {"w": normal(num_pairs, 2, 3), "b": normal(num_pairs)}

    params, stale_params, grads = tree(), tree(), tree()
    # A true gradient that compensation can come near to, in most components.
    stale_grads = jax.tree.map(
        lambda g, w, s: g - 0.3 * abs(g) ** 2 * (w - s), *(grads, params, stale_params)
    )
    nu = jax.tree.map(lambda g: np.abs(g) ** 2 + 0.1, grads)
    return Pairs(params, stale_params, grads, stale_grads, nu)


@pytest.mark.usefixtures("x64")
def test_a_quadratic():
    """½·Σ h·w²: g − g_s = h·Δ, so 1/(h·w_s²) makes DC-c exact, and 1/|w_s| DC-a without memory."""
    rng = np.random.default_rng(0)
    h, w_s, w = 3.0, -0.5, np.array([0.4, 0.1, -0.9])
    grad_fn = jax.value_and_grad(lambda w, batch, key: h * jnp.sum(w**2) / 2)
    pairs = diagnostics.pairs(grad_fn, w[:, None], np.full((3, 1), w_s), None, decay=0.0)

    stale = diagnostics.quality(pairs, 0.0)
    np.testing.assert_allclose(stale.relative_errors, np.abs(w - w_s) / np.abs(w))
    np.testing.assert_allclose(stale.cosines, np.sign(w * w_s))
    np.testing.assert_allclose(stale.relative_error, np.sqrt(np.sum((w - w_s) ** 2) / np.sum(w**2)))
    np.testing.assert_allclose(stale.cosine, np.sum(w * w_s) / np.sqrt(3 * w_s**2 * np.sum(w**2)))
    for adaptive, expected in [(False, 1 / (h * w_s**2)), (True, 1 / abs(w_s))]:
        best = diagnostics.fit(pairs, adaptive=adaptive, eps=0.0)
        np.testing.assert_allclose(best.lamda, expected)
        np.testing.assert_allclose(best.relative_error, 0, atol=1e-12)
        np.testing.assert_allclose([best.cosine, *best.cosines], 1)

    # With several curvatures no λ is right for all, and the sums of fit's formula decide.
    h, w_s, w = np.array([1.0, 2.0, 5.0]), rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    grad_fn = jax.value_and_grad(lambda w, batch, key: jnp.sum(h * w**2) / 2)
    best = diagnostics.fit(diagnostics.pairs(grad_fn, w, w_s, None))
    delta, g = w - w_s, h * w_s
    np.testing.assert_allclose(
        best.lamda, np.sum(h * delta * g**2 * delta) / np.sum((g**2 * delta) ** 2)
    )


@pytest.mark.usefixtures("x64")
def test_logistic_regression_by_hand():
    """log(1 + e^−w): g = −σ(−w), and for w_s → w the λ that fits is g′/g² = σ(w)/σ(−w) = e^w."""
    grad_fn = jax.value_and_grad(lambda w, batch, key: jax.nn.softplus(-w))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    for w, w_s in [(0.3, -0.2), (1.0, 1.0 - 1e-6)]:
        pairs = diagnostics.pairs(grad_fn, np.array([w]), np.array([w_s]), None)
        expected = (sigmoid(-w_s) - sigmoid(-w)) / (sigmoid(-w_s) ** 2 * (w - w_s))
        np.testing.assert_allclose(diagnostics.fit(pairs).lamda, expected, 1e-6)
    np.testing.assert_allclose(expected, np.e, 1e-5)


@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.usefixtures("x64")
def test_logistic_regression_in_expectation(batch_size):
    """Labels from the model itself, inputs ±1: g is the mean of B draws of variance σ² = p(1 − p),
    and that is the curvature too. So E[c·(g − g_s)] / E[c²] = σ²·E[g²] / E[g⁴], which grows with B.
    """
    rng = np.random.default_rng(0)
    num_pairs, w = 40_000, 0.5
    x = np.sign(rng.normal(size=(num_pairs, batch_size)))
    y = rng.random(x.shape) < 1 / (1 + np.exp(-w * x))

    def grad_fn(w, batch, key):
        x, y = batch
        return jnp.zeros(()), jnp.mean((jax.nn.sigmoid(w * x) - y) * x)

    w_s = np.full(num_pairs, w)
    fitted = diagnostics.fit(diagnostics.pairs(grad_fn, w_s + 1e-4, w_s, (x, y))).lamda
    p = 1 / (1 + np.exp(-w))
    variance = p * (1 - p)
    fourth_moment = variance * (1 - 3 * variance)
    expected_fourth = (fourth_moment + 3 * (batch_size - 1) * variance**2) / batch_size**3
    np.testing.assert_allclose(fitted, variance**2 / batch_size / expected_fourth, 0.03)


@pytest.mark.parametrize("complex_numbers", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("clip", [None, 0.0, 0.1, 1.0])
def test_the_fit_is_the_smallest_error_of_all(clip, adaptive, complex_numbers):
    options = {"adaptive": adaptive, "clip": clip, "eps": 0.01}
    for seed in range(5):
        pairs = random_pairs(complex_numbers=complex_numbers, seed=seed)
        best = diagnostics.fit(pairs, **options)
        grid = np.append(0.0, np.geomspace(1e-3, 1e5, 1001))
        for _ in range(3):  # brute force, ever finer around the best so far
            errors = [diagnostics.quality(pairs, lamda, **options).relative_error for lamda in grid]
            first = min(max(int(np.argmin(errors)) - 1, 0), grid.size - 3)
            grid = np.linspace(grid[first], grid[first + 2], 101)
        assert best.relative_error == pytest.approx(min(errors), rel=1e-6)
        assert diagnostics.quality(pairs, best.lamda, **options).cosine == best.cosine


def test_the_fit_is_never_below_zero():
    pairs = random_pairs()
    against = pairs._replace(params=pairs.stale_params, stale_params=pairs.params)
    assert diagnostics.fit(against).lamda == 0
    assert diagnostics.fit(against, clip=1.0).lamda == 0
    same = pairs._replace(stale_params=pairs.params)
    assert diagnostics.fit(same).lamda == 0


@pytest.mark.parametrize("complex_numbers", [False, True])
@pytest.mark.parametrize("options", [{}, {"clip": 0.2}, {"eps": 0.5}], ids=str)
@pytest.mark.usefixtures("x64")
def test_what_is_judged_is_what_the_transformation_does(options, complex_numbers):
    pairs = random_pairs(1, complex_numbers)
    one = jax.tree.map(lambda x: jnp.asarray(x[0]), pairs)
    for adaptive in [False, True]:
        judged = diagnostics.quality(
            pairs._replace(nu=reference.squares(pairs.stale_grads)),
            2.0,
            adaptive=adaptive,
            **options,
        )
        decay = {"decay": 0.0} if adaptive else {}
        tx = add_delay_compensation(2.0, store=None, **decay, **options)
        compensated, _ = tx.update(
            one.stale_grads, tx.init(one.params), one.params, stale_params=one.stale_params
        )
        difference = optax.tree.norm(jax.tree.map(jnp.subtract, compensated, one.grads))
        expected = difference / optax.tree.norm(one.grads)
        np.testing.assert_allclose(judged.relative_error, expected, 1e-10)


@pytest.mark.parametrize(("num_pairs", "replayed"), [(3, False), (7, False), (40, True)])
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
    recorded = {3: [12, 25, 39], 7: [4, 10, 16, 21, 27, 33, 39], 40: range(40)}[num_pairs]
    for row, t in enumerate(recorded):
        expected = Pairs(
            versions[t],
            versions[t - staleness[t]],
            gradient(t, t),
            gradient(t - staleness[t], t),
            nus[t],
        )
        jax.tree.map(
            lambda x, e, row=row: np.testing.assert_allclose(x[row], e, 1e-10, 1e-12),
            pairs,
            expected,
        )


def test_fresh_gradients_of_a_real_run_are_right():
    """Each on the batch and with the key that it was computed with."""
    arrivals = simulation.arrivals(jax.random.key(0), 1, 24)
    arrivals = dataclasses.replace(arrivals, batch=np.random.default_rng(0).permutation(24))

    def grad_fn(w, batch, key):
        return jnp.zeros(()), w - batch + jax.random.normal(key)

    for batches in (jnp.arange(24.0), jnp.arange(5.0), lambda i: 2.0 * i):
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


def diagnose(loss, num_workers=8, **options):
    grad_fn = jax.value_and_grad(loss)
    arrivals = simulation.arrivals(jax.random.key(0), num_workers, 100, compute_time=1.0)
    return diagnostics.diagnose(
        grad_fn, jnp.array([0.5, -0.5]), optax.sgd(0.1), jnp.ones(100), arrivals, **options
    )


def test_the_verdict():
    convex = diagnose(lambda w, x, key: jnp.sum(jax.nn.softplus(3 * w) + jax.nn.softplus(-w)))
    assert convex.verdict.startswith("Compensation pays: add_delay_compensation(lamda=")
    assert convex.best in convex.fits
    best = convex.fits[convex.best]
    assert best.relative_error == min(f.relative_error for f in convex.fits.values())
    assert best.relative_error < convex.stale.relative_error
    assert convex.arguments["lamda"] == best.lamda > 0
    add_delay_compensation(**convex.arguments)
    assert convex.staleness == pytest.approx(7, abs=0.5)

    # The curvature is negative, so g² stands for the wrong thing.
    concave = diagnose(lambda w, x, key: -jnp.sum(jax.nn.softplus(w**2 / 2)))
    assert concave.verdict.startswith("Compensation does not pay: at its best it removes 0% of")
    assert concave.best is None
    assert concave.arguments == {"lamda": 0.0}

    for harmless in [
        diagnose(lambda w, x, key: jnp.sum(w)),
        diagnose(lambda w, x, key: jnp.sum(w**2), num_workers=1),
    ]:
        assert harmless.verdict.startswith("Nothing to compensate: stale gradients are off by only")
        assert harmless.best is None


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
    assert report.arguments == {"lamda": report.fits["DC-a"].lamda, "decay": 0.5, "eps": 1e-6}


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


def test_wrong_pairs():
    grad_fn = jax.value_and_grad(lambda w, x, key: jnp.sum(w["a"] ** 2))
    w = {"a": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match=r"stale_params\['a'\] has shape \(2,\)"):
        diagnostics.pairs(grad_fn, w, {"a": jnp.ones(2)}, None)
    with pytest.raises(ValueError, match="params must be parameters stacked"):
        diagnostics.pairs(grad_fn, {"a": jnp.ones(())}, w, None)
    with pytest.raises(ValueError, match="params must be parameters stacked"):
        diagnostics.pairs(grad_fn, {"a": jnp.ones(2), "b": jnp.ones(3)}, w, None)
    with pytest.raises(ValueError, match=r"batches has shape \(2,\)"):
        diagnostics.pairs(grad_fn, w, w, jnp.ones(2))
    with pytest.raises(TypeError, match=r"pairs must be a diagnostics\.Pairs"):
        diagnostics.fit(w)
    pairs = random_pairs()
    with pytest.raises(ValueError, match="lamda must be finite and at least 0"):
        diagnostics.quality(pairs, -1.0)
    pairs.stale_grads["b"][1] = np.nan
    with pytest.raises(ValueError, match="1 of 3 pairs are not finite, the first being pair 1"):
        diagnostics.fit(pairs)
    zero = jax.tree.map(np.zeros_like, random_pairs())
    with pytest.raises(ValueError, match="The true gradient is zero in all pairs"):
        diagnostics.fit(zero)
