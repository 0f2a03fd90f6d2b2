"""Made-up cells of examples/compare_async.py."""

import numpy as np


def cell(script, workers, method, momentum, rate, test, validation=None, loss=None):
    test = np.array(test, float)
    validation = test if validation is None else np.array(validation, float)
    loss = np.full((len(test), 2), 1.0) if loss is None else np.array(loss, float)
    return script.Cell(
        workers, method, momentum, rate, np.array([25, 50]), np.tile([10.0, 20.0], (len(test), 1)),
        loss, np.stack([validation] * 2, 1), np.stack([test] * 2, 1),
    )  # fmt: skip
