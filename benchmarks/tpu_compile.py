"""What the TPU compiler makes of one optimizer step: bytes a parameter, temporaries, copies.

    pip install ".[tpu-compile]"
    python benchmarks/tpu_compile.py

It needs no TPU: libtpu compiles for a described topology. The figures are the compiler's own:
``bytes accessed`` of its cost analysis, the temporary memory of its memory analysis, and the
full-size copies in the compiled program. A kernel is a black box to the compiler: for it, the bytes
are those that it declares (each array it reads or writes, once), and the rest is the compiler's.
After that it prints the table of tpu_overlap.py, which runs by itself too: whether all-reduces run
under the compute of a data-parallel step, synchronous and overlapped.
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import re
import sys
from importlib.metadata import version

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for the TPU this machine has not
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

import optax_dcasgd

CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SHAPE = (4096, 4096)
DTYPES = ("float32", "bfloat16")
RULE = {"learning_rate": 0.1, "momentum": 0.9, "lamda": 0.04}


def sgd():
    """The baseline: a transformation and the addition of its updates."""
    tx = optax.sgd(0.1, 0.9)

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, step


def fused(**arguments):
    """A fused step of this library."""
    optimizer = optax_dcasgd.fused_dcasgd(**RULE | arguments)
    return optimizer.init, optimizer.step


def by_hand():
    """The step as one would write it without this library, its last parameters a bare copy."""

    def step(g, state, w):
        prev, mom = state
        mom = 0.9 * mom - 0.1 * (g + 0.04 * g * g * (w - prev))
        return w + mom, (w, mom)

    return lambda w: (jnp.copy(w), jnp.zeros_like(w)), step


ADAPTIVE = {"decay": 0.95, "clip": 1.0}
STEPS = {
    "optax.sgd(momentum)": sgd,
    "JAX by hand": by_hand,
    "fused_dcasgd()": fused,
    "fused_dcasgd(), pallas": lambda: fused(implementation="pallas"),
    "fused_dcasgd(store='updates')": lambda: fused(store="updates"),
    "fused_dcasgd(store='updates'), pallas": lambda: fused(
        store="updates", implementation="pallas"
    ),
    "fused_dcasgd(decay, clip)": lambda: fused(**ADAPTIVE),
    "fused_dcasgd(decay, clip), pallas": lambda: fused(**ADAPTIVE, implementation="pallas"),
}
# What a step returns; the last is the step's own signature, which takes the state first.
ORDERS = ("params, state", "state, params", "jit(step)")


def devices(chip: str):
    """The devices of a topology that is described and not there."""
    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices


def compile_for(chip: str, function, *args, **options):
    """Compiles a jitted function of arrays, given by their shapes and dtypes, for one chip."""
    device = devices(chip)[0]
    sharding = SingleDeviceSharding(device)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    mesh = Mesh(np.array([device]), ("chip",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # so that Pallas knows the chip
        return jax.jit(function, **options).lower(*args).compile()


def compile_step(chip: str, name: str, order: str, dtype):
    """Compiles a donated step on one array for one chip."""
    init, step = STEPS[name]()
    params = jax.ShapeDtypeStruct(SHAPE, dtype)
    state = jax.eval_shape(init, params)
    if order == "jit(step)":
        return compile_for(chip, step, params, state, params, donate_argnums=(1, 2))

    def train_step(params, state, grads):
        params, state = step(grads, state, params)
        return (params, state) if order == "params, state" else (state, params)

    return compile_for(chip, train_step, params, state, params, donate_argnums=(0, 1))


def full_size(text: str, operation: str, size: int) -> int:
    """How many operations of that kind in the compiled program have a result of at least `size`."""
    found = re.findall(rf"= \w+\[([\d,]*)\]\S* {operation}(?:-start)?\(", text)
    return sum(math.prod(int(n) for n in dims.split(",") if n) >= size for dims in found)


def figures(compiled, size: int) -> dict:
    """Bytes a parameter, full-size temporaries and copies of a compiled step."""
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return {
        "bytes_per_parameter": cost["bytes accessed"] / size,
        "temporaries": memory.temp_size_in_bytes / (4 * size),
        "copies": full_size(text, "copy", size),
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "aliased_bytes_per_parameter": memory.alias_size_in_bytes / size,
    }


def many_arrays(chips) -> list[dict]:
    """What the compiler makes of a step of 400 arrays, in the ordinary order."""
    from contenders import transformer_shapes  # here, as only a script finds its neighbours

    params = [jax.ShapeDtypeStruct(shape, "float32") for shape in transformer_shapes()]
    size = sum(x.size for x in params)
    rows = []
    names = [name for name in STEPS if name != "JAX by hand"]  # which is written for one array
    for chip, name in itertools.product(chips, names):
        init, step = STEPS[name]()
        compiled = compile_for(
            chip,
            lambda params, state, grads, step=step: step(grads, state, params),
            params,
            jax.eval_shape(init, params),
            params,
            donate_argnums=(0, 1),
        )
        found = figures(compiled, size)
        rows.append(
            {"chip": chip, "step": name}
            | {k: found[k] for k in ("bytes_per_parameter", "temporaries", "kernels")}
            | {"fusions": compiled.as_text().count(" fusion(")}
        )
    return rows


def many_arrays_table(result: dict) -> str:
    """Fusions or kernels, and bytes a parameter, for each chip, as Markdown."""
    chips = list(dict.fromkeys(row["chip"] for row in result["rows"]))
    lines = [result["software"], "", f"| fusions or kernels; bytes | {' | '.join(chips)} |"]
    lines += ["|---" * (1 + len(chips)) + "|"]
    for name in dict.fromkeys(row["step"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["step"] == name]
        cells = [f"{r['fusions'] + r['kernels']}; {r['bytes_per_parameter']:.0f}" for r in rows]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Compiles everything for every chip, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", choices=CHIPS, action="append", help="only this one (repeatable)")
    parser.add_argument("--many-arrays", action="store_true", help="400 arrays, and no more")
    parser.add_argument("--out", type=pathlib.Path, help="where to write the figures, as JSON")
    args = parser.parse_args()
    software = f"JAX {jax.__version__}, libtpu {version('libtpu')}"
    if args.many_arrays:
        result = {"software": software, "rows": many_arrays(args.chip or CHIPS)}
        print(many_arrays_table(result))
        write(args.out, result)
        return
    rows = []
    turns = list(itertools.product(args.chip or CHIPS, DTYPES, STEPS, ORDERS))
    for done, (chip, dtype, name, order) in enumerate(turns):
        print(
            f"\r{done}/{len(turns)} {chip} {dtype} {name}, {order}\033[K", end="", file=sys.stderr
        )
        compiled = compile_step(chip, name, order, dtype)
        row = {"chip": chip, "dtype": dtype, "step": name, "returned": order}
        rows.append(row | figures(compiled, math.prod(SHAPE)))
    print(file=sys.stderr)
    result = {"software": software, "rows": rows}
    print(table(result))
    # Here, as it takes this file's topologies.
    import tpu_overlap

    print(f"\n{tpu_overlap.table(tpu_overlap.measure(args.chip or CHIPS))}")
    write(args.out, result)


def write(out: pathlib.Path | None, result: dict) -> None:
    """Writes the JSON, if it is asked for."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


def table(result: dict) -> str:
    """Bytes a parameter, full-size temporaries and copies, over all chips, as Markdown."""
    lines = [result["software"] + ", " + ", ".join(sorted({r["chip"] for r in result["rows"]})), ""]
    cells = [f"{order}: {dtype}" for order in ORDERS for dtype in DTYPES]
    lines += ["| | " + " | ".join(cells) + " |", "|---" * (1 + len(cells)) + "|"]
    for name in STEPS:
        cells = []
        for order, dtype in itertools.product(ORDERS, DTYPES):
            key = {"step": name, "returned": order, "dtype": dtype}
            rows = [r for r in result["rows"] if key.items() <= r.items()]
            cell = _range(rows, "bytes_per_parameter", ".0f")
            for what in ("temporaries", "copies"):
                if max(r[what] for r in rows) >= 0.5:
                    cell += f"; {what}: {_range(rows, what, '.0f')}"
            cells.append(cell)
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _range(rows: list[dict], key: str, spec: str) -> str:
    low, high = (format(choose(r[key] for r in rows), spec) for choose in (min, max))
    return low if low == high else f"{low}–{high}"


if __name__ == "__main__":
    main()
