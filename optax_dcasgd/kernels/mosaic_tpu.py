"""The fused update of one array as a Pallas kernel for TPUs.

One grid step reads one block of each array, computes `reference.formula` on it and writes each
result over the array it replaces. Arrays keep the two minor dimensions they have (the TPU lays
those out in tiles, so that any other view is a copy); the leading ones are merged, which is free.
"""

import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from optax_dcasgd._hyperparameters import Hyperparameters
from optax_dcasgd.kernels import reference
from optax_dcasgd.kernels._plan import Plan
from optax_dcasgd.kernels.reference import Operands, Results

_LANES = 128  # the minor dimension of a tile
_SUBLANES = 16  # the other one, of bfloat16; a multiple of that of float32
# One block of each operand. All are held twice, so that copies overlap with arithmetic, and share
# the 16 MiB of the smallest chip (v5e) with what the arithmetic spills.
_BLOCK_BYTES = 3 * 2**20


def update(
    operands: Operands,
    count: jax.Array,
    numbers: Hyperparameters,
    *,
    step: bool,
    interpret: Any = False,
) -> Results:
    """`reference.update` in one kernel; float32 and bfloat16 arrays of any shape.

    ``interpret`` is what `pl.pallas_call` takes, to run without a TPU.
    """
    param = operands.param
    if not param.size:
        return reference.update(operands, count, numbers, step=step)
    view = _view(param.shape)
    viewed = Operands(*(None if x is None else x.reshape(view) for x in operands))
    plan = Plan(viewed, count, numbers, step=step)
    given, results = plan.given, plan.results

    def kernel(scalar_ref: Any, *refs: Any) -> None:
        read, write = refs[: len(given)], refs[len(given) :]
        blocks = {k: ref[...] for k, ref in zip(given, read, strict=True) if k in plan.read}
        new = plan.compute(scalar_ref, blocks)
        for k, ref in zip(results, write, strict=True):
            ref[...] = new[k]

    moved = [given[k].dtype.itemsize for k in (*plan.read, *results.values())]
    block = _block(view, _BLOCK_BYTES // sum(moved))
    spec = pl.BlockSpec(block, lambda *index: index)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    outputs = pl.pallas_call(
        kernel,
        grid=tuple(pl.cdiv(n, b) for n, b in zip(view, block, strict=True)),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            *(spec if k in plan.read else anywhere for k in given),
        ],
        out_specs=[spec] * len(results),
        out_shape=[_like(given[k]) for k in results.values()],
        input_output_aliases={
            1 + list(given).index(v): list(results).index(k) for k, v in plan.in_place.items()
        },
        cost_estimate=pl.CostEstimate(
            flops=12 * param.size,
            transcendentals=0 if operands.nu is None else param.size,
            bytes_accessed=sum(moved) * param.size,
        ),
        interpret=interpret,
        name="dcasgd",
    )(plan.scalars, *given.values())
    new = {k: x.reshape(param.shape) for k, x in zip(results, outputs, strict=True)}
    return Results(*map(new.get, Results._fields))


def _like(x: jax.Array) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def _view(shape: tuple[int, ...]) -> tuple[int, ...]:
    """One dimension, or (merged leading dimensions, the two minor ones)."""
    if len(shape) < 2:
        return shape or (1,)
    return (math.prod(shape[:-2]), *shape[-2:])


def _block(view: tuple[int, ...], elements: int) -> tuple[int, ...]:
    """A block of at most so many elements, padding to whole tiles counted."""
    tile = _SUBLANES * _LANES
    if len(view) == 1:
        return (min(view[0], elements // tile * tile),)
    leading, rows, columns = view
    if columns > 8 * _LANES:
        columns = 8 * _LANES
    padded = -(-columns // _LANES) * _LANES
    if rows * padded > elements:
        rows = max(elements // padded // _SUBLANES, 1) * _SUBLANES
    padded *= -(-rows // _SUBLANES) * _SUBLANES
    return (min(leading, max(elements // padded, 1)), rows, columns)
