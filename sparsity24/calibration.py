"""Calibration sequences: what the Grams are collected on (reference 3.5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from core.errors import InvalidInput

# About what a forward pass takes at once on a laptop without swapping.
_BATCH_TOKENS = 4096


def random_sequences(
    token_ids: Sequence[int] | Int[Tensor, " tokens"], *, num_sequences: int, window: int, seed: int = 0
) -> list[Int[Tensor, "batch window"]]:
    """Sequences of `window` tokens from random places of one long text, in batches of about 4,096 tokens.

    Documents are taken as joined, so a text of short ones is no trouble. Raises `InvalidInput` when the text is shorter
    than one sequence.
    """
    ids = torch.as_tensor(token_ids)
    if num_sequences < 1 or window < 1:
        raise InvalidInput(f"Calibration needs sequences of tokens; got {num_sequences} sequences of {window} tokens.")
    if len(ids) < window:
        raise InvalidInput(
            f"Calibration on {num_sequences} sequences of {window} tokens needs a text of at least {window} tokens; "
            f"this one has {len(ids)}. Use a shorter window or a longer text."
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - window + 1, (num_sequences,), generator=generator)
    sequences = torch.stack([ids[start : start + window] for start in starts.tolist()])
    return list(torch.split(sequences, max(1, _BATCH_TOKENS // window)))
