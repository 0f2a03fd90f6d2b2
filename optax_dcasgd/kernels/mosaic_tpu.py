"""The fused update of one leaf as a Pallas kernel for TPUs.

One grid step reads one block of each array, computes `reference.formula` on it and writes each
result over the array it replaces. Arrays keep the two minor dimensions they have (the TPU lays
those out in tiles, so that any other view is a copy); the leading ones are merged, which is free.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from optax_dcasgd.kernels import reference
from optax_dcasgd.kernels.reference import Leaf, Operands, Scalars

_LANES = 128  # the minor dimension of a tile
_SUBLANES = 16  # the other one, of bfloat16; a multiple of that of float32
# One block of each operand. All are held twice, so that copies overlap with arithmetic, and share
# the 16 MiB of the smallest chip (v5e) with what the arithmetic spills.
_BLOCK_BYTES = 3 * 2**20


def leaf(
    operands: Operands, count: jax.Array, scalars: Scalars, *, step: bool, interpret: Any = False
) -> Leaf:
    """`reference.leaf` in one kernel; float32 and bfloat16 arrays of any shape.

    Args:
      operands: As for `reference.leaf`.
      count: As for `reference.leaf`.
      scalars: As for `reference.leaf`, float32.
      step: As for `reference.leaf`.
      interpret: What `pl.pallas_call` takes, to run without a TPU.
    """
    param = operands.param
    if not param.size:
        return reference.leaf(operands, count, scalars, step=step)
    view = _view(param.shape)
    given = {k: x.reshape(view) for k, x in operands._asdict().items() if x is not None}
    results = {"out": "param"} | {k: k for k in ("prev", "momentum", "nu") if k in given}
    written_only = ("prev",) if operands.stale is not None else ()
    in_place = [(k, v) for k, v in results.items() if k != "out" or step]
    treedef: Any
    values, treedef = jax.tree.flatten(scalars)
    vector = jnp.stack([jnp.asarray(count == 0, jnp.float32), *values])

    def kernel(scalar_ref: Any, *refs: Any) -> None:
        read = dict(zip(given, refs, strict=False))
        write = dict(zip(results, refs[len(given) :], strict=True))
        blocks = Operands(
            **{k: read[k][...] if k in read and k not in written_only else None for k in _FIELDS}
        )
        numbers = treedef.unflatten([scalar_ref[1 + i] for i in range(len(values))])
        new = reference.block(blocks, scalar_ref[0] > 0, numbers, step=step)
        for k, ref in write.items():
            ref[...] = getattr(new, k).astype(ref.dtype)

    itemsizes = [x.dtype.itemsize for k, x in given.items() if k not in written_only]
    itemsizes += [given[k].dtype.itemsize for k in results.values()]
    block = _block(view, _BLOCK_BYTES // sum(itemsizes))
    spec = pl.BlockSpec(block, lambda *index: index)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    outputs = pl.pallas_call(
        kernel,
        grid=tuple(pl.cdiv(n, b) for n, b in zip(view, block, strict=True)),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            *(anywhere if k in written_only else spec for k in given),
        ],
        out_specs=[spec] * len(results),
        out_shape=[_like(given[k]) for k in results.values()],
        input_output_aliases={
            1 + list(given).index(v): list(results).index(k) for k, v in in_place
        },
        cost_estimate=pl.CostEstimate(
            flops=12 * param.size,
            transcendentals=0 if operands.nu is None else param.size,
            bytes_accessed=sum(itemsizes) * param.size,
        ),
        interpret=interpret,
        name="dcasgd_step" if step else "dcasgd_update",
    )(vector, *given.values())
    new = {k: x.reshape(param.shape) for k, x in zip(results, outputs, strict=True)}
    return Leaf(**{k: new.get(k) for k in Leaf._fields})


_FIELDS = Operands._fields


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
