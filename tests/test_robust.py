"""`robust` against a float64 loop over its formula; fresh gradients; wrong uses."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import optax_dcasgd as dc

STEPS = 24
NUM_WORKERS = 3
SHAPES = {
    "conv": (2, 3, 2, 4),
    "dense": {"bias": (3,), "kernel": (5, 3)},
    "scale": (),
}


def random_tree(seed, scale=1.0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


PARAMS = random_tree(0)
WORKERS = np.random.default_rng(1).integers(NUM_WORKERS, size=STEPS).tolist()


class Robust:
    """The formula of `robust`, one unit after the other, in float64 or complex128."""

    def __init__(self, lamda=8.0, decay=0.95, max_norm=2.0, power=0.25, eps=1e-12):
        self.hyperparams = {"lamda": lamda, "decay": decay, "max_norm": max_norm, "eps": eps}
        self.power, self.count, self.nu = power, 0, {}
        self.shrunk, self.limited, self.zeroed = 0, 0, 0

    def __call__(self, grads, params, stale, staleness):
        now = {k: reference.at(v, self.count) for k, v in self.hyperparams.items()}
        self.count += 1
        treedef = jax.tree.structure(grads)
        trees = (jax.tree.leaves(reference.wide(tree)) for tree in (grads, params, stale))
        leaves = []
        for i, (g, w, w_s) in enumerate(zip(*trees, strict=True)):
            units = g.reshape(-1, g.shape[-1] if g.ndim else 1)
            delta = (w - w_s).reshape(units.shape)
            columns = enumerate(zip(units.T, delta.T, strict=True))
            out = [self.unit(g, d, (i, u), **now) for u, (g, d) in columns]
            leaves.append(np.stack(out, axis=-1).reshape(g.shape))
        return reference.scale_by_staleness(treedef.unflatten(leaves), staleness, self.power)

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


def grads_at(stale, t):
    """A gradient that depends on where it is computed, with an outlier now and then."""
    noise = random_tree(100 + t, 0.5)
    size = 8.0 if t % 7 == 6 else 1.0
    return jax.tree.map(lambda w, e: size * (0.3 * w + e).astype(w.dtype), stale, noise)


def close(actual, expected, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a), b, **{"rtol": 1e-4, "atol": 3e-6, **tolerance}
        ),
        actual,
        expected,
    )


def train(tx, source, *, params=PARAMS, jit=True, steps=STEPS, grads_at=grads_at):
    """Parameters, gradient, w_s, τ and update of every step."""
    state, update = tx.init(params), jax.jit(tx.update) if jit else tx.update
    pulled, pulled_at, last = [params] * NUM_WORKERS, [0] * NUM_WORKERS, params
    for t in range(steps):
        worker = WORKERS[t]
        stale, staleness = (last, 1) if source == "previous" else (
            pulled[worker], t - pulled_at[worker]
        )  # fmt: skip
        extra = {"given": {"stale_params": stale}, "worker": {"worker": worker}}.get(source, {})
        grads = grads_at(stale, t)
        updates, state = update(grads, state, params, staleness=staleness, **extra)
        yield params, grads, stale, staleness, updates
        last, params = params, optax.apply_updates(params, updates)
        pulled[worker], pulled_at[worker] = params, t + 1


KEPT = {"given": {"store": None}, "worker": {"num_workers": NUM_WORKERS}, "previous": {}}
SETTINGS = {
    "default": {},
    "no limit": {"max_norm": None},
    "other": {"lamda": 12.0, "decay": 0.5, "max_norm": 1.0, "power": 0.5, "eps": 0.1},
    "schedules": {
        "lamda": lambda t: 4.0 + t / 2,
        "decay": lambda t: 0.9 - 0.01 * t,
        "max_norm": lambda t: 1.5 / (1 + t),
        "eps": lambda t: 0.1 / (1 + t),
    },
}


@pytest.mark.parametrize("source", KEPT)
@pytest.mark.parametrize("settings", SETTINGS)
def test_against_the_formula(settings, source):
    tx = optax.chain(dc.robust(**SETTINGS[settings], **KEPT[source]), optax.scale(-0.2))
    expected = Robust(**SETTINGS[settings])
    for params, grads, stale, staleness, updates in train(tx, source, jit=source != "previous"):
        wanted = expected(grads, params, stale, staleness)
        close(updates, jax.tree.map(lambda x: -0.2 * x, wanted))
    # Every branch of the formula was taken.
    assert min(expected.shrunk, expected.zeroed) > 0
    assert (expected.limited > 0) == (expected.hyperparams["max_norm"] is not None)


def test_before_momentum_and_adam():
    for optimizer in (optax.sgd(0.1, momentum=0.9), optax.adam(0.05)):
        tx = optax.chain(dc.robust(num_workers=NUM_WORKERS), optimizer)
        expected, state = Robust(), optimizer.init(PARAMS)
        for params, grads, stale, staleness, updates in train(tx, "worker"):
            shrunk = jax.tree.map(jnp.float32, expected(grads, params, stale, staleness))
            wanted, state = optimizer.update(shrunk, state, params)
            close(updates, wanted, rtol=1e-3, atol=1e-5)


def test_complex_parameters_are_pairs_of_real_ones():
    rng = np.random.default_rng(3)

    def tree():
        z = rng.normal(size=(4, 3)) + 1j * rng.normal(size=(4, 3))
        return {"z": jnp.asarray(z, jnp.complex64)}

    def pairs(tree):
        return {"z": jnp.concatenate([tree["z"].real, tree["z"].imag])}

    tx, params = dc.robust(store=None), tree()
    state, real_state = tx.init(params), tx.init(pairs(params))
    expected = Robust()
    for t in range(20):
        grads, stale = tree(), jax.tree.map(lambda w, d: w + 0.1 * d, params, tree())
        updates, state = tx.update(grads, state, params, stale_params=stale, staleness=t)
        real, real_state = tx.update(
            pairs(grads), real_state, pairs(params), stale_params=pairs(stale), staleness=t
        )
        close(pairs(updates), real)
        close(updates, expected(grads, params, stale, t))
        params = optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, updates))


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("staleness", [0, 1])
def test_fresh_gradients_pass_bit_for_bit_without_a_limit(staleness):
    tx = dc.robust(max_norm=None, store=None)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for t in range(20):
        grads = random_tree(t, 10.0**t)  # each is an outlier after the one before
        grads["dense"]["bias"] = jnp.array([-0.0, jnp.inf, 1e30])
        updates, state = update(grads, state, PARAMS, stale_params=PARAMS, staleness=staleness)
        assert bits(updates) == bits(grads)


@pytest.mark.parametrize("staleness", [0, 1])
def test_fresh_gradients_pass_bit_for_bit_unless_they_are_outliers(staleness):
    tx = dc.robust(store=None)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for t in range(30):
        factor = jnp.where(t == 20, 100.0, 1.0 + 0.1 * (t % 3))
        grads = jax.tree.map(lambda w, factor=factor: factor * w, PARAMS)
        updates, state = update(grads, state, PARAMS, stale_params=PARAMS, staleness=staleness)
        if t >= 6:  # ν has grown
            assert (bits(updates) == bits(grads)) == (t != 20)


def test_one_worker_trains_as_without():
    tx = optax.chain(dc.robust(max_norm=None, num_workers=1), optax.sgd(0.1, momentum=0.9))
    plain = optax.sgd(0.1, momentum=0.9)
    # Op by op: one compiled program may round a + b·c in another way than the next.
    params, state, plain_state = PARAMS, tx.init(PARAMS), plain.init(PARAMS)
    for t in range(8):
        grads = grads_at(params, t)
        updates, state = tx.update(grads, state, params, worker=0, staleness=0)
        expected, plain_state = plain.update(grads, plain_state, params)
        assert bits(updates) == bits(expected)
        params = optax.apply_updates(params, updates)


def test_a_unit_that_did_not_move_passes_beside_one_that_did():
    tx, params = dc.robust(max_norm=None, store=None), jnp.ones((2, 2))
    grads = jnp.array([[3.0, 3.0], [4.0, 4.0]])
    stale = params + jnp.array([[0.0, 2.0], [0.0, 0.0]])
    updates, _ = tx.update(grads, tx.init(params), params, stale_params=stale, staleness=1)
    np.testing.assert_array_equal(updates, [[3.0, 0.0], [4.0, 0.0]])


def test_it_never_grows_or_reverses_a_component():
    tx = dc.robust(store=None)
    state = tx.init(PARAMS)
    for t in range(10):
        grads, stale = random_tree(t), random_tree(50 + t)
        updates, state = tx.update(grads, state, PARAMS, stale_params=stale, staleness=3)
        for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
            assert np.all(np.abs(u) <= np.abs(g))
            assert np.all(u * g >= 0)


def test_nothing_is_nan_where_gradients_were_always_zero():
    tx, zeros = dc.robust(eps=0.0, store=None), jax.tree.map(jnp.zeros_like, PARAMS)
    state = tx.init(PARAMS)
    for _ in range(3):
        updates, state = tx.update(zeros, state, PARAMS, stale_params=random_tree(1), staleness=2)
        assert all(np.all(np.asarray(u) == 0) for u in jax.tree.leaves(updates))


def test_the_state_keeps_its_form_and_the_update_the_dtype_of_its_parameter():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    params["empty"] = jnp.zeros((0, 3))
    tx = dc.robust(num_workers=2)
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, new_state = jax.jit(tx.update)(grads, state, params, worker=1, staleness=2)

    def form(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert form(updates) == form(params)
    assert form(new_state) == form(state) == form(jax.eval_shape(tx.init, params))
    assert form(state[0].nu) == {
        "conv": ((4,), jnp.float32),
        "dense": {"bias": ((3,), jnp.float32), "kernel": ((3,), jnp.float32)},
        "empty": ((3,), jnp.float32),
        "scale": ((), jnp.float32),
    }
    # The state owns its buffers: the caller may donate the parameters.
    jax.jit(tx.update, donate_argnums=(1, 2))(grads, state, params, worker=0, staleness=1)


def test_masked_injected_and_without_gradients():
    tx = optax.inject_hyperparams(dc.robust, static_args=("num_workers", "store"))(
        lamda=2.0, store=None
    )
    tx = optax.masked(tx, {"conv": True, "dense": False, "scale": True})
    stale = random_tree(9)
    updates, _ = jax.jit(tx.update)(
        PARAMS, tx.init(PARAMS), PARAMS, stale_params=stale, staleness=16
    )
    expected = Robust(lamda=2.0)(PARAMS, PARAMS, stale, 16)
    expected["dense"] = PARAMS["dense"]
    close(updates, expected)

    tx = dc.robust(store=None)
    grads = {**PARAMS, "dense": None}
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, stale_params=stale, staleness=1)
    assert updates["dense"] is None


def test_under_scan_and_vmap_over_settings():
    def run(lamda):
        tx = optax.chain(dc.robust(lamda, store=None), optax.scale(-0.1))

        def step(carry, t):
            params, stale, state = carry
            grads = jax.tree.map(lambda w: 2 * w, stale)
            updates, state = tx.update(grads, state, params, stale_params=stale, staleness=t)
            return (optax.apply_updates(params, updates), params, state), None

        (params, *_), _ = jax.lax.scan(step, (PARAMS, PARAMS, tx.init(PARAMS)), jnp.arange(20))
        return params

    both = jax.jit(jax.vmap(run))(jnp.array([0.5, 8.0]))
    for i, lamda in enumerate((0.5, 8.0)):
        close(jax.tree.map(lambda x, i=i: x[i], both), jax.jit(functools.partial(run, lamda))())


WRONG = {
    "lamda": [(-1.0, ValueError), ("1", TypeError), (float("nan"), ValueError)],
    "decay": [(1.0, ValueError), (None, TypeError)],
    "max_norm": [(0.0, ValueError), (-1.0, ValueError), (True, TypeError)],
    "power": [(-0.5, ValueError), (lambda t: 0.5, TypeError)],
    "eps": [(-1e-9, ValueError)],
    "store": [("updates", ValueError)],
    "num_workers": [(0, ValueError), (2.0, TypeError)],
    "accumulator_dtype": [(jnp.int32, TypeError)],
}


@pytest.mark.parametrize(
    ("name", "value", "error"), [(n, *case) for n, cases in WRONG.items() for case in cases]
)
def test_wrong_arguments_are_refused_by_name(name, value, error):
    with pytest.raises(error, match=name):
        dc.robust(**{name: value})


def test_wrong_updates_are_refused_by_leaf():
    tx = dc.robust(store=None)
    state = tx.init(PARAMS)
    right = {"stale_params": PARAMS, "staleness": 2}
    other = {**PARAMS, "conv": jnp.ones((2, 3, 2, 5))}

    def refused(message, grads=PARAMS, params=PARAMS, error=ValueError, **extra):
        with pytest.raises(error, match=re.escape(message)):
            tx.update(grads, state, params, **{**right, **extra})

    refused("params", params=None)
    refused("stale_params is required", stale_params=None)
    refused("staleness is required", staleness=None)
    refused("staleness", staleness=-1)
    refused("updates['conv']", grads=other)
    refused("params['conv']", grads=other, params=other, stale_params=other)
    refused("stale_params['conv']", stale_params=other)
    with pytest.raises(TypeError, match=re.escape("params['steps']")):
        tx.init({"steps": jnp.arange(3)})
    per_worker = dc.robust(num_workers=2)
    with pytest.raises(ValueError, match="worker is required"):
        per_worker.update(PARAMS, per_worker.init(PARAMS), PARAMS, staleness=1)
