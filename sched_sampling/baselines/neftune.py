"""NEFTune (Jain et al. 2023, arXiv 2310.05914): supervised fine-tuning with uniform noise on the input embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import InvalidInput
from sched_sampling.baselines.supervised import SupervisedFineTuning


@dataclass(frozen=True, kw_only=True)
class NEFTune(SupervisedFineTuning):
    """Noise of size alpha / sqrt(L d) for lines of L tokens, filling included, with embeddings of size d."""

    alpha: float = 5.0

    def __post_init__(self) -> None:
        """Refuse noise without a size."""
        super().__post_init__()
        if not 0 <= self.alpha < math.inf:
            raise InvalidInput(f"alpha is the size of the noise, finite and at least 0; got {self.alpha}.")

    def around_training(self, model: Any) -> AbstractContextManager[object]:
        """Noise while a round trains; afterwards, also on an error, there is none."""
        return noisy_embeddings(model, self.alpha)


@contextmanager
def noisy_embeddings(model: Any, alpha: float) -> Iterator[None]:
    """Add Uniform(-1, 1) * alpha / sqrt(L d) to the input embeddings while the model is in training mode.

    The numbers come from torch's generator, which `TorchStep` seeds for every step and process.
    """

    def add_noise(module: nn.Module, inputs: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        if not module.training:
            return embedded
        size = alpha / math.sqrt(embedded.shape[-2] * embedded.shape[-1])
        return embedded + torch.empty_like(embedded).uniform_(-size, size)

    handle = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()
