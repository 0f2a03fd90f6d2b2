"""The choice between the Pallas kernels, made where the program is lowered for a platform."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from optax_dcasgd.kernels import mosaic_gpu, mosaic_tpu, reference
from optax_dcasgd.kernels.reference import Leaf, Operands, Scalars

_DTYPES = ("float32", "bfloat16", "float16")
_INSTEAD = "Use implementation=None, which takes the fastest there is."


def _refused(reason: str) -> NotImplementedError:
    return NotImplementedError(f"implementation='pallas': {reason}. {_INSTEAD}")


def leaf(operands: Operands, count: jax.Array, scalars: Scalars, *, step: bool) -> Leaf:
    """`reference.leaf` by the kernel of the platform.

    Raises:
      NotImplementedError: For an array of another dtype than float32, bfloat16 and float16; when
        the program is lowered, for a platform without a kernel (for float16, a TPU too), or a mesh
        on which the compiler would have to partition one.
    """
    for name, x in operands._asdict().items():
        if x is not None and x.dtype not in _DTYPES:
            raise NotImplementedError(
                f"implementation='pallas' computes in float32; {name} has dtype {x.dtype}. "
                f"{_INSTEAD}"
            )
    return _per_shard(_differentiable(step), operands, count, scalars)


def _per_shard(function: Callable[..., Leaf], operands: Operands, *scalars: Any) -> Leaf:
    """Calls the function on the shards of a parameter that an Explicit mesh holds."""
    sharding = jax.typeof(operands.param).sharding
    axis_types = sharding.mesh.axis_types
    if AxisType.Explicit not in axis_types:
        return function(operands, *scalars)
    if AxisType.Auto in axis_types:  # the type does not say how those shard it
        raise _refused(_NO_PARTITIONING)
    return jax.shard_map(
        function,
        mesh=sharding.mesh,
        in_specs=(sharding.spec, *(P() for _ in scalars)),
        out_specs=sharding.spec,
        check_vma=False,
    )(operands, *scalars)


@functools.cache
def _differentiable(step: bool) -> Callable[..., Leaf]:
    """The kernels with the derivative of the reference."""
    by_xla = functools.partial(reference.leaf, step=step)
    function = jax.custom_jvp(_batched(step))
    function.defjvp(lambda primals, tangents: jax.jvp(by_xla, primals, tangents))
    return function


@functools.cache
def _batched(step: bool) -> Callable[..., Leaf]:
    """The kernels under ``vmap``: a batch of leaves is one larger leaf."""

    @jax.custom_batching.custom_vmap
    def function(operands: Operands, count: jax.Array, scalars: Scalars) -> Leaf:
        out: Leaf = _per_platform(operands, count, scalars, step)
        return out

    @function.def_vmap
    def rule(axis_size: int, in_batched: Any, *args: Any) -> tuple[Leaf, Any]:
        operands, *scalars = jax.tree.map(
            lambda x, batched: x if batched else jnp.broadcast_to(x, (axis_size, *x.shape)),
            args,
            tuple(in_batched),
        )
        if any(jax.tree.leaves(in_batched[1:])):  # each member has its own count or scalars
            out = lax.map(lambda member: _batched(step)(*member), (operands, *scalars))
        else:
            out = _batched(step)(operands, *args[1:])
        return out, jax.tree.map(lambda _: True, out)

    return function


# Jitted, so that leaves of one shape are lowered once, and calls outside `jit` compile once.
@functools.partial(jax.jit, static_argnums=3)
def _per_platform(operands: Operands, count: jax.Array, scalars: Scalars, step: bool) -> Leaf:
    def branch(
        compute: Callable[..., Leaf], check: Callable[[Any], str | None]
    ) -> Callable[..., Leaf]:
        def function(operands: Operands, count: jax.Array, scalars: Scalars) -> Leaf:
            return compute(operands, _check_p.bind(count, check=check), scalars, step=step)

        return function

    half = any(x.dtype == jnp.float16 for x in operands if x is not None)
    out: Leaf = lax.platform_dependent(
        operands,
        count,
        scalars,
        tpu=branch(mosaic_tpu.leaf, lambda ctx: _NO_FLOAT16 if half else _needs_partitioning(ctx)),
        cuda=(
            branch(reference.leaf, lambda _: _NO_VARYING_TYPES)
            if jax.typeof(operands.param).manual_axis_type.varying
            else branch(mosaic_gpu.leaf, lambda ctx: _is_too_old() or _needs_partitioning(ctx))
        ),
        default=branch(
            reference.leaf,
            lambda ctx: (
                f"there is no kernel for the platform {'/'.join(ctx.module_context.platforms)}, "
                "only for TPUs and for NVIDIA GPUs"
            ),
        ),
    )
    return out


_NO_FLOAT16 = "the TPU kernel takes float32 and bfloat16 arrays, and one of these is float16"
_NO_PARTITIONING = (
    "a kernel cannot be partitioned automatically. On a mesh with Auto axes, call the step inside "
    "jax.shard_map over all of them"
)
_NO_VARYING_TYPES = (
    "Mosaic GPU kernels do not support jax.shard_map's check of varying types; pass it "
    "check_vma=False"
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


def _is_too_old() -> str | None:
    try:
        devices = jax.devices("cuda")
    except RuntimeError:  # lowering for a GPU on a machine without one
        return None
    capability = min(float(device.compute_capability) for device in devices)
    if capability < 9.0:
        return f"the kernel needs compute capability 9.0 (Hopper), and the GPU has {capability}"
    return None


_check_p = Primitive("check_lowering")  # the identity, refused where `check` gives a reason
_check_p.def_abstract_eval(lambda x, *, check: x)


def _lower_check(ctx: Any, x: Any, *, check: Callable[[Any], str | None]) -> list[Any]:
    reason = check(ctx)
    if reason:
        raise _refused(reason)
    return [x]


mlir.register_lowering(_check_p, _lower_check)
