"""Puts each fault of earlier DCASGD implementations into a copy of the source and runs the tests.

Run it as ``python tests/check_mutations.py``. Every fault must make the tests named beside it fail;
the last line is ``10/10 faults caught``. A fault that can be made in several ways counts as caught
only if all of them are.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent import futures
from typing import NamedTuple

TESTS = pathlib.Path(__file__).parent
PACKAGE = TESTS.parent / "optax_dcasgd"

PAPER = "test_paper.py::test_algorithm_2_with_random_arrivals"
CHAIN = "test_paper.py::test_algorithm_2_as_a_link_of_a_chain"
MXNET = "test_mxnet.py"
STATE = "test_dcasgd.py"


class Mutation(NamedTuple):
    """One way to make a fault: in `file`, replace `old`, which stands there once, by `new`."""

    fault: int
    name: str
    file: str
    old: str
    new: str
    tests: str  # a pytest node id: at least one test of it must fail


MUTATIONS = [
    Mutation(
        1,
        "the previous parameters are kept by reference, so that w − w_s is zero",
        "_stale_params.py",
        "_unless_first(count, prev_params, params)",
        "params",
        MXNET,
    ),
    Mutation(
        2,
        "a factor g is missing: λ·g·(w − w_s)",
        "_compensation.py",
        "relative = scaled * magnitude",
        "relative = scaled",
        PAPER,
    ),
    Mutation(
        3,
        "the backups of workers start at zero",
        "_stale_params.py",
        "_trees.stack_copies(p, num_workers)",
        "jnp.zeros_like(_trees.stack_copies(p, num_workers))",
        PAPER,
    ),
    Mutation(
        4,
        "λ is fixed at 1",
        "_compensation.py",
        "lamda, decay, rest, eps, clip = coefficients",
        "lamda, decay, rest, eps, clip = coefficients._replace(lamda=jnp.ones_like(delta))",
        PAPER,
    ),
    Mutation(
        5,
        "ε stands outside the square root",
        "_compensation.py",
        "lamda * lax.rsqrt(jnp.where(square == 0, 1, square))",
        "lamda / (jnp.sqrt(nu) + eps)",
        PAPER,
    ),
    Mutation(
        5,
        "there is no square root",
        "_compensation.py",
        "lamda * lax.rsqrt(jnp.where(square == 0, 1, square))",
        "lamda / square",
        PAPER,
    ),
    Mutation(
        6,
        "the backup of another worker is looked up: that of the previous push",
        "_stale_params.py",
        "lax.dynamic_index_in_dim(b, index, 0, keepdims=False)",
        "lax.dynamic_index_in_dim(b, last_worker, 0, keepdims=False)",
        PAPER,
    ),
    Mutation(
        7,
        "weight decay stands on the wrong side of the square",
        "mxnet.py",
        "if version == 2:",
        "if version == 1:",
        MXNET,
    ),
    Mutation(
        8,
        "momentum cannot be used",
        "kernels/reference.py",
        "if scalars.momentum is not None and momentum is not None:",
        "if False:",
        MXNET,
    ),
    Mutation(
        8,
        "momentum cannot be used with MXNet 1.x's rule",
        "mxnet.py",
        'parts.append(dcasgd(schedule, buffer, 0.0, store="updates"))',
        "parts.append(optax.scale_by_learning_rate(schedule))",
        MXNET,
    ),
    Mutation(
        9,
        "a worker's backup is refreshed before its own update is applied",
        "_stale_params.py",
        "return StaleParams(stale_params, backups, index)",
        "return StaleParams(stale_params, jax.tree.map(\n"
        "        lambda b, w: _fill_row(b, w, index, num_workers), backups, params\n"
        "    ), jnp.full((), num_workers, jnp.int32))",
        CHAIN,
    ),
    Mutation(
        10,
        "ν is kept in the parameter's low precision",
        "_trees.py",
        "dtype = compute_dtype(p)",
        "dtype = dtype_of(p)",
        f"{STATE}::test_nu_is_kept_in_float32_for_low_precision_parameters",
    ),
    Mutation(
        10,
        "ν is cast down to the parameter's dtype after each update",
        "_compensation.py",
        "new_nu.astype(nu.dtype)",
        "new_nu.astype(_trees.dtype_of(param)).astype(nu.dtype)",
        f"{STATE}::test_nu_is_kept_in_float32_for_low_precision_parameters",
    ),
]


def run_tests(package_parent: pathlib.Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs the tests against the package in that folder."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", "0"]
    return subprocess.run(
        [*command, *(str(TESTS / test) for test in tests)],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": str(package_parent), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def copy_package(parent: pathlib.Path) -> pathlib.Path:
    """Copies the package to a new folder; returns the copy."""
    return pathlib.Path(
        shutil.copytree(
            PACKAGE, parent / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__")
        )
    )


def is_caught(mutation: Mutation) -> bool:
    """Whether the mutation makes a test fail: fail, not error on the way to it."""
    with tempfile.TemporaryDirectory() as folder:
        file = copy_package(pathlib.Path(folder)) / mutation.file
        source = file.read_text()
        if source.count(mutation.old) != 1:
            raise SystemExit(
                f"{mutation.file} must contain once, but contains {source.count(mutation.old)} "
                f"times: {mutation.old}"
            )
        file.write_text(source.replace(mutation.old, mutation.new))
        result = run_tests(pathlib.Path(folder), [mutation.tests])
    failure = re.search(r"^FAILED (.*)$", result.stdout, re.MULTILINE)
    caught = result.returncode == 1 and failure is not None
    print(
        f"fault {mutation.fault:2}: {mutation.name}: "
        + (f"caught by {failure.group(1)[:110]}" if caught else f"NOT CAUGHT\n{result.stdout}"),
        flush=True,
    )
    return caught


def main() -> int:
    """Runs all mutations; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        copy_package(pathlib.Path(folder))
        result = run_tests(pathlib.Path(folder), sorted({m.tests for m in MUTATIONS}))
    if result.returncode:
        print(result.stdout, "the tests fail without any fault", sep="\n")
        return 1
    with futures.ThreadPoolExecutor(os.cpu_count()) as executor:
        caught = list(executor.map(is_caught, MUTATIONS))
    faults = {m.fault for m in MUTATIONS}
    missed = {m.fault for m, was_caught in zip(MUTATIONS, caught, strict=True) if not was_caught}
    print(f"{len(faults - missed)}/{len(faults)} faults caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
