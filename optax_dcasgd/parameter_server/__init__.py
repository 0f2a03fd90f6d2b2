"""Real asynchronous training, on Ray (the extra ``ray``).

    result = parameter_server.train(
        grad_fn, params, tx, batches, num_workers=4, num_updates=10_000, checkpoint_dir="run"
    )

One server owns the parameters and applies every gradient with your own Optax optimizer; workers
compute them. With ``address=`` the same call trains on a cluster.
"""

from optax_dcasgd.parameter_server._history import Event, History, Result, Straggler
from optax_dcasgd.parameter_server._resize import resize
from optax_dcasgd.parameter_server._train import train

__all__ = ["Event", "History", "Result", "Straggler", "resize", "train"]
