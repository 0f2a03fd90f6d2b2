"""Batches a second on Ray where two of four workers take four times as long for a batch.

All take H = 16 local steps, or each as many as it has time for (``local_steps=16``), behind a
barrier and without one. A batch takes a fast worker 10 ms, and nothing else takes any: they sleep.
Counted is the second half of a run, in which all speeds are known.

    python benchmarks/steps_by_speed.py --out figures.json
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import ray

from optax_dcasgd import local_updates, parameter_server

H, WORKERS, SLOWER, SECONDS = 16, 4, 4, 0.01
STEPS = {"equal": [H] * WORKERS, "by speed": H}


class Batches:
    """Zeros, after the time that it takes this worker to make them."""

    def __init__(self, folder):
        self.folder, self.trainer, self.seconds = folder, os.getpid(), None

    def __call__(self, first, num_steps):
        if os.getpid() != self.trainer:
            if self.seconds is None:
                self.seconds = SECONDS * (SLOWER if self._number() % 2 else 1)
            time.sleep(num_steps * self.seconds)
        return np.zeros((H, 1), np.float32)

    def _number(self):
        """The first that no other worker has taken."""
        for i in range(WORKERS):
            with contextlib.suppress(FileExistsError):
                pathlib.Path(self.folder, str(i)).touch(exist_ok=False)
                return i
        raise RuntimeError("A worker was lost.")


def batches_a_second(mode, local_steps, num_updates):
    """By the server's own record; and the least and the most batches of a push, or of a round."""
    grad_fn = local_updates(lambda params, batch, key: (jnp.sum(batch), params), optax.sgd(0.01), H)
    with tempfile.TemporaryDirectory() as folder:
        history = parameter_server.train(
            grad_fn, jnp.ones(1000), optax.sgd(1.0), Batches(folder), num_workers=WORKERS,
            num_updates=num_updates, local_steps=local_steps, mode=mode, progress=False,
        ).history  # fmt: skip
    half = num_updates // 2
    used, seconds = history.num_steps[half:], history.time[half - 1 :]
    return used.sum() / (seconds[-1] - seconds[0]), int(used.min()), int(used.max())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="of all four, interleaved [3]")
    parser.add_argument("--out", type=pathlib.Path, help="where to write the JSON")
    args = parser.parse_args()
    found = {}
    for _ in range(args.rounds):
        for mode, num_updates in (("sync", 32), ("async", 128)):
            for name, local_steps in STEPS.items():
                case = found.setdefault(f"{mode}, {name}", {"rounds": [], "batches at a time": []})
                rate, *used = batches_a_second(mode, local_steps, num_updates)
                case["rounds"].append(rate)
                case["batches at a time"].append(used)
    for case in found.values():
        case["batches a second"] = statistics.median(case["rounds"])
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    report = {"cores": os.cpu_count(), **versions, "ray": ray.__version__, "cases": found}
    print(json.dumps(report, indent=2))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
