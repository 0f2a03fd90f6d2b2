"""What every transformation must compute, in float64 (complex128) NumPy.

Written from the papers' formulas and not from the library's code, so that the two can disagree.
Trees are whatever `jax.tree` takes (dicts, lists, tuples, NamedTuples; ``None`` is no leaf), with
leaves that NumPy can read. Everything returned is a tree of float64 or complex128 arrays.
Hyperparameters are numbers, or functions of the number of updates done so far.
"""

import jax
import numpy as np


def wide(tree):
    """A copy of a tree in float64, complex leaves in complex128."""

    def leaf(x):
        x = np.asarray(x)
        return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64, copy=True)

    return jax.tree.map(leaf, tree)


def add(a, b):
    return jax.tree.map(np.add, wide(a), wide(b))


def subtract(a, b):
    return jax.tree.map(np.subtract, wide(a), wide(b))


def zeros(tree):
    return jax.tree.map(np.zeros_like, wide(tree))


def squares(tree):
    """g² for real leaves, |g|² for complex ones; real in either case."""
    return jax.tree.map(lambda g: g.real**2 + g.imag**2, wide(tree))


def at(value, count):
    """The value of a hyperparameter that may be a schedule."""
    return value(count) if callable(value) else value


def _unzip(tree_of_pairs, like):
    outer = jax.tree.structure(like)
    columns = zip(*outer.flatten_up_to(tree_of_pairs), strict=True)
    first, second = map(list, columns) if outer.num_leaves else ([], [])
    return outer.unflatten(first), outer.unflatten(second)


def compensate_leaf(g, w, w_s, lamda, nu, decay=None, eps=1e-7, clip=None):
    """`compensate` for one float64 or complex128 array."""
    square = g.real**2 + g.imag**2
    if decay is not None:
        nu = decay * nu + (1 - decay) * square
        # 0/0 without ε: a gradient that was always zero has nothing to correct.
        with np.errstate(divide="ignore", invalid="ignore"):
            lamda = np.where(square == 0, 0, lamda / np.sqrt(nu + eps))
    correction = lamda * square * (w - w_s)
    if clip is not None:
        limit, size = clip * np.abs(g), np.abs(correction)
        with np.errstate(divide="ignore", invalid="ignore"):
            correction = np.where(size > limit, correction * (limit / size), correction)
    return g + correction, nu


def compensate(g, w, w_s, lamda, nu=None, decay=None, eps=1e-7, clip=None):
    """The compensated gradient, and ν: DC-ASGD-c without ``decay``, DC-ASGD-a with it.

    g̃ = g + λ·|g|²·(w − w_s), λ = λ0 or λ0/√(ν + ε), ν' = decay·ν + (1 − decay)·|g|², and
    |g̃ − g| ≤ clip·|g| in every component. Without ``nu``, ν starts at zero.
    """
    nu = squares(zeros(g)) if nu is None else nu
    pairs = jax.tree.map(
        lambda *leaves: compensate_leaf(*leaves[:3], lamda, leaves[3], decay, eps, clip),
        wide(g),
        wide(w),
        wide(w_s),
        wide(nu),
    )
    return _unzip(pairs, g)


class DCASGD:
    """MXNet's update on compensated gradients, with the learning rate inside the momentum.

    m' = momentum·m − lr·g̃ is the update. Call with a gradient, where it is applied, and where it
    was computed.
    """

    def __init__(self, lr=0.1, momentum=None, lamda=0.04, decay=None, eps=1e-7, clip=None):
        self.lr, self.momentum, self.lamda = lr, momentum, lamda
        self.decay, self.eps, self.clip = decay, eps, clip
        self.count, self.mom, self.nu = 0, None, None

    def __call__(self, g, w, w_s):
        """The update for the parameters ``w``, to be added to them."""
        lr, momentum, lamda, decay, eps, clip = (
            at(value, self.count)
            for value in (self.lr, self.momentum, self.lamda, self.decay, self.eps, self.clip)
        )
        g_tilde, self.nu = compensate(g, w, w_s, lamda, self.nu, decay, eps, clip)
        mom = zeros(g) if self.mom is None else self.mom
        self.mom = jax.tree.map(lambda m, g: (momentum or 0) * m - lr * g, mom, g_tilde)
        self.count += 1
        return self.mom


class Backups:
    """Where a gradient was computed, by the rule of the paper's Algorithm 2.

    Worker i computes at the parameters as they stood once its own previous update had been
    applied; before its first, at the initial ones. ``num_workers=None`` is MXNet's rule: the
    parameters one update ago, which are the initial ones at first.
    """

    def __init__(self, params, num_workers=None):
        self.per_worker = num_workers is not None
        self.backups = [wide(params) for _ in range(num_workers or 1)]

    def stale(self, worker=None):
        return self.backups[worker if self.per_worker else 0]

    def applied(self, before, after, worker=None):
        """To be told the parameters on both sides of an update."""
        if self.per_worker:
            self.backups[worker] = wide(after)
        else:
            self.backups[0] = wide(before)


def algorithm_2(grad_fn, params, workers, num_workers, **hyperparameters):
    """The parameters after each update of the paper's Algorithm 2 (by `DCASGD`).

    ``workers`` is the order of arrival; ``grad_fn(stale_params, t)`` is the gradient of update t.
    """
    params = wide(params)
    optimizer, backups, trajectory = DCASGD(**hyperparameters), Backups(params, num_workers), []
    for t, worker in enumerate(workers):
        stale = backups.stale(worker)
        before, params = params, add(params, optimizer(grad_fn(stale, t), params, stale))
        backups.applied(before, params, worker)
        trajectory.append(params)
    return trajectory


def one_update_old(grad_fn, params, num_updates, **hyperparameters):
    """The parameters after each update by MXNet's rule, each gradient being one update old.

    The first is fresh. ``grad_fn(stale_params, t)`` is the gradient of update t.
    """
    params = wide(params)
    optimizer, backups, trajectory = DCASGD(**hyperparameters), Backups(params), []
    for t in range(num_updates):
        stale = backups.stale()
        before, params = params, add(params, optimizer(grad_fn(stale, t), params, stale))
        backups.applied(before, params)
        trajectory.append(params)
    return trajectory


class DelayLine:
    """A FIFO of gradients with the parameters at which each was computed."""

    def __init__(self, delay):
        self.delay, self.queue = delay, []

    def __call__(self, g, w):
        """What went in ``delay`` calls ago, or None while there is nothing that old."""
        self.queue.append((wide(g), wide(w)))
        return self.queue.pop(0) if len(self.queue) > self.delay else None


def scale_by_staleness(g, staleness, power=1.0):
    """g / max(τ, 1)^power, for one τ or a tree of them like ``g``."""
    if not isinstance(staleness, dict | list | tuple):
        staleness = jax.tree.map(lambda _: staleness, g)
    return jax.tree.map(
        lambda g, tau: g / np.maximum(np.float64(tau), 1.0) ** power, wide(g), staleness
    )


class Robust:
    """`robust_delay_compensation` with a neuron's weights along the last axis, unit after unit."""

    def __init__(self, lamda=8.0, decay=0.95, max_norm=2.0, power=0.25, eps=1e-12):
        self.hyperparams = {"lamda": lamda, "decay": decay, "max_norm": max_norm, "eps": eps}
        self.power, self.count, self.nu = power, 0, {}
        self.shrunk, self.limited, self.zeroed = 0, 0, 0

    def __call__(self, grads, params, stale, staleness):
        now = {k: at(v, self.count) for k, v in self.hyperparams.items()}
        power = at(self.power, self.count)
        self.count += 1
        treedef = jax.tree.structure(grads)
        trees = (jax.tree.leaves(wide(tree)) for tree in (grads, params, stale))
        leaves = []
        for i, (g, w, w_s) in enumerate(zip(*trees, strict=True)):
            units = g.reshape(-1, g.shape[-1] if g.ndim else 1)
            delta = (w - w_s).reshape(units.shape)
            columns = enumerate(zip(units.T, delta.T, strict=True))
            out = [self.unit(g, d, (i, u), **now) for u, (g, d) in columns]
            leaves.append(np.stack(out, axis=-1).reshape(g.shape))
        return scale_by_staleness(treedef.unflatten(leaves), staleness, power)

    def unit(self, g, delta, key, lamda, decay, max_norm, eps):
        norm = np.linalg.norm(g)
        self.nu[key] = nu = decay * self.nu.get(key, 0.0) + (1 - decay) * norm**2
        root = np.sqrt(nu + eps)
        factor = 1.0
        if delta.any() and g.any():
            factor = min(max(1 + lamda * np.vdot(g, delta).real / root, 0.0), 1.0)
        self.shrunk += 0 < factor < 1
        self.zeroed += factor == 0
        if max_norm is not None and norm > max_norm * root:
            self.limited += 1
            factor *= max_norm * root / norm
        return g * factor
