"""Times one optimizer step of this library against its peers, in one interleaved run.

    python benchmarks/update.py
    python benchmarks/update.py --torch .venv-torch/bin/python --mxnet .venv-mxnet/bin/python

JAX runs in the interpreter that runs this script (with the package installed); each peer in an
environment of its own, named by its interpreter: ``pip install torch``, and ``pip install
numpy==1.23.5 mxnet==2.0.0b1`` (Python 3.11). In every round each contender takes its turn, in
random order and on new arrays; reported are medians over rounds, and their ratios to that of
``optax.sgd``. (Where arrays happen to lie in memory changes the time of one turn by some percent,
independently for each contender, so ratios within a round would only add noise.) Run it on an
otherwise idle machine.
"""

import argparse
import json
import math
import os
import pathlib
import platform
import random
import statistics
import subprocess
import sys

from contenders import CASES

BASELINE = "optax.sgd"
# Least memory traffic of a step in bytes a float32 parameter: each array read or written once.
BYTES = {
    "optax.sgd": 20,
    "torch.optim.SGD(fused=True)": 20,
    "dcasgd(store='updates')": 20,
    "fused_dcasgd(store='updates')": 20,
    "dcasgd()": 28,
    "fused_dcasgd()": 28,
    "fused_dcasgd(), state first": 28,
    "JAX by hand": 28,
    "MXNet DCASGD": 28,
    "copy of the gradients": 8,
    "fused_dcasgd(), pallas": 28,
    "fused_dcasgd(store='updates'), pallas": 20,
    "torch.optim.SGD(foreach=True)": 20,
    "torch.optim.SGD(fused=True), CUDA graph": 20,
    "torch.optim.SGD(foreach=True), CUDA graph": 20,
}


class Worker:
    """A running ``contenders.py``."""

    def __init__(self, python: str, framework: str):
        script = pathlib.Path(__file__).with_name("contenders.py")
        self._process = subprocess.Popen(
            [python, str(script), framework],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        hello = self._answer()
        self.contenders: list[str] = hello["contenders"]
        self.description: str = hello["description"]

    def _answer(self):
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a contender's process ended; its message stands above")
        return json.loads(line)

    def seconds_per_step(
        self, shapes: list[tuple[int, ...]], contender: str, steps: int, dtype: str = "float32"
    ) -> float:
        """Runs some steps of a contender on new arrays and returns their mean time."""
        assert self._process.stdin is not None
        request = {"shapes": shapes, "dtype": dtype, "contender": contender, "steps": steps}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()


def measure(workers: list[Worker], case: str, rounds: int, steps: int) -> dict[str, dict]:
    """Interleaves all contenders; returns the figures of each."""
    turns = [(worker, contender) for worker in workers for contender in worker.contenders]
    seconds: dict[str, list[float]] = {contender: [] for _, contender in turns}
    order, shapes = random.Random(0), CASES[case]()
    for _ in range(rounds):
        for worker, contender in order.sample(turns, len(turns)):
            seconds[contender].append(worker.seconds_per_step(shapes, contender, steps))
    size = sum(math.prod(shape) for shape in shapes)
    figures = {}
    for contender, times in seconds.items():
        figures[contender] = {
            "median_ms": 1e3 * statistics.median(times),
            "min_ms": 1e3 * min(times),
            "max_ms": 1e3 * max(times),
            "ratio": statistics.median(times) / statistics.median(seconds[BASELINE]),
            "effective_GB_per_s": BYTES[contender] * size / statistics.median(times) / 1e9,
        }
    return figures


def table(result: dict) -> str:
    """The result as Markdown."""
    lines = [f"{result['machine']}; {'; '.join(result['software'])}; {result['rounds']} rounds", ""]
    lines += ["| | " + " | ".join(f"{case}, ms | ratio | GB/s" for case in result["cases"]) + " |"]
    lines += ["|---" * (1 + 3 * len(result["cases"])) + "|"]
    for contender in next(iter(result["cases"].values())):
        cells = []
        for figures in result["cases"].values():
            row = figures[contender]
            cells += [f"{row['median_ms']:.2f}", f"{row['ratio']:.2f}"]
            cells += [f"{row['effective_GB_per_s']:.0f}"]
        lines.append(f"| `{contender}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine() -> str:
    """The processor's name and the number of cores this process may use."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    name = platform.processor() or platform.machine()
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def main() -> None:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter that has PyTorch")
    parser.add_argument("--mxnet", metavar="PYTHON", help="an interpreter that has MXNet 2.0.0b1")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each (default 30)")
    parser.add_argument("--steps", type=int, default=5, help="steps a turn (default 5)")
    parser.add_argument(
        "--case", choices=CASES, action="append", help="only this case (repeatable)"
    )
    parser.add_argument("--out", type=pathlib.Path, help="where to write the figures, as JSON")
    args = parser.parse_args()

    peers = {"jax": sys.executable, "torch": args.torch, "mxnet": args.mxnet}
    workers = [Worker(python, framework) for framework, python in peers.items() if python]
    result = {
        "machine": machine(),
        "software": [worker.description for worker in workers],
        "rounds": args.rounds,
        "steps_per_round": args.steps,
        "cases": {
            case: measure(workers, case, args.rounds, args.steps) for case in args.case or CASES
        },
    }
    print(table(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
