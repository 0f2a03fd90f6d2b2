"""What an optimizer step costs on a GPU, by this library and its peers. At most four minutes.

    python benchmarks/gpu.py --out benchmarks/results/gpu-h100.json
    python benchmarks/gpu.py --quick

It needs no network, and takes JAX and PyTorch as they are installed; PyTorch runs in a process of
its own. One large array says whether a step is at the memory's limit, beside a copy. Many small
ones are timed in two ways: inside a compiled loop (for PyTorch a CUDA graph that is replayed), and
one call a step, which is the dispatch of the arrays too. Reported are medians of interleaved turns;
the least bytes of a step (each array read, or written, once) over that time; and of the compiled
program its temporaries and the kernels that it launches a step. What cannot run here, or has no
time left, is left out and named. Without a GPU, or with ``--quick``, all
sizes are small: that tries the script and measures nothing.
"""

import argparse
import concurrent.futures
import importlib.util
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too

import jax
import jax.numpy as jnp
import optax
from contenders import jax_gradients, jax_steps, resnet50_shapes, transformer_shapes
from programs import CALL, LOOP, Case, Program
from update import BASELINE, Worker, machine

COPY = "copy of the gradients"
ALONE = ("optax.sgd", "fused_dcasgd(), xla", "fused_dcasgd(), pallas")  # compilation is timed
SLOW_KERNEL = ("dcasgd(), pallas", "dcasgd(store='updates'), pallas")  # not all can be in place
RESERVE = 20  # seconds that must be left for another program


def cases(quick: bool) -> list[Case]:
    """What is measured, those that compile quickest first."""
    if quick:
        few = [(1 << 10,), (3, 5)]
        return [
            Case("one array of 65,536", [(1 << 16,)], "float32", 3, 3),
            Case("some arrays", few * 3, "float32", 3, 3),
            Case("one array of 65,536", [(1 << 16,)], "bfloat16", 3, 0),
        ]
    # A turn is one call, and dispatching 400 arrays takes milliseconds: so its loop has many steps.
    return [
        Case("one array of 268 M", [(1 << 28,)], "float32", 20, 20),
        Case("one array of 268 M", [(1 << 28,)], "bfloat16", 20, 0),
        Case("one array of 16.8 M", [(1 << 24,)], "float32", 100, 0),
        Case("one array of 16.8 M", [(1 << 24,)], "bfloat16", 100, 0),
        Case("transformer, 400 arrays", transformer_shapes(), "float32", 500, 20),
        Case("ResNet-50, 161 arrays", resnet50_shapes(), "float32", 500, 20),
    ]


# --- JAX ---


def contenders(case: Case, way: str) -> dict[str, tuple]:
    """The steps that are timed in that way, those whose compilation is timed first."""
    steps = jax_steps()
    if len(case.shapes) == 1 and way == CALL:  # what a step does shows in the loop
        copy = jax.jit(lambda params, state, grads: (jax.tree.map(jnp.copy, grads), state))
        return {COPY: (lambda params: (), copy)}
    names = [n for n in steps if "dcasgd(" not in n or n.endswith(("xla", "pallas", "dcasgd())"))]
    if way == CALL:  # as many arrays come and go as without the kernel, or in other forms
        names = [n for n in names if n != "JAX by hand" and not n.startswith(SLOW_KERNEL)]
    return {name: steps[name] for name in sorted(names, key=lambda name: name not in ALONE)}


def jax_programs(case: Case, pool: Any, left: Any, left_out: dict) -> dict[tuple, dict]:
    """All that compile, with what is known of them before they run."""
    grads = jax.block_until_ready(jax_gradients(case.shapes, case.dtype))
    programs: dict[tuple, dict] = {}
    compiling = {}
    for way in [way for way, count in ((CALL, case.calls), (LOOP, case.loop)) if count]:
        for name, (init, step) in contenders(case, way).items():
            if left() < RESERVE:
                left_out[label(case, way, name)] = "no time left"
                continue
            try:
                program = Program(init, step, case, way, grads)
                programs[way, name] = {"program": program}
                if len(case.shapes) > 1 and way == CALL and name in ALONE:
                    programs[way, name]["compile_s"] = program.compile()
                else:
                    compiling[way, name] = pool.submit(program.compile)
            except Exception as error:  # a kernel that does not run here, and whatever else
                programs.pop((way, name), None)
                left_out[label(case, way, name)] = why(error)
    for key, future in compiling.items():
        if error := future.exception():
            del programs[key]
            left_out[label(case, *key)] = why(error)
    for (way, name), entry in programs.items():
        program = entry.pop("program")
        entry |= {"turn": program.turn, "bytes": program.least_bytes}
        if name == COPY:
            entry["bytes"] = 2 * sum(x.nbytes for x in grads)
        try:
            entry |= program.properties()
        except Exception as error:  # of a compiler that writes its programs otherwise
            left_out[f"kernels and temporaries of {label(case, way, name)}"] = why(error)
    return programs


def label(case: Case, way: str, name: str) -> str:
    """What is left out."""
    return f"{name}, {case.title}, {way}"


def why(error: BaseException) -> str:
    """The first line of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


# --- PyTorch ---


def start_torch(left_out: dict) -> Worker | None:
    """Its process, or None where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        left_out["PyTorch"] = "not installed"
        return None
    try:
        return Worker(sys.executable, "torch")
    except SystemExit:
        left_out["PyTorch"] = "its process ended; the message stands above"
        return None


def torch_programs(case: Case, torch: Worker | None, left_out: dict) -> dict[tuple, dict]:
    """Its steps: a captured one in the place of a loop."""
    programs: dict[tuple, dict] = {}
    for name in torch.contenders if torch else ():
        way, count = (LOOP, case.loop) if "graph" in name else (CALL, case.calls)
        if not count or (len(case.shapes) == 1 and way == CALL):
            continue

        def turn(name: str = name, count: int = count) -> float:
            return torch.seconds_per_step(case.shapes, name, count, case.dtype)

        least = 5 * case.size * jnp.dtype(case.dtype).itemsize
        programs[way, name] = {"turn": turn, "bytes": least}
    if torch and not any("graph" in name for name in torch.contenders):
        left_out["PyTorch, CUDA graph"] = "no GPU"
    return programs


# --- All of it ---


def measure(
    case: Case, programs: dict[tuple, dict], rounds: int, left: Any, left_out: dict
) -> list:
    """Interleaves the turns; returns a row of figures for each."""
    seconds: dict[tuple, list[float]] = {key: [] for key in programs}
    order = random.Random(0)
    for done in range(rounds):
        for key in order.sample(list(seconds), len(seconds)):
            if left() < 0 and done:
                break
            try:
                seconds[key].append(programs[key]["turn"]())
            except (Exception, SystemExit) as error:
                del seconds[key]
                left_out[label(case, *key)] = why(error)
    rows = []
    for (way, name), times in sorted(seconds.items(), key=lambda item: item[0][0] == CALL):
        entry = {k: v for k, v in programs[way, name].items() if k not in ("turn", "bytes")}
        median, least = statistics.median(times), programs[way, name]["bytes"]
        base = seconds.get((way, BASELINE))
        rows.append(
            {"case": case.name, "dtype": case.dtype, "way": way, "contender": name}
            | {"median_ms": 1e3 * median, "min_ms": 1e3 * min(times), "max_ms": 1e3 * max(times)}
            | {"ratio": median / statistics.median(base) if base else None}
            | {"least_bytes": least, "GB_per_s": least / median / 1e9, "turns": len(times)}
            | entry
        )
    return rows


def table(result: dict) -> str:
    """The result as Markdown: tables for each way, a column for each case."""
    lines = [f"{result['machine']}; {'; '.join(result['software'])}"]
    if result["small"]:
        lines.append("Small sizes: these figures try the script and measure nothing.")
    copies = [row["GB_per_s"] for row in result["rows"] if row["contender"] == COPY]
    if copies:
        lines.append(f"A copy moves {copies[0]:,.0f} GB/s.")
    for way, one in ((LOOP, True), (LOOP, False), (CALL, False)):
        rows = [row for row in result["rows"] if row["way"] == way and row["contender"] != COPY]
        rows = [row for row in rows if row["case"].startswith("one array") == one]
        columns = list(dict.fromkeys((row["case"], row["dtype"]) for row in rows))
        if not rows:
            continue
        titles = " | ".join(f"{case}, {dtype}" for case, dtype in columns)
        lines += ["", f"{way[0].upper()}{way[1:]}, ms:", ""]
        lines += [f"| | {titles} |", "|---" * (1 + len(columns)) + "|"]
        for name in dict.fromkeys(row["contender"] for row in rows):
            found = {(r["case"], r["dtype"]): r for r in rows if r["contender"] == name}
            cells = [cell(found.get(column), copies, one=one) for column in columns]
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
    compiled = [
        f"{row['case']}, `{row['contender']}`: {row['compile_s']:.1f} s"
        for row in result["rows"]
        if "compile_s" in row
    ]
    if compiled:
        lines.append(f"\nXLA's compilation of one call: {'; '.join(compiled)}.")
    reasons: dict[str, list[str]] = {}
    for what, reason in result["left_out"].items():
        reasons.setdefault(reason, []).append(what)
    lines += [f"\nLeft out ({reason}): {'; '.join(names)}" for reason, names in reasons.items()]
    return "\n".join(lines)


def cell(row: dict | None, copies: list[float], *, one: bool) -> str:
    """Milliseconds; in a loop also the share of a copy's bandwidth; of many arrays the kernels."""
    if row is None:
        return "–"
    text = f"{row['median_ms']:.3f}"
    if row["way"] == LOOP:
        notes = [f"{row['GB_per_s'] / copies[0]:.0%}"] if copies else []
        notes += [f"{row['kernels']} kernels"] if row.get("kernels") and not one else []
        text += f" ({', '.join(notes)})" if notes else ""
    return text


def driver() -> str:
    """What nvidia-smi says of the driver, if it is there."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return (
            "driver "
            + subprocess.run(
                command, capture_output=True, text=True, timeout=10, check=True
            ).stdout.split("\n")[0]
        )
    except (OSError, subprocess.SubprocessError):
        return "no NVIDIA driver"


def main() -> None:
    """Measures, prints the tables, writes the JSON after each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--seconds", type=float, default=225, help="when to stop (default 225)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--out", type=pathlib.Path, help="where to write the figures, as JSON")
    args = parser.parse_args()
    begin = time.monotonic()

    def left() -> float:
        return args.seconds - (time.monotonic() - begin)

    left_out: dict[str, str] = {}
    pool = concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    worker = pool.submit(start_torch, left_out)
    device = jax.devices()[0]
    small = args.quick or device.platform != "gpu"
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/gpu.py", *sys.argv[1:]]),
        "machine": f"{device.device_kind}, {driver()}; {machine()}",
        "software": [f"JAX {jax.__version__}, Optax {optax.__version__}, {device.platform}"],
        "small": small,
        "rows": [],
        "left_out": left_out,
    }
    for case in cases(small):
        if left() < RESERVE:
            left_out[case.title] = "no time left"
            continue
        print(f"{left():.0f} s left: {case.title}", file=sys.stderr, flush=True)
        programs = jax_programs(case, pool, left, left_out)
        torch = worker.result()  # which takes as long to start as JAX to compile
        if torch and torch.description not in result["software"]:
            result["software"].append(torch.description)
        programs |= torch_programs(case, torch, left_out)
        rounds = 2 if small else args.rounds
        result["rows"] += measure(case, programs, rounds, left, left_out)
        write(args.out, result | {"seconds": time.monotonic() - begin})
    write(args.out, result | {"seconds": time.monotonic() - begin})  # and what was left out
    print(table(result))


def write(out: pathlib.Path | None, result: dict) -> None:
    """Writes the JSON, if it is asked for."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
