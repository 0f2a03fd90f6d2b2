"""The faults that `check_mutations.py` puts into the package, and the test that catches each.

Faults 1 to 10 are those of earlier DCASGD implementations; the others are those that the seam
between rules and sources makes possible.
"""

from typing import NamedTuple

PAPER = "rules/test_paper.py::test_algorithm_2_with_random_arrivals"
CHAIN = "rules/test_paper.py::test_algorithm_2_as_a_link_of_a_chain"
MXNET = "test_mxnet.py::test_every_step_is_that_of_mxnet"
NU = "test_dcasgd.py::test_nu_is_kept_in_float32_for_low_precision_parameters"
MATRIX = (
    "sources/test_matrix.py::test_a_rule_computes_the_same_whatever_supplies_the_stale_parameters"
)
OVERLAP = "sources/test_overlap.py"
MATRIX_OVERLAP = "sources/test_matrix.py::test_a_rule_computes_the_same_inside_overlap_reduction"


class Mutation(NamedTuple):
    """One way to make a fault: in `file`, replace `old`, which stands there once, by `new`."""

    fault: int
    name: str
    file: str
    old: str
    new: str
    tests: str  # a pytest node id below tests/: at least one test of it must fail


MUTATIONS = [
    Mutation(
        1,
        "the previous parameters are kept by reference, so that w − w_s is zero",
        "sources/_remember.py",
        "return jnp.where(count == 0, jnp.asarray(param, remembered.dtype), remembered)",
        "return jnp.asarray(param, remembered.dtype)",
        f"{MATRIX}[DC-ASGD-c-remember_params]",
    ),
    Mutation(
        1,
        "the same in dcasgd",
        "kernels/reference.py",
        "delta = jnp.where(fresh, 0, param.astype(dtype) - prev.astype(dtype))",
        "delta = jnp.zeros(param.shape, dtype)",
        f"{MXNET}[2-lamda_2]",
    ),
    Mutation(
        2,
        "a factor g is missing: λ·g·(w − w_s)",
        "_mathematics.py",
        "relative = scale(scale(delta, lamda), magnitude)",
        "relative = scale(delta, lamda)",
        f"{PAPER}[c-None]",
    ),
    Mutation(
        3,
        "the backups of workers start at zero",
        "sources/_remember.py",
        "lambda p: _trees.stack_copies(p, num_workers), params",
        "lambda p: 0 * _trees.stack_copies(p, num_workers), params",
        f"{PAPER}[c-None]",
    ),
    Mutation(
        4,
        "λ is fixed at 1",
        "_mathematics.py",
        'lamda, clip = hyperparams["lamda"], hyperparams["clip"]',
        'lamda, clip = 0 * hyperparams["lamda"] + 1, hyperparams["clip"]',
        f"{PAPER}[c-None]",
    ),
    Mutation(
        5,
        "ε stands outside the square root",
        "_mathematics.py",
        "lamda * lax.rsqrt(jnp.where(square == 0, 1, square))",
        'lamda / (jnp.sqrt(nu) + hyperparams["eps"])',
        f"{PAPER}[a without memory-None]",
    ),
    Mutation(
        5,
        "there is no square root",
        "_mathematics.py",
        "lamda * lax.rsqrt(jnp.where(square == 0, 1, square))",
        "lamda / square",
        f"{PAPER}[a-None]",
    ),
    Mutation(
        6,
        "the backup of another worker is looked up: that of the previous push",
        "sources/_remember.py",
        "_row(backup, worker), w)",
        "_row(backup, jnp.minimum(state.last_worker, num_workers - 1)), w)",
        f"{PAPER}[c-None]",
    ),
    Mutation(
        7,
        "weight decay stands on the wrong side of the square",
        "mxnet.py",
        "if version == 2:",
        "if version == 1:",
        f"{MXNET}[2-wd]",
    ),
    Mutation(
        8,
        "momentum cannot be used",
        "kernels/reference.py",
        'if numbers["momentum"] is not None and momentum is not None:',
        "if False:",
        f"{MXNET}[2-momentum_lamda_2]",
    ),
    Mutation(
        8,
        "momentum cannot be used with MXNet 1.x's rule",
        "mxnet.py",
        'else dcasgd(schedule, buffer, 0.0, store="updates")',
        "else optax.scale_by_learning_rate(schedule)",
        "test_mxnet.py::test_version_1_has_the_momentum_that_mxnet_1_fails_on[2-momentum_lamda_2]",
    ),
    Mutation(
        20,
        "num_update is counted from 0",
        "mxnet.py",
        "begin_num_update + 1 + count",
        "begin_num_update + count",
        f"{MXNET}[2-scheduler]",
    ),
    Mutation(
        21,
        "the gradient is clipped before it is rescaled",
        "mxnet.py",
        "prepare.append(optax.clip(_at_least_float32(clip_gradient)))",
        "prepare.insert(1, optax.clip(_at_least_float32(clip_gradient)))",
        f"{MXNET}[2-rescale_and_clip]",
    ),
    Mutation(
        22,
        "wd_mult is ignored",
        "mxnet.py",
        "[_add_decayed_weights(wd, wd_mult)]",
        "[_add_decayed_weights(wd, None)]",
        f"{MXNET}[2-multipliers]",
    ),
    Mutation(
        23,
        "the masters do not follow a parameter that something else wrote",
        "_mixed_precision.py",
        "return jnp.where(master.astype(param.dtype) == param, master, param.astype(master.dtype))",
        "return master",
        "test_master_weights.py::test_applied_updates_land_on_the_rounded_master_weights",
    ),
    Mutation(
        24,
        "a delayed gradient loses the parameters that the caller says",
        "sources/_delay.py",
        "jnp.asarray(at, history.dtype)",
        "jnp.asarray(param, history.dtype)",
        "test_arguments.py::test_delay_gradients_adds_up_stalenesses_and_hands_on_the_rest",
    ),
    Mutation(
        9,
        "a worker's backup is refreshed before its own update is applied",
        "sources/_remember.py",
        "        last_worker=worker,\n        prev_params=backups,",
        "        last_worker=jnp.full((), num_workers, jnp.int32),\n"
        "        prev_params=jax.tree.map(functools.partial(_fill_row, worker), backups, params),",
        f"{CHAIN}[c-None]",
    ),
    Mutation(
        10,
        "ν is kept in the parameter's low precision",
        "_trees.py",
        "        dtype = compute_dtype(p)",
        "        dtype = dtype_of(p)",
        NU,
    ),
    Mutation(
        10,
        "ν is cast down to the parameter's dtype after each update",
        "rules/_driver.py",
        "new_nu.astype(nu.dtype)",
        "new_nu.astype(_trees.dtype_of(param)).astype(nu.dtype)",
        NU,
    ),
    Mutation(
        11,
        "w_s is from memory, though the caller said where",
        "sources/_remember.py",
        "stale_params=found if stale_params is None else stale_params",
        "stale_params=found",
        f"{MATRIX}[DC-ASGD-c-remember_params inside delay_gradients]",
    ),
    Mutation(
        11,
        "w_s of a delayed gradient is where it is applied",
        "sources/_delay.py",
        "stale_params=due_at",
        "stale_params=params",
        f"{MATRIX}[DC-ASGD-c-delay_gradients, 2]",
    ),
    Mutation(
        11,
        "dcasgd prefers its own memory",
        "kernels/reference.py",
        "elif stale is not None:",
        "elif stale is not None and prev is None:",
        f"{PAPER}[a-0.9]",
    ),
    Mutation(
        12,
        "w − w_s is reversed",
        "rules/_driver.py",
        "jnp.asarray(param, dtype) - jnp.asarray(stale, dtype)",
        "jnp.asarray(stale, dtype) - jnp.asarray(param, dtype)",
        f"{CHAIN}[c-None]",
    ),
    Mutation(
        13,
        "the staleness of a worker's gradient is off by one",
        "sources/_remember.py",
        "state.count - state.pulled_at[worker]",
        "state.count - state.pulled_at[worker] + 1",
        f"{MATRIX}[scale_by_staleness-remember_params of workers]",
    ),
    Mutation(
        13,
        "the staleness of a gradient of the previous call is off by one",
        "sources/_remember.py",
        "jnp.minimum(state.count, 1)",
        "jnp.minimum(state.count, 2)",
        f"{MATRIX}[scale_by_staleness-remember_params]",
    ),
    Mutation(
        13,
        "the staleness of a delayed gradient is off by one",
        "sources/_delay.py",
        "_add_staleness(delay if uniform else delays, staleness)",
        "_add_staleness(delay if uniform else delays, staleness + 1)",
        f"{MATRIX}[scale_by_staleness-delay_gradients, 2]",
    ),
    Mutation(
        13,
        "the staleness of a gradient that was summed late is off by one",
        "sources/_overlap.py",
        "staleness=jax.tree.map(lambda age: age + 1, staleness)",
        "staleness=staleness",
        f"{MATRIX_OVERLAP}[the age itself-passed]",
    ),
    Mutation(
        14,
        "delay_gradients: a call with no gradient to apply reaches the inner state",
        "sources/_delay.py",
        "lambda new, old: jnp.where(state.count >= delay, new, old)",
        "lambda new, old: new",
        "sources/test_delay.py::test_until_the_history_is_full_the_inner_optimizer_is_left_alone",
    ),
    Mutation(
        14,
        "overlap_reduction: a call with no gradient to apply reaches the inner state",
        "sources/_overlap.py",
        "lambda new, old: jnp.where(started, new, old)",
        "lambda new, old: new",
        f"{OVERLAP}::test_an_inner_optimizer_with_a_count_of_its_own",
    ),
    Mutation(
        15,
        "units lie along the wrong axis",
        "rules/_robust.py",
        "kept = {axis % len(shape) for axis in axes}",
        "kept = {(axis + 1) % len(shape) for axis in axes}",
        "rules/test_unit_axes.py::test_units_are_the_same_in_every_layout",
    ),
    Mutation(
        15,
        "unit_axes is not read",
        "rules/_robust.py",
        "axes = None if callable(unit_axes) else unit_axes",
        "axes = None",
        "rules/test_unit_axes.py::test_units_are_the_same_in_every_layout",
    ),
    Mutation(
        16,
        "one worker is not told that its gradients are fresh",
        "sources/_remember.py",
        "if num_workers == 1:",
        "if False:",
        "sources/test_remember.py::test_one_worker_is_told_so_while_tracing",
    ),
    Mutation(
        17,
        "overlap_reduction hands stale_params over one update early",
        "sources/_overlap.py",
        'extra_args["stale_params"] = kept_params',
        'extra_args["stale_params"] = stale_params',
        f"{OVERLAP}::test_gradients_at_parameters_that_the_caller_says",
    ),
    Mutation(
        18,
        "scale_by_gap takes the way from the stale parameters for the last step",
        "rules/_gap.py",
        "jax.tree.map(observe, params, state.prev_params, state.nu)",
        "jax.tree.map(observe, params, stale_params, state.nu)",
        "rules/test_compensation.py::test_the_steps_of_the_gap_are_those_taken_and_not_those_from_the_stale_parameters",
    ),
    Mutation(
        19,
        "the pseudo-gradient of local steps points uphill",
        "_local_updates.py",
        "lambda p, s: -s.astype(p.dtype)",
        "lambda p, s: s.astype(p.dtype)",
        "test_local_updates.py::test_one_worker_that_adds_its_rounds_trains_as_without_rounds",
    ),
    Mutation(
        25,
        "stale parameters that are the live Variables of an nnx model go unnoticed",
        "_stale_params.py",
        'return bool(variables(passed["stale_params"]) & variables(model))',
        "return False",
        "test_live_params.py::test_live_variables_are_refused_and_copies_are_not[rule]",
    ),
]
