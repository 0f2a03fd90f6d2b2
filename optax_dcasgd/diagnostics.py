"""How wrong stale gradients are on *your* model and data, and what compensation makes of them.

    print(diagnostics.diagnose(grad_fn, params, tx, batches, arrivals))

trains as `simulation.run` does, and compares along the way the stale gradient, and the compensated
one, with the gradient that a fresh worker would have sent. The rest of this module is that in
parts: `collect` or `pairs` make the `Pairs` to look at, `fit` finds λ, `quality` judges one.
"""

import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_dcasgd import _arguments, _trees, simulation
from optax_dcasgd._compensation import add_delay_compensation
from optax_dcasgd.simulation import Arrivals, _arrivals
from optax_dcasgd.simulation._run import check_batches, check_grad_fn, row

GradFn = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]

# The verdict's thresholds: a relative error of stale gradients that does no harm, and a share of
# the squared error that is worth the trouble of removing.
_HARMLESS_ERROR = 0.05
_WORTHWHILE_SHARE = 0.1

_DEFAULT_EPS = 1e-7  # that of `add_delay_compensation`


class Pairs(NamedTuple):
    """Gradients at K pairs (w_s, w) of stale and current parameters, each pair on one batch.

    Every leaf has a leading axis of size K; otherwise all trees are like the parameters.
    """

    params: Any  # w
    stale_params: Any  # w_s
    grads: Any  # at w: the true gradient
    stale_grads: Any  # at w_s
    nu: Any  # ν of DC-ASGD-a, this gradient included; real


class Quality(NamedTuple):
    """How close g̃, stale or compensated, is to the true gradient g."""

    lamda: float  # the λ0 of the compensation; 0 for none
    relative_error: float  # sqrt(Σ|g̃ − g|² / Σ|g|²), over all components of all pairs
    cosine: float  # Σ g̃·g / sqrt(Σ|g̃|² Σ|g|²), likewise
    relative_errors: np.ndarray  # shape=(K,), float64: the same of each pair; NaN where g = 0
    cosines: np.ndarray  # shape=(K,), float64


def pairs(
    grad_fn: GradFn,
    params: Any,
    stale_params: Any,
    batches: Any,
    *,
    decay: float = 0.95,
    key: jax.Array | None = None,
) -> Pairs:
    r"""Computes both gradients of pairs from a trajectory of your own.

    Args:
      grad_fn: ``grad_fn(params, batch, key) -> (loss, grads)``, as for `simulation.run`.
      params: K current parameters w, stacked along a new leading axis.
      stale_params: K stale parameters :math:`w_s`, likewise.
      batches: K batches along a leading axis; or a function from k (traced) to batch k.
      decay: m of :math:`\nu_k = m\,\nu_{k-1} + (1 - m)\,|g_k|^2`, from :math:`\nu = 0` and over the
        stale gradients of the pairs in their order. Give consecutive updates (or a decay that is
        smaller by the power of the updates left out) for the ν that training would have.
      key: A JAX random key, by default ``jax.random.key(0)``; pair k gets ``fold_in(key, k)``.

    Raises:
      TypeError: If an argument has no legal type.
      ValueError: If a tree does not fit the others (the message names the leaf).

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_dcasgd import diagnostics
      >>> grad_fn = jax.value_and_grad(lambda w, batch, key: 2 * jnp.sum(w**2))  # g = 4·w
      >>> w, w_s = jnp.array([[0.4], [0.6]]), jnp.array([[0.5], [0.5]])
      >>> pairs = diagnostics.pairs(grad_fn, w, w_s, batches=None)
      >>> diagnostics.fit(pairs).lamda  # exact here: 4 / (4·0.5)²
      1.0
    """
    _arguments.check_callable("grad_fn", grad_fn, "(params, batch, key) -> (loss, grads)")
    _arguments.check_scalar("decay", decay, minimum=0.0, below=1.0, schedule=False)
    key = jax.random.key(0) if key is None else key
    _arguments.check_key("key", key)
    params = _trees.copy(params)
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(params)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "params must be parameters stacked along a leading axis, of the same size in every "
            f"leaf; got leading axes {sorted(sizes)}."
        )
    stale_params = _trees.align("stale_params", stale_params, params)
    num_pairs = jax.tree.leaves(params)[0].shape[0]
    check_batches(batches, num_pairs)
    check_grad_fn(grad_fn, row(params, 0), batches, key)
    k = jnp.arange(num_pairs, dtype=jnp.int32)
    grads = _gradients(grad_fn, params, batches, key, k)
    stale_grads = _gradients(grad_fn, stale_params, batches, key, k)
    link = add_delay_compensation(0.0, decay=decay, store=None)

    def accumulate(state: Any, pair: Any) -> Any:
        params, grads = pair
        _, state = link.update(grads, state, params, stale_params=params)
        return state, state.nu

    _, nu = lax.scan(accumulate, link.init(row(params, 0)), (params, stale_grads))
    return Pairs(params, stale_params, grads, stale_grads, nu)


def collect(
    grad_fn: GradFn,
    params: optax.Params,
    tx: optax.GradientTransformation,
    batches: Any,
    arrivals: Arrivals,
    *,
    num_pairs: int = 32,
    decay: float = 0.95,
    key: jax.Array | None = None,
) -> Pairs:
    """Trains as ``simulation.run`` does and keeps pairs evenly spaced along the way.

    The state of the training holds 3 · num_pairs copies of the parameters for this.

    Args:
      grad_fn: As for `simulation.run`, like the next four.
      params: The initial parameters.
      tx: Any Optax optimizer; it decides the trajectory.
      batches: One batch a push.
      arrivals: The order of the pushes.
      num_pairs: K, how many pairs; the last is that of the last update.
      decay: m of DC-ASGD-a, whose ν runs over the stale gradients of all updates.
      key: A JAX random key, by default ``jax.random.key(0)``.

    Raises:
      TypeError: If an argument has no legal type.
      ValueError: If an argument is out of range or does not fit, as in `simulation.run`.
    """
    _arguments.check_transformation("tx", tx)
    _arguments.check_integer("num_pairs", num_pairs, minimum=1)
    _arguments.check_scalar("decay", decay, minimum=0.0, below=1.0, schedule=False)
    _arrivals.check(arrivals)
    key = jax.random.key(0) if key is None else key
    recorder = _record(num_pairs, _spacing(arrivals, num_pairs), decay)
    result = simulation.run(grad_fn, params, optax.chain(recorder, tx), batches, arrivals, key=key)
    seen: Pairs = result.state[0].pairs
    grads = _gradients(grad_fn, seen.params, batches, key, _recorded_at(arrivals, num_pairs))
    return seen._replace(grads=grads)


def _spacing(arrivals: Arrivals, num_pairs: int) -> int:
    num_updates = int(jnp.shape(arrivals.worker)[0])
    if num_updates < num_pairs:
        raise ValueError(f"num_pairs={num_pairs} is more than the {num_updates} updates there are.")
    return num_updates // num_pairs


def _recorded_at(arrivals: Arrivals, num_pairs: int) -> np.ndarray:
    """The updates whose pairs `collect` keeps, shape (num_pairs,)."""
    last = np.arange(1, num_pairs + 1) * _spacing(arrivals, num_pairs) - 1
    last[-1] = jnp.shape(arrivals.worker)[0] - 1
    return last.astype(np.int32)


class _RecordState(NamedTuple):
    link: Any  # keeps ν
    pairs: Pairs


def _record(num_pairs: int, spacing: int, decay: float) -> optax.GradientTransformationExtraArgs:
    """Passes gradients on as they are, and keeps the last pair of each stretch of updates."""
    link = add_delay_compensation(0.0, decay=decay, store=None)

    def init_fn(params: optax.Params) -> _RecordState:
        state = link.init(params)
        rows = jax.tree.map(lambda p: jnp.zeros((num_pairs, *p.shape), p.dtype), (params, state.nu))
        return _RecordState(state, Pairs(rows[0], rows[0], None, rows[0], rows[1]))

    def update_fn(
        updates: optax.Updates,
        state: _RecordState,
        params: optax.Params | None = None,
        *,
        stale_params: Any,
        **extra_args: Any,
    ) -> tuple[optax.Updates, _RecordState]:
        del extra_args
        # Each update of a stretch overwrites the one before.
        stretch = jnp.minimum(state.link.count // spacing, num_pairs - 1)
        _, link_state = link.update(updates, state.link, params, stale_params=stale_params)
        kept = jax.tree.map(
            lambda rows, x: lax.dynamic_update_index_in_dim(
                rows, jnp.asarray(x, rows.dtype), stretch, 0
            ),
            state.pairs,
            Pairs(params, stale_params, None, updates, link_state.nu),
        )
        return updates, _RecordState(link_state, kept)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _gradients(grad_fn: GradFn, params: Any, batches: Any, key: Any, t: Any) -> Any:
    """The gradients at stacked parameters, each on its batch ``t``, one after another."""

    def gradients(params: Any, data: Any, key: Any) -> Any:
        def gradient(x: Any) -> Any:
            params, t = x
            batch = batches(t) if callable(batches) else row(data, t)
            return grad_fn(params, batch, jax.random.fold_in(key, t))[1]

        return lax.map(gradient, (params, jnp.asarray(t)))

    return jax.jit(gradients)(params, None if callable(batches) else batches, key)


class _Flat(NamedTuple):
    """Arrays of shape (K, P), float64 or complex128: what the error is made of."""

    grads: np.ndarray
    stale_grads: np.ndarray
    direction: np.ndarray  # the compensation of λ0 = 1 without clip
    limit: np.ndarray  # the λ0 from which on the clip holds a component; inf for never


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
    eps: float = _DEFAULT_EPS,
    clip: float | None = None,
) -> Quality:
    """Judges the compensation by a given λ0; 0 judges the stale gradients themselves.

    Args:
      pairs: From `collect` or `pairs`.
      lamda: λ0 ≥ 0.
      adaptive: Whether to judge DC-ASGD-a, with the ν of the pairs, in place of DC-ASGD-c.
      eps: As for `add_delay_compensation`.
      clip: As for `add_delay_compensation`.

    Raises:
      TypeError: If an argument has no legal type.
      ValueError: If one is out of range, or a pair is not finite, or the true gradients are zero.
    """
    _arguments.check_scalar("lamda", lamda, minimum=0.0, schedule=False)
    return _quality(_flatten(pairs, adaptive, eps, clip), lamda)


def fit(
    pairs: Pairs, *, adaptive: bool = False, eps: float = _DEFAULT_EPS, clip: float | None = None
) -> Quality:
    r"""Finds the λ0 ≥ 0 whose compensation comes closest to the true gradient, by least squares.

    For stale gradients :math:`g_s`, true ones :math:`g` and the compensation :math:`\lambda_0 c`,
    where :math:`c = |g_s|^2 (w - w_s)` (DC-ASGD-c) or that over :math:`\sqrt{\nu + \varepsilon}`
    (DC-ASGD-a), the sum of :math:`|g_s + \lambda_0 c - g|^2` over all components of all pairs is
    smallest at

    .. math:: \lambda_0 = \max\Bigl(0, \frac{\sum c\,(g - g_s)}{\sum c^2}\Bigr) .

    With ``clip`` a component stays as it is from :math:`\lambda_0 = \text{clip}\,|g_s| / |c|` on.
    The sum is then a parabola between any two such values next to each other; the smallest value of
    all these parabolas is found by sorting, exactly, though it may lie in none of their vertices.

    Args:
      pairs: From `collect` or `pairs`.
      adaptive: Whether to fit DC-ASGD-a in place of DC-ASGD-c.
      eps: As for `add_delay_compensation`.
      clip: As for `add_delay_compensation`.

    Mini-batch noise draws this λ down: where :math:`g_s` is mostly Gaussian noise,
    :math:`E[g_s^4] = 3\,E[g_s^2]^2`, and DC-ASGD-c gets a third of the λ that would make
    :math:`\lambda\,E[g_s^2]` the curvature.

    Returns:
      The best λ0 (the smallest, if there are several) and what it achieves. The arithmetic is
      NumPy's in float64 and takes memory for some ten copies of the pairs.

    Raises:
      TypeError: If an argument has no legal type.
      ValueError: If one is out of range, or a pair is not finite, or the true gradients are zero.
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
    # Between two limits: those before are held there, those after still grow with λ.
    low = np.append(0.0, limit)
    high = np.append(limit, np.inf)
    growing_square = np.append(square[::-1].cumsum()[::-1], 0.0)
    growing_product = np.append(product[::-1].cumsum()[::-1], 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Where a limit is inf the two terms are inf - inf, and no λ is behind it.
        held = np.append(0.0, np.cumsum(limit**2 * square - 2 * limit * product))
        vertex = np.where(growing_square > 0, growing_product / growing_square, low)
        lamda = np.clip(vertex, low, high)
        error = held + lamda**2 * growing_square - 2 * lamda * growing_product
    return _quality(flat, float(lamda[np.nanargmin(error)]))


class Report(NamedTuple):
    """What `diagnose` found; ``print`` it."""

    num_pairs: int
    staleness: float  # the mean over the pairs, in updates
    stale: Quality  # the stale gradients as they are
    fits: dict[str, Quality]  # the best of each form of compensation, by what the form is called
    best: str | None  # the form with the smallest error; None if compensation does not pay
    arguments: dict[str, float]  # what to call `add_delay_compensation` with
    verdict: str  # in words

    def __str__(self) -> str:
        rows = [("", "lamda", "relative error", "cosine")]
        for name, of in [("stale gradient", self.stale), *self.fits.items()]:
            lamda = "" if of is self.stale else f"{of.lamda:.3g}"
            rows.append((name, lamda, f"{of.relative_error:.3f}", f"{of.cosine:.3f}"))
        title = f"{self.num_pairs} gradients, {self.staleness:.1f} updates old on average"
        lines = [f"{a:<26}{b:>8}{c:>17}{d:>9}" for a, b, c, d in rows]
        return "\n".join([title, *lines, *textwrap.wrap(self.verdict, 80)])


def diagnose(
    grad_fn: GradFn,
    params: optax.Params,
    tx: optax.GradientTransformation,
    batches: Any,
    arrivals: Arrivals,
    *,
    num_pairs: int = 32,
    decay: float = 0.95,
    eps: float = _DEFAULT_EPS,
    clip: float = 1.0,
    key: jax.Array | None = None,
) -> Report:
    """Says whether delay compensation brings stale gradients closer to the true ones, and which λ.

    It trains with ``tx``, which should be what you train with now, without compensation, and judges
    the gradients along the way (`collect`, `fit`). Compensation is said to pay where stale
    gradients are off by more than 5 % and it removes a tenth or more of their squared error. That
    is about gradients; how much sooner training is done, and how much larger a learning rate it
    bears, only `simulation.run` with and without compensation shows. A λ larger than the one that
    fits, with a clip, may well train better.

    Args:
      grad_fn: As for `simulation.run`, like the next four.
      params: The initial parameters.
      tx: Any Optax optimizer.
      batches: One batch a push.
      arrivals: The order of the pushes.
      num_pairs: How many gradients to judge.
      decay: m of DC-ASGD-a.
      eps: As for `add_delay_compensation`.
      clip: As for `add_delay_compensation`; judged beside no clip.
      key: A JAX random key, by default ``jax.random.key(0)``.

    Raises:
      TypeError: If an argument has no legal type.
      ValueError: If an argument is out of range or does not fit, or the run is not finite.

    Examples:
      Logistic regression, whose Hessian is nearly what the squared gradient stands for:

      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_dcasgd import diagnostics, simulation
      >>> x = jax.random.normal(jax.random.key(0), (300, 8, 5))
      >>> batches = x, jax.random.bernoulli(jax.random.key(1), jax.nn.sigmoid(x.sum(-1)))
      >>> def loss(w, batch, key):
      ...   return optax.sigmoid_binary_cross_entropy(batch[0] @ w, batch[1]).mean()
      >>> report = diagnostics.diagnose(
      ...   jax.value_and_grad(loss), jnp.zeros(5), optax.sgd(2.0), batches,
      ...   simulation.arrivals(jax.random.key(2), num_workers=8, num_updates=300))
      >>> print(report)
      32 gradients, 7.0 updates old on average
                                   lamda   relative error   cosine
      stale gradient                                0.669    0.795
      DC-a, clip=1                 0.239            0.514    0.862
      DC-a                         0.166            0.526    0.856
      DC-c, clip=1                  1.27            0.516    0.862
      DC-c                         0.974            0.520    0.860
      Compensation pays: add_delay_compensation(lamda=0.239, decay=0.95, clip=1)
      removes 41% of the squared error of stale gradients.
    """
    _arguments.check_scalar("clip", clip, minimum=0.0, schedule=False)
    found = collect(
        grad_fn, params, tx, batches, arrivals, num_pairs=num_pairs, decay=decay, key=key
    )
    adaptive_arguments = {"decay": decay} | ({} if eps == _DEFAULT_EPS else {"eps": eps})
    forms: dict[str, tuple[bool, dict[str, float]]] = {
        f"DC-a, clip={clip:g}": (True, {**adaptive_arguments, "clip": clip}),
        "DC-a": (True, adaptive_arguments),
        f"DC-c, clip={clip:g}": (False, {"clip": clip}),
        "DC-c": (False, {}),
    }
    fits = {
        name: fit(found, adaptive=adaptive, eps=eps, clip=arguments.get("clip"))
        for name, (adaptive, arguments) in forms.items()
    }
    stale = quality(found, 0.0)
    best = min(fits, key=lambda name: fits[name].relative_error)
    share = 0.0
    if stale.relative_error > 0:
        share = 1 - (fits[best].relative_error / stale.relative_error) ** 2
    arguments = {"lamda": fits[best].lamda, **forms[best][1]}
    call = ", ".join(f"{name}={value:.3g}" for name, value in arguments.items())
    pays = False
    if stale.relative_error < _HARMLESS_ERROR:
        verdict = (
            f"Nothing to compensate: stale gradients are off by only {stale.relative_error:.1%}."
        )
    elif share < _WORTHWHILE_SHARE:
        verdict = (
            f"Compensation does not pay: at its best it removes {share:.0%} of the squared error "
            "of stale gradients. Smaller steps (scale_by_staleness, scale_by_gap) may help."
        )
    else:
        pays = True
        verdict = (
            f"Compensation pays: add_delay_compensation({call}) removes {share:.0%} of the squared "
            "error of stale gradients."
        )
    return Report(
        num_pairs=num_pairs,
        staleness=float(np.mean(np.asarray(arrivals.staleness)[_recorded_at(arrivals, num_pairs)])),
        stale=stale,
        fits=fits,
        best=best if pays else None,
        arguments=arguments if pays else {"lamda": 0.0},
        verdict=verdict,
    )
