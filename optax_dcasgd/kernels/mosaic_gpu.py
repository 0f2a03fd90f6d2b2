"""The fused update of many arrays in one Pallas kernel, for NVIDIA GPUs, Hopper and newer.

On a GPU every kernel costs microseconds before it moves a byte, and a model has hundreds of arrays,
most of them small. So a launch updates up to `ARRAYS` of them. Its blocks of 128 threads share out
their numbers; one branch an array says which references a block reads and writes.

Memory is linear, so any shape is one row of numbers. A block reads its piece of each array straight
into registers, computes `reference.formula` and writes each result over the array it replaces:
nothing is used twice, so shared memory would only be in the way.

A piece has `PIECE` numbers. What is left at an array's end, and what is smaller, goes to one block
more: the largest power of two that fits, once from the front and once from the back. So nothing is
read or written beyond an array, and there is no second program for the ends. Where the two overlap,
both compute the same values, and the block reads all before it writes any.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from optax_dcasgd._hyperparameters import Hyperparameters
from optax_dcasgd.kernels import reference
from optax_dcasgd.kernels._plan import Plan
from optax_dcasgd.kernels.reference import Operands, Results

# Of one launch. Their addresses fit into 4 KiB of arguments, which every CUDA takes. With 128 of
# them a step of 400 took half as long again to compile on an H100, and as long to run. With 200
# registers ran out.
ARRAYS = 64
PIECE = 1024  # numbers a block of threads takes: two loads of each array in flight a thread
_BRANCHES = 32  # of one switch; JAX's time to trace one grows with their square
_THREADS = 128  # of a block


def update(
    arrays: Sequence[Operands],
    count: jax.Array,
    numbers: Hyperparameters,
    *,
    step: bool,
    interpret: Any = None,
) -> list[Results]:
    """`reference.update` of every array; float32, bfloat16 and float16, of any shape.

    XLA computes arrays of 2³¹ numbers and more, since offsets are 32-bit integers. ``interpret`` is
    what `pl.kernel` takes, to run without a GPU.
    """
    flat = [Operands(*(None if x is None else x.reshape(-1) for x in array)) for array in arrays]
    new: dict[int, Results] = {}
    alike = collections.defaultdict(list)  # arrays of one mode, with the same dtypes
    for i, array in enumerate(flat):
        if 0 < array.param.size < 2**31:
            alike[tuple(None if x is None else x.dtype for x in array)].append(i)
        else:
            new[i] = reference.update(array, count, numbers, step=step)
    for indices in alike.values():
        for chosen in _launches([flat[i].param.size for i in indices]):
            launched = [indices[k] for k in chosen]
            results = _launch(
                tuple(flat[i] for i in launched), count, numbers, step=step, interpret=interpret
            )
            new.update(zip(launched, results, strict=True))
    return [
        Results(*(None if x is None else x.reshape(array.param.shape) for x in new[i]))
        for i, array in enumerate(arrays)
    ]


def _launches(sizes: Sequence[int]) -> list[list[int]]:
    """Which arrays a launch updates.

    The launches have the same sizes, as far as the arrays can be shared out so: then they are one
    program, which is traced and compiled once. What is left over has launches of its own, so that
    there can be more of them than if each were filled, up to twice as many.
    """
    number = -(-len(sizes) // ARRAYS)
    alike = collections.defaultdict(list)
    for i, size in enumerate(sizes):
        alike[size].append(i)
    equal: list[list[int]] = [[] for _ in range(number)]
    left = []
    for indices in alike.values():
        share = len(indices) // number
        for k, launch in enumerate(equal):
            launch += indices[k * share : (k + 1) * share]
        left += indices[number * share :]
    return [*filter(None, equal), *(left[k : k + ARRAYS] for k in range(0, len(left), ARRAYS))]


class _Work(NamedTuple):
    """What some blocks of threads do: numbers of one array, ``length`` at a time."""

    length: int
    starts: tuple[int, ...]  # in the array, of the first block; each further block goes on there
    array: int
    first: int  # block
    blocks: int

    @property
    def kind(self) -> tuple[int, int]:
        """Work of one kind differs in the references alone."""
        return (-self.length, len(self.starts))


def _share_out(sizes: Sequence[int]) -> list[_Work]:
    """The work of a launch, each kind together: the compiler then makes one program of it."""
    work = []
    for i, size in enumerate(sizes):
        pieces, rest = divmod(size, PIECE)
        if pieces:
            work.append(_Work(PIECE, (0,), i, 0, pieces))
        if rest:
            length = 1 << (rest.bit_length() - 1)
            work.append(_Work(length, tuple(sorted({size - rest, size - length})), i, 0, 1))
    work.sort(key=lambda w: w.kind)
    firsts = itertools.accumulate((w.blocks for w in work), initial=0)
    return [w._replace(first=first) for w, first in zip(work, firsts, strict=False)]


# Jitted, so that equal launches are one program.
@functools.partial(jax.jit, static_argnames=("step", "interpret"))
def _launch(
    arrays: tuple[Operands, ...],
    count: jax.Array,
    numbers: Hyperparameters,
    *,
    step: bool,
    interpret: Any,
) -> list[Results]:
    plan = Plan(arrays[0], count, numbers, step=step)
    work = _share_out([array.param.size for array in arrays])
    # A kernel writes over what it is given as a reference; so an array that is replaced is read
    # from the reference of its result.
    replaced = {v: k for k, v in plan.in_place.items()}
    only_read = [k for k in plan.read if k not in replaced]
    read = [{k: getattr(array, k) for k in only_read} for array in arrays]
    written = [
        {
            k: getattr(array, v) if k in plan.in_place else jnp.empty_like(getattr(array, v))
            for k, v in plan.results.items()
        }
        for array in arrays
    ]
    treedef = jax.tree.structure((read, written))

    def kernel(scalar_ref: Any, *refs: Any) -> None:
        block = lax.axis_index("block")
        scalars = [scalar_ref[i] for i in range(plan.scalars.size)]
        references = [r | w for r, w in zip(*jax.tree.unflatten(treedef, refs), strict=True)]

        def do(work: _Work) -> None:
            ref = references[work.array]
            offset = (block - work.first) * work.length
            ranges = [_range(start + offset, work.length) for start in work.starts]
            layout = _layout(work.length, aligned=len(ranges) == 1)
            blocks = [
                {k: _load(ref[replaced.get(k, k)], at, layout) for k in plan.read} for at in ranges
            ]
            new = [plan.compute(scalars, x) for x in blocks]
            if len(ranges) > 1 or work.length < _THREADS:
                # Threads have numbers in common: all wait until all is read. This is the barrier
                # that Pallas offers; nothing is in shared memory.
                plgpu.commit_smem()
            for at, values in zip(ranges, new, strict=True):
                for k, value in values.items():
                    _store(ref[k], at, value)

        _switch(block, work, do)

    def run(refs: Any) -> None:
        pl.kernel(
            kernel,
            mesh=plgpu.Mesh(grid=(work[-1].first + work[-1].blocks,), grid_names=("block",)),
            compiler_params=plgpu.CompilerParams(
                lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
            ),
            interpret=interpret,
            name="dcasgd",
        )(plan.scalars, *jax.tree.leaves((read, refs)))

    new = pl.run_state(run)(written)
    return [Results(*map(x.get, Results._fields)) for x in new]


def _switch(block: Any, work: Sequence[_Work], do: Callable[[_Work], None]) -> None:
    """Does the work of this block of threads."""

    def choose(firsts: Sequence[int], branches: Sequence[Callable[[], None]]) -> None:
        if len(branches) == 1:
            branches[0]()
        else:
            index = sum((block >= first).astype(jnp.int32) for first in firsts[1:])
            lax.switch(index, branches)

    def choose_one(work: Sequence[_Work]) -> None:
        choose([w.first for w in work], [functools.partial(do, w) for w in work])

    alike = [list(kind) for _, kind in itertools.groupby(work, key=lambda w: w.kind)]
    groups = [kind[k : k + _BRANCHES] for kind in alike for k in range(0, len(kind), _BRANCHES)]
    choose([group[0].first for group in groups], [functools.partial(choose_one, g) for g in groups])


def _range(start: Any, length: int) -> Any:
    return pl.ds(start, length) if length > 1 else start


def _layout(length: int, *, aligned: bool) -> Any:
    """Which thread has which numbers; fewer numbers than threads are held by several."""
    if length >= _THREADS:
        vector = min(length // _THREADS, 4) if aligned else 1  # 16 bytes of float32 a load
        return plgpu.Layout.WG_STRIDED((length,), vec_size=vector)
    if length == 1:
        return None
    lanes = min(length, 32)
    return plgpu.Layout.TILED(
        plgpu.Tiling(((lanes,), (1,))),
        warp_dims=(plgpu.Replicated(4),),
        lane_dims=(-2,) if lanes == 32 else (plgpu.Replicated(32 // lanes), -2),
        vector_dim=-1,
    )


_mosaic: Any = plgpu  # with other signatures in other versions of JAX


# "Optimized" transfers would be refused: they go through shared memory. (Before JAX 0.12 a store
# by index is not.)
def _load(ref: Any, at: Any, layout: Any) -> Any:
    if jax.__version_info__ >= (0, 11):
        return _mosaic.load(ref.at[at], layout=layout, optimized=False)
    return _mosaic.load(ref, at, layout=layout, optimized=False)


def _store(ref: Any, at: Any, value: Any) -> None:
    if jax.__version_info__ >= (0, 12):
        _mosaic.store(ref.at[at], value, optimized=False)
    else:
        ref[at] = value
