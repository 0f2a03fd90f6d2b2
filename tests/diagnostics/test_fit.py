"""`fit` and `quality` on problems whose answers are known, and against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from optax_dcasgd import add_delay_compensation, diagnostics
from optax_dcasgd.diagnostics import Pairs


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


@pytest.mark.parametrize("complex_numbers", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("clip", [None, 0.0, 0.1, 1.0])
def test_the_fit_is_the_smallest_error_of_all(clip, adaptive, complex_numbers):
    options = {"adaptive": adaptive, "clip": clip, "eps": 0.01}
    for seed in range(3):
        pairs = random_pairs(complex_numbers=complex_numbers, seed=seed)
        best = diagnostics.fit(pairs, **options)
        grid = np.append(0.0, np.geomspace(1e-3, 1e5, 301))
        for _ in range(4):  # brute force, ever finer around the best so far
            errors = [diagnostics.quality(pairs, lamda, **options).relative_error for lamda in grid]
            first = min(max(int(np.argmin(errors)) - 1, 0), grid.size - 3)
            grid = np.linspace(grid[first], grid[first + 2], 31)
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
@pytest.mark.parametrize("options", [{"clip": None}, {"clip": 0.2, "eps": 0.5}], ids=str)
@pytest.mark.usefixtures("x64")
def test_what_is_judged_is_what_the_transformation_does(options, complex_numbers):
    pairs = random_pairs(1, complex_numbers)
    pairs = pairs._replace(nu=reference.squares(pairs.stale_grads))
    one = jax.tree.map(lambda x: jnp.asarray(x[0]), pairs)
    for decay in [None, 0.0]:
        adaptive = decay is not None
        judged = diagnostics.quality(pairs, 2.0, adaptive=adaptive, **options)
        tx = add_delay_compensation(2.0, decay=decay, **options)
        compensated, _ = jax.jit(tx.update)(
            one.stale_grads, tx.init(one.params), one.params, stale_params=one.stale_params
        )
        difference = optax.tree.norm(jax.tree.map(jnp.subtract, compensated, one.grads))
        expected = difference / optax.tree.norm(one.grads)
        np.testing.assert_allclose(judged.relative_error, expected, 1e-10)


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
