"""One framework's optimizer steps, timed on request: the worker of ``update.py``.

It is started as ``python contenders.py jax|torch|mxnet`` by the interpreter of that framework's own
environment and speaks JSON lines: a request ``{"shapes", "dtype", "contender", "steps"}`` is
answered with the seconds a step took. So ``update.py`` can interleave frameworks that cannot be
installed together. Every request gets new arrays: where memory happens to lie changes the time of
one and the same program by up to 8 %.
"""

import functools
import json
import sys
import time

LEARNING_RATE, MOMENTUM, LAMDA = 0.1, 0.9, 0.04


def resnet50_shapes():
    """The 161 parameter arrays of ResNet-50: 25.6 million parameters."""
    shapes = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convs = [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convs.append((4 * width, channels, 1, 1))
            for conv in convs:
                shapes += [conv, (conv[0],), (conv[0],)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def transformer_shapes():
    """400 arrays of a narrow, deep transformer: 6.7 million parameters."""
    d = 128
    layer = [(d,), (d,), (d, d), (d, d), (d, d), (d, d), (d,), (d,), (d, 4 * d), (4 * d,)]
    layer += [(4 * d, d), (d,)]
    return layer * 33 + [(1024, d), (256, d), (d,), (d,)]


CASES = {
    "one array of 16.8 M": lambda: [(1 << 24,)],
    "ResNet-50, 161 arrays": resnet50_shapes,
    "transformer, 400 arrays": transformer_shapes,
}


def jax_steps():
    """``(init, step)`` of each, by name; ``step(params, state, grads) -> (params, state)``."""
    import jax
    import jax.numpy as jnp
    import optax

    import optax_dcasgd

    def transformation(tx):
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return tx.init, step

    def fused(optimizer):
        return optimizer.init, lambda params, state, grads: optimizer.step(grads, state, params)

    def init_by_hand(params):
        return jax.tree.map(jnp.copy, params), jax.tree.map(jnp.zeros_like, params)

    def by_hand(params, state, grads):
        """What one would write without this library."""
        prev, mom = state

        def new_momentum(g, w, old, m):
            return MOMENTUM * m - LEARNING_RATE * (g + LAMDA * g * g * (w - old))

        mom = jax.tree.map(new_momentum, grads, params, prev, mom)
        return jax.tree.map(jnp.add, params, mom), (params, mom)

    arguments = (LEARNING_RATE, MOMENTUM, LAMDA)
    sgd, dcasgd = optax.sgd(LEARNING_RATE, MOMENTUM), optax_dcasgd.dcasgd(*arguments)
    steps = {"optax.sgd": transformation(sgd), "JAX by hand": (init_by_hand, by_hand)}
    for form, make, complete in (
        ("dcasgd", optax_dcasgd.dcasgd, transformation),
        ("fused_dcasgd", optax_dcasgd.fused_dcasgd, fused),
    ):
        for store, settings in (("store='updates'", {"store": "updates"}), ("", {})):
            for implementation, suffix in ((None, ""), ("xla", ", xla"), ("pallas", ", pallas")):
                optimizer = make(*arguments, implementation=implementation, **settings)
                steps[f"{form}({store}){suffix}"] = complete(optimizer)
    return steps | {
        "optax.flatten(optax.sgd)": transformation(optax.flatten(sgd)),
        "optax.flatten(dcasgd())": transformation(optax.flatten(dcasgd)),
    }


def jax_contenders():
    """Those of the steps that ``update.py`` times, compiled, parameters and state donated."""
    import jax
    import jax.numpy as jnp
    import optax

    import optax_dcasgd

    donating = functools.partial(jax.jit, donate_argnums=(0, 1))
    names = ["optax.sgd", "dcasgd(store='updates')", "dcasgd()"]
    names += ["fused_dcasgd(store='updates')", "fused_dcasgd()", "JAX by hand"]
    device = jax.devices()[0]
    if device.platform != "cpu":  # where there is a kernel
        names += ["fused_dcasgd(store='updates'), pallas", "fused_dcasgd(), pallas"]
    all_steps = jax_steps()
    steps = {name: (all_steps[name][0], donating(all_steps[name][1])) for name in names}

    # The step as it is, which takes the state before the parameters.
    optimizer = optax_dcasgd.fused_dcasgd(LEARNING_RATE, MOMENTUM, LAMDA)
    as_it_is = jax.jit(optimizer.step, donate_argnums=(1, 2))
    steps["fused_dcasgd(), state first"] = (
        optimizer.init,
        lambda params, state, grads: as_it_is(grads, state, params),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def copy(params, state, grads):
        """Not a step: what the memory can do. Reads one array and writes another."""
        del params
        return jax.tree.map(jnp.copy, grads), state

    if device.platform != "cpu":
        steps["copy of the gradients"] = lambda params: None, copy

    def start(shapes, contender, dtype):
        init, step = steps[contender]
        grads = jax_gradients(shapes, dtype)
        params = [jnp.ones(s, dtype) for s in shapes]
        held = [params, init(params)]

        def run(repeats):
            begin = time.perf_counter()
            for _ in range(repeats):
                held[:] = step(*held, grads)
            jax.block_until_ready(held)
            return (time.perf_counter() - begin) / repeats

        return run

    return list(steps), start, f"JAX {jax.__version__}, Optax {optax.__version__}, {device}"


def jax_gradients(shapes, dtype):
    """Small random gradients."""
    import jax

    keys = jax.random.split(jax.random.key(0), len(shapes))
    grads = [1e-3 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    return [g.astype(dtype) for g in grads]


def torch_contenders():
    """PyTorch's own SGD with momentum, which does less than DCASGD; by its fused kernel first."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    forms = {"torch.optim.SGD(fused=True)": {"fused": True}}
    if device.type == "cuda":
        forms["torch.optim.SGD(foreach=True)"] = {"foreach": True}
    names = list(forms)
    if device.type == "cuda":
        names += [f"{name}, CUDA graph" for name in forms]

    def start(shapes, contender, dtype):
        dtype = getattr(torch, dtype)
        params = [torch.nn.Parameter(torch.ones(s, device=device, dtype=dtype)) for s in shapes]
        for p in params:
            p.grad = 1e-3 * torch.randn(p.shape, device=device, dtype=dtype)
        name, _, captured = contender.partition(", ")
        optimizer = torch.optim.SGD(params, LEARNING_RATE, MOMENTUM, **forms[name])
        step = optimizer.step
        if captured:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # makes the momentum buffers
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            step = graph.replay

        def synchronize():
            if device.type == "cuda":
                torch.cuda.synchronize()

        def run(repeats):
            synchronize()
            begin = time.perf_counter()
            for _ in range(repeats):
                step()
            synchronize()
            return (time.perf_counter() - begin) / repeats

        return run

    where = torch.cuda.get_device_name() if device.type == "cuda" else device
    return names, start, f"PyTorch {torch.__version__}, {where}"


def mxnet_contenders():
    """The real DCASGD of MXNet."""
    import mxnet as mx

    def start(shapes, contender, dtype):
        del contender
        optimizer = mx.optimizer.DCASGD(LEARNING_RATE, MOMENTUM, LAMDA)
        params = [mx.nd.ones(s, dtype=dtype) for s in shapes]
        grads = [1e-3 * mx.nd.random.normal(shape=s, dtype=dtype) for s in shapes]
        indices = list(range(len(shapes)))
        states = [optimizer.create_state(i, p) for i, p in zip(indices, params, strict=True)]
        mx.nd.waitall()

        def run(repeats):
            begin = time.perf_counter()
            for _ in range(repeats):
                optimizer.update(indices, params, grads, states)
            mx.nd.waitall()
            return (time.perf_counter() - begin) / repeats

        return run

    return ["MXNet DCASGD"], start, f"MXNet {mx.__version__}, cpu"


FRAMEWORKS = {"jax": jax_contenders, "torch": torch_contenders, "mxnet": mxnet_contenders}


def main():
    """Answers requests until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a framework prints must not be an answer
    names, start, description = FRAMEWORKS[sys.argv[1]]()

    def answer(value):
        print(json.dumps(value), file=answers, flush=True)

    answer({"contenders": names, "description": description})
    for line in sys.stdin:
        request = json.loads(line)
        shapes = [tuple(shape) for shape in request["shapes"]]
        run = start(shapes, request["contender"], request["dtype"])
        run(2)  # compilation, first touch of the memory
        answer(run(request["steps"]))
        del run


if __name__ == "__main__":
    main()
