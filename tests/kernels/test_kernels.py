"""Both kernels, in their interpreters, compute what the reference does."""

import functools

import jax
import kernel_cases
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from kernel_cases import (
    ALL,
    DTYPES,
    EACH_DTYPE,
    EACH_MODE,
    EACH_SHAPE,
    MODES,
    SHAPES,
    SHAPES_WITH_NUMBERS,
    Case,
    arguments,
    assert_same,
)

from optax_dcasgd.kernels import mosaic_gpu, mosaic_tpu, reference

# Shapes of several small blocks, with less at the ends; and of several blocks of full size.
SMALL, FULL = [(5000,), (40, 1100), (5, 3, 130)], [(300, 1100), (400_000,)]
BLOCKS = {
    "stored, DC-a, clip": (SMALL, FULL),
    "updates": (SMALL, FULL),
    # The interpreter of JAX 0.12 cannot pad an array that is written and not read.
    "stored, and known": ([(4096,), (32, 1024), (5, 3, 130)], [(576, 1024)]),
}


class EveryCase:
    @pytest.mark.parametrize(
        "cases", [EACH_MODE, EACH_SHAPE, EACH_DTYPE], ids=["mode", "shape", "dtype"]
    )
    def test_each(self, cases):
        kernel_cases.check(self.kernel, cases)

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", MODES)
    def test_all_dtypes_in_a_mode(self, mode):
        kernel_cases.check(self.kernel, [case for case in ALL if case.mode == mode])


class TestMosaicTPU(EveryCase):
    kernel = staticmethod(functools.partial(mosaic_tpu.update, interpret=True))

    @pytest.mark.parametrize("mode", BLOCKS)
    def test_several_blocks(self, mode, monkeypatch):
        monkeypatch.setattr(mosaic_tpu, "_BLOCK_BYTES", 2048 * 36)  # 2,048 numbers or so
        kernel_cases.check(self.kernel, [Case(mode, shape) for shape in BLOCKS[mode][0]])

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", BLOCKS)
    def test_several_blocks_of_full_size(self, mode):
        kernel_cases.check(self.kernel, [Case(mode, shape) for shape in BLOCKS[mode][1]])


@pytest.fixture
def interpreted(monkeypatch):
    """`mosaic_gpu.update` in its interpreter, which before JAX 0.12 lacks what the compiler has.

    Of its values nothing changes: where numbers lie in the registers of the threads, and that a
    reference without a memory space is in global memory.
    """
    if jax.__version_info__ < (0, 12):
        monkeypatch.setattr(mosaic_gpu, "_load", lambda ref, at, layout: ref[at])
    if jax.__version_info__ < (0, 11):
        is_global = gpu_callbacks.is_gmem_memory_space
        monkeypatch.setattr(
            gpu_callbacks, "is_gmem_memory_space", lambda space: space is None or is_global(space)
        )
    launch = mosaic_gpu._launch
    launch.clear_cache()  # of traces with the compiler's
    yield functools.partial(mosaic_gpu.update, interpret=InterpretGPUParams())
    launch.clear_cache()


class TestMosaicGPU(EveryCase):
    @pytest.fixture(autouse=True)
    def one_array(self, interpreted):
        self.kernel = lambda operands, *args, step: interpreted([operands], *args, step=step)[0]


def mixed(mode):
    """Whole pieces; ends of one kind and of another; one number; none; and dtypes in turn."""
    return [Case(mode, s, DTYPES[i % len(DTYPES)]) for i, s in enumerate([*SHAPES, (5000,)])]


def keeps(mode):
    """Whether it has arrays of the state's dtype; else there are three dtypes and not five."""
    return mode.momentum is not None or mode.decay is not None


ALIKE = [Case("updates", (130,))] * 5 + [Case("updates", (7,))] * 4
ADAPTIVE = mixed("stored, DC-a, clip")


@pytest.mark.parametrize(
    ("cases", "arrays", "branches", "launches"),
    [
        pytest.param(ADAPTIVE, 64, 32, 5, id="one launch a dtype"),
        pytest.param(ADAPTIVE, 2, 32, 6, id="more arrays than a launch takes"),
        pytest.param(ALIKE, 4, 32, 4, id="equal launches"),  # 2 + 1 arrays three times, and 0 + 1
        pytest.param(ALIKE, 64, 2, 1, id="more arrays of a kind than a switch has branches"),
        *(
            pytest.param(
                mixed(name), 64, 32, 5 if keeps(mode) else 3, id=name, marks=pytest.mark.slow
            )
            for name, mode in MODES.items()
            if name != "stored, DC-a, clip"
        ),
    ],
)
def test_many_arrays_on_a_gpu(cases, arrays, branches, launches, interpreted, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "ARRAYS", arrays)
    monkeypatch.setattr(mosaic_gpu, "_BRANCHES", branches)
    launched, launch = [], mosaic_gpu._launch
    monkeypatch.setattr(
        mosaic_gpu, "_launch", lambda some, *a, **k: launched.append(some) or launch(some, *a, **k)
    )
    args = [arguments(MODES[case.mode], case.shape, *case.dtypes) for case in cases]
    operands, (_, count, numbers) = [a[0] for a in args], args[0]

    @jax.jit
    def run(operands):
        expected = [reference.update(x, count, numbers, step=True) for x in operands]
        return interpreted(operands, count, numbers, step=True), expected

    for case, array, actual, expected in zip(cases, operands, *run(operands), strict=True):
        assert_same(actual, expected, array.param, case)
    assert len(launched) == launches


@given(st.lists(st.integers(1, 5 * mosaic_gpu.PIECE), min_size=1, max_size=9))
def test_each_number_is_the_work_of_one_block(sizes):
    done = [np.full(size, -1) for size in sizes]
    blocks = []
    for work in mosaic_gpu._share_out(sizes):
        for k in range(work.blocks):
            blocks.append(work.first + k)
            for start in work.starts:
                numbers = done[work.array][start + k * work.length :][: work.length]
                assert len(numbers) == work.length
                assert set(numbers) <= {-1, blocks[-1]}
                numbers[:] = blocks[-1]
    assert blocks == list(range(len(blocks)))
    assert all(np.all(x >= 0) for x in done)


@pytest.mark.parametrize(
    "shape", [*SHAPES_WITH_NUMBERS, (4096, 4096), (1 << 24,), (512, 512, 3, 3)], ids=str
)
@pytest.mark.parametrize("elements", [2048, 100_000])
def test_a_tpu_block_covers_the_array_and_fits(shape, elements):
    view = mosaic_tpu._view(shape)
    block = mosaic_tpu._block(view, elements)
    assert len(block) == len(view)
    assert min(block) > 0
    if len(view) == 1:
        assert block == view or (block[0] % 2048 == 0 and block[0] <= elements)
        return
    rows, columns = block[1:]
    assert rows == view[1] or rows % 16 == 0
    assert columns == view[2] or columns % 128 == 0
    padded = -(-rows // 16) * 16 * -(-columns // 128) * 128
    assert block[0] * padded <= max(elements, padded)
