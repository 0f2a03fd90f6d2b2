"""The fused update of one leaf as a Pallas kernel for NVIDIA GPUs, Hopper and newer.

Memory is linear there, so any shape is one row of numbers. A block of 128 threads reads its piece
of each array straight into registers, four numbers a thread and load, computes
`reference.formula` and writes each result over the array it replaces: nothing is used twice, so
shared memory would only be in the way. Less than one piece is left to XLA.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from optax_dcasgd.kernels import reference
from optax_dcasgd.kernels.reference import Leaf, Operands, Scalars

PIECE = 1024  # numbers a block of threads takes: two loads of each array in flight a thread
_LAYOUT = plgpu.Layout.WG_STRIDED((PIECE,), vec_size=4)  # 16 bytes of float32 a load


def leaf(
    operands: Operands, count: jax.Array, scalars: Scalars, *, step: bool, interpret: Any = None
) -> Leaf:
    """`reference.leaf` in one kernel; float32, bfloat16 and float16 arrays of any shape.

    What is smaller than one piece, or has 2³¹ numbers or more, is left to XLA whole.

    Args:
      operands: As for `reference.leaf`.
      count: As for `reference.leaf`.
      scalars: As for `reference.leaf`, float32.
      step: As for `reference.leaf`.
      interpret: What `pl.kernel` takes, to run without a GPU.
    """
    param = operands.param
    pieces, rest = divmod(param.size, PIECE)
    # Offsets are 32-bit integers.
    if pieces == 0 or param.size >= 2**31:
        return reference.leaf(operands, count, scalars, step=step)
    flat = Operands(*(None if x is None else x.reshape(-1) for x in operands))
    main = _main(flat, count, scalars, pieces, step, interpret)
    if rest:
        tail = reference.leaf(
            Operands(*(None if x is None else x[-rest:] for x in flat)), count, scalars, step=step
        )
        main = Leaf(
            *(None if x is None else x.at[-rest:].set(t) for x, t in zip(main, tail, strict=True))
        )
    return Leaf(*(None if x is None else x.reshape(param.shape) for x in main))


def _main(
    operands: Operands,
    count: jax.Array,
    scalars: Scalars,
    pieces: int,
    step: bool,
    interpret: Any,
) -> Leaf:
    """The whole pieces of the arrays; what stands behind them is left as it was."""
    treedef: Any
    values, treedef = jax.tree.flatten(scalars)
    vector = jnp.stack([jnp.asarray(count == 0, jnp.float32), *values])
    given = {k: x for k, x in operands._asdict().items() if x is not None}
    # A kernel writes over what it is given as a reference; w' goes where w was read.
    given["out"] = operands.param if step else jnp.empty_like(operands.param)
    if step:
        del given["param"]
    written = [k for k in Leaf._fields if k in given]

    def kernel(scalar_ref: Any, *args: Any) -> None:
        ref = dict(zip(given, args, strict=True))
        piece = pl.ds(lax.axis_index("piece") * PIECE, PIECE)

        def read(name: str) -> Any:
            name = "out" if step and name == "param" else name
            if name not in given or (name == "prev" and "stale" in given):
                return None
            return plgpu.layout_cast(ref[name][piece], _LAYOUT)

        blocks = Operands(*map(read, Operands._fields))
        numbers = treedef.unflatten([scalar_ref[1 + i] for i in range(len(values))])
        results = reference.block(blocks, scalar_ref[0] > 0, numbers, step=step)
        for name in written:
            ref[name][piece] = getattr(results, name).astype(ref[name].dtype)

    def run(refs: dict[str, Any]) -> None:
        pl.kernel(
            kernel,
            mesh=plgpu.Mesh(grid=(pieces,), grid_names=("piece",)),
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=interpret,
            name="dcasgd_step" if step else "dcasgd_update",
        )(vector, *(refs[k] if k in written else x for k, x in given.items()))

    new = pl.run_state(run)({k: given[k] for k in written})
    return Leaf(*(new.get(k) for k in Leaf._fields))
