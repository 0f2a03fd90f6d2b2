"""Puts each of a list of faults into a copy of the source and runs the tests that must catch it.

The faults are in mutations.py. Run it as ``python tests/check_mutations.py``. Every fault must make
the test named beside it fail; the last line is ``N/N faults caught``. A fault that can be made in
several ways counts as caught only if all of them are.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent import futures

from mutations import MUTATIONS, Mutation

TESTS = pathlib.Path(__file__).parent
PACKAGE = TESTS.parent / "optax_dcasgd"


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
