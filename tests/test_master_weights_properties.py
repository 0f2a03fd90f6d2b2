"""`with_master_weights`: where updates land, and what the optimizer inside sees."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_bit_equal
from hypothesis import strategies as st
from property_bounds import initialise, signature
from property_cases import HALF, apply, cases, examples, is_half, leaves_of

from optax_dcasgd import dcasgd, with_master_weights


def half_numbers(dtype):
    """Half-precision numbers that are hard to reach by an addition."""
    info = jnp.finfo(dtype)
    # XLA flushes subnormal float32 to zero on the CPU, and bfloat16 has the exponents of float32.
    smallest = float(info.smallest_subnormal if dtype == "float16" else info.tiny)
    edges = [0.0, -0.0, 1.0, 1.0 + float(info.eps), smallest, float(info.tiny), float(info.max)]
    edges += [2 * smallest, 3 * smallest, 1.0 - float(info.epsneg), 65504.0, 1e-4]
    return st.sampled_from([*edges, *(-x for x in edges)]) | st.floats(
        -60000, 60000, width=16, allow_subnormal=dtype == "float16"
    )


STEPS = st.sampled_from([1.0, -1.0, 2.0**-9, 2.0**-25, 1e-8, -3e-8, 1e-20, 0.0]) | st.floats(
    -60000, 60000, width=32, allow_subnormal=False
)


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@hypothesis.given(dtype=st.sampled_from(HALF), draw=st.data())
@examples(20)
def test_applied_updates_land_on_the_rounded_master_weights(x64, dtype, draw):
    with jax.enable_x64(x64):
        check_landing(np.float64 if x64 else np.float32, dtype, draw)


def check_landing(step_dtype, dtype, draw):
    size = 4

    def numbers(strategy):
        return np.asarray(draw.draw(st.lists(strategy, min_size=size, max_size=size)), np.float32)

    params = jnp.asarray(numbers(half_numbers(dtype))).astype(dtype)
    tx = with_master_weights(optax.identity())
    state = tx.init(params)
    kind = signature(state)
    alive = np.ones(size, bool)  # what has overflowed is no longer compared
    tiny, huge = float(jnp.finfo("float32").tiny), float(jnp.finfo("float32").max)
    for _ in range(5):
        # Often to zero, across zero, or almost to zero (the sum of a float32 master and a float32
        # step is never too near to zero to be reached, but that with a float64 step may be). Now
        # and then somebody else writes the parameter; the master has to follow that.
        how = numbers(st.integers(0, 6)).astype(int)
        params = jnp.where(
            how == 5, jnp.asarray(numbers(half_numbers(dtype))).astype(dtype), params
        )
        master = np.asarray(state.master)
        master = np.where(np.asarray(state.master.astype(dtype)) == params, master, params)
        factors = np.asarray([0, -1, -2, -1 + 2.0**-10, -1 + 2.0**-23, 0, -1 + 1e-8], step_dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            steps = factors[how] * master.astype(step_dtype)
            steps = np.where(np.isin(how, [0, 5]), numbers(STEPS).astype(step_dtype), steps)
            exact = np.asarray(jnp.asarray(master) + jnp.asarray(steps)).astype(np.float32)
            # XLA flushes subnormal float32 to zero on the CPU.
            exact = np.where(np.abs(exact) < tiny, np.float32(0), exact)
        updates, state = tx.update(jnp.asarray(steps), state, params)
        assert signature(state) == kind
        old, params = params, optax.apply_updates(params, updates)
        assert params.dtype == old.dtype

        def exactly(x, alive=alive):
            return np.asarray(x).astype(np.float64)[alive]

        wanted = jnp.asarray(exact).astype(dtype)
        # Finite, and not further away than float32 reaches.
        with np.errstate(invalid="ignore"):  # inf − inf is nan: not alive either
            alive &= np.abs(np.asarray(wanted, np.float64) - np.asarray(old, np.float64)) <= huge
        np.testing.assert_array_equal(exactly(params), exactly(state.master.astype(dtype)))
        # A float32 update is off by 2⁻²⁵ of the parameter it starts from at most, and the sum by
        # as much; that is less than half of what half precision resolves at the end of the step,
        # unless the end is 2⁻¹² times nearer to zero than the beginning, or nearer still. And
        # where the difference of the two is subnormal, it is flushed to zero.
        goal, start = exactly(wanted), exactly(old)
        within_reach = (np.abs(goal) >= 2.0**-12 * np.abs(start)) | (goal == 0)
        within_reach &= (np.abs(goal - start) >= tiny) | (goal == start)
        np.testing.assert_array_equal(exactly(params)[within_reach], goal[within_reach])
        np.testing.assert_array_equal(
            exactly(state.master)[within_reach], exactly(exact)[within_reach]
        )
        assert np.all(np.abs(exactly(params) - goal) <= 2.0**-23 * np.abs(start) + tiny)


INNER = {
    "dcasgd": lambda: dcasgd(0.1, 0.9, 1.0),
    "dcasgd, adaptive": lambda: dcasgd(0.1, 0.5, 2.0, decay=0.95, clip=1.0, store="updates"),
    "adam": lambda: optax.adam(0.01),
}


@hypothesis.given(
    case=cases({}, dtypes_of_x64=((False, [*HALF, "float32"]), (True, [*HALF, "float64"]))),
    inner=st.sampled_from(list(INNER)),
    wider=st.booleans(),
)
@examples(20)
def test_master_weights_train_as_if_the_parameters_were_float32(case, inner, wider):
    x64, tree, _, data = case
    with jax.enable_x64(x64):
        params = data.params(tree)
        masters = [p.astype(jnp.float32) if is_half(p) else p for p in params]
        optimizer = INNER[inner]()
        tx = with_master_weights(optimizer)
        state = initialise(tx, tree.unflatten(params))
        kind = signature(state)
        inner_state = optimizer.init(tree.unflatten(masters))
        for _ in range(4):
            grads = data.grads(tree, wider=wider, absent=False)
            updates, state = tx.update(tree.unflatten(grads), state, tree.unflatten(params))
            assert signature(state) == kind
            params = apply(params, leaves_of(tree, updates))
            widened = [g.astype(m.dtype) for g, m in zip(grads, masters, strict=True)]
            updates, inner_state = optimizer.update(
                tree.unflatten(widened), inner_state, tree.unflatten(masters)
            )
            masters = apply(masters, leaves_of(tree, updates))
            assert_bit_equal(state.inner_state, inner_state)
            for p, m in zip(params, masters, strict=True):
                np.testing.assert_array_equal(np.asarray(p), np.asarray(m.astype(p.dtype)))
