"""Every rule with every source: the same w_s and staleness give the same bits.

The updates run op by op. Then each array goes through the same compiled code whatever source is
around it, and equal inputs give equal bits. Two whole programs may round a + b·c differently, so
those on a mesh, which have to be compiled, are compiled without optimization.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import optax
import pytest
from common import WORKERS, assert_bit_equal, random_tree, train
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_dcasgd as dc

SHAPES = {"bias": (2,), "kernel": (3, 2)}
PARAMS = random_tree(0, shapes=SHAPES)
# With so few digits that the sum of eight equal ones is exact.
GRADS = [
    jax.tree.map(jnp.float32, random_tree(t, shapes=SHAPES, dtype=jnp.bfloat16))
    for t in range(1, 9)
]
NUM_WORKERS = 3


# What a user writes for another rule, and for another source --------------------------------------


def toy_rule(g, delta, nu, hyperparams):
    return g if delta is None else g / (1 + hyperparams["weight"] * abs(delta)), nu


def toy_source(inner):
    def update(updates, state, params, **extra):
        told = {"stale_params": state[0], "staleness": 1} | extra
        updates, inner_state = inner.update(updates, state[1], params, **told)
        return updates, (params, inner_state)

    return optax.GradientTransformationExtraArgs(lambda p: (p, inner.init(p)), update)


def test_how_little_another_rule_and_another_source_take():
    assert len(inspect.getsource(toy_rule).splitlines()) <= 3
    assert len(inspect.getsource(toy_source).splitlines()) <= 8


# The matrix ---------------------------------------------------------------------------------------


def scale_by_one_plus_age():
    """Tells an age of 0 from one of 1, which no rule of the library does."""
    return optax.GradientTransformationExtraArgs(
        lambda params: (),
        lambda updates, state, params, *, staleness, **_: (
            jax.tree.map(lambda g: g * (1.0 + staleness), updates),
            state,
        ),
    )


RULES = {
    "DC-ASGD-c": dc.add_delay_compensation(2.0, decay=None, clip=None),
    "add_delay_compensation": dc.add_delay_compensation(),
    "robust_delay_compensation": dc.robust_delay_compensation(),
    "scale_by_gap": dc.scale_by_gap(),
    "scale_by_staleness": dc.scale_by_staleness(0.5),
    "a toy rule": dc.rules.transformation(toy_rule, {"weight": 3.0}),
    "the age itself": scale_by_one_plus_age(),
    "dcasgd": dc.dcasgd(0.1, 0.9, 2.0, store=None),
    "two rules": optax.chain(dc.add_delay_compensation(2.0, decay=None), dc.scale_by_gap()),
}


def old(age, first=None):
    """Where each gradient was computed (so many updates before the first), and its age."""
    ages = [age] * len(GRADS)
    if first is not None:
        ages[0] = first
    return [max(t - age, 0) for t in range(len(GRADS))], ages


def of_workers():
    """The same by Algorithm 2 for the workers of `WORKERS`."""
    at, ages, pulled = [], [], [0] * NUM_WORKERS
    for t, worker in zip(range(len(GRADS)), WORKERS, strict=False):
        at.append(pulled[worker])
        ages.append(t - pulled[worker])
        pulled[worker] = t + 1
    return at, ages


def as_int(t):
    return {"worker": WORKERS[t]}


def as_array(t):
    return {"worker": jnp.int32(WORKERS[t])}


# name: (the source, the extra arguments of update t, its updates before the first gradient arrives,
# where the gradients were computed and their ages)
SOURCES = {
    "remember_params": (dc.remember_params, None, 0, old(1, first=0)),
    "remember_params of workers": (
        functools.partial(dc.remember_params, num_workers=NUM_WORKERS),
        as_int,
        0,
        of_workers(),
    ),
    "remember_params of workers, arrays": (
        functools.partial(dc.remember_params, num_workers=NUM_WORKERS),
        as_array,
        0,
        of_workers(),
    ),
    "delay_gradients, 0": (lambda tx: dc.delay_gradients(tx, 0), None, 0, old(0)),
    "delay_gradients, 1": (lambda tx: dc.delay_gradients(tx, 1), None, 1, old(1)),
    "delay_gradients, 2": (lambda tx: dc.delay_gradients(tx, 2), None, 2, old(2)),
    "remember_params inside delay_gradients": (
        lambda tx: dc.delay_gradients(dc.remember_params(tx), 2),
        None,
        2,
        old(2),
    ),
    "a toy source": (toy_source, None, 0, old(1)),
}


def optimizer(rule):
    return optax.chain(RULES[rule], optax.sgd(0.1, momentum=0.9))


unoptimized = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def told_by_the_caller(rule, at, ages, compiled=False):
    """The parameters after each update, where the caller passes w_s and the staleness."""
    tx, params = optimizer(rule), [PARAMS]
    state = tx.init(PARAMS)
    update = unoptimized(tx.update) if compiled else tx.update
    for grad, i, age in zip(GRADS, at, ages, strict=True):
        updates, state = update(grad, state, params[-1], stale_params=params[i], staleness=age)
        params.append(optax.apply_updates(params[-1], updates))
    return params[1:]


def check(rule, trajectory, late, schedule, *, compiled=False):
    expected = told_by_the_caller(rule, *map(tuple, schedule), compiled)
    for params in trajectory[:late]:
        assert_bit_equal(params, PARAMS)
    assert_bit_equal(trajectory[late:], expected[: len(trajectory) - late])


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_computes_the_same_whatever_supplies_the_stale_parameters(rule, source):
    wrap, extras, late, schedule = SOURCES[source]
    trajectory, _ = train(wrap(optimizer(rule)), PARAMS, GRADS, extras or (lambda t: {}), jit=False)
    check(rule, trajectory, late, schedule)


@pytest.mark.parametrize("rule", RULES)
def test_the_schedules_of_the_matrix_make_a_difference(rule):
    """Or it would show nothing: with fresh gradients each rule ends elsewhere."""
    fresh = told_by_the_caller(rule, *map(tuple, old(0)))[-1]["kernel"]
    for at, ages in (old(1), old(2), of_workers()):
        stale = told_by_the_caller(rule, tuple(at), tuple(ages))[-1]["kernel"]
        ignores = rule == "scale_by_staleness" and max(ages) == 1
        assert (abs(stale - fresh).max() > 1e-3) == (not ignores)


@pytest.mark.parametrize("told", [False, True], ids=["remembered", "passed"])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_computes_the_same_inside_overlap_reduction(rule, told):
    """Eight devices with equal local gradients: their mean is each of them."""
    inner = optimizer(rule)
    tx = dc.overlap_reduction(inner if told else dc.remember_params(inner), "data")
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    specs = dc.OverlapReductionState(count=P(), grads=P("data"), inner_state=P())

    def update(grads, state, params):
        extra = {"stale_params": params} if told else {}
        return tx.update(jax.lax.pcast(grads, "data", to="varying"), state, params, **extra)

    init = jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs)
    update = jax.shard_map(update, mesh=mesh, in_specs=(P(), specs, P()), out_specs=(P(), specs))
    on_mesh = optax.GradientTransformation(jax.jit(init), unoptimized(update))
    trajectory, _ = train(on_mesh, PARAMS, GRADS, jit=False)
    check(rule, trajectory, 1, old(1), compiled=True)


# How much is kept ---------------------------------------------------------------------------------


def test_one_memory_serves_all_rules_inside():
    """Eight backups; Gap-Aware's own ν and last parameters; not eight backups for each rule."""
    rules = optax.chain(dc.add_delay_compensation(decay=None), dc.scale_by_gap(), optax.sgd(0.1))
    params = {"w": jnp.ones((64, 64))}
    state = jax.eval_shape(dc.remember_params(rules, num_workers=8).init, params)
    sizes = [x.size for x in jax.tree.leaves(state)]
    assert sum(size // 64**2 for size in sizes) == 10
    assert sum(size for size in sizes if size < 64**2) == 13  # 8 ages, and 5 scalars
