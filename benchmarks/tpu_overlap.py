"""Whether the TPU compiler runs the gradients' all-reduce under the compute of a training step.

    pip install ".[tpu-compile]"
    python benchmarks/tpu_overlap.py

It needs no TPU: libtpu compiles a data-parallel step for all chips of a described topology, and the
compiled program says in which order a chip starts its operations. An all-reduce is under way from
where it starts to where the program waits for it; a blocking one is under way while nothing else
is. What is compared is the synchronous step (`jax.lax.pmean` of this step's gradients) with
`overlap_reduction`, each with the compiler's defaults and with the options of `OVERLAP`.

Cycles are the compiler's own estimates. That an operation is under way while another runs does not
say how much time it takes: that has to be measured on a TPU.
"""

import argparse
import functools
import json
import pathlib
import re
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tpu_compile import CHIPS, devices

from optax_dcasgd import OverlapReductionState, dcasgd, overlap_reduction

LAYERS, WIDTH, BATCH = 4, 4096, 1024  # of a perceptron in float32; the batch of each chip
# What it takes for an all-reduce to run under matrix products, found by trying. A v5e has no other
# way than to fuse the two; v5p and v6e have SparseCores, which reduce by themselves. On a v4 no
# option was found; there, and everywhere without options, a ring of permutes does it.
OVERLAP = {
    "v4": {},
    "v5e": {
        "xla_enable_async_all_reduce": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
    },
    "v5p": {"xla_tpu_enable_sparse_core_collective_offload_all_reduce": True},
    "v6e": {"xla_tpu_enable_sparse_core_collective_offload_all_reduce": True},
}


def ring_pmean(tree, axis_name):
    """`jax.lax.pmean` of arrays whose first axis the devices divide, made of permutes alone."""
    num, me = lax.axis_size(axis_name), lax.axis_index(axis_name)
    to_next = [(k, (k + 1) % num) for k in range(num)]

    def mean(x):
        chunks = x.reshape(num, -1, *x.shape[1:])

        def chunk(k):
            return lax.dynamic_index_in_dim(chunks, k % num, keepdims=False)

        moving = chunk(me - 1)
        for hop in range(num - 1):  # each chunk travels once around, and grows to the sum
            moving = lax.ppermute(moving, axis_name, to_next) + chunk(me - 2 - hop)
        moving = moving / num
        out = lax.dynamic_update_index_in_dim(chunks, moving, me, 0)
        for hop in range(num - 1):  # and once more, to be handed out
            moving = lax.ppermute(moving, axis_name, to_next)
            out = lax.dynamic_update_index_in_dim(out, moving, (me - 1 - hop) % num, 0)
        return out.reshape(x.shape)

    return jax.tree.map(mean, tree)


def loss(params, x):
    for kernel in params:
        x = jax.nn.relu(x @ kernel)
    return jnp.mean(jnp.square(x))


def synchronous(reduction):
    """The optimizer, the specs of its state, and the gradients it takes."""
    return optax.sgd(0.1, 0.9), P(), lambda grads: reduction(grads, "data")


def overlapped(reduction):
    tx = overlap_reduction(dcasgd(0.1, 0.9, 0.04, store="updates"), "data", reduction=reduction)
    return tx, OverlapReductionState(P(), P("data"), P()), lambda grads: grads


STEPS = {"synchronous": synchronous, "overlapped": overlapped}
REDUCTIONS = {"pmean": lax.pmean, "ring": ring_pmean}


def compile_step(chip: str, step: str, reduction: str, options: dict):
    """Compiles a donated training step on all chips of a topology."""
    mesh = Mesh(np.array(devices(chip)), ("data",))
    tx, specs, reduce = STEPS[step](REDUCTIONS[reduction])

    def train_step(params, state, batch):
        # check_vma=False: the gradients are local, and a ring's result counts as replicated.
        updates, state = tx.update(reduce(jax.grad(loss)(params, batch)), state, params)
        return optax.apply_updates(params, updates), state

    def place(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    shard_map = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    params = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * LAYERS
    state = jax.eval_shape(shard_map(tx.init, in_specs=P(), out_specs=specs), params)
    state = jax.tree.map(
        lambda spec, part: jax.tree.map(lambda x: place(x, spec), part),
        specs,
        state,
        is_leaf=lambda s: isinstance(s, P),
    )
    params = [place(p, P()) for p in params]
    batch = jax.ShapeDtypeStruct((mesh.size * BATCH, WIDTH), jnp.float32)
    step = shard_map(train_step, in_specs=(P(), specs, P("data")), out_specs=(P(), specs))
    return (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(params, state, place(batch, P("data")))
        .compile(compiler_options=options)
    )


# --- Reading a schedule ---

COLLECTIVES = {"all-reduce", "reduce-scatter", "all-gather", "collective-permute"}


def instructions(body: str):
    """The name, opcode, operands and line of each instruction of a computation."""
    for line in body.splitlines():
        found = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = .*? ([a-z][\w-]*)\((.*)$", line)
        if found:
            yield *found.groups(), line


def schedule(text: str) -> list[tuple[str, str, int]]:
    """What a chip does, in order: (event, name, estimated cycles).

    An event is a matrix product of the forward or the backward pass (``"forward"``,
    ``"backward"``), another fusion (``"other"``), a collective that blocks (``"blocking"``), or the
    ``"start"`` or ``"done"`` of one that does not, with the same name.
    """
    assert "is_scheduled=true" in text  # else the order of the text would mean nothing
    bodies = {
        "ENTRY" if entry else name: body
        for entry, name, body in re.findall(
            r"^(ENTRY )?%?([\w.-]+)[^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL
        )
    }

    def inside(line: str) -> set[str]:
        """The opcodes, and targets of custom calls, of all computations that a line calls."""
        found = set()
        for called in re.findall(r"calls=%?([\w.-]+)", line):
            for _, opcode, _, inner in instructions(bodies.get(called, "")):
                found |= {opcode, *re.findall(r'custom_call_target="(\w+)"', inner)}
                found |= inside(inner)
        return found

    events, started = [], {}  # started: from what a "done" refers to, to the collective's name

    def start(name: str) -> None:
        started[name] = name
        events.append(("start", name, 0))

    for name, opcode, operands, line in instructions(bodies["ENTRY"]):
        kinds = {opcode, *inside(line)}
        cycles = int((re.findall(r'"estimated_cycles":"(\d+)"', line) or ["0"])[0])
        of = (re.findall(r"%([\w.-]+)", operands) or [""])[0]
        if "AsyncCollectiveStart" in kinds:
            start(name)
        elif "AsyncCollectiveDone" in kinds:
            # Its operands have been through every fusion in between; these pairs do not overlap.
            (pending,) = started
            events.append(("done", started.pop(pending), 0))
        elif opcode == "custom-call-update" and "all-reduce" in name:
            start(name)  # on a SparseCore: the start takes no operand, the update does
        elif opcode.removesuffix("-start") in COLLECTIVES and opcode.endswith("-start"):
            start(name)
        elif opcode.endswith("-done") and of in started:
            events.append(("done", started.pop(of), 0))
        elif "convolution" in kinds:  # matrix products are convolutions here
            backward = "transpose(" in (re.findall(r'op_name="([^"]*)"', line) or [""])[0]
            events.append(("backward" if backward else "forward", name, cycles))
        elif kinds & COLLECTIVES:
            events.append(("blocking", name, cycles))
        elif cycles:
            events.append(("other", name, cycles))
    assert not started, started
    return events


def figures(events: list[tuple[str, str, int]]) -> dict:
    """How many collectives are under way during matrix products, and during how many of them."""
    under_way, during = {}, {}
    matmuls = {"forward": 0, "backward": 0}
    covered = {"forward": 0, "backward": 0}
    for event, name, _ in events:
        if event == "start":
            under_way[name] = during[name] = set()
        elif event == "done":
            del under_way[name]
        elif event in matmuls:
            matmuls[event] += 1
            covered[event] += bool(under_way)
            for passes in under_way.values():
                passes.add(event)
    blocking = sum(event == "blocking" for event, _, _ in events)
    return {
        "collectives": blocking + len(during),
        "blocking": blocking,
        "under_forward": sum("forward" in passes for passes in during.values()),
        "under_matmuls": sum(bool(passes) for passes in during.values()),
        "forward_matmuls": matmuls["forward"],
        "backward_matmuls": matmuls["backward"],
        "forward_matmuls_covered": covered["forward"],
        "backward_matmuls_covered": covered["backward"],
    }


def measure(chips) -> dict:
    """Compiles every step for every chip."""
    turns = []
    for chip in chips:
        options = [{}, OVERLAP[chip]] if OVERLAP[chip] else [{}]
        turns += [(chip, step, "pmean", o) for o in options for step in STEPS]
        turns += [(chip, step, "ring", {}) for step in STEPS]
    rows = []
    for done, turn in enumerate(turns):
        print(f"\r{done}/{len(turns)} {' '.join(map(str, turn))}\033[K", end="", file=sys.stderr)
        compiled = compile_step(*turn)
        events = schedule(compiled.as_text())
        rows.append(
            dict(zip(("chip", "step", "reduction", "options"), turn, strict=True))
            | {"devices": len(devices(turn[0]))}
            | figures(events)
            | {"temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}
            | {"schedule": [f"{event} {name}: {cycles} cycles" for event, name, cycles in events]}
        )
    print(file=sys.stderr)
    software = f"JAX {jax.__version__}, libtpu {version('libtpu')}"
    model = {"layers": LAYERS, "width": WIDTH, "batch_per_chip": BATCH, "dtype": "float32"}
    return {"software": software, "model": model, "rows": rows}


def table(result: dict) -> str:
    """One row a chip and way to compile, as Markdown."""
    lines = [result["software"], ""]
    columns = ["chip", "step", "mean by", "collectives", "of these blocking"]
    columns += ["under way in matrix products", "in the forward pass"]
    columns += ["forward products covered", "backward products covered"]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in result["rows"]:
        how = row["reduction"] + (" with options" if row["options"] else "")
        cells = [row["chip"], row["step"], how, row["collectives"], row["blocking"]]
        cells += [row["under_matmuls"], row["under_forward"]]
        cells += [
            f"{row[f'{half}_matmuls_covered']} of {row[f'{half}_matmuls']}"
            for half in ("forward", "backward")
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Compiles everything, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", choices=CHIPS, action="append", help="only this one (repeatable)")
    parser.add_argument("--out", type=pathlib.Path, help="where to write the figures, as JSON")
    args = parser.parse_args()
    result = measure(args.chip or CHIPS)
    print(table(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
