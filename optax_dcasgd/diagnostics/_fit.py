"""How close compensated gradients come to the true ones, and the λ that brings them closest."""

from typing import Any, NamedTuple

import jax
import numpy as np

from optax_dcasgd import _arguments
from optax_dcasgd.diagnostics._pairs import Pairs

DEFAULT_EPS = 1e-7  # that of `add_delay_compensation`


class Quality(NamedTuple):
    """How close g̃, stale or compensated, is to the true gradient g."""

    lamda: float  # the λ0 of the compensation; 0 for none
    relative_error: float  # sqrt(Σ|g̃ − g|² / Σ|g|²), over all components of all pairs
    cosine: float  # Σ g̃·g / sqrt(Σ|g̃|² Σ|g|²), likewise
    relative_errors: np.ndarray  # shape=(K,), float64: the same of each pair; NaN where g = 0
    cosines: np.ndarray  # shape=(K,), float64


class _Flat(NamedTuple):
    """Arrays of shape (K, P), float64 or complex128: what the error is made of."""

    grads: np.ndarray
    stale_grads: np.ndarray
    direction: np.ndarray  # the compensation for λ0 = 1 without clip
    limit: np.ndarray  # above this λ0 the clip holds the component; inf for never


def _flatten(pairs: Pairs, adaptive: bool, eps: float, clip: float | None) -> _Flat:
    if not isinstance(pairs, Pairs):
        raise TypeError(f"pairs must be a diagnostics.Pairs; got {pairs!r}.")
    _arguments.check_scalar("eps", eps, minimum=0.0, schedule=False)
    _arguments.check_scalar("clip", clip, minimum=0.0, optional=True, schedule=False)

    def flat(tree: Any) -> np.ndarray:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
        wide = np.complex128 if any(map(np.iscomplexobj, leaves)) else np.float64
        return np.concatenate([x.astype(wide).reshape(len(x), -1) for x in leaves], 1)

    grads, stale_grads = flat(pairs.grads), flat(pairs.stale_grads)
    delta = flat(pairs.params) - flat(pairs.stale_params)
    finite = np.all(np.isfinite(grads) & np.isfinite(stale_grads) & np.isfinite(delta), 1)
    if not finite.all():
        raise ValueError(
            f"{(~finite).sum()} of {finite.size} pairs are not finite, the first being pair "
            f"{np.argmin(finite)}: take them from a run that does not diverge."
        )
    if not np.any(grads):
        raise ValueError("The true gradient is zero in all pairs, so no error is relative to it.")
    size = np.abs(stale_grads)
    direction = size**2 * delta
    with np.errstate(divide="ignore", invalid="ignore"):
        if adaptive:
            direction = np.where(size == 0, 0, direction / np.sqrt(flat(pairs.nu) + eps))
        moved = direction != 0
        limit = np.where(moved, np.inf if clip is None else clip * size / np.abs(direction), np.inf)
    return _Flat(grads, stale_grads, direction, limit)


def _quality(flat: _Flat, lamda: float) -> Quality:
    estimate = flat.stale_grads + np.minimum(lamda, flat.limit) * flat.direction
    error = np.sum(np.abs(estimate - flat.grads) ** 2, 1)
    size = np.sum(np.abs(flat.grads) ** 2, 1)
    dot = np.sum((estimate * flat.grads.conj()).real, 1)
    product = np.sum(np.abs(estimate) ** 2, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Quality(
            lamda=float(lamda),
            relative_error=float(np.sqrt(error.sum() / size.sum())),
            cosine=float(dot.sum() / np.sqrt(product.sum() * size.sum())),
            relative_errors=np.sqrt(error / size),
            cosines=dot / np.sqrt(product * size),
        )


def quality(
    pairs: Pairs,
    lamda: float,
    *,
    adaptive: bool = False,
    eps: float = DEFAULT_EPS,
    clip: float | None = None,
) -> Quality:
    """Judges the compensation by a given λ0; 0 judges the stale gradients themselves.

    Args:
      pairs: From `collect` or `pairs`.
      lamda: λ0 ≥ 0.
      adaptive: Whether to judge DC-ASGD-a, with the ν of the pairs, in place of DC-ASGD-c, which
        is ``add_delay_compensation(decay=None)``.
      eps: As for `add_delay_compensation`.
      clip: As for `add_delay_compensation`, but by default None.

    Returns:
      Its errors and cosines, over all pairs and for each pair.

    Raises:
      TypeError: If an argument has no legal type.
      ValueError: If one is out of range, or a pair is not finite, or the true gradients are zero.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_dcasgd import diagnostics
      >>> grad_fn = jax.value_and_grad(lambda w, batch, key: 2 * jnp.sum(w**2))  # g = 4·w
      >>> w, w_s = jnp.array([[0.4], [0.6]]), jnp.array([[0.5], [0.5]])
      >>> pairs = diagnostics.pairs(grad_fn, w, w_s, batches=None)
      >>> for lamda in (0.0, 0.5, 1.0):
      ...     print(round(diagnostics.quality(pairs, lamda).relative_error, 3))
      0.196
      0.098
      0.0
    """
    _arguments.check_scalar("lamda", lamda, minimum=0.0, schedule=False)
    return _quality(_flatten(pairs, adaptive, eps, clip), lamda)


def fit(
    pairs: Pairs, *, adaptive: bool = False, eps: float = DEFAULT_EPS, clip: float | None = None
) -> Quality:
    r"""Finds the λ0 ≥ 0 whose compensation comes closest to the true gradient, by least squares.

    For stale gradients :math:`g_s`, true ones :math:`g` and the compensation :math:`\lambda_0 c`,
    where :math:`c = |g_s|^2 (w - w_s)` (DC-ASGD-c) or that over :math:`\sqrt{\nu + \varepsilon}`
    (DC-ASGD-a), the sum of :math:`|g_s + \lambda_0 c - g|^2` over all components of all pairs is
    smallest at

    .. math:: \lambda_0 = \max\Bigl(0, \frac{\sum c\,(g - g_s)}{\sum c^2}\Bigr) .

    With ``clip`` a component no longer changes once :math:`\lambda_0` is above
    :math:`\text{clip}\,|g_s| / |c|`. Between two neighbouring values of this kind the sum is a
    parabola. All of them are tried, in sorted order, so the minimum is exact.

    Mini-batch noise makes this λ smaller. Where :math:`g_s` is mostly Gaussian noise,
    :math:`E[g_s^4] = 3\,E[g_s^2]^2`. The fitted λ of DC-ASGD-c is then a third of the λ for which
    :math:`\lambda\,E[g_s^2]` is the curvature.

    Args:
      pairs: From `collect` or `pairs`.
      adaptive: Whether to fit DC-ASGD-a in place of DC-ASGD-c, which is
        ``add_delay_compensation(decay=None)``.
      eps: As for `add_delay_compensation`.
      clip: As for `add_delay_compensation`, but by default None.

    Returns:
      The best λ0 (the smallest, if there are several), with its errors and cosines. NumPy computes
      them in float64, which takes the memory of about ten copies of the pairs.

    Raises:
      TypeError: If an argument has no legal type.
      ValueError: If one is out of range, or a pair is not finite, or the true gradients are zero.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_dcasgd import diagnostics
      >>> grad_fn = jax.value_and_grad(lambda w, batch, key: 2 * jnp.sum(w**2))  # g = 4·w
      >>> w, w_s = jnp.array([[0.4], [0.6]]), jnp.array([[0.5], [0.5]])
      >>> best = diagnostics.fit(diagnostics.pairs(grad_fn, w, w_s, batches=None))
      >>> print(best.lamda, best.relative_error)  # exact here: 4 / (4·0.5)²
      1.0 0.0
    """
    flat = _flatten(pairs, adaptive, eps, clip)
    moved = flat.direction != 0
    direction = flat.direction[moved]
    square = np.abs(direction) ** 2
    product = (direction.conj() * (flat.grads - flat.stale_grads)[moved]).real
    limit = flat.limit[moved]
    if not square.any():
        return _quality(flat, 0.0)
    order = np.argsort(limit)
    limit, square, product = limit[order], square[order], product[order]
    # Between two limits: the components before are held, those after still grow with λ.
    low = np.append(0.0, limit)
    high = np.append(limit, np.inf)
    growing_square = np.append(square[::-1].cumsum()[::-1], 0.0)
    growing_product = np.append(product[::-1].cumsum()[::-1], 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        # An infinite limit gives inf - inf = NaN. No λ lies above it, and nanargmin skips it.
        held = np.append(0.0, np.cumsum(limit**2 * square - 2 * limit * product))
        vertex = np.where(growing_square > 0, growing_product / growing_square, low)
        lamda = np.clip(vertex, low, high)
        error = held + lamda**2 * growing_square - 2 * lamda * growing_product
    return _quality(flat, float(lamda[np.nanargmin(error)]))
