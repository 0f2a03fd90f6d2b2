"""`implementation="pallas"`: which kernel runs where, and why none does.

No machine here has a TPU or a GPU: programs are lowered for those platforms.
"""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kernel_cases import ALL, EACH_DTYPE, EACH_MODE, MODES, SETTINGS, arguments, make

from optax_dcasgd.kernels import mosaic_gpu

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
GPU, TPU = "mosaic_gpu_v2", "tpu_custom_call"


def custom_calls(lowering):
    """What the program calls, beside the allocation of an output that a kernel then writes."""
    calls = re.findall(r"custom_call @(\w+)", lowering.as_text())
    return [call for call in calls if call not in ("AllocateBuffer", "Sharding")]


def lower(
    implementation,
    platform="cuda",
    dtype="float32",
    *,
    form="fused_dcasgd",
    axis_types=None,
    manual=(),
    check_vma=False,
    **settings,
):
    """Lowers one update of an array, which may be on a mesh of 4 × 2 devices, for a platform.

    Args:
      implementation: The one that is asked for.
      platform: What the program is lowered for.
      dtype: Of the parameter.
      form: The optimizer.
      axis_types: Of the mesh, or None for no mesh.
      manual: The axes of `jax.shard_map` around the update; none for no `jax.shard_map`.
      check_vma: For `jax.shard_map`.
      settings: For the optimizer.
    """
    tx = make(form, implementation=implementation, **settings)
    update = tx.step if form == "fused_dcasgd" else tx.update
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(dtype in ("float64", "complex128")))
        params = {"w": jnp.ones((16, 1024), dtype)}
        if axis_types:
            mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=axis_types)
            stack.enter_context(jax.set_mesh(mesh))
            params = jax.device_put(params, NamedSharding(mesh, P("x", "y")))
        state = tx.init(params)
        if manual:
            spec = P(*(axis if axis in manual else None for axis in ("x", "y")))
            specs = jax.tree.map(lambda x: spec if x.ndim else P(), (params, state))
            update = jax.shard_map(
                update,
                in_specs=(specs[0], specs[1], specs[0]),
                out_specs=specs,
                axis_names=set(manual),
                check_vma=check_vma,
            )
        return jax.jit(update).trace(params, state, params).lower(lowering_platforms=(platform,))


# --- Which kernel ---

PLATFORMS = {"cpu": [], "rocm": [], "cuda": [GPU], "tpu": [TPU]}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_by_default_it_is_xla(platform):
    assert custom_calls(lower(None, platform)) == []
    assert custom_calls(lower("xla", platform, form="dcasgd")) == []


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("form", ["dcasgd", "fused_dcasgd"])
def test_each_platform_gets_its_kernel(form, settings):
    for platform in ("cuda", "tpu"):
        lowering = lower("pallas", platform, form=form, **settings)
        assert custom_calls(lowering) == PLATFORMS[platform]


TAKEN = {
    "bfloat16": (GPU, {"dtype": "bfloat16"}),
    "float16": (GPU, {"dtype": "float16"}),
    "bfloat16 on a TPU": (TPU, {"platform": "tpu", "dtype": "bfloat16"}),
    "an Explicit mesh": (GPU, {"axis_types": (EXPLICIT, EXPLICIT)}),
    "shard_map": (GPU, {"axis_types": (AUTO, AUTO), "manual": "xy"}),
    "shard_map, checked, on a TPU": (
        TPU,
        {"platform": "tpu", "axis_types": (AUTO, AUTO), "manual": "xy", "check_vma": True},
    ),
}


@pytest.mark.parametrize(("call", "situation"), TAKEN.values(), ids=TAKEN)
def test_where_it_runs(call, situation):
    assert custom_calls(lower("pallas", **situation)) == [call]


NO_PARTITIONING = r"partitioned automatically.*jax\.shard_map over all of them"
REFUSED = {
    "a CPU": ("no kernel for the platform cpu.*implementation=None", {"platform": "cpu"}),
    "an AMD GPU": ("no kernel for the platform rocm", {"platform": "rocm"}),
    "float64": ("grad has dtype float64", {"dtype": "float64"}),
    "complex64": ("grad has dtype complex64", {"dtype": "complex64", "platform": "tpu"}),
    "float16 on a TPU": (r"TPU kernel.*float16", {"dtype": "float16", "platform": "tpu"}),
    "an Auto mesh": (NO_PARTITIONING, {"axis_types": (AUTO, AUTO)}),
    # What the Auto axis shards would be gathered.
    "a mesh of both kinds": (NO_PARTITIONING, {"axis_types": (EXPLICIT, AUTO)}),
    "shard_map over some axes": (NO_PARTITIONING, {"axis_types": (AUTO, AUTO), "manual": "x"}),
    "shard_map, checked": (
        "varying.*check_vma=False",
        {"axis_types": (AUTO, AUTO), "manual": "xy", "check_vma": True},
    ),
}


@pytest.mark.parametrize(("reason", "situation"), REFUSED.values(), ids=REFUSED)
def test_where_it_is_refused_and_why(reason, situation):
    with pytest.raises(NotImplementedError, match=f"implementation='pallas'.*{reason}"):
        lower("pallas", **situation)
    assert custom_calls(lower(None, **situation)) == []  # which never fails


def test_arrays_that_vary_over_different_axes_are_refused():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AUTO,))
    optimizer = make("fused_dcasgd", implementation="pallas")
    params = jnp.ones(1024)
    step = jax.shard_map(
        optimizer.step, mesh=mesh, in_specs=(P("x"), P(), P()), out_specs=(P("x"), P())
    )
    with pytest.raises(NotImplementedError, match=r"vary over different axes \[\[\], \['x'\]\]"):
        jax.eval_shape(step, jnp.ones(8 * 1024), optimizer.init(params), params)


def test_a_gpu_before_hopper_is_refused(monkeypatch):
    class Ampere:
        compute_capability = "8.0"

    devices = jax.devices
    monkeypatch.setattr(jax, "devices", lambda *a: [Ampere()] if a == ("cuda",) else devices(*a))
    with pytest.raises(NotImplementedError, match=r"9\.0.*8\.0"):
        lower("pallas")
    assert custom_calls(lower(None)) == []


# --- The program for a GPU ---


def launches(lowering):
    """How often a program calls each of its kernels."""
    calls = re.findall(r"call @(_launch\w*)\(", lowering.as_text())
    return sorted(map(calls.count, set(calls)))


def assert_lowers(cases):
    """All in one program."""
    args = [arguments(MODES[case.mode], (5000,), *case.dtypes) for case in cases]

    def run(args):
        return [
            mosaic_gpu.update([operands], *a, step=case.step)
            for (operands, *a), case in zip(args, cases, strict=True)
        ]

    lowering = jax.jit(run).trace(args).lower(lowering_platforms=("cuda",))
    assert sum(launches(lowering)) == len(cases)
    assert set(custom_calls(lowering)) == {GPU}


@pytest.mark.parametrize("cases", [EACH_MODE, EACH_DTYPE], ids=["mode", "dtype"])
def test_the_gpu_kernel_lowers(cases):
    assert_lowers(cases)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_gpu_kernel_lowers_for_all_dtypes(mode):
    assert_lowers([case for case in ALL if case.mode == mode])


def test_the_gpu_kernel_writes_over_what_it_replaces():
    optimizer = make("fused_dcasgd", implementation="pallas")
    params = {"w": jnp.ones(1 << 12)}
    step = functools.partial(jax.jit, donate_argnums=(1, 2))(optimizer.step)
    lowering = step.trace(params, optimizer.init(params), params).lower(
        lowering_platforms=("cuda",)
    )
    aliases = re.findall(
        r"output_tuple_indices = \[(\d)\], operand_index = (\d)", lowering.as_text()
    )
    assert [output for output, _ in aliases] == ["0", "1", "2"]
    assert len({operand for _, operand in aliases}) == 3


@pytest.mark.parametrize("store", ["params", "updates"])
def test_400_arrays_take_eight_launches_of_two_kernels(store):
    layer = [(32,)] * 5 + [(32, 32)] * 4 + [(128,)] + [(32, 128)] * 2
    params = [jnp.ones(shape) for shape in layer * 33 + [(1024, 32), (256, 32), (32,), (32,)]]
    tx = make("fused_dcasgd", implementation="pallas", store=store)
    lowering = jax.jit(tx.step).trace(params, tx.init(params), params)
    lowering = lowering.lower(lowering_platforms=("cuda",))
    assert custom_calls(lowering) == [GPU] * 2
    assert launches(lowering) == [1, 7]


@pytest.mark.parametrize(("size", "waits"), [(1024, False), (128, False), (64, True), (129, True)])
def test_threads_wait_where_they_have_numbers_in_common(size, waits):
    args = arguments(MODES["updates"], (size,))
    step = jax.jit(lambda operands, *args: mosaic_gpu.update([operands], *args, step=True))
    kernel = step.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert ("bar.sync" in kernel) is waits


def test_arrays_of_one_shape_share_a_kernel_on_a_tpu():
    tx = make("dcasgd", implementation="pallas")
    params = [jnp.ones((16, 1024))] * 6 + [jnp.ones((8, 128))] * 3
    lowering = jax.jit(tx.update).trace(params, tx.init(params), params)
    lowering = lowering.lower(lowering_platforms=("tpu",))
    assert custom_calls(lowering) == [TPU] * 2
    assert len(re.findall(r"call @update", lowering.as_text())) == 9


def test_an_explicit_mesh_runs_the_kernel_on_each_shard():
    text = lower("pallas", axis_types=(EXPLICIT, EXPLICIT)).as_text()
    assert re.search(r"mosaic_gpu_v2\(.*tensor<2048xf32>", text), "a shard has 4 × 512 numbers"
