"""Under jit, scan, vmap and eval_shape, every transformation is the plainest loop of itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from host_cases import (
    GRADS,
    NUM_WORKERS,
    PARAMS,
    STALENESS,
    STEPS,
    WORKERS,
    TraceCounter,
    assert_close,
    counted_step,
    each_mode,
    given,
    make_step,
    no_extras,
    plain_run,
    random_tree,
    start,
    tree_cast,
    worker,
)

import optax_dcasgd as dc

# --- Loops and batches ---


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@each_mode
def test_scan_equals_a_loop(mode):
    tx, extras, params, grads = start(mode)
    step = make_step(tx)

    @jax.jit
    def train(params, grads, extra_args):
        def body(carry, of_step):
            return step(*carry, *of_step), None

        # scan itself refuses a state whose structure, shapes or dtypes change.
        return jax.lax.scan(body, (params, tx.init(params)), (grads, extra_args))[0]

    of_steps = (stacked(grads[:STEPS]), stacked([extras(t) for t in range(STEPS)]))
    assert_close(train(params, *of_steps), plain_run(mode), rtol=1e-6)


@each_mode
def test_no_ranks_are_promoted(mode):
    tx, extras, params, grads = start(mode)
    with jax.numpy_rank_promotion("raise"):
        state = tx.init(params)
        for t in range(2):
            _, state = tx.update(grads[t], state, params, **extras(t))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "tx",
    [
        dc.dcasgd(0.1, 0.9, 0.5, decay=0.9, clip=1.0),
        dc.dcasgd(0.1, 0.9, 0.5, store="updates"),
        optax.chain(dc.add_delay_compensation(0.5, decay=0.9, clip=1.0), optax.sgd(0.1)),
        optax.chain(dc.robust(), optax.sgd(0.1)),
        optax.chain(dc.scale_by_gap(), optax.sgd(0.1)),
        dc.delay_gradients(dc.dcasgd(0.1, 0.9, 0.5, store=None), 1),
    ],
    ids=["dcasgd", "updates", "add_delay_compensation", "robust", "scale_by_gap", "delay"],
)
def test_no_dtypes_are_promoted(tx, dtype):
    params, grads = tree_cast(PARAMS, dtype), tree_cast(GRADS[0], dtype)
    with jax.numpy_dtype_promotion("strict"):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params, staleness=1)
    assert jax.tree.all(jax.tree.map(lambda u: u.dtype == dtype, updates))


@pytest.mark.parametrize("store", ["params", "updates", "workers", "given"])
def test_vmap_over_hyperparameters_equals_a_loop(store):
    kept = {"workers": {"num_workers": NUM_WORKERS}, "given": {"store": None}}
    kept = kept.get(store, {"store": store})
    extras = {"workers": worker, "given": given}.get(store, no_extras)

    def train(learning_rate, lamda):
        tx = dc.dcasgd(learning_rate, 0.9, lamda, decay=0.9, **kept)
        params, state = PARAMS, tx.init(PARAMS)
        for t in range(3):
            params, state = make_step(tx)(params, state, GRADS[t], extras(t))
        return params, state

    learning_rates, lamdas = jnp.array([0.1, 0.1, 0.2]), jnp.array([0.0, 0.8, 0.8])
    batched = jax.jit(jax.vmap(train))(learning_rates, lamdas)
    one_by_one = [train(*map(float, pair)) for pair in zip(learning_rates, lamdas, strict=True)]
    one_by_one = stacked(one_by_one)
    assert_close(batched, one_by_one, rtol=1e-6)
    params = batched[0]["dense"]["kernel"]
    assert np.max(np.abs(params[0] - params[1])) > 1e-3
    assert np.max(np.abs(params[1] - params[2])) > 1e-3


def test_vmap_over_seeds_and_lamda_of_a_chain():
    """Parameters and state have the axis too, and the index of the worker differs in a batch."""
    batch_of_workers = jnp.array([[0, 1, 0, 2], [1, 1, 2, 0]])
    params = [random_tree(300), random_tree(301)]

    def train(params, lamda, workers):
        tx = optax.chain(
            dc.add_delay_compensation(lamda, num_workers=NUM_WORKERS), optax.adam(0.1, b2=0.9)
        )
        state = tx.init(params)
        for t in range(4):
            params, state = make_step(tx)(params, state, GRADS[t], {"worker": workers[t]})
        return params, state

    lamdas = [0.3, 2.0]
    batched = jax.jit(jax.vmap(train))(stacked(params), jnp.array(lamdas), batch_of_workers)
    one_by_one = [train(p, x, w) for p, x, w in zip(params, lamdas, batch_of_workers, strict=True)]
    assert_close(batched, stacked(one_by_one), rtol=2e-6)


# --- Compilation ---


@each_mode
def test_one_compilation_for_all_steps(mode):
    """Workers, stalenesses and stale parameters change, and the state comes from init first."""
    tx, extras, params, grads = start(mode)
    step = counted_step(mode)
    for state in (tx.init(params), jax.jit(tx.init)(params)):
        for t in range(STEPS):
            params, state = step.jitted(params, state, grads[t], extras(t))
    assert step.count == 1  # in all tests of this process together


def test_no_compilation_when_schedules_and_injected_values_change():
    tx = optax.inject_hyperparams(dc.dcasgd, static_args=("num_workers",))(
        learning_rate=lambda t: 0.1 / (1 + t), lamda=0.5, decay=0.9, num_workers=NUM_WORKERS
    )
    tx = optax.chain(dc.scale_by_staleness(0.5), tx)
    step = TraceCounter(make_step(tx))
    params, state = PARAMS, tx.init(PARAMS)
    results = []
    for t in range(STEPS):
        state[1].hyperparams["lamda"] = jnp.asarray(0.1 * t)
        extra_args = {"worker": WORKERS[t], "staleness": STALENESS[t]}
        params, state = step.jitted(params, state, GRADS[t], extra_args)
        results.append(params)
    assert step.count == 1

    expected = reference.wide(PARAMS)
    formula = reference.DCASGD(lambda t: 0.1 / (1 + t), None, lambda t: 0.1 * t, 0.9)
    backups = reference.Backups(expected, NUM_WORKERS)
    for t, i in enumerate(WORKERS[:STEPS]):
        grads = reference.scale_by_staleness(GRADS[t], STALENESS[t], 0.5)
        before = expected
        expected = reference.add(before, formula(grads, before, backups.stale(i)))
        backups.applied(before, expected, i)
        assert_close(results[t], expected)


@each_mode
def test_outside_jit_nothing_is_compiled_after_the_first_updates(mode, caplog):
    """A Python number that is baked into an operation would compile it anew for every value."""
    tx, extras, params, grads = start(mode)
    state = tx.init(params)
    for t in range(STEPS):
        with jax.log_compiles(t >= 3):  # the history of a delay of 2 is full
            _, state = tx.update(grads[t], state, params, **extras(t))
    assert [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()] == []


def test_compilations_are_logged(caplog):
    """What the test above rests on."""
    with jax.log_compiles(True):
        jax.jit(lambda x: x + 1.2345)(jnp.ones(7))
    assert any("ompil" in record.getMessage() for record in caplog.records)


@each_mode
def test_eval_shape_of_init_and_update(mode):
    tx, extras, params, grads = start(mode)
    updates, state = jax.eval_shape(tx.update, grads[0], tx.init(params), params, **extras(0))

    def shapes(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    initial = shapes(tx.init(params))
    assert shapes(jax.eval_shape(tx.init, params)) == initial
    assert shapes(state) == initial
    assert shapes(plain_run(mode)[1]) == initial
    if not mode.startswith("masters"):
        assert shapes(updates) == shapes(params)
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    assert shapes(jax.eval_shape(tx.init, abstract)) == initial
