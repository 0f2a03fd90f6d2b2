"""benchmarks/gpu.py, as far as a machine without a GPU can try it."""

import importlib.util
import json
import pathlib

import pytest
from example_cases import run_script

PROGRAMS = pathlib.Path(__file__).parents[2] / "benchmarks" / "programs.py"
# As the compiler writes it, with operands and types cut short.
PROGRAM = """HloModule step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused_computation (p: f32[8]) -> (f32[8], f32[8]) {
  %p = f32[8]{0} parameter(0)
  %m = f32[8]{0} multiply(%p, %p)
  ROOT %t = (f32[8]{0}, f32[8]{0}) tuple(%m, %p)
}

%command_buffer (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %f.1 = (f32[8]{0}, f32[8]{0}) fusion(%p), kind=kLoop, calls=%fused_computation
  %g.1 = f32[8]{0} get-tuple-element(%f.1), index=0
  ROOT %k = f32[8]{0} custom-call(%g.1), custom_call_target="mosaic_gpu_v2"
}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%arg), index=1
  %c = f32[8]{0} call(%x), to_apply=%command_buffer
  %i = s32[] fusion(%arg), kind=kLoop, calls=%fused_computation
  ROOT %r = (s32[], f32[8]{0}) tuple(%i, %c)
}

%condition (arg: (s32[], f32[8])) -> pred[] {
  %arg = (s32[], f32[8]{0}) parameter(0)
  ROOT %lt = pred[] compare(%arg, %arg), direction=LT
}

ENTRY %main (p: f32[8]) -> (f32[8], f32[8]) {
  %p = f32[8]{0} parameter(0)
  %empty = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"
  %copy = f32[8]{0} copy(%p)
  %start = (s32[], f32[8]{0}) tuple(%p, %copy)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  %y = f32[8]{0} get-tuple-element(%loop), index=1
  ROOT %f.2 = (f32[8]{0}, f32[8]{0}) fusion(%y), kind=kLoop, calls=%fused_computation
}
"""


def test_kernels_are_counted_with_what_is_called_and_without_what_is_fused():
    spec = importlib.util.spec_from_file_location("programs", PROGRAMS)
    programs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(programs)
    body = ["fusion", "custom-call", "fusion"]  # of the command buffer, and the counter
    assert programs.launches(PROGRAM, loop=True) == len(body)
    assert programs.launches(PROGRAM) == len(["copy", *body, "fusion"])


@pytest.mark.slow
def test_it_measures_what_it_can_and_names_the_rest(tmp_path):
    run = run_script("../benchmarks/gpu.py", "--quick", "--out", "gpu.json", cwd=tmp_path)
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["small"]
    found = {(row["case"], row["way"], row["contender"]) for row in result["rows"]}
    left_out = "\n".join(result["left_out"])
    for name in ("dcasgd()", "fused_dcasgd()", "fused_dcasgd(store='updates')"):
        assert ("some arrays", "inside a loop", f"{name}, xla") in found
        assert f"{name}, pallas, some arrays, float32, inside a loop" in left_out
    for name in ("optax.sgd", "optax.flatten(optax.sgd)", "optax.flatten(dcasgd())"):
        assert ("some arrays", "one call a step", name) in found
    if importlib.util.find_spec("torch") is None:
        assert "PyTorch" in left_out
    for row in result["rows"]:
        assert row["median_ms"] > 0
        if row["contender"] != "copy of the gradients":  # which stands above the tables
            lines = [x for x in run.stdout.splitlines() if x.startswith(f"| `{row['contender']}` ")]
            assert any(f"| {row['median_ms']:.3f}" in x for x in lines), row
    (least,) = {
        row["least_bytes"]
        for row in result["rows"]
        if (row["contender"], row["case"], row["dtype"])
        == ("fused_dcasgd(), xla", "one array of 65,536", "bfloat16")
    }
    assert least == (2 + 2 * (2 + 2 + 4)) * 65536  # g; w, prev and mom
