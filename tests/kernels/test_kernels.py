"""Both kernels, in their interpreters, compute what the reference does."""

import functools

import jax
import kernel_cases
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_cases import ALL, EACH_DTYPE, EACH_MODE, EACH_SHAPE, MODES, SHAPES_WITH_NUMBERS, Case

from optax_dcasgd.kernels import mosaic_gpu, mosaic_tpu

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


class TestMosaicGPU(EveryCase):
    kernel = staticmethod(functools.partial(mosaic_gpu.update, interpret=InterpretGPUParams()))

    @pytest.fixture(autouse=True)
    def mend_the_interpreter_of_jax_0_10(self, monkeypatch):
        """Its compiler needs none of this.

        A reference without a memory space is in global memory, and where numbers lie in the
        registers of the threads changes nothing of their values.
        """
        if jax.__version_info__ >= (0, 11):
            return
        is_global = gpu_callbacks.is_gmem_memory_space
        monkeypatch.setattr(
            gpu_callbacks, "is_gmem_memory_space", lambda space: space is None or is_global(space)
        )
        monkeypatch.setattr(plgpu, "layout_cast", lambda x, _: x)


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
