"""What a push costs on Ray, how much memory the server needs, and what faults cost.

    python benchmarks/parameter_server.py                 # all, about twelve minutes
    python benchmarks/parameter_server.py speed memory    # some: speed, memory, replay,
                                                          # worker_faults, server_faults
    python benchmarks/parameter_server.py local_steps --local-steps 1,4,16,64 --rounds 3

A push is compared with the plain loop: a server with the methods pull and push, and workers that
call one, compute, and call the other. All apply the same jitted update; rounds are interleaved and
medians compared. The loop runs on Ray as it comes, on Ray as `train` starts it, with an object
store that is cleared at once, and there once more with one call for a push and the next pull. The
figures are printed and, with --out, written to a JSON file, which keeps other measurements.
"""

import argparse
import collections
import contextlib
import copy
import itertools
import json
import os
import pathlib
import platform
import random
import re
import statistics
import tempfile
import threading
import time
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
import ray

from optax_dcasgd import (
    add_delay_compensation,
    dcasgd,
    local_updates,
    parameter_server,
    simulation,
)

TX = dcasgd(1e-4, 0.9, 2.0, store=None)


def no_op(params, batch, key):
    """A gradient that costs nothing: the parameters."""
    return jnp.zeros(()), params


class PlainServer:
    """The server of the plain loop."""

    def __init__(self, size):
        @jax.jit
        def update(params, state, grads, stale):
            updates, state = TX.update(grads, state, params, stale_params=stale)
            return optax.apply_updates(params, updates), state

        self.update, self.params, self.pulled = update, jnp.ones(size), {}
        self.state = TX.init(self.params)

    def pull(self, worker):
        self.pulled[worker] = self.params
        return np.asarray(self.params)

    def push(self, worker, grads):
        grads = jax.device_put(grads)
        stale = self.pulled[worker]
        self.params, self.state = self.update(self.params, self.state, grads, stale)
        self.params.block_until_ready()

    def push_and_pull(self, worker, grads):
        self.push(worker, grads)
        return self.pull(worker)


class PlainWorker:
    """A worker of the plain loop."""

    def __init__(self):
        self.gradient = jax.jit(lambda params: no_op(params, None, None)[1])

    def run(self, server, worker, num_pushes):
        for _ in range(num_pushes):
            params = jax.device_put(ray.get(server.pull.remote(worker)))
            grads = np.asarray(self.gradient(params))
            ray.get(server.push.remote(worker, grads))

    def run_in_one_call(self, server, worker, num_pushes):
        params = ray.get(server.pull.remote(worker))
        for _ in range(num_pushes):
            grads = np.asarray(self.gradient(jax.device_put(params)))
            params = ray.get(server.push_and_pull.remote(worker, grads))


RAY = {"address": "local", "num_cpus": 8, "include_dashboard": False, "log_to_driver": False}
CLEARED = {"_system_config": {"free_objects_period_milliseconds": 0}}


@contextlib.contextmanager
def started(**options):
    ray.init(**copy.deepcopy({**RAY, **options}))  # Ray adds to what it is given
    yield
    ray.shutdown()


def plain(size, num_workers, num_pushes, warm_up, in_one_call=False):
    """Seconds a push."""
    server = ray.remote(PlainServer).remote(size)
    workers = [ray.remote(PlainWorker).remote() for _ in range(num_workers)]

    def run(pushes):
        each = pushes // num_workers
        methods = [w.run_in_one_call if in_one_call else w.run for w in workers]
        ray.get([method.remote(server, i, each) for i, method in enumerate(methods)])

    run(warm_up)
    start = time.perf_counter()
    run(num_pushes)
    seconds = (time.perf_counter() - start) / num_pushes
    for actor in [server, *workers]:
        ray.kill(actor)
    return seconds


def ours(size, num_workers, num_pushes, warm_up, grad_fn=no_op):
    """Seconds a push, by the server's own record."""
    result = parameter_server.train(
        grad_fn, jnp.ones(size), TX, lambda i: (),
        num_workers=num_workers, num_updates=num_pushes + warm_up, progress=False,
    )  # fmt: skip
    seconds = result.history.time[warm_up:]
    return (seconds[-1] - seconds[0]) / (num_pushes - 1)


def measure_speed(rounds):
    cases = {
        "16.8 M parameters, 2 workers": (16_800_000, 2, 60, 20),
        "1,000 parameters, 4 workers": (1_000, 4, 2_000, 400),
    }
    report = {}
    for name, case in cases.items():
        names = [
            "plain loop",
            "plain loop, store cleared at once",
            "plain loop in one call, store cleared at once",
            "train",
        ]
        times = {name: [] for name in names}
        for _ in range(rounds):
            with started():
                times[names[0]].append(1e3 * plain(*case))
            with started(**CLEARED):
                times[names[1]].append(1e3 * plain(*case))
            with started(**CLEARED):
                times[names[2]].append(1e3 * plain(*case, in_one_call=True))
            times["train"].append(1e3 * ours(*case))
        report[name] = {
            "milliseconds a push": {k: statistics.median(v) for k, v in times.items()},
            "rounds": times,
            "ratio": {
                k: statistics.median(a / b for a, b in zip(v, times["train"], strict=True))
                for k, v in times.items()
            },
        }
    return report


def measure_local_steps(rounds, steps, size):
    """Gradients a second where a push carries H of them, with two workers.

    Once as if the steps cost nothing, which is what the messages alone allow; and once with steps
    of SGD, whose gradient costs nothing: each reads and writes all parameters, and their sum.
    """
    times = {}
    for _ in range(rounds):
        with started():
            times.setdefault("plain loop", []).append(plain(size, 2, 60, 20))
        for h in steps:
            times.setdefault(f"H={h}, steps that cost nothing", []).append(ours(size, 2, 60, 20))
            grad_fn = local_updates(no_op, optax.sgd(1e-6), h)
            pushes = max(12, 60 // h)
            times.setdefault(f"H={h}, steps of SGD", []).append(
                ours(size, 2, pushes, pushes // 3, grad_fn)
            )
    report = {}
    for name, seconds in times.items():
        h = int(name.partition(",")[0][2:]) if name.startswith("H=") else 1
        median = statistics.median(seconds)
        report[name] = {
            "milliseconds a push": 1e3 * median,
            "gradients a second": h / median,
            "bytes a gradient, pull and push": 2 * 4 * size / h,
            "rounds": seconds,
        }
    return {"parameters": size, "workers": 2, **report}


class Process(typing.NamedTuple):
    """One of Ray's actors."""

    name: str
    process: psutil.Process


def processes():
    named = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may just have ended
            named.append(Process(" ".join(process.cmdline()), process))
    return [p for p in named if p.name.startswith("ray::")]


def watched(size, num_updates):
    """Bytes of the server's own memory and of the object store, while it trains."""
    samples, done = [], threading.Event()

    def watch():
        total = ray.cluster_resources()["object_store_memory"]
        while not done.wait(0.25):
            for server in [p.process for p in processes() if "Server" in p.name]:
                used = total - ray.available_resources().get("object_store_memory", total)
                try:
                    samples.append((server.memory_full_info().uss, used))
                except psutil.Error:
                    continue

    thread = threading.Thread(target=watch)
    thread.start()
    parameter_server.train(
        no_op, jnp.ones(size), TX, lambda i: (),
        num_workers=4, num_updates=num_updates, progress=False,
    )  # fmt: skip
    done.set()
    thread.join()
    return np.array(samples, float)


def measure_memory():
    size, num_updates = 4_000_000, 2_200
    nothing = np.median(watched(1, 8_000)[:, 0])
    samples = (watched(size, num_updates) - [nothing, 0]) / (4 * size)
    quarters = np.array_split(samples, 4)
    return {
        "unit": "copies of the parameters (16 MB)",
        "parameters and optimizer state": 2,
        "pushes": num_updates,
        "workers, all of which pull every version they push to": 4,
        "server's own memory over that of one with one parameter": {
            "second quarter": float(np.median(quarters[1][:, 0])),
            "last quarter": float(np.median(quarters[3][:, 0])),
        },
        "object store: versions, and gradients on their way": {
            "second quarter": float(np.median(quarters[1][:, 1])),
            "last quarter": float(np.median(quarters[3][:, 1])),
            "most": float(samples[len(samples) // 4 :, 1].max()),
        },
    }


def problem():
    """Digits and a perceptron: the gradient, parameters, batches, and the test accuracy."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = [64, 64, 64, 10]
    params = {
        f"layer {i}": {
            "w": jax.random.normal(keys[i], (a, b)) * (2 / a) ** 0.5, "b": jnp.zeros(b)
        }
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    }  # fmt: skip

    def logits(params, x):
        for layer in list(params.values())[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return x @ params["layer 2"]["w"] + params["layer 2"]["b"]

    def loss(params, batch, key):
        return optax.softmax_cross_entropy_with_integer_labels(
            logits(params, batch[0]), batch[1]
        ).mean()

    index = np.random.default_rng(1).integers(0, 1437, (20_000, 32))
    accuracy = jax.jit(lambda p: (logits(p, x[1437:]).argmax(-1) == y[1437:]).mean())
    return jax.value_and_grad(loss), params, (x, y, index), accuracy


DC = optax.chain(add_delay_compensation(), optax.sgd(0.02, momentum=0.9))


def train_digits(num_updates, pause, **options):
    loss_and_grad, params, (x, y, index), accuracy = problem()

    def batches(i):
        time.sleep(pause)
        return x[index[i]], y[index[i]]

    start = time.perf_counter()
    result = parameter_server.train(
        loss_and_grad, params, DC, batches,
        num_workers=4, num_updates=num_updates, progress=False, **options,
    )  # fmt: skip
    used = result.history.batch
    return result, {
        "seconds": time.perf_counter() - start,
        "updates": len(used),
        "test accuracy": float(accuracy(result.params)),
        "batches applied twice": int(len(used) - len(np.unique(used))),
        "events": dict(collections.Counter(event.kind for event in result.events)),
    }


def measure_replay():
    result, report = train_digits(600, 0.002)
    loss_and_grad, params, (x, y, index), _ = problem()
    x, y, index = map(jnp.asarray, (x, y, index))
    replayed = simulation.run(
        loss_and_grad, params, DC, lambda i: (x[index[i]], y[index[i]]), result.arrivals
    )
    differences = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), result.params, replayed.params
    )
    return {
        **report,
        "largest staleness": int(result.history.staleness.max()),
        "largest relative difference of the replayed parameters": max(jax.tree.leaves(differences)),
    }


def kill_again_and_again(kind, every, times, begin=lambda: True):
    """Kills one of the processes, chosen at random, every so many seconds; returns a thread."""

    def kill():
        draw = random.Random(0)
        for _ in range(times):
            while not begin():
                time.sleep(0.1)
            time.sleep(every)
            found = [p for p in processes() if kind in p.name]
            with contextlib.suppress(psutil.NoSuchProcess):  # it may just have ended
                if found:
                    draw.choice(found).process.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def measure_worker_faults():
    report = {"undisturbed": train_digits(6_000, 0.03)[1]}
    # Those that compute: on a busy machine a worker may take longer than 2 s to start.
    thread = kill_again_and_again("ray::Worker.gradient", 2, 30)
    report["a worker killed every 2 s for 60 s"] = train_digits(6_000, 0.03)[1]
    thread.join()
    return report


def measure_server_faults():
    with tempfile.TemporaryDirectory() as directory:
        options = {"checkpoint_dir": directory, "checkpoint_every": 200}

        seen = set()

        def begin():  # a new checkpoint says that the server is there, and can be resumed from it
            new = {name for name in os.listdir(directory) if name.isdigit()} - seen
            seen.update(new)
            return bool(new)

        thread = kill_again_and_again("ray::Server", 12, 5, begin)
        result, of_server = train_digits(6_000, 0.03, **options)
        thread.join()
    lost, seconds = None, []
    for event in result.events:
        if event.kind == "server lost":  # perhaps again, before it had resumed
            lost = event.time if lost is None else lost
        elif event.kind == "resumed":
            seconds.append(round(event.time - lost, 1))
            lost = None
    of_server["seconds until it was back"] = seconds
    of_server["messages"] = [
        event.message for event in result.events if event.kind in ("server lost", "resumed")
    ]
    return {"the server killed five times, checkpoints every 200 updates": of_server}


MEASUREMENTS = {
    "speed": measure_speed,
    "memory": measure_memory,
    "replay": measure_replay,
    "worker_faults": measure_worker_faults,
    "server_faults": measure_server_faults,
}


def cpu_model():
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text()):
            return found[1]
    return platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*MEASUREMENTS, "local_steps"]
    parser.add_argument("what", nargs="*", choices=[[], *names], default=[])
    parser.add_argument("--rounds", type=int, default=3, help="of the comparisons of speed")
    parser.add_argument("--local-steps", default="1,4,16,64", help="H, with commas between")
    parser.add_argument("--size", type=int, default=16_800_000, help="parameters of local_steps")
    parser.add_argument("--out", type=pathlib.Path, help="where to write the JSON")
    args = parser.parse_args()
    report = {
        "machine": f"{os.cpu_count()} cores, {cpu_model()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__,
                     "ray": ray.__version__},
    }  # fmt: skip
    if args.out and args.out.exists():
        report = {**json.loads(args.out.read_text()), **report}
    loads = report.setdefault("load before", {})
    for name in args.what or names:
        loads[name] = os.getloadavg()[0]
        if name == "speed":
            report[name] = measure_speed(args.rounds)
        elif name == "local_steps":
            steps = [int(h) for h in args.local_steps.split(",")]
            report[name] = measure_local_steps(args.rounds, steps, args.size)
        else:
            with started(**CLEARED):
                report[name] = MEASUREMENTS[name]()
        print(json.dumps({name: report[name]}, indent=2), flush=True)
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
