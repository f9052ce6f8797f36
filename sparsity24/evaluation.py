"""How good a language model is, dense or sparse (reference 5): the offline zero-shot proxy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.llm.causal import CausalLM


@dataclass(frozen=True)
class Cloze:
    """Per item: log-probability of the true choice after a softmax over the four, and whether it scored highest."""

    log_likelihood: NDArray[np.float64]
    correct: NDArray[np.bool_]


def cloze(
    lm: CausalLM, ids: Tensor, num_items: int, *, context: int = 32, choice: int = 8, other_context: int = 0
) -> Cloze:
    """The offline zero-shot proxy (reference section 5): which of four endings belongs to the context?

    Windows of 32 + 8 tokens in an order fixed by a seed; the choices are the window's own ending and those of the next
    three. The score of a choice is the sum of its log-probabilities; all have the same length. `other_context` takes each
    item's context from so many items on.
    """
    windows = ids[: len(ids) // (context + choice) * (context + choice)].view(-1, context + choice)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    windows = windows[order[: num_items + 3]]
    num_items = len(windows) - 3
    contexts = [windows[(i + other_context) % num_items, :context].tolist() for i in range(num_items) for _ in range(4)]
    endings = [windows[i + k, context:].tolist() for i in range(num_items) for k in range(4)]
    scores = torch.stack([log_probs.sum() for log_probs in lm.log_probs(contexts, endings)]).view(num_items, 4).double()
    return Cloze(scores.log_softmax(-1)[:, 0].numpy(), (scores.argmax(-1) == 0).numpy())
