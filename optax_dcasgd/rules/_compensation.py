"""`add_delay_compensation`: DC-ASGD-c and DC-ASGD-a."""

from typing import Any

import optax

from optax_dcasgd import _arguments
from optax_dcasgd._arguments import ScalarOrSchedule
from optax_dcasgd._mathematics import compensate
from optax_dcasgd.rules._driver import transformation


def add_delay_compensation(
    lamda: ScalarOrSchedule = 8.0,
    *,
    decay: ScalarOrSchedule | None = 0.95,
    eps: ScalarOrSchedule = 1e-7,
    clip: ScalarOrSchedule | None = 1.0,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Corrects a stale gradient to first order; put it before any Optax optimizer.

    For a gradient :math:`g` computed at :math:`w_s` and applied at :math:`w`,

    .. math::
      \tilde g = g + \lambda_t \odot g \odot g \odot (w - w_s), \qquad
      \lambda_t = \lambda_0 \;\text{(DC-ASGD-c)} \;\text{or}\;
      \lambda_0 / \sqrt{\nu_t + \varepsilon} \;\text{(DC-ASGD-a)}, \quad
      \nu_t = m\,\nu_{t-1} + (1 - m)\,g \odot g .

    :math:`w_s` is ``stale_params``, from a source around the whole chain (`remember_params`,
    `delay_gradients`, ...) or from who calls ``update``. Where λ is zero, or :math:`w = w_s`, the
    gradient passes bit for bit (but for its dtype: it is rounded to that of its parameter).

    The defaults are DC-ASGD-a that may not reverse a component, the setting of
    ``examples/train_flax.py``. The paper's DC-ASGD-c is ``decay=None, clip=None``, with a λ of its
    own.

    Args:
      lamda: :math:`\lambda_0 \ge 0`, a float or a schedule of this transformation's own count. The
        gradient of a mean over B samples makes :math:`g^2` about 1/B of the Fisher diagonal, so the
        λ of DC-ASGD-c that fits grows with B.
      decay: :math:`m` in [0, 1) of DC-ASGD-a, or None for DC-ASGD-c. Or a schedule.
        (``optax.inject_hyperparams`` needs ``hyperparam_dtype=jnp.float32`` for bfloat16
        parameters: 0.999 is 1 in bfloat16, and a decay of 1 is refused.)
      eps: :math:`\varepsilon`, inside the square root. Only DC-ASGD-a uses it. Or a schedule.
      clip: None, or the largest :math:`|\tilde g - g| / |g|` of a component; 1 keeps the sign of
        the gradient. Or a schedule.
      accumulator_dtype: The dtype of :math:`\nu`; by default float32 or that of the parameter,
        whichever is wider.

    Returns:
      A transformation with state `RuleState` whose updates have the dtype of their parameter.
      ``update`` needs ``stale_params``, a tree like the parameters, and ignores other extra
      arguments. Of a Flax nnx model it is a copy, ``jax.tree.map(jnp.copy, nnx.state(model,
      nnx.Param))``: ``nnx.state`` alone follows the model, and is refused (``docs/libraries.md``).
      A parameter without a gradient (``None``) gets no update.

    Raises:
      ValueError: If an argument is out of range; in ``update``, if ``params`` or ``stale_params``
        is missing, a tree does not fit ``params`` (the message names the leaf), or both hold the
        same nnx Variables.
      TypeError: If an argument has no legal type, or a parameter is an integer array.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_dcasgd import add_delay_compensation
      >>> tx = optax.chain(add_delay_compensation(0.5, decay=None), optax.sgd(0.1))
      >>> stale_params = {"w": jnp.array([1.0, -1.0])}
      >>> params = {"w": jnp.array([1.5, -1.5])}
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(stale_params)
      >>> updates, state = tx.update(grads, state, params, stale_params=stale_params)
      >>> print(updates["w"])  # here as if the gradient were fresh; stale it gives [-0.2  0.2]
      [-0.3  0.3]

    References:
      Zheng et al., `Asynchronous Stochastic Gradient Descent with Delay Compensation
      <https://arxiv.org/abs/1609.08326>`_, 2017: equations 10 and 14.
    """
    hyperparams = {"lamda": lamda, "decay": decay, "eps": eps, "clip": clip}
    _arguments.check_compensation(**hyperparams)
    return transformation(
        compensate,
        hyperparams,
        nu_like=None if decay is None else lambda params: params,
        accumulator_dtype=_arguments.check_accumulator_dtype(accumulator_dtype),
    )
