"""A donated step writes every new array over an old one, by XLA on a CPU."""

import jax
import jax.numpy as jnp
import optax
import pytest
from kernel_cases import make

NEEDS_COPIES = {"bfloat16"} if jax.__version_info__ < (0, 11) else set()  # XLA's CPU compiler then
SETTINGS = {
    "stored": {},
    "updates": {"store": "updates"},
    "updates, no momentum": {"store": "updates", "momentum": None},
    "adaptive": {"decay": 0.9, "clip": 1.0},
}


def memory(step, *args):
    return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile().memory_analysis()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("form", ["fused_dcasgd", "dcasgd"])
def test_a_donated_step_is_in_place(form, settings, dtype):
    optimizer = make(form, **settings)
    params = [jnp.ones((1 << 8, 1 << 8), dtype)] * 3
    state = optimizer.init(params)

    def step(params, state, grads):
        if form == "fused_dcasgd":
            return optimizer.step(grads, state, params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    used = memory(step, params, state, params)
    assert used.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves((params, state)))
    if dtype not in NEEDS_COPIES:
        assert used.temp_size_in_bytes < params[0].nbytes


ORDERS = [("state, params", settings) for settings in SETTINGS]  # taken, and returned


@pytest.mark.parametrize(("order", "settings"), [*ORDERS, ("jit(step)", "stored")])
def test_a_fused_step_in_another_order_is_in_place(order, settings):
    optimizer = make("fused_dcasgd", **SETTINGS[settings])
    params = [jnp.ones((1 << 8, 1 << 8))] * 3
    state = optimizer.init(params)
    if order == "jit(step)":
        used = memory(lambda s, p, g: optimizer.step(g, s, p), state, params, params)
    else:
        used = memory(lambda s, p, g: optimizer.step(g, s, p)[::-1], state, params, params)
    assert used.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves((params, state)))
    assert used.temp_size_in_bytes < params[0].nbytes
