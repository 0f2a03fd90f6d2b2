"""Checks of what users pass: each raises an error that names the argument and says what to do.

Only values known while tracing are checked. A traced hyperparameter (``optax.inject_hyperparams``,
``jax.vmap`` over learning rates) has no value yet and passes.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# A number, a traced or injected scalar, or a schedule: a function of the update count.
ScalarOrSchedule = float | jax.Array | Callable[[Any], Any]


def check_scalar(
    name: str,
    value: Any,
    *,
    minimum: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    optional: bool = False,
    schedule: bool = True,
) -> None:
    """Checks a hyperparameter: a finite number, at least ``minimum``, ``above`` and ``below``.

    ``None`` passes if it is ``optional``, and a function of the update count if ``schedule``.

    Raises:
      TypeError: If the value is no real scalar and no schedule.
      ValueError: If it is a number outside the range, or an array that is not 0-d. (Of JAX's arrays
        only a decay is read, and only where it is not traced.)
    """
    if (value is None and optional) or (schedule and callable(value)):
        return
    wanted = f"a number{' or None' if optional else ''}{', or a schedule' if schedule else ''}"
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        if value.ndim != 0:
            raise ValueError(f"{name} must be {wanted}; got an array of shape {value.shape}.")
        if not (
            jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
        ):
            raise TypeError(f"{name} must be {wanted}; got an array of dtype {value.dtype}.")
        is_known = not isinstance(value, jax.core.Tracer)
        if isinstance(value, jax.Array) and not (is_known and below < math.inf):
            return  # reading a value blocks; worth it for a decay, whose rounding may end at 1
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {wanted}; got {value!r}.")
    try:
        number = float(value)  # a comparison of JAX's arrays would be traced, here under jit
        legal = math.isfinite(number) and minimum <= number and above < number < below
    except OverflowError:  # an integer that no float can hold
        legal = False
    if not legal:
        bounds = [f"at least {minimum:g}"] if minimum > -math.inf else []
        bounds += [f"above {above:g}"] if above > -math.inf else []
        bounds += [f"below {below:g}"] if below < math.inf else []
        hint = (
            " Under optax.inject_hyperparams, which rounds to the dtype of the parameters, pass "
            "hyperparam_dtype=jnp.float32."
            if isinstance(value, jax.Array) and value.dtype.itemsize < 4
            else ""
        )
        raise ValueError(
            f"{name} must be {' and '.join(['finite', *bounds])}; got {value!r}.{hint}"
        )


def check_compensation(lamda: Any, decay: Any, eps: Any, clip: Any) -> None:
    """Checks the hyperparameters of `add_delay_compensation`, which `dcasgd` has too."""
    check_scalar("lamda", lamda, minimum=0.0)
    check_scalar("decay", decay, minimum=0.0, below=1.0, optional=True)
    check_scalar("eps", eps, minimum=0.0)
    check_scalar("clip", clip, minimum=0.0, optional=True)


def check_integer(name: str, value: Any, *, minimum: float = -math.inf) -> None:
    """Checks a number that shapes the state, so that it has to be a Python integer.

    Raises:
      TypeError: If it is not a Python or NumPy integer.
      ValueError: If it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        hint = (
            f' Under optax.inject_hyperparams, list it: static_args=("{name}",).'
            if isinstance(value, jax.Array) and name.isidentifier()  # no field of something
            else ""
        )
        raise TypeError(f"{name} must be a Python integer; got {value!r}.{hint}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}.")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if not any(
        value is choice or (type(value) is type(choice) and value == choice) for choice in choices
    ):
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}; got {value!r}.")


def check_accumulator_dtype(accumulator_dtype: Any) -> Any:
    """Returns the dtype as JAX will hold it (``None`` stays ``None``).

    Raises:
      TypeError: If it is no real floating-point dtype. Complex parameters get the complex
        counterpart of it by themselves.
    """
    if accumulator_dtype is None:
        return None
    try:
        dtype = jax.dtypes.canonicalize_dtype(accumulator_dtype)
    except TypeError as error:
        hint = (
            " Under optax.inject_hyperparams, which takes a dtype class for a schedule, list it: "
            'static_args=("accumulator_dtype",).'
            if isinstance(accumulator_dtype, jax.Array)
            else ""
        )
        raise TypeError(
            f"accumulator_dtype must be a dtype; got {accumulator_dtype!r}.{hint}"
        ) from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"accumulator_dtype must be a floating-point dtype such as jnp.bfloat16; got {dtype}."
        )
    return dtype


def check_worker(worker: Any, num_workers: int) -> jax.Array:
    """Returns the worker index as an int32 scalar, clamped where its value cannot be checked.

    Raises:
      TypeError: If it is not an integer scalar.
      ValueError: If it is a concrete Python or NumPy integer outside ``[0, num_workers)``.
    """
    is_array = isinstance(worker, jax.Array | np.ndarray | np.generic | int)
    if (
        not is_array
        or jnp.shape(worker) != ()
        or not jnp.issubdtype(jnp.result_type(worker), jnp.integer)
    ):
        kind = f"shape {jnp.shape(worker)}, dtype {jnp.result_type(worker)}" if is_array else worker
        raise TypeError(
            f"worker must be one integer, the index of the worker whose gradient this is; "
            f"got {kind!r}."
        )
    if isinstance(worker, int | np.integer | np.ndarray) and not 0 <= worker < num_workers:
        raise ValueError(
            f"worker must be at least 0 and below num_workers={num_workers}; got {worker}."
        )
    return jnp.clip(jnp.asarray(worker, jnp.int32), 0, num_workers - 1)


def check_transformation(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` has the methods of an ``optax.GradientTransformation``."""
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        raise TypeError(f"{name} must be an optax.GradientTransformation; got {value!r}.")


def check_callable(name: str, value: Any, signature: str) -> None:
    """Raises TypeError unless ``value`` can be called; ``signature`` says how it will be."""
    if not callable(value):
        raise TypeError(f"{name} must be a function {signature}; got {value!r}.")


def check_key(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is one JAX random key, typed or of two uint32."""
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        is_key = jnp.shape(value) == ()
    else:
        is_key = dtype == jnp.uint32 and jnp.ndim(value) == 1
    if not is_key:
        raise TypeError(
            f"{name} must be one JAX random key, like jax.random.key(0); got {value!r}."
        )
