"""What this library adds before the first step of a program: import time and tracing time.

    python benchmarks/overhead.py import --json import.json
    python benchmarks/overhead.py tracing --json tracing.json

``import`` is the time of `import optax_dcasgd` beyond `import jax, optax`, in fresh processes.
``tracing`` is the time of ``jax.jit(tx.update).trace(...)`` for the 400 arrays of a transformer,
with JAX's caches cleared before, as a ratio to that of `optax.adam`. In every round each contender
takes its turn, in random order; reported are medians over rounds. Run it on an otherwise idle
machine.
"""

import argparse
import json
import pathlib
import random
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import optax
from contenders import transformer_shapes
from update import machine

import optax_dcasgd as dc

IMPORTS = {  # what is timed, and what is imported before
    "import jax, optax": "import time",
    "import optax_dcasgd": "import time, jax, optax",
}
TIMED_IMPORT = "{}; begin = time.perf_counter(); {}; print(time.perf_counter() - begin)"
BASELINE = "optax.adam"


def interleave(names, rounds: int, measure) -> dict[str, dict]:
    """The median, least and most seconds of each."""
    seconds = {name: [] for name in names}
    order = random.Random(0)
    for done in range(rounds):
        for name in order.sample(sorted(seconds), len(seconds)):
            print(f"\r{done + 1}/{rounds} {name}\033[K", end="", file=sys.stderr)
            seconds[name].append(measure(name))
    print(file=sys.stderr)
    return {
        name: {"median_s": statistics.median(s), "min_s": min(s), "max_s": max(s)}
        for name, s in seconds.items()
    }


def import_time(rounds: int) -> dict[str, dict]:
    """Seconds of each import, of this library after JAX and Optax."""

    def measure(name: str) -> float:
        command = [sys.executable, "-c", TIMED_IMPORT.format(IMPORTS[name], name)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    for name in IMPORTS:  # so that the files are in memory, and compiled to bytecode
        measure(name)
    return interleave(IMPORTS, rounds, measure)


def contenders() -> dict[str, dict]:
    """Optimizers by the extra arguments that their update gets."""
    sgd, robust = optax.sgd(0.1, 0.9), dc.robust_delay_compensation()
    adaptive = {"decay": 0.95, "clip": 1.0}
    rules = {
        "add_delay_compensation()": dc.add_delay_compensation(),
        "add_delay_compensation(decay=None)": dc.add_delay_compensation(decay=None),
        "robust_delay_compensation()": robust,
        "scale_by_gap()": dc.scale_by_gap(),
        "scale_by_staleness()": dc.scale_by_staleness(),
    }
    optimizers = {
        BASELINE: optax.adam(0.1),
        "optax.sgd(momentum)": sgd,
        "track_velocity()": dc.track_velocity(),
        "remember_params(robust, sgd)": dc.remember_params(optax.chain(robust, sgd)),
        "delay_gradients(sgd, 2)": dc.delay_gradients(sgd, 2),
        "with_master_weights(sgd)": dc.with_master_weights(sgd),
        "dcasgd(momentum)": dc.dcasgd(0.1, 0.9),
        "dcasgd(momentum, store='updates')": dc.dcasgd(0.1, 0.9, store="updates"),
        "dcasgd(momentum, decay, clip)": dc.dcasgd(0.1, 0.9, **adaptive),
        "fused_dcasgd(momentum)": dc.fused_dcasgd(0.1, 0.9),
        "fused_dcasgd(momentum, decay, clip)": dc.fused_dcasgd(0.1, 0.9, **adaptive),
        "mxnet.DCASGD(momentum)": dc.mxnet.DCASGD(momentum=0.9),
    }
    of_workers = {"remember_params(sgd, num_workers=4)": dc.remember_params(sgd, num_workers=4)}
    return {"": optimizers, "stale_params staleness": rules, "worker": of_workers}


def tracing_time(rounds: int) -> dict[str, dict]:
    """CPU seconds a trace of each contender, and the ratio to the baseline."""
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in transformer_shapes()]
    integer = jax.ShapeDtypeStruct((), jnp.int32)
    values = {"stale_params": params, "staleness": integer, "worker": integer}
    calls = {}
    for names, made in contenders().items():
        extra = {name: values[name] for name in names.split()}
        for name, tx in made.items():
            update = getattr(tx, "step", None) or tx.update
            calls[name] = (update, (params, jax.eval_shape(tx.init, params), params), extra)

    def measure(name: str) -> float:
        update, args, extra = calls[name]
        jax.clear_caches()
        begin = time.process_time()
        jax.jit(update).trace(*args, **extra)
        return time.process_time() - begin

    for name in calls:  # what is imported or built only once
        measure(name)
    rows = interleave(calls, rounds, measure)
    for row in rows.values():
        row["ratio"] = row["median_s"] / rows[BASELINE]["median_s"]
    return rows


def main() -> None:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figure", choices=["import", "tracing"])
    parser.add_argument("--rounds", type=int, default=11, help="turns of each (default 11)")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures")
    args = parser.parse_args()
    rows = (import_time if args.figure == "import" else tracing_time)(args.rounds)
    software = f"Python {sys.version.split()[0]}, JAX {jax.__version__}, Optax {optax.__version__}"
    print(f"{machine()}; {software}; {args.rounds} rounds\n\n| | seconds | ratio |\n|---|---|---|")
    for name, row in rows.items():
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else "–"
        print(f"| `{name}` | {row['median_s']:.3f} | {ratio} |")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": machine(), "software": software, "rounds": args.rounds, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
