"""Where nothing is to be corrected, gradients pass to the bit; edges of the range; the state."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import assert_bit_equal, random_tree, train

import optax_dcasgd as dc
from optax_dcasgd import add_delay_compensation, remember_params

# Values whose square overflows or underflows in their own dtype, and those that no arithmetic
# leaves alone: -0, infinities, subnormals (which XLA flushes to zero on the CPU if it computes).
AWKWARD = [0.0, -0.0, np.inf, -np.inf, 1e-25, -1e-25, 1e25, -3e38, 1e-40, 1.0, -2.0, 6e4, -6e-8]
AWKWARD_WIDE = [*AWKWARD, 1e200, -1e-200, 5e-324]
DTYPES = ["float32", "bfloat16", "float16", "complex64", "float64", "complex128"]


def awkward(dtype):
    values = np.asarray(AWKWARD_WIDE if jnp.finfo(dtype).bits == 64 else AWKWARD)
    with np.errstate(all="ignore"):
        if jnp.issubdtype(dtype, jnp.complexfloating):
            values = values + 1j * np.roll(values, 3)
        return jnp.asarray(values.astype(jnp.dtype(dtype)))


RULES = {
    "constant": {"decay": None, "clip": None},
    "adaptive": {"decay": 0.95, "clip": None},
    "no memory": {"decay": 0.0, "clip": None},
    "clipped": {"decay": None, "clip": 1.0},
    "adaptive, clipped to nothing": {"decay": 0.5, "clip": 0.0},
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_pass_bit_for_bit_where_there_is_nothing_to_correct(rule, x64, compiled):
    """For want of λ, or because w = w_s, in one array or (told by identity) in all."""
    with jax.enable_x64(x64):
        dtypes = [d for d in DTYPES if (jnp.finfo(d).bits == 64) == x64]
        grads = {d: awkward(d) for d in dtypes}
        params = {d: jnp.asarray(np.linspace(-2, 2, g.size), d) for d, g in grads.items()}
        moved = {d: p + jnp.asarray(1, d) for d, p in params.items()}
        equal = {d: p + 0 for d, p in params.items()}
        for lamda, stale in [(0.0, moved), (lambda count: 0.0 * count, moved), (2.0, equal)] + (
            [] if compiled else [(2.0, params)]
        ):
            tx = add_delay_compensation(lamda, **RULES[rule])
            update = jax.jit(tx.update) if compiled else tx.update
            state = tx.init(params)
            for _ in range(2):
                updates, state = update(grads, state, params, stale_params=stale)
                assert_bit_equal(updates, grads)


def test_the_defaults_are_adaptive_and_clipped():
    params, grads = random_tree(0), [random_tree(t) for t in range(1, 5)]
    spelled_out = add_delay_compensation(8.0, decay=0.95, eps=1e-7, clip=1.0)
    trajectories = [
        train(remember_params(tx), params, grads, jit=False)[0]
        for tx in (add_delay_compensation(), spelled_out)
    ]
    chex.assert_trees_all_equal(*trajectories)


def test_the_square_of_a_gradient_may_leave_the_range_of_float32():
    for g in (1e25, -1e-25, 3e30):
        # λ·g is 10⁻³, so the correction is a thousandth of the gradient, whatever g² is.
        tx = add_delay_compensation(abs(1e-3 / g), decay=None, clip=None)
        params = jnp.ones(())
        updates, _ = tx.update(jnp.float32(g), tx.init(params), params, stale_params=params - 1)
        np.testing.assert_allclose(updates, g * (1 + np.sign(g) * 1e-3), rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_without_epsilon_a_zero_gradient_is_no_division_by_zero(decay):
    tx = add_delay_compensation(1.0, decay=decay, eps=0.0, clip=None)
    params, grads = jnp.asarray([1.0, 2.0]), jnp.asarray([0.0, 1.0])
    updates, _ = tx.update(grads, tx.init(params), params, stale_params=jnp.zeros(2))
    np.testing.assert_allclose(updates, [0.0, 1.0 + 2.0 / np.sqrt(1 - decay)], rtol=1e-6)


def test_without_epsilon_a_parameter_that_never_moved_has_no_gap():
    params = jnp.asarray([1.0, 2.0])
    tx = remember_params(dc.scale_by_gap(eps=0.0))
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(params, state, params)
        np.testing.assert_array_equal(updates, params)


@pytest.mark.parametrize(
    "tx",
    [
        add_delay_compensation(2.0, decay=0.9),
        dc.robust_delay_compensation(),
        dc.scale_by_gap(),
    ],
    ids=["add_delay_compensation", "robust_delay_compensation", "scale_by_gap"],
)
def test_what_is_not_a_number_stays_to_be_seen(tx):
    """A NaN in ν, or in w_s, is not taken for the zero that is allowed there."""
    params, fine = jnp.ones(2), jnp.array([0.1, 0.1])
    given = {"stale_params": params - 0.1, "staleness": 2}
    _, state = tx.update(fine, tx.init(params), params, **given)
    _, with_nan = tx.update(fine.at[0].set(jnp.nan), state, params, **given)
    if isinstance(state, dc.ScaleByGapState):  # its ν is of the parameters
        given["stale_params"], with_nan = given["stale_params"].at[0].set(jnp.nan), state
    updates, _ = tx.update(fine, with_nan, params + 0.1, **given)
    np.testing.assert_array_equal(np.isnan(updates), [True, False])


def test_the_steps_of_the_gap_are_those_taken_and_not_those_from_the_stale_parameters():
    """ν after one update that moved w by 1, the gradient having been computed 5 away."""
    tx = dc.scale_by_gap(0.9)
    params = jnp.zeros(2)
    state = tx.init(params)
    for step in range(2):
        _, state = tx.update(params + 1, state, params + step, stale_params=params - 5)
    np.testing.assert_allclose(state.nu, 0.1, rtol=1e-6)
    assert_bit_equal(state.prev_params, params + 1)


# What the state owes ------------------------------------------------------------------------------
