"""Which process of a `torchrun` this is."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Processes:
    """This process's number, how many there are, and how to wait until all have come this far."""

    rank: int = 0
    world_size: int = 1
    wait: Callable[[], None] = lambda: None


def processes() -> Processes:
    """The processes that were started together; one when this one was started alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available())
    return Processes(state.process_index, state.num_processes, state.wait_for_everyone)
