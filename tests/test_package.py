"""The package seen from outside: its names, what importing it pulls in, what the README shows."""

import ast
import pathlib
import re
import subprocess
import sys

import optax_dcasgd

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_importing_the_package_imports_no_extra():
    extras = ["chex", "flax", "matplotlib", "mlxtend", "orbax", "ray", "sklearn", "tqdm"]
    code = f"import sys, optax_dcasgd; print([m for m in {extras} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert ast.literal_eval(result.stdout) == []


def test_the_public_names_are_there():
    functions = {
        "add_delay_compensation",
        "dcasgd",
        "delay_gradients",
        "fused_dcasgd",
        "overlap_reduction",
        "pipeline_delays",
        "predict_params",
        "robust",
        "scale_by_gap",
        "scale_by_staleness",
        "track_velocity",
        "with_master_weights",
    }
    modules = {
        "mxnet": ["DCASGD"],
        "simulation": ["Arrivals", "arrivals", "exponential", "lognormal", "run"],
        "diagnostics": ["collect", "diagnose", "fit", "pairs", "quality"],
        "parameter_server": ["resize", "train"],
    }
    assert {*functions, *modules} <= set(optax_dcasgd.__all__)
    for name in functions:
        assert callable(getattr(optax_dcasgd, name)), name
    for module, names in modules.items():
        for name in names:
            assert callable(getattr(getattr(optax_dcasgd, module), name)), (module, name)
    assert all(hasattr(optax_dcasgd, name) for name in optax_dcasgd.__all__)


def test_the_examples_of_the_readme_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_the_readme_has_a_row_for_every_argument_of_mxnet():
    """The constructor of MXNet 2.0.0b1's DCASGD and of its base class Optimizer."""
    arguments = (
        "learning_rate momentum lamda use_fused_step rescale_grad param_idx2name wd clip_gradient "
        "lr_scheduler sym begin_num_update multi_precision param_dict aggregate_num"
    )
    table = README.partition("## Coming from MXNet")[2].partition("\n## ")[0]
    for argument in arguments.split():
        assert re.search(rf"^\| .*`{argument}[=`]", table, re.MULTILINE), argument
