"""The package seen from outside: its names, its parts, its imports, and the code of its pages."""

import ast
import inspect
import operator
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import optax_dcasgd

ROOT = pathlib.Path(__file__).parent.parent
MODULES = ["rules", "sources", "mxnet", "simulation", "diagnostics", "parameter_server"]


def test_importing_the_package_imports_no_extra():
    unwanted = ["chex", "flax", "jax.experimental.pallas", "matplotlib", "mlxtend", "orbax", "ray"]
    unwanted += ["sklearn", "tqdm"] + [f"optax_dcasgd.{name}" for name in MODULES[3:]]
    code = f"import sys, optax_dcasgd; print([m for m in {unwanted} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert ast.literal_eval(result.stdout) == []


# --- Names ---


def public():
    """All public functions and classes, by their full names."""
    found = {}
    for module in [optax_dcasgd, *(getattr(optax_dcasgd, name) for name in MODULES)]:
        for name in getattr(module, "__all__", ["DCASGD"]):
            value = getattr(module, name)
            if not inspect.ismodule(value):
                found[f"{module.__name__}.{name}"] = value
    return found


def test_the_public_names_are_there():
    names = {
        "": "FusedOptimizer add_delay_compensation dcasgd delay_gradients fused_dcasgd "
        "local_updates overlap_reduction pipeline_delays predict_params remember_params "
        "robust_delay_compensation scale_by_gap scale_by_staleness track_velocity "
        "with_master_weights",
        "rules.": "transformation",
        "mxnet.": "DCASGD",
        "simulation.": "Arrivals arrivals deterministic exponential lognormal run",
        "diagnostics.": "collect diagnose fit overhead pairs quality",
        "parameter_server.": "resize train",
    }
    expected = {f"optax_dcasgd.{m}{name}" for m, text in names.items() for name in text.split()}
    assert not expected - {name for name, value in public().items() if callable(value)}
    assert {*MODULES} <= {*optax_dcasgd.__all__}
    assert {*optax_dcasgd.__all__} <= {*dir(optax_dcasgd), *MODULES}


def test_every_public_name_is_in_the_reference():
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.rst"))
    found = re.findall(r"^\.\. auto(?:function|class):: optax_dcasgd\.(\S+)$", pages, re.MULTILINE)
    documented = [operator.attrgetter(name)(optax_dcasgd) for name in found]
    assert len({*found}) == len(found)
    for name, value in public().items():
        assert any(value is other for other in documented), name


def test_every_public_name_is_documented_with_an_example():
    """Records, which functions return, need none."""
    for name, value in public().items():
        assert value.__doc__, name
        assert not value.__doc__.startswith(f"{value.__name__}("), name  # a NamedTuple's own
        if inspect.isfunction(value):
            assert "\nExamples:\n" in inspect.getdoc(value), name


# --- Parts: each imports only from those in the rows above it ---

LAYERS = [
    [
        *("_arguments", "_checks", "_gradients", "_hyperparameters", "_mathematics"),
        *("_stale_params", "_trees"),
    ],
    ["kernels"],
    ["rules", "sources"],
    ["_dcasgd", "_local_updates", "_mixed_precision", "mxnet"],
    ["simulation"],
    ["diagnostics", "parameter_server"],
]
LAYER = {part: i for i, parts in enumerate(LAYERS) for part in parts}
SAME_LAYER = {  # what else is allowed
    ("_checks", "_trees"),
    ("_gradients", "_checks"),
    ("_hyperparameters", "_arguments"),
    ("_mathematics", "_hyperparameters"),
    ("_stale_params", "_checks"),
    ("mxnet", "_dcasgd"),
    ("mxnet", "_mixed_precision"),
}


def imports(file):
    """The dotted names in the package that a module imports, as (part, *rest)."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            if package == "optax_dcasgd":
                yield tuple(rest)


def test_parts_depend_on_each_other_in_one_direction():
    top = ROOT / "optax_dcasgd"
    seen = set()
    for file in top.rglob("*.py"):
        part = file.relative_to(top).parts[0].removesuffix(".py")
        for other, *rest in imports(file) if part != "__init__" else ():
            if other == part:
                continue
            seen.add((part, other))
            assert LAYER[other] < LAYER[part] or (part, other) in SAME_LAYER, (file, other)
            if file.parent != top:  # a subpackage uses no private module of another
                assert not (rest and rest[0].startswith("_")), (file, other, rest)
    # Or nothing was found.
    assert {("diagnostics", "simulation"), ("rules", "_mathematics"), *SAME_LAYER} <= seen


# --- Pages ---


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def run(block, names):
    exec(compile(block, "page", "exec"), names)
    return names


def test_the_example_of_the_readme_runs():
    (block,) = blocks("README.md")
    assert np.all(run(block, {})["params"]["w"] < 0.985)  # it was 0.99 before the update


@pytest.mark.slow
def test_the_page_to_start_from_runs(capsys):
    """One block after the other; the one on Ray is the next test's."""
    names = {}
    for block in blocks("docs/start.md"):
        if "parameter_server" not in block:
            run(block, names)
    assert names["fresh"] < names["compensated"] < 0.5 * names["stale"]
    history = names["result"].history
    assert history.num_finite == 400
    assert history.loss[-1] < 0.3 < history.loss[0]
    assert "Compensation pays: add_delay_compensation(" in capsys.readouterr().out


@pytest.mark.ray
def test_the_example_on_ray_runs():
    (block,) = (block for block in blocks("docs/start.md") if "parameter_server" in block)
    np.testing.assert_allclose(run(block, {})["result"].params, 1, atol=0.01)


def test_the_code_of_the_page_on_the_design_runs():
    (block,) = blocks("docs/design.md")
    np.testing.assert_allclose(run(block, {})["updates"], -0.1, rtol=1e-6)


def test_the_code_of_the_page_on_several_devices_runs():
    """One block after the other, as a user would go from one step to the other."""
    before, after, resumed = blocks("docs/spmd.md")
    names = run(before, {})
    x = np.ones((16, 4), np.float32)
    params, _ = names["step"](names["params"], names["opt_state"], (x, np.ones(16)))
    assert np.all(params["w"] > 0)
    run(after, names)
    assert np.any(names["params"]["w"] != 0)
    grads = names["opt_state"].grads["w"]
    run(resumed, names)
    moved = names["opt_state"].grads["w"]
    assert moved.shape == (4, *grads.shape[1:])
    np.testing.assert_allclose(moved.mean(0), grads.mean(0), rtol=1e-6)


def test_the_code_of_the_page_on_pipelines_runs(capsys):
    late, by_stage, on_one_device, nnx, pays = blocks("docs/pipelines.md")
    names = {}
    run(late, names)
    run(by_stage, names)
    grads, tx = names["params"], names["by_stage"]
    _, state = tx.update(grads, tx.init(grads))
    updates, _ = tx.update({b: {"w": np.zeros((4, 4))} for b in grads}, state)
    for stage, momentum in enumerate((0.99, 0.945, 0.9)):  # after a gradient, one of 0
        size = 3e-3 * momentum / (1 + momentum) / np.sqrt(0.999 / 1.999)
        found = updates[f"block_{2 * stage}"]["w"] * -np.sign(grads[f"block_{2 * stage}"]["w"])
        np.testing.assert_allclose(found, size, rtol=1e-4)
    for tx in map(names["sgd"], range(3)):
        state = tx.init(1.0)
        for _ in range(600):
            update, state = tx.update(1.0, state)
        np.testing.assert_allclose(update, -1.0, rtol=0.01)  # however much momentum
    run(on_one_device, names)
    assert np.mean(names["losses"][-10:]) < np.mean(names["losses"][50:60]) < 2
    run(nnx, names)
    assert np.mean(names["nnx_losses"][-10:]) < 2 < names["nnx_losses"][0]
    capsys.readouterr()
    run(pays, names)
    assert capsys.readouterr().out.endswith("times as long: staleness pays.\n")


def test_the_page_on_mxnet_has_a_row_for_every_argument():
    """The constructor of MXNet 2.0.0b1's DCASGD and of its base class Optimizer."""
    arguments = (
        "learning_rate momentum lamda use_fused_step rescale_grad param_idx2name wd clip_gradient "
        "lr_scheduler sym begin_num_update multi_precision param_dict aggregate_num"
    )
    page = (ROOT / "docs" / "tutorials" / "mxnet.md").read_text()
    table = page.partition("## Every argument")[2]
    for argument in arguments.split():
        assert re.search(rf"^\| .*`{argument}[=`]", table, re.MULTILINE), argument


def test_the_code_of_the_page_on_local_steps_runs():
    """But for the lines that are shown for Ray and for several devices."""
    names = {}
    for block in blocks("docs/local_steps.md"):
        if "simulation.run" in block and "parameter_server" not in block:
            run(block, names)
            assert 0 < names["result"].history.loss[-1] < 1e-5 * names["result"].history.loss[0]
    assert int(names["arrivals"].batch[-1]) > 600 * 4


@pytest.mark.ray
def test_the_code_of_the_page_on_local_steps_runs_on_ray():
    """Where workers are of unequal speed; with the same parameters in the simulator."""
    # By this name functions are sent to the workers by value.
    names = {"__name__": "__main__", "parameter_server": optax_dcasgd.parameter_server}
    for block in blocks("docs/local_steps.md"):
        if "simulation.run" in block:
            run(block, names)
    found, replayed = (names[name].params["w"] for name in ("result", "replayed"))
    np.testing.assert_allclose(found, replayed, 1e-6)
    assert 0 < names["result"].history.loss[-1] < 1e-4 * names["result"].history.loss[0]
    assert 1 < names["result"].history.num_steps.max() <= 16
