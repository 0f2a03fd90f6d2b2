"""What the examples share: command line arguments, and how runs are judged."""

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy import stats


def number(kind: type, expected: str, legal: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type that refuses what is not legal, and says what is expected."""

    def convert(text: str) -> Any:
        if text == "none" and "none" in expected:
            return None
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and legal(value)):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return convert


def machine() -> str:
    """What the numbers were computed with and on."""
    device = jax.devices()[0]
    return f"JAX {jax.__version__} on {device.platform} ({device.device_kind})"


count = number(int, "an integer of at least 1", lambda v: v >= 1)
positive = number(float, "a number above 0", lambda v: v > 0)
nonnegative = number(float, "a number of at least 0", lambda v: v >= 0)
fraction = number(float, "a number in [0, 1)", lambda v: 0 <= v < 1)


def make_folder(parser: argparse.ArgumentParser, out: Path) -> None:
    """Makes the folder of --out, or ends with an error before anything is computed for it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        parser.error(f"argument --out: cannot write to {out}: {error.strerror}")


def read_entries(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a file of JSON lines, if there is one, that have these settings.

    An interrupted run's unfinished last line is removed, so that a next one can be written.
    """
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text)
    entries = [json.loads(line) for line in text.splitlines()]
    return [entry for entry in entries if entry.pop("settings") == settings]


def std(values: Sequence[float] | np.ndarray) -> float:
    """The standard deviation of single runs; NaN for one run."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def mean_and_std(values: Sequence[float] | np.ndarray, digits: int) -> str:
    """Mean ± standard deviation of single runs, for people; the mean alone for one run."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {std(values):.{digits}f}"


def compare(
    before: Sequence[float] | np.ndarray,
    after: Sequence[float] | np.ndarray,
    standard_errors: float,
) -> str:
    """Judges a change by what the runs before and after it end with: lower is better, NaN failed.

    Returns ``"helped"``, ``"hurt"`` or ``"made no clear difference"``. Where runs failed, their
    numbers decide, if chance alone would make them differ so, this way, in at most one case of ten
    (Fisher's exact test): three of five and none, three of three and none. Where none failed, the
    means differ if they are further apart than so many standard errors of their difference; from a
    single run nothing can be told.
    """
    none = "made no clear difference"
    failed = [[int(np.isnan(runs).sum()), int(np.isfinite(runs).sum())] for runs in (before, after)]
    if failed[0][0] or failed[1][0]:
        for effect, way in (("helped", "greater"), ("hurt", "less")):
            if stats.fisher_exact(failed, alternative=way).pvalue <= 0.1:
                return effect
        return none
    if min(len(before), len(after)) == 1:
        return none
    change = float(np.mean(after) - np.mean(before))
    error = math.hypot(*(std(runs) / math.sqrt(len(runs)) for runs in (before, after)))
    if abs(change) <= standard_errors * error + 1e-9:
        return none
    return "helped" if change < 0 else "hurt"
