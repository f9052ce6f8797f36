"""Demonstrations as token ids: a prompt, the answer that is to be learned, and batches of such rows.

A row has `input_ids` and `labels`, as every trainer of transformers takes them: labels are -100 where nothing is to be
learned, and they are not shifted, because the models shift them. Labels are made from lengths, never from token ids, so that a
padding token which is also the end token hides no end.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.errors import InvalidInput
from core.llm.causal import encode

IGNORED = -100


@dataclass(frozen=True)
class EncodedPair:
    """A prompt and its answer as token ids; the answer ends with an end token where the task has one."""

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]


def encode_pairs(
    tokenizer: Any,
    pairs: Iterable[Mapping[str, Any] | EncodedPair],
    *,
    max_length: int | None = None,
    end_ids: Collection[int] = (),
) -> list[EncodedPair]:
    """Encode dictionaries with `prompt` and `completion`, both texts or both messages, in their order.

    A text prompt is encoded as the tokenizer's default has it, its completion by itself without special tokens, and the end
    token comes behind. Messages go through the chat template: the completion is what the template writes behind the
    prompt, up to its last end token (the tokenizer's, or one of `end_ids`). `EncodedPair`s pass through as they are.

    Raises `InvalidInput`, naming the row, on an empty prompt or completion, a tokenizer without an end token or without a
    chat template for messages, and a pair of more than `max_length` tokens.
    """
    encoded = []
    for row, pair in enumerate(pairs):
        found = pair if isinstance(pair, EncodedPair) else _encode(tokenizer, pair, row, end_ids)
        if not found.prompt_ids or not found.target_ids:
            what = "prompt" if not found.prompt_ids else "completion"
            raise InvalidInput(f"Row {row} has an empty {what}. Leave the row out, or fill it.")
        length = len(found.prompt_ids) + len(found.target_ids)
        if max_length is not None and length > max_length:
            raise InvalidInput(
                f"Row {row} has {length} tokens ({len(found.prompt_ids)} of them the prompt); the model reads at most "
                f"{max_length}. Shorten it, or leave the row out."
            )
        encoded.append(found)
    return encoded


def supervised_row(pair: EncodedPair) -> dict[str, list[int]]:
    """The row of plain supervised fine-tuning: nothing is learned on the prompt, everything on the answer."""
    return {
        "input_ids": [*pair.prompt_ids, *pair.target_ids],
        "labels": [IGNORED] * len(pair.prompt_ids) + list(pair.target_ids),
    }


def collate(rows: Sequence[Mapping[str, Any]], *, packing: bool = False) -> dict[str, Tensor]:
    """Rows as tensors `input_ids`, `labels` and `position_ids`, filled up at the end; packed, several rows share a line.

    A causal model never looks ahead, so filling needs neither a mask nor a padding token. Packing puts rows into lines as
    long as the longest row, the longest first and each where it fits; positions begin at 0 again with every row, which is
    how transformers knows that rows may not see each other (`attention_mask` must not be given).
    """
    lines = _packed([len(row["input_ids"]) for row in rows]) if packing else [[i] for i in range(len(rows))]
    width = max(sum(len(rows[i]["input_ids"]) for i in line) for line in lines)
    batch = {
        "input_ids": torch.zeros(len(lines), width, dtype=torch.long),
        "labels": torch.full((len(lines), width), IGNORED),
        "position_ids": torch.arange(width).repeat(len(lines), 1),
    }
    for number, line in enumerate(lines):
        start = 0
        for i in line:
            end = start + len(rows[i]["input_ids"])
            batch["input_ids"][number, start:end] = torch.tensor(rows[i]["input_ids"])
            batch["labels"][number, start:end] = torch.tensor(rows[i]["labels"])
            batch["position_ids"][number, start:] = torch.arange(width - start)
            start = end
        # The filling of a packed line begins a row of its own.
        if packing and start < width:
            batch["position_ids"][number, start:] = torch.arange(width - start)
    return batch


def _packed(lengths: Sequence[int]) -> list[list[int]]:
    """First-fit decreasing."""
    capacity = max(lengths)
    lines: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for number, left in enumerate(room):
            if lengths[i] <= left:
                lines[number].append(i)
                room[number] -= lengths[i]
                break
        else:
            lines.append([i])
            room.append(capacity - lengths[i])
    return lines


def _encode(tokenizer: Any, pair: Mapping[str, Any], row: int, end_ids: Collection[int]) -> EncodedPair:
    prompt, completion = pair["prompt"], pair["completion"]
    if tokenizer is None:
        raise InvalidInput(f"Row {row} is text and needs a tokenizer.")
    if tokenizer.eos_token_id is None:
        raise InvalidInput("This tokenizer has no end token, so that no model could learn to stop; set its eos_token.")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            return EncodedPair(tuple(encode(tokenizer, prompt)), ())
        answer = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
        return EncodedPair(tuple(encode(tokenizer, prompt)), (*answer, tokenizer.eos_token_id))
    if isinstance(prompt, str) or isinstance(completion, str):
        raise InvalidInput(f"Row {row} mixes a text and messages; both are texts, or both are messages.")
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInput(
            f"Row {row} is messages and this tokenizer has no chat template. Give texts, or set its chat_template."
        )
    before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    if not whole.startswith(before):
        raise InvalidInput(
            f"Row {row}: the chat template does not write the prompt first; its answer cannot be told apart."
        )
    answer = tokenizer(whole[len(before) :], add_special_tokens=False, verbose=False)["input_ids"]
    ends = {tokenizer.eos_token_id, *end_ids}
    last = max((i for i, token in enumerate(answer) if token in ends), default=None)
    answer = [*answer, tokenizer.eos_token_id] if last is None else answer[: last + 1]
    return EncodedPair(tuple(tokenizer(before, add_special_tokens=False, verbose=False)["input_ids"]), tuple(answer))
