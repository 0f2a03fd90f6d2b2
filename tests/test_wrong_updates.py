"""Wrong arguments of init and update raise an error that names them and, in a tree, the leaf.

Messages are matched for the names that a user needs to find the mistake, not for their wording.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import raises
from transformation_cases import CASES, GRADS, NUM_WORKERS, PARAMS, cast, inputs

import optax_dcasgd as dc


def changed(tree, *path, value=None, drop=False):
    """A copy of the tree with something else, or nothing, at the path."""
    tree = jax.tree.map(lambda x: x, tree)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    parent.pop(path[-1], None)
    if not drop:
        parent[path[-1]] = value
    return tree


class Call:
    """Calls the update, or the step, of a case with one argument changed."""

    def __init__(self, name):
        self.params, self.grads, self.extras = inputs(name, 0)
        self.tx = CASES[name].make()
        self.state = self.tx.init(self.params)
        self.update = getattr(self.tx, "step", None) or self.tx.update
        self.gradients = "grads" if hasattr(self.tx, "step") else "updates"  # in its signature

    def __call__(self, **change):
        trees = {"grads": self.grads, "state": self.state, "params": self.params}
        arguments = [change.pop(key, tree) for key, tree in trees.items()]
        return self.update(*arguments, **{**self.extras, **change})


each_case = pytest.mark.parametrize("name", CASES)
# A link that needs no parameters is left to the other links of its chain.
NEEDS_PARAMS = [
    name
    for name in CASES
    if name not in ("track_velocity", "staleness-given", "scheduled-staleness-given")
]
each_that_needs_params = pytest.mark.parametrize("name", NEEDS_PARAMS)

# --- Trees ---

ONE = jnp.ones(())
WRONG_TREES = [  # the tree, and the path at which it differs from PARAMS
    (changed(PARAMS, "dense", "bias", drop=True), "['dense']['bias']"),
    (changed(PARAMS, "dense", drop=True), "['dense']"),
    (changed(PARAMS, "dense", "more", value=ONE), "['dense']['more']"),
    (changed(PARAMS, "frozen", value=ONE), "['frozen']"),
    (changed(PARAMS, "dense", "bias", value=[jnp.ones(2)]), "['dense']['bias']"),
    (changed(PARAMS, "frozen", value=(ONE, jnp.ones(4))), "['frozen']"),
    (changed(PARAMS, "dense", "bias", value=optax.MaskedNode()), "['dense']['bias']"),
    ({}, "['dense']"),
    (jnp.ones(3), ""),  # wrong at the root, whose path is empty
    (changed(PARAMS, "dense", "kernel", value=jnp.ones((2, 3))), "['dense']['kernel']"),
    (changed(PARAMS, "frozen", "scale", value=jnp.ones(5)), "['frozen']['scale']"),
    # These would broadcast, so that nothing else would notice.
    (changed(PARAMS, "dense", "bias", value=jnp.ones(1)), "['dense']['bias']"),
    (changed(PARAMS, "dense", "kernel", value=1.0), "['dense']['kernel']"),
    (changed(PARAMS, "frozen", "scale", value=jnp.ones((1, 4))), "['frozen']['scale']"),
    (changed(PARAMS, "frozen", "offset", value=jnp.ones(1)), "['frozen']['offset']"),
]


@each_that_needs_params
def test_trees_that_do_not_fit_are_refused(name):
    call = Call(name)
    for tree, path in WRONG_TREES:
        with raises(ValueError, call.gradients, path):
            call(grads=tree)
        with raises(ValueError, "stale_params", path):
            call(stale_params=tree)
        if name != "constant-given":  # whose state is a count
            with raises(ValueError, "params", path):  # the state was made for others
                call(grads=tree, params=tree)
    with raises(ValueError, "stale_params", "['dense']['bias']"):
        call(stale_params=changed(PARAMS, "dense", "bias", value=None))
    number = changed(PARAMS, "dense", "bias", value=jnp.ones(2, jnp.complex64))
    with raises(TypeError, f"{call.gradients}['dense']['bias']", "complex"):
        call(grads=number)
    with raises(TypeError, "stale_params['dense']['bias']", "complex"):
        call(stale_params=number)
    for dtype in (bool, jax.dtypes.float0):
        no_number = changed(PARAMS, "dense", "bias", value=np.zeros(2, dtype))
        with raises(TypeError, f"{call.gradients}['dense']['bias']", f"dtype {np.dtype(dtype)}"):
            call(grads=no_number)


@each_that_needs_params
def test_parameters_that_cannot_be_trained_or_are_missing_are_refused(name):
    call = Call(name)
    for leaf in (jnp.ones(3, jnp.int32), True, 1, jax.random.key(0), "abc", object()):
        with raises(TypeError, "params['dense']['bias']"):
            call.tx.init(changed(PARAMS, "dense", "bias", value=leaf))
    decay = optax.add_decayed_weights(0.1)
    with pytest.raises(ValueError) as of_optax:  # noqa: PT011 (the message is what is asked for)
        decay.update(PARAMS, decay.init(PARAMS), None)
    with raises(ValueError, str(of_optax.value)):
        call(params=None)
    if hasattr(call.tx, "update"):  # where the argument may also be left out
        with raises(ValueError, str(of_optax.value)):
            call.tx.update(call.grads, call.state, **call.extras)


def test_bare_arrays_are_named_by_the_argument_alone():
    tx, params = dc.remember_params(dc.dcasgd(store=None)), jnp.ones(3)
    state = tx.init(params)
    with raises(ValueError, "updates has shape (2,)", "(3,)"):
        tx.update(jnp.ones(2), state, params)
    with raises(ValueError, "stale_params has shape ()", "(3,)"):
        tx.update(params, state, params, stale_params=1.0)
    with raises(TypeError, "params has dtype int32"):
        tx.init(jnp.ones(3, jnp.int32))


def test_a_parameter_that_cannot_be_trained_can_be_masked():
    params = {**PARAMS, "step": jnp.arange(3)}
    trained = jax.tree.map(lambda p: jnp.issubdtype(p.dtype, jnp.floating), params)
    tx = optax.masked(dc.remember_params(optax.chain(dc.scale_by_gap())), trained)
    tx.update({**GRADS[0], "step": jnp.arange(3)}, tx.init(params), params)


# --- Where the stale parameters come from ---

WITH_WORKERS = dc.remember_params(dc.scale_by_staleness(), num_workers=NUM_WORKERS)


def update(tx, state=None, **extra_args):
    state = tx.init(PARAMS) if state is None else state
    return (getattr(tx, "step", None) or tx.update)(GRADS[0], state, PARAMS, **extra_args)


@pytest.mark.parametrize(
    "tx",
    [
        *(dc.dcasgd(store=None), dc.fused_dcasgd(store=None), dc.add_delay_compensation()),
        *(dc.robust_delay_compensation(), dc.scale_by_gap()),
    ],
    ids=["dcasgd", "fused_dcasgd", "add_delay_compensation", "robust", "scale_by_gap"],
)
def test_stale_parameters_are_required_and_the_ways_to_them_are_named(tx):
    for extra_args in ({}, {"stale_params": None}, {"worker": 0}, {"staleness": 1}):
        with raises(ValueError, "stale_params", "remember_params", "delay_gradients", "update("):
            update(tx, **extra_args)


def test_a_staleness_is_required_and_must_be_a_number_or_a_tree_of_them():
    for tx in (dc.scale_by_staleness(), dc.robust_delay_compensation()):
        with raises(ValueError, "staleness", "remember_params", "delay_gradients"):
            update(tx, stale_params=PARAMS)
    tx = dc.scale_by_staleness()
    for wrong in ("2", 2j, jnp.ones(2), -1, object()):  # jnp.ones(2) would broadcast
        for staleness, name in (
            (wrong, "staleness"),
            ({"dense": 1, "frozen": wrong}, "['frozen']"),
        ):
            with pytest.raises((TypeError, ValueError), match=re.escape(name)):
                update(tx, staleness=staleness)
    for staleness in (0, 2.5, np.int64(3), jnp.asarray(3), {"dense": 1, "frozen": jnp.int8(2)}):
        update(tx, staleness=staleness)


def test_a_worker_is_required_with_workers_and_refused_without():
    for extra_args in ({}, {"worker": None}):
        with raises(ValueError, "worker", f"num_workers={NUM_WORKERS}"):
            update(WITH_WORKERS, **extra_args)
    one_copy = dc.remember_params(optax.sgd(0.1))
    with raises(ValueError, "worker", "num_workers"):
        update(one_copy, worker=0)
    update(one_copy, worker=0, stale_params=PARAMS)
    for tx in (dc.dcasgd(), dc.fused_dcasgd(store="updates")):
        with raises(ValueError, "worker", "store=", "remember_params(dcasgd"):
            update(tx, worker=0)
        update(tx, worker=0, stale_params=PARAMS)


def test_a_worker_is_one_integer_in_range():
    state = WITH_WORKERS.init(PARAMS)
    for worker in (-1, 3, 2**40, np.int64(3), np.array(3)):
        for more in ({}, {"stale_params": PARAMS}):
            with raises(ValueError, "worker", f"num_workers={NUM_WORKERS}", str(worker)):
                update(WITH_WORKERS, state, worker=worker, **more)
    for worker in (1.0, np.float32(1), jnp.asarray(1.0), True, np.True_, "1", [1], {}):
        with raises(TypeError, "worker"):
            update(WITH_WORKERS, state, worker=worker)
    with raises(TypeError, "worker", "(2,)"):
        update(WITH_WORKERS, state, worker=jnp.asarray([1, 2]))
    for worker in (2, np.int8(2), np.array(2), jnp.asarray(2), jnp.uint32(2)):
        assert int(update(WITH_WORKERS, state, worker=worker)[1].last_worker) == 2


# --- A state that was made otherwise ---

OTHER_STATES = [  # made by, used by, what the message names
    *(
        (make(**a), make(**b), argument)
        for make in (dc.dcasgd, dc.fused_dcasgd)
        for a, b, argument in [
            ({}, {"decay": 0.9}, "decay=0.9"),
            ({"decay": 0.9}, {}, "decay=None"),
            ({"store": None}, {}, "store='params'"),
            ({}, {"store": None}, "store=None"),
            ({"momentum": 0.9}, {}, "momentum=None"),
            ({}, {"momentum": 0.9}, "momentum=0.9"),
        ]
    ),
    (dc.add_delay_compensation(), dc.add_delay_compensation(decay=None), "decay=None"),
    (dc.add_delay_compensation(decay=None), dc.add_delay_compensation(), "decay=0.95"),
    *(
        (*(dc.remember_params(dc.scale_by_staleness(), num_workers=n) for n in pair), message)
        for pair in ((3, 4), (3, 1), (None, 3), (3, None))
        for message in [f"num_workers={pair[1]}, but"]
    ),
    *(
        (*(dc.delay_gradients(optax.sgd(0.1), d) for d in pair), f"delay is {pair[1]}, but")
        for pair in ((3, 2), (2, 0), (0, 1))
    ),
]


@pytest.mark.parametrize("case", range(len(OTHER_STATES)), ids=lambda i: OTHER_STATES[i][2])
def test_a_state_made_otherwise_is_refused(case):
    made_by, used_by, message = OTHER_STATES[case]
    worker = {"worker": 0} if "num_workers" in message and "None, but" not in message else {}
    with raises(ValueError, message, "the optimizer state was made with"):
        update(used_by, made_by.init(PARAMS), stale_params=PARAMS, **worker)


@pytest.mark.parametrize("name", ["dcasgd-params", "fused_dcasgd", "gap-remembered", "workers"])
def test_a_state_made_for_another_dtype_is_refused(name):
    """A fused step would round the parameters to it."""
    call = Call(name)
    with raises(ValueError, "params", "['bias'] has dtype float32", "dtype bfloat16"):
        call(state=call.tx.init(cast(PARAMS, jnp.bfloat16)))
