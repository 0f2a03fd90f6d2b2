"""The scripts under examples/: as modules, and as a user runs them."""

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = str(ROOT / "examples")


@functools.cache
def load(name):
    """A script as a module. It finds its neighbours; those called as a module here do not stay."""
    here = sys.modules.pop("common", None)  # the tests have a module of this name too
    sys.path.insert(0, EXAMPLES)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(EXAMPLES)
        sys.modules.pop("common", None)
        if here is not None:
            sys.modules["common"] = here


def run_script(name, *options, cwd):
    env = dict(os.environ)
    env.pop("XLA_FLAGS", None)  # the virtual devices of conftest.py
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    # -W error: no warning reaches a user, that of a donated buffer which cannot be used included.
    command = [sys.executable, "-W", "error", f"{EXAMPLES}/{name}", *options]
    run = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    return run


def refuses(main, capsys, option, *values):
    """That it ends with an error that names the option and the last value."""
    with pytest.raises(SystemExit) as exit_info:
        main([option, *values])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"error: argument {option}: " in message
    assert not values or values[-1] in message
