"""A donated step, or a loop of steps, as a compiled JAX program: its time, memory and kernels."""

import math
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LOOP, CALL = "inside a loop", "one call a step"


class Case(NamedTuple):
    """Arrays, and how many steps a turn takes in each way (0: not in this way)."""

    name: str
    shapes: list[tuple[int, ...]]
    dtype: str
    loop: int
    calls: int

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def title(self) -> str:
        """What it is called in messages and tables."""
        return f"{self.name}, {self.dtype}"


def repeat(step: Any, steps: int) -> Any:
    """A donated function of so many steps; of one, without a loop."""

    def run(params, state, grads):
        def body(i, carry):
            # So that nothing of the gradients, which are constant here, is computed only once.
            held, _ = jax.lax.optimization_barrier((grads, i))
            return step(*carry, held)

        if steps == 1:
            return step(params, state, grads)
        return jax.lax.fori_loop(0, steps, body, (params, state))

    return jax.jit(run, donate_argnums=(0, 1))


class Program:
    """A compiled step or loop, which can take its turn."""

    def __init__(self, init: Any, step: Any, case: Case, way: str, grads: list[jax.Array]):
        self._init, self._case, self._grads = init, case, grads
        self._steps = case.loop if way == LOOP else 1
        self._calls = 1 if way == LOOP else case.calls
        self._held: Any = None
        params = [jax.ShapeDtypeStruct(shape, case.dtype) for shape in case.shapes]
        state = jax.eval_shape(init, params)
        self._run = repeat(step, self._steps)
        self._lowered = self._run.lower(params, state, params)
        # Each array once; those of the step are read and written, all but the gradients.
        arrays = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state)) if x.ndim)
        self.least_bytes = 2 * arrays + sum(x.nbytes for x in grads)

    def compile(self) -> float:
        """Compiles it; returns the seconds that this took."""
        begin = time.perf_counter()
        self._compiled = self._lowered.compile()  # a call of the function finds it
        return time.perf_counter() - begin

    def properties(self) -> dict[str, Any]:
        """What the compiler says."""
        memory = self._compiled.memory_analysis()
        return {
            "temporary_bytes": memory.temp_size_in_bytes,
            "kernels": launches(self._compiled.as_text(), loop=self._steps > 1),
        }

    def turn(self) -> float:
        """The seconds of a step."""
        if self._held is None:
            params = [jnp.ones(x.shape, x.dtype) for x in self._grads]
            self._held = (params, self._init(params))
            self._held = self._run(*self._held, self._grads)  # first touch of the memory
            jax.block_until_ready(self._held)
        begin = time.perf_counter()
        for _ in range(self._calls):
            self._held = self._run(*self._held, self._grads)
        jax.block_until_ready(self._held)
        seconds = (time.perf_counter() - begin) / (self._calls * self._steps)
        if len(self._grads) == 1:  # large, and soon made again
            self._held = None
        return seconds


# --- What it runs, read from its text ---

# Operations that are no work of their own: they name, group or call.
FREE = {
    "after-all", "add-dependency", "async-done", "async-update", "bitcast", "call", "conditional",
    "constant", "copy-done", "get-tuple-element", "opt-barrier", "parameter", "tuple", "while",
}  # fmt: skip
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\(.*)?\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (?:\(.*?\)|\S+) ([a-z][\w-]*)\(")
_CALLED = re.compile(r"\b(?:to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


def computations(text: str) -> tuple[str, dict[str, list[tuple[str, str]]]]:
    """The name of the entry, and the operations of each computation with their lines."""
    entry, found, lines = "", {}, []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = found[header[2]] = []
            if header[1]:
                entry = header[2]
        elif operation := _OPERATION.match(line):
            lines.append((operation[1], line))
    return entry, found


def launches(text: str, *, loop: bool = False) -> int:
    """How many kernels and copies the program runs; of its first loop, if any, one round.

    Args:
      text: ``compiled.as_text()``.
      loop: Whether to count one round of the loop, without what stands around it.
    """
    entry, found = computations(text)
    start = entry
    if loop:
        bodies = [
            _CALLED.findall(line) for ops in found.values() for o, line in ops if o == "while"
        ]
        start = bodies[0][0]
    pending, count = [start], 0
    while pending:
        for operation, line in found[pending.pop()]:
            if operation in ("call", "while", "conditional"):
                pending += _CALLED.findall(line)
                for names in _BRANCHES.findall(line):
                    pending += [name.strip(" %") for name in names.split(",")]
            elif operation not in FREE and '"AllocateBuffer"' not in line:
                count += 1
    return count
