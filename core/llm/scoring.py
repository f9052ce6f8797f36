"""Token log-probabilities and perplexity of given text under a causal language model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from core.errors import InvalidInput
from core.llm.batching import length_buckets, pad_right, patiently
from core.metrics.language_modeling import perplexity as perplexity_of


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and how it was measured.

    `window_nll` holds the mean negative log-likelihood (natural logarithm) of the tokens scored in each window, and
    `num_tokens` says how many were scored in all. Windows overlap when `stride` is less than `window`.
    """

    value: float
    window_nll: NDArray[np.float64]
    num_tokens: int
    window: int
    stride: int


@dataclass(frozen=True)
class Scored:
    """A sequence of token ids, of which those from `first` on are scored."""

    token_ids: Sequence[int]
    first: int


@torch.no_grad()
def score(model: Any, sequences: Sequence[Scored], *, max_batch_tokens: int | None = None) -> list[Float[Tensor, " _"]]:
    """The log-probability of every scored token given all tokens before it, in the order of `sequences`, on the CPU.

    Sequences of like length share a forward pass; a batch is at most `max_batch_tokens` long, padding included. None
    is `default_batch_tokens`.
    """
    results: list[Tensor] = [torch.empty(0)] * len(sequences)
    wanted = [i for i, sequence in enumerate(sequences) if sequence.first < len(sequence.token_ids)]
    budget = max_batch_tokens or default_batch_tokens(model)
    batches = length_buckets([len(sequences[i].token_ids) for i in wanted], budget)
    for batch in patiently(batches, f"Scoring {len(wanted)} sequences"):
        chosen = [wanted[i] for i in batch]
        for i, log_probs in zip(chosen, _score_batch(model, [sequences[i] for i in chosen]), strict=True):
            results[i] = log_probs
    return results


def default_batch_tokens(model: Any) -> int:
    """How many tokens one forward pass may hold: float32 logits below half a gigabyte, and on a CPU little enough work.

    A CPU is busy with 2048 tokens, and larger batches only leave its caches (measured on two small models).
    """
    vocabulary = model.config.get_text_config().vocab_size
    return int(min(2048 if model.device.type == "cpu" else 16384, 2**27 // vocabulary))


def _score_batch(model: Any, batch: Sequence[Scored]) -> list[Tensor]:
    ids = pad_right([sequence.token_ids for sequence in batch]).to(model.device)
    # The logits that predict the first scored token sit one position before it.
    start = min(sequence.first for sequence in batch) - 1
    keep = {"logits_to_keep": ids.shape[1] - start} if accepts(model, "logits_to_keep") else {}
    # A mask of ones keeps the fast causal kernel and the warning about padding away; see `pad_right`.
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **keep).logits
    logits = logits[:, start - ids.shape[1] : -1].float()
    targets = ids[:, start + 1 :, None]
    log_probs = (logits.gather(-1, targets).squeeze(-1) - logits.logsumexp(-1)).cpu()
    return [
        row[sequence.first - 1 - start : len(sequence.token_ids) - 1 - start].clone()
        for row, sequence in zip(log_probs, batch, strict=True)
    ]


def accepts(model: Any, argument: str) -> bool:
    """Whether the `forward` of a transformers model, which may wear adapters of peft, has an argument of this name."""
    # peft's wrapper has other arguments of its own and passes on what it does not know.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in inspect.signature(inner.forward).parameters


def window_perplexity(
    model: Any,
    token_ids: Sequence[int],
    *,
    window: int,
    stride: int | None = None,
    max_windows: int | None = None,
    max_batch_tokens: int | None = None,
) -> Perplexity:
    """The perplexity of one long sequence, cut into windows.

    Without `stride`, as in the literature on WikiText-2 (sparsity24 reference, section 5): windows do not overlap, the
    tail that fills no window is dropped, and each window scores all its tokens but the first. With `stride < window`,
    windows begin every `stride` tokens up to the end of the text and each token but the very first is scored once, by
    the first window that holds it. Raises `InvalidInput` on impossible sizes or a text shorter than one window.
    """
    if window < 2 or (stride is not None and not 0 < stride < window) or (max_windows is not None and max_windows < 1):
        raise InvalidInput(
            "Perplexity needs window >= 2, 0 < stride < window (None for windows that do not overlap) and "
            f"max_windows >= 1; got window={window}, "
            f"stride={stride}, max_windows={max_windows}."
        )
    windows = _separate_windows(token_ids, window) if stride is None else _sliding_windows(token_ids, window, stride)
    windows = windows[:max_windows]
    if not windows:
        raise InvalidInput(
            f"The text has {len(token_ids)} tokens, too few for one window of {window}. Give more text or a smaller window."
        )
    log_probs = score(model, windows, max_batch_tokens=max_batch_tokens)
    return Perplexity(
        value=perplexity_of(-torch.cat(log_probs).double().numpy()),
        window_nll=np.array([-scores.double().mean().item() for scores in log_probs]),
        num_tokens=sum(map(len, log_probs)),
        window=window,
        stride=window if stride is None else stride,
    )


def _separate_windows(token_ids: Sequence[int], window: int) -> list[Scored]:
    starts = range(0, len(token_ids) - window + 1, window)
    return [Scored(token_ids[start : start + window], first=1) for start in starts]


def _sliding_windows(token_ids: Sequence[int], window: int, stride: int) -> list[Scored]:
    windows: list[Scored] = []
    scored = 1
    for start in range(0, len(token_ids), stride):
        end = min(start + window, len(token_ids))
        if end > scored:
            windows.append(Scored(token_ids[start:end], first=scored - start))
        scored = end
        if end == len(token_ids):
            break
    return windows
