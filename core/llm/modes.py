"""How torch works for the length of a `with` block: training or evaluation mode, and one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put the whole model into one mode for the `with` block; afterwards, also on an error, each module is as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for models so small that a second one only waits.

    Sums then come in one order on every machine; and on a busy one, threads that wait for each other after each tiny
    operation have been measured to take fifty times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
