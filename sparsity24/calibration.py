"""Calibration data: random sequences of a text, and batches as the blocks take them, without padding (reference 3.5)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn

from core.errors import InvalidInput

# What a tokenizer or a processor returns, or token ids alone.
Batch = Tensor | Mapping[str, Tensor]

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


def excerpt(text: str, *, num_tokens: int, seed: int = 0) -> str:
    """A part of a long text, at a random place, about sixteen times as long as `num_tokens` tokens; a short one whole.

    Sequences are drawn from it. A shard of C4 holds hundreds of times what is drawn, and encoding it takes longer than
    pruning.
    """
    # English takes about four characters a token.
    length = 16 * 4 * num_tokens
    if len(text) <= length:
        return text
    start = int(torch.randint(len(text) - length + 1, (1,), generator=torch.Generator().manual_seed(seed)))
    return text[start : start + length]


def as_inputs(model: nn.Module, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """The batches as arguments of the model's body, padding taken off, so that every token that runs counts.

    Rows of unequal length become batches of equal length. Raises `InvalidInput` on empty calibration, on inputs the
    model does not take, and on an attention mask with holes.
    """
    body = getattr(model, "base_model", model)
    known = set(inspect.signature(body.forward).parameters) - {"labels", "kwargs", "args"}
    inputs = []
    for batch in batches:
        given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        tensors = {key: value for key, value in given.items() if isinstance(value, Tensor) and key in known}
        if not tensors:
            raise InvalidInput(
                f"A calibration batch is a (batch, sequence) tensor of token ids, or a mapping of what {type(body).__name__} "
                f"takes; got the keys {sorted(given)}."
            )
        for key in ("input_ids", "decoder_input_ids"):
            ids = tensors.get(key)
            if ids is not None and (ids.ndim != 2 or ids.is_floating_point()):
                raise InvalidInput(
                    f"`{key}` is a (batch, sequence) tensor of token ids; got {ids.dtype} of shape {tuple(ids.shape)}."
                )
        inputs += _without_padding(tensors)
    if not sum(next(iter(batch.values())).numel() for batch in inputs):
        raise InvalidInput("Calibration is empty, or all padding: give at least one batch with tokens.")
    return inputs


def _without_padding(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    masks = {key: value.bool() for key, value in batch.items() if key in ("attention_mask", "decoder_attention_mask")}
    others = {key: value for key, value in batch.items() if key not in masks}
    num_rows = max((len(value) for value in others.values()), default=0)
    # Positions may come once for all rows.
    others = {k: v.expand(num_rows, *v.shape[1:]) if len(v) == 1 < num_rows else v for k, v in others.items()}
    if all(bool(mask.all()) for mask in masks.values()):
        return [others] if next(iter(others.values())).numel() else []
    rows: dict[tuple[tuple[str, int, int], ...], list[int]] = {}
    for row in range(len(next(iter(others.values())))):
        spans = tuple((key, *_span(mask[row])) for key, mask in masks.items())
        if all(start < stop for _, start, stop in spans):
            rows.setdefault(spans, []).append(row)
    return [{key: _cut(key, value[own], spans, masks) for key, value in others.items()} for spans, own in rows.items()]


def _span(mask: Tensor) -> tuple[int, int]:
    places = mask.nonzero().flatten().tolist()
    if places and len(places) != places[-1] - places[0] + 1:
        raise InvalidInput("An attention mask of the calibration data has holes; padding may only be at the ends.")
    return (places[0], places[-1] + 1) if places else (0, 0)


def _cut(key: str, value: Tensor, spans: tuple[tuple[str, int, int], ...], masks: Mapping[str, Tensor]) -> Tensor:
    """The columns of the span of the mask that goes with `key`: the decoder's for what is the decoder's."""
    for name, start, stop in spans:
        own = key.startswith("decoder_") == name.startswith("decoder_")
        if own and value.ndim >= 2 and value.shape[1] == masks[name].shape[1]:
            return value[:, start:stop]
    return value
