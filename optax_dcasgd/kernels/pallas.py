"""The table of Pallas kernels, and the choice where the program is lowered for a platform."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from optax_dcasgd import _trees
from optax_dcasgd._hyperparameters import Hyperparameters
from optax_dcasgd.kernels import mosaic_gpu, mosaic_tpu, reference
from optax_dcasgd.kernels.reference import Operands, Results


class Kernel(NamedTuple):
    """The kernel of a platform, and what it cannot do."""

    update: Callable[..., list[Results]]  # of all arrays
    why_not: Callable[[Operands], str | None]  # for this array, known while tracing
    why_not_here: Callable[[], str | None]  # on this machine, asked when the program is lowered


def _why_not_on_tpu(operands: Operands) -> str | None:
    if any(x is not None and x.dtype == jnp.float16 for x in operands):
        return "the TPU kernel takes float32 and bfloat16 arrays, and one of these is float16"
    return None


def _why_not_on_gpu(operands: Operands) -> str | None:
    if jax.typeof(operands.param).manual_axis_type.varying:
        return (
            "Mosaic GPU kernels do not support jax.shard_map's check of varying types; pass it "
            "check_vma=False"
        )
    return None


def _is_too_old() -> str | None:
    try:
        devices = jax.devices("cuda")
    except RuntimeError:  # lowering for a GPU on a machine without one
        return None
    capability = min(float(device.compute_capability) for device in devices)
    if capability < 9.0:
        return f"the kernel needs compute capability 9.0 (Hopper), and the GPU has {capability}"
    return None


# Jitted, so that arrays of one shape are lowered once.
_update_on_tpu = jax.jit(mosaic_tpu.update, static_argnames="step")


def _each_on_tpu(arrays: Sequence[Operands], *args: Any, step: bool) -> list[Results]:
    return [_update_on_tpu(operands, *args, step=step) for operands in arrays]


KERNELS = {
    "tpu": Kernel(_each_on_tpu, _why_not_on_tpu, lambda: None),
    "cuda": Kernel(mosaic_gpu.update, _why_not_on_gpu, _is_too_old),
}
_DTYPES = ("float32", "bfloat16", "float16")


def update(
    arrays: Sequence[Operands], count: jax.Array, numbers: Hyperparameters, *, step: bool
) -> list[Results]:
    """`reference.update` of every array by the kernel of the platform.

    Raises:
      NotImplementedError: For an array of another dtype than float32, bfloat16 and float16; when
        the program is lowered, where the table of kernels has none, or none that can run, or for a
        mesh on which the compiler would have to partition one.
    """
    arrays = [
        Operands(*(None if x is None else jnp.asarray(x, _trees.dtype_of(x)) for x in operands))
        for operands in arrays
    ]
    by_mesh: dict[Any, list[int]] = {}
    for i, operands in enumerate(arrays):
        for name, x in operands._asdict().items():
            if x is not None and x.dtype not in _DTYPES:
                raise _refused(f"the kernels compute in float32; {name} has dtype {x.dtype}")
        varying = {jax.typeof(x).manual_axis_type.varying for x in operands if x is not None}
        if len(varying) > 1:
            raise _refused(
                "inside jax.shard_map the arrays of a parameter vary over different axes "
                f"{sorted(map(sorted, varying))}; give them the same by jax.lax.pcast, or pass "
                "check_vma=False"
            )
        by_mesh.setdefault(jax.typeof(operands.param).sharding.mesh, []).append(i)
    new: dict[int, Results] = {}
    for mesh, indices in by_mesh.items():
        function = _per_shard(_DIFFERENTIABLE[step], mesh)
        results = function([arrays[i] for i in indices], count, numbers)
        new.update(zip(indices, results, strict=True))
    return [new[i] for i in range(len(arrays))]


def _refused(reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"implementation='pallas': {reason}. Use implementation=None, which takes the fastest "
        "there is."
    )


def _per_shard(function: Callable[..., list[Results]], mesh: Any) -> Callable[..., list[Results]]:
    """The function; where the mesh is Explicit, of the shards of the arrays."""
    if AxisType.Explicit not in mesh.axis_types:
        return function
    if AxisType.Auto in mesh.axis_types:  # the type does not say how those shard it
        raise _refused(_NO_PARTITIONING)

    def per_shard(arrays: Sequence[Operands], *scalars: Any) -> list[Results]:
        specs = [jax.typeof(operands.param).sharding.spec for operands in arrays]
        out: list[Results] = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(specs, *(P() for _ in scalars)),
            out_specs=specs,
            check_vma=False,
        )(arrays, *scalars)
        return out

    return per_shard


def _by_reference(arrays: Sequence[Operands], *args: Any, step: bool) -> list[Results]:
    return [reference.update(operands, *args, step=step) for operands in arrays]


def _differentiable(step: bool) -> Callable[..., list[Results]]:
    """The kernels with the derivative of the reference; under ``vmap`` one member after another."""
    by_xla = functools.partial(_by_reference, step=step)
    by_kernel = functools.partial(_per_platform, step=step)
    function = jax.custom_jvp(jax.custom_batching.sequential_vmap(by_kernel))
    function.defjvp(lambda primals, tangents: jax.jvp(by_xla, primals, tangents))
    return function


# Jitted, so that calls outside `jit` compile once.
@functools.partial(jax.jit, static_argnames="step")
def _per_platform(
    arrays: Sequence[Operands], count: jax.Array, numbers: Hyperparameters, *, step: bool
) -> list[Results]:
    def branch(
        compute: Callable[..., list[Results]], why_not: Callable[[Any], str | None]
    ) -> Callable[..., list[Results]]:
        def function(
            arrays: Sequence[Operands], count: jax.Array, numbers: Hyperparameters
        ) -> list[Results]:
            return compute(arrays, _unless_p.bind(count, why_not=why_not), numbers, step=step)

        return function

    def branch_of(kernel: Kernel) -> Callable[..., list[Results]]:
        reason = next(filter(None, map(kernel.why_not, arrays)), None)
        if reason:  # the kernel cannot be traced; what stands here instead is never lowered
            return branch(_by_reference, lambda _: reason)
        return branch(kernel.update, lambda ctx: _needs_partitioning(ctx) or kernel.why_not_here())

    def no_kernel(ctx: Any) -> str:
        platforms = "/".join(ctx.module_context.platforms)
        return f"there is no kernel for the platform {platforms}, only for TPUs and NVIDIA GPUs"

    out: list[Results] = lax.platform_dependent(
        arrays,
        count,
        numbers,
        default=branch(_by_reference, no_kernel),
        **{platform: branch_of(kernel) for platform, kernel in KERNELS.items()},
    )
    return out


_DIFFERENTIABLE = {step: _differentiable(step) for step in (False, True)}
_NO_PARTITIONING = (
    "a kernel cannot be partitioned automatically. On a mesh with Auto axes, call the step inside "
    "jax.shard_map over all of them; on one with Explicit axes, put every array on it"
)


def _needs_partitioning(ctx: Any) -> str | None:
    context = ctx.module_context.axis_context
    if getattr(context, "num_devices", 1) == 1:
        mesh = getattr(context, "mesh", None)
        if mesh is None or mesh.size == 1:
            return None
        if set(mesh.axis_names) <= set(context.manual_axes) | set(mesh.manual_axes):
            return None
    return _NO_PARTITIONING


# The identity. Lowering it fails where `why_not` gives a reason: the only way to refuse a platform
# that is known only then.
_unless_p = Primitive("unless")
_unless_p.def_abstract_eval(lambda x, *, why_not: x)


def _lower_unless(ctx: Any, x: Any, *, why_not: Callable[[Any], str | None]) -> list[Any]:
    reason = why_not(ctx)
    if reason:
        raise _refused(reason)
    return [x]


mlir.register_lowering(_unless_p, _lower_unless)
