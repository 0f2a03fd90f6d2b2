"""mxnet.DCASGD on half-precision parameters without masters: arithmetic and momentum in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_dcasgd import mxnet

versions = pytest.mark.parametrize("version", [1, 2])
halves = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])


def dtypes(tree):
    return jax.tree.map(lambda x: x.dtype, tree)


@versions
@halves
def test_a_momentum_that_half_precision_cannot_hold_decays(version, dtype):
    # 0.999 is 1 in bfloat16, where a momentum would stay as it is for ever.
    tx = mxnet.DCASGD(1.0, momentum=0.999, version=version)
    params = jnp.ones(3, dtype)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for t in range(200):
        updates, state = update(jnp.full(3, float(t == 0), dtype), state, params)
    assert updates.dtype == dtype
    np.testing.assert_allclose(np.asarray(updates, float), -(0.999**199), rtol=jnp.finfo(dtype).eps)


@versions
@halves
def test_an_update_is_rounded_once_or_behind_the_compensation_of_version_1_twice(version, dtype):
    rng = np.random.default_rng(0)
    params, grads = (jnp.asarray(rng.normal(size=500), dtype) for _ in range(2))
    wd = 0.03 if version == 2 else 0.0  # in version 1 it is added behind the compensation
    tx = mxnet.DCASGD(0.1, 0.9, 2.0, wd=wd, rescale_grad=0.011, version=version)
    updates, _ = tx.update(grads, tx.init(params), params)
    exact = -0.1 * (0.011 * np.asarray(grads, float) + wd * np.asarray(params, float))
    half_a_unit = float(jnp.finfo(dtype).eps) / 2
    limit = half_a_unit * np.maximum(np.abs(exact), float(jnp.finfo(dtype).tiny))
    number = {1: 2, 2: 1}[version]
    assert np.all(np.abs(np.asarray(updates, float) - exact) <= 1.001 * number * limit)


@versions
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
def test_the_state_keeps_its_form_where_a_parameter_has_no_gradient(version, momentum, dtype):
    tx = mxnet.DCASGD(0.1, momentum, wd=0.1, rescale_grad=0.5, lr_mult=0.3, version=version)
    params = {"a": jnp.ones(2, dtype), "b": {"c": jnp.ones((), dtype)}}
    state = tx.init(params)
    form = jax.tree.structure(state), dtypes(state)
    for grads in ({"a": None, "b": params["b"]}, {"a": params["a"], "b": None}, params):
        updates, state = tx.update(grads, state, params)
        assert (jax.tree.structure(state), dtypes(state)) == form
        assert dtypes(updates) == dtypes(grads)
