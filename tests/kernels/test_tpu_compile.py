"""What the real TPU compiler makes of a step. It comes with the extra tpu-compile and needs no TPU.

pytest -m tpu_compile tests/kernels/test_tpu_compile.py
"""

import importlib.util
import math
import pathlib
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kernel_cases import MODES, SHAPES_WITH_NUMBERS, TPU_DTYPES, Case, arguments

import optax_dcasgd as dc
from optax_dcasgd.kernels import mosaic_tpu

pytestmark = pytest.mark.tpu_compile

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "tpu_compile.py"
SIZE = 1 << 24
KERNEL = 'custom_call_target="tpu_custom_call"'
ONE_PASS = {  # bytes a float32 parameter with each array read once and written once
    "fused_dcasgd()": 28,
    "fused_dcasgd(store='updates')": 20,
    "fused_dcasgd(decay, clip)": 36,
}


@cache
def benchmark():
    spec = importlib.util.spec_from_file_location("tpu_compile", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figures(chip, step, order):
    compiled = benchmark().compile_step(chip, step, order, jnp.float32)
    return benchmark().figures(compiled, SIZE)


each_chip = pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e"])


@each_chip
@pytest.mark.parametrize("order", ["params, state", "state, params", "jit(step)"])
@pytest.mark.parametrize(("step", "size"), ONE_PASS.items(), ids=ONE_PASS)
def test_xla_moves_each_array_once_in_any_order(chip, order, step, size):
    found = figures(chip, step, order)
    assert found["bytes_per_parameter"] <= size + 0.01
    assert found["copies"] == 0
    assert found["temporaries"] < 0.01
    assert found["kernels"] == 0


@each_chip
@pytest.mark.parametrize(("step", "size"), ONE_PASS.items(), ids=ONE_PASS)
def test_the_kernel_moves_each_array_once(chip, step, size):
    found = figures(chip, f"{step}, pallas", "params, state")
    assert found["bytes_per_parameter"] <= size + 0.01
    assert found["copies"] == 0
    assert found["temporaries"] < 0.01
    assert found["kernels"] == 1


def test_the_measure_sees_a_copy():
    """A bare copy of w, as one would write it, is what all of this avoids."""
    found = figures("v5e", "JAX by hand", "params, state")
    assert found["bytes_per_parameter"] > 39
    assert found["copies"] >= 1
    assert found["temporaries"] >= 1


def kernels_in(chip, cases):
    """How many kernels are in one program of all these cases."""
    args = [arguments(MODES[case.mode], case.shape, *case.dtypes) for case in cases]

    def run(*args):
        return [mosaic_tpu.update(*a, step=case.step) for a, case in zip(args, cases, strict=True)]

    return benchmark().compile_for(chip, run, *args).as_text().count(KERNEL)


@pytest.mark.parametrize("dtypes", TPU_DTYPES, ids="-".join)
def test_the_kernel_compiles_in_every_mode(dtypes):
    cases = [Case(mode, (300, 1100), dtypes, step) for mode in MODES for step in (False, True)]
    assert kernels_in("v5e", cases) == len(cases)


@each_chip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_compiles_for_every_shape(chip, dtype):
    cases = [
        Case("stored, DC-a, clip", shape, (dtype, "float32"))
        for shape in [*SHAPES_WITH_NUMBERS, (300, 1100)]
    ]
    assert kernels_in(chip, cases) == len(cases)


@pytest.mark.parametrize("shape", [(1 << 16, 12345), ((1 << 29) + 3,)], ids=str)
def test_the_kernel_compiles_beyond_two_gigabytes(shape):
    assert 4 * math.prod(shape) > 2**31
    args = arguments(MODES["updates"], (1,))
    big = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(shape if x.shape == (1,) else x.shape, x.dtype), args
    )
    step = partial(mosaic_tpu.update, step=True)
    assert KERNEL in benchmark().compile_for("v5p", step, *big).as_text()


# --- Eight devices ---


def mesh_of(axis_type):
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    devices = np.array(topology.devices).reshape(4, 2)
    return jax.sharding.Mesh(devices, ("x", "y"), axis_types=(axis_type, axis_type))


def compile_on_mesh(mesh, implementation, wrap=lambda step, specs: step):
    optimizer = dc.fused_dcasgd(0.1, 0.9, 0.04, implementation=implementation)
    shape, spec = (4096, 2048), P("x", "y")
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    state = jax.eval_shape(optimizer.init, params)

    def place(x):
        sharding = NamedSharding(mesh, spec if x.shape == shape else P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params, state = jax.tree.map(place, (params, state))
    specs = jax.tree.map(lambda x: x.sharding.spec, (params, state))
    step = wrap(optimizer.step, specs)

    def train_step(params, state, grads):
        return step(grads, state, params)

    return (
        jax.jit(train_step, donate_argnums=(0, 1)).lower(params, state, params).compile().as_text()
    )


COLLECTIVES = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def assert_kernel_per_shard(text):
    assert not re.search(COLLECTIVES, text)
    assert not re.search(r"f32\[1024,1024\]\S* copy\(", text)
    (kernel,) = (line for line in text.splitlines() if "tpu_custom_call" in line)
    assert "f32[1,1024,1024]" in kernel  # the shard of 4096 × 2048 on 4 × 2 devices


def test_on_an_explicit_mesh_the_kernel_runs_per_shard():
    mesh = mesh_of(AxisType.Explicit)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert_kernel_per_shard(compile_on_mesh(mesh, "pallas"))


@pytest.mark.parametrize("check_vma", [False, True])
def test_on_an_auto_mesh_the_kernel_runs_inside_shard_map(check_vma):
    mesh = mesh_of(AxisType.Auto)

    def wrap(step, specs):
        params, state = specs
        return jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(params, state, params),
            out_specs=specs,
            check_vma=check_vma,
        )

    assert_kernel_per_shard(compile_on_mesh(mesh, "pallas", wrap))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_on_any_mesh_the_default_stays_on_its_shard(axis_type):
    mesh = mesh_of(axis_type)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = compile_on_mesh(mesh, None)
    assert not re.search(COLLECTIVES, text)


def test_an_auto_mesh_is_refused():
    with pytest.raises(NotImplementedError, match="partitioned automatically"):
        compile_on_mesh(mesh_of(AxisType.Auto), "pallas")
