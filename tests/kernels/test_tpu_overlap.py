"""Which collectives the TPU compiler runs under the compute of a training step.

The steps, and how a schedule is read, are those of benchmarks/tpu_overlap.py.

pytest -m tpu_compile tests/kernels/test_tpu_overlap.py
"""

import importlib.metadata
import importlib.util
import pathlib
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
# As the compiler writes them, with operands and types cut short.
BLOCKING = """HloModule step, is_scheduled=true

%products (p: f32[8]) -> f32[8] {
  ROOT %convolution.1 = f32[8]{0} convolution(%p, %p)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %f.1 = f32[8]{0} fusion(%p), calls=%products, metadata={op_name="jit(f)/jvp()/dot_general"}
  %psum.1 = f32[8]{0} all-reduce(%f.1), to_apply=%add
  ROOT %f.2 = f32[8]{0} fusion(%psum.1), calls=%products, metadata={op_name="transpose(jvp())/dot"}
}
"""
UNDER_WAY = (
    BLOCKING.replace("  %psum.1 = f32[8]{0} all-reduce(%f.1), to_apply=%add\n", "")
    .replace(
        "  %f.1 =",
        "  %psum.1 = (f32[8]{0}) all-reduce-start(%p), to_apply=%add\n  %f.1 =",
    )
    .replace(
        "  ROOT %f.2 = f32[8]{0} fusion(%psum.1)",
        "  %psum.2 = f32[8]{0} all-reduce-done(%psum.1)\n  ROOT %f.2 = f32[8]{0} fusion(%psum.2)",
    )
)


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))  # as it is for a script: it imports its neighbour
    try:
        path = BENCHMARKS / "tpu_overlap.py"
        spec = importlib.util.spec_from_file_location("tpu_overlap", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def figures(benchmark, chip, step, reduction="pmean", options=True):
    options = benchmark.OVERLAP[chip] if options else {}
    compiled = benchmark.compile_step(chip, step, reduction, options)
    return benchmark.figures(benchmark.schedule(compiled.as_text()))


def test_a_schedule_is_read_in_its_order(benchmark):
    kinds = [event for event, _, _ in benchmark.schedule(BLOCKING)]
    assert kinds == ["forward", "blocking", "backward"]
    kinds = [event for event, _, _ in benchmark.schedule(UNDER_WAY)]
    assert kinds == ["start", "forward", "done", "backward"]
    found = benchmark.figures(benchmark.schedule(UNDER_WAY))
    assert (found["under_forward"], found["blocking"], found["collectives"]) == (1, 0, 1)
    assert (found["forward_matmuls_covered"], found["backward_matmuls_covered"]) == (1, 0)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("step", ["synchronous", "overlapped"])
def test_by_default_an_all_reduce_blocks(benchmark, step):
    found = figures(benchmark, "v5e", step, options=False)
    assert found["blocking"] == found["collectives"] == benchmark.LAYERS


@pytest.mark.tpu_compile
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_with_options_only_the_overlapped_step_reduces_during_its_forward_pass(benchmark, chip):
    version = tuple(map(int, importlib.metadata.version("libtpu").split(".")[:3]))
    if chip != "v5e" and version < (0, 0, 52):
        pytest.skip("libtpu 0.0.42 does not yet overlap on v5p and v6e")
    found = figures(benchmark, chip, "overlapped")
    assert found["under_forward"] >= 1
    assert found["forward_matmuls_covered"] >= 2
    assert found["backward_matmuls_covered"] == found["backward_matmuls"]
    found = figures(benchmark, chip, "synchronous")
    assert found["under_forward"] == 0
    assert found["backward_matmuls_covered"] < found["backward_matmuls"]


@pytest.mark.tpu_compile
def test_a_ring_of_permutes_needs_no_option(benchmark):
    found = figures(benchmark, "v4", "overlapped", "ring", options=False)
    assert found["blocking"] == 0
    assert found["forward_matmuls_covered"] == found["forward_matmuls"]
    assert figures(benchmark, "v4", "synchronous", "ring", options=False)["under_forward"] == 0
