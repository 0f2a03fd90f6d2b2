"""Both kernels, in their interpreters, compute what the reference does."""

import jax
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_cases import (
    DTYPES,
    FEW_SHAPES,
    MODES,
    SHAPES,
    SHAPES_WITH_NUMBERS,
    KernelTests,
)

from optax_dcasgd.kernels import mosaic_gpu, mosaic_tpu

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_few_shapes = pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
each_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
each_form = pytest.mark.parametrize("step", [False, True], ids=["update", "step"])


class EveryCase(KernelTests):
    @each_shape
    @each_dtype
    @each_form
    def test_shape(self, shape, dtypes, step):
        self.check(MODES["stored, DC-a, clip"], shape, *dtypes, step)

    @each_mode
    @each_few_shapes
    @each_form
    def test_mode(self, mode, shape, step):
        self.check(mode, shape, "float32", "float32", step)

    @each_dtype
    @each_few_shapes
    @each_form
    def test_dtype(self, dtypes, shape, step):
        self.check(MODES["updates"], shape, *dtypes, step)
        self.check(MODES["stored, no momentum"], shape, *dtypes, step)


class TestMosaicTPU(EveryCase):
    @staticmethod
    def kernel(*args, step):
        return mosaic_tpu.leaf(*args, step=step, interpret=True)


class TestMosaicGPU(EveryCase):
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

    @staticmethod
    def kernel(*args, step):
        return mosaic_gpu.leaf(*args, step=step, interpret=InterpretGPUParams())


@pytest.mark.parametrize(
    "shape", [*SHAPES_WITH_NUMBERS, (4096, 4096), (1 << 24,), (512, 512, 3, 3)], ids=str
)
def test_a_tpu_block_covers_the_array_and_fits(shape):
    view = mosaic_tpu._view(shape)
    elements = 100_000
    block = mosaic_tpu._block(view, elements)
    assert len(block) == len(view)
    if len(view) == 1:
        assert block == view or (block[0] % 2048 == 0 and block[0] <= elements)
        return
    rows, columns = block[1:]
    assert rows == view[1] or rows % 16 == 0
    assert columns == view[2] or columns % 128 == 0
    padded = -(-rows // 16) * 16 * -(-columns // 128) * 128
    assert block[0] * padded <= max(elements, padded)


def test_no_tpu_block_is_empty():
    assert jax.tree.all(jax.tree.map(lambda n: n > 0, mosaic_tpu._block((1, 16, 1024), 10)))
