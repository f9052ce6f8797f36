"""Training on any engine under one loop: progress bar, evaluation, early stopping, hooks, exact resume.

    from core.training import Batches, fit
    from core.training.torch import TorchStep

    step = TorchStep(model, loss=lambda model, batch: model(**batch).loss, learning_rate=3e-3, num_steps=400)
    history = fit(step, fetch, Batches(num_items=5000, batch_size=16, seed=0), num_steps=400, checkpoint_dir="run",
                  checkpoint_every=100)

`fetch(indices)` makes a batch of the items at `indices`; `core.training.jax.JaxStep` is the same for jax. Start the
script with `torchrun` to use many processes. Importing this package imports neither torch nor jax.
"""

from __future__ import annotations

from core.training.hooks import MetricsFile, tensorboard
from core.training.loop import Batches, EarlyStop, Event, History, Hook, Moment, Step, TrainingDiverged, fit

__all__ = [
    "Batches",
    "EarlyStop",
    "Event",
    "History",
    "Hook",
    "MetricsFile",
    "Moment",
    "Step",
    "TrainingDiverged",
    "fit",
    "tensorboard",
]
