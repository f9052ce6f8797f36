"""Answers in the making on token ids: some tokens forced, the model choosing the others; and predictions in any context.

What the exposure metrics are made of (`sched_sampling.evaluation`). Prompts may have any lengths: a batch holds rows of like
length, filled up on the right, which decode together over one cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from core.llm.batching import length_buckets, pad_right, patiently
from core.llm.examples import EncodedPair
from core.llm.scoring import accepts, default_batch_tokens
from sched_sampling.engines import Batch, Proposal, sequential


@dataclass(frozen=True)
class Forced:
    """An answer to a pair's prompt: the model chooses where `open` is true, `tokens` holds what stands elsewhere."""

    pair: EncodedPair
    tokens: Sequence[int]
    open: NDArray[np.bool_]


def decode(
    model: Any, rows: Sequence[Forced], proposal: Proposal, *, max_batch_tokens: int | None = None
) -> list[tuple[int, ...]]:
    """The answers with their open positions drawn from left to right, each given all tokens before it."""
    results: list[tuple[int, ...]] = [()] * len(rows)
    sizes = [len(row.pair.prompt_ids) + len(row.tokens) for row in rows]
    batches = length_buckets(sizes, max_batch_tokens or default_batch_tokens(model))
    for batch in patiently(batches, f"Decoding {len(rows)} answers"):
        chosen = [rows[i] for i in batch]
        starts = [len(row.pair.prompt_ids) for row in chosen]
        ids = pad_right([[*row.pair.prompt_ids, *row.tokens] for row in chosen])
        opened = torch.zeros(ids.shape, dtype=torch.bool)
        for k, (row, start) in enumerate(zip(chosen, starts, strict=True)):
            opened[k, start : start + len(row.tokens)] = torch.from_numpy(row.open)
        device = model.device
        made = Batch(
            ids.to(device), opened.to(device), torch.tensor(starts, device=device), torch.tensor(batch, device=device)
        )
        sequential(model, made, proposal)
        found = made.ids.cpu().numpy()
        for k, i in enumerate(batch):
            results[i] = tuple(found[k, starts[k] : sizes[i]].tolist())
    return results


@torch.inference_mode()
def predict(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    contexts: Sequence[tuple[int, ...]],
    use: Callable[[int, Float[Tensor, "answer vocabulary"]], Any],
    *,
    max_batch_tokens: int | None = None,
) -> list[Any]:
    """`use(i, logits)` of every row, where logits[t] (float32) predict token t of the answer behind contexts[i][:t]."""
    results: list[Any] = [None] * len(prompts)
    sizes = [len(prompt) + len(context) - 1 for prompt, context in zip(prompts, contexts, strict=True)]
    batches = length_buckets(sizes, max_batch_tokens or default_batch_tokens(model))
    for batch in patiently(batches, f"Scoring {len(prompts)} answers"):
        ids = pad_right([[*prompts[i], *contexts[i][:-1]] for i in batch]).to(model.device)
        start = min(len(prompts[i]) for i in batch) - 1
        keep = {"logits_to_keep": ids.shape[1] - start} if accepts(model, "logits_to_keep") else {}
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **keep)
        logits = output.logits[:, start - ids.shape[1] :]
        for k, i in enumerate(batch):
            first = len(prompts[i]) - 1 - start
            results[i] = use(i, logits[k, first : first + len(contexts[i])].float())
    return results
