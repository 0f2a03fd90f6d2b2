"""The fused update of one array as a Pallas kernel for NVIDIA GPUs, Hopper and newer.

Memory is linear there, so any shape is one row of numbers. A block of 128 threads reads its piece
of each array straight into registers, four numbers a thread and load, computes
`reference.formula` and writes each result over the array it replaces: nothing is used twice, so
shared memory would only be in the way. XLA computes what is less than one piece, and arrays of 2³¹
numbers or more.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from optax_dcasgd._hyperparameters import Hyperparameters
from optax_dcasgd.kernels import reference
from optax_dcasgd.kernels._plan import Plan
from optax_dcasgd.kernels.reference import Operands, Results

PIECE = 1024  # numbers a block of threads takes: two loads of each array in flight a thread
_LAYOUT = plgpu.Layout.WG_STRIDED((PIECE,), vec_size=4)  # 16 bytes of float32 a load


def update(
    operands: Operands,
    count: jax.Array,
    numbers: Hyperparameters,
    *,
    step: bool,
    interpret: Any = None,
) -> Results:
    """`reference.update` in one kernel; float32, bfloat16 and float16 arrays of any shape.

    ``interpret`` is what `pl.kernel` takes, to run without a GPU.
    """
    param = operands.param
    pieces, rest = divmod(param.size, PIECE)
    # Offsets are 32-bit integers.
    if pieces == 0 or param.size >= 2**31:
        return reference.update(operands, count, numbers, step=step)
    flat = Operands(*(None if x is None else x.reshape(-1) for x in operands))
    new = _whole_pieces(Plan(flat, count, numbers, step=step), pieces, interpret)
    if rest:
        tail = Operands(*(None if x is None else x[-rest:] for x in flat))
        tail_new = reference.update(tail, count, numbers, step=step)
        new = {k: x.at[-rest:].set(getattr(tail_new, k)) for k, x in new.items()}
    return Results(*(new[k].reshape(param.shape) if k in new else None for k in Results._fields))


def _whole_pieces(plan: Plan, pieces: int, interpret: Any) -> dict[str, Any]:
    """The whole pieces of the arrays; what stands behind them is left as it was."""
    # A kernel writes over what it is given as a reference; so an array that is replaced is read
    # from the reference of its result.
    written = {
        k: plan.given[v] if k in plan.in_place else jnp.empty_like(plan.given[v])
        for k, v in plan.results.items()
    }
    replaced = {v: k for k, v in plan.in_place.items()}
    only_read = {k: plan.given[k] for k in plan.read if k not in replaced}

    def kernel(scalar_ref: Any, *refs: Any) -> None:
        ref = dict(zip([*only_read, *written], refs, strict=True))
        piece = pl.ds(lax.axis_index("piece") * PIECE, PIECE)
        blocks = {k: plgpu.layout_cast(ref[replaced.get(k, k)][piece], _LAYOUT) for k in plan.read}
        for name, block in plan.compute(scalar_ref, blocks).items():
            ref[name][piece] = block

    def run(refs: dict[str, Any]) -> None:
        pl.kernel(
            kernel,
            mesh=plgpu.Mesh(grid=(pieces,), grid_names=("piece",)),
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=interpret,
            name="dcasgd",
        )(plan.scalars, *only_read.values(), *(refs[k] for k in written))

    new: dict[str, Any] = pl.run_state(run)(written)
    return new
