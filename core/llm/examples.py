"""Demonstrations as token ids: a prompt, the answer that is to be learned, and batches of such rows.

A row has `input_ids` and `labels`, as every trainer of transformers takes them: labels are -100 where nothing is to be
learned, and they are not shifted, because the models shift them. Labels are made from lengths, never from token ids: a
padding token that is also the end token hides no end.
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

    A text prompt is encoded as the tokenizer's default has it, as for generation, and its completion by itself. The
    tokenizer's end token comes behind, once; any other control token that a completion spells is ordinary text.
    Messages go through the chat template: the completion is what the template writes behind the prompt, up to its last
    end token (the tokenizer's, or one of `end_ids`; see `core.llm.causal.end_tokens`). `EncodedPair`s pass through as
    they are and need no tokenizer.

    Raises `InvalidInput`, naming the row, on an empty prompt or completion, on a tokenizer without an end token or,
    for messages, without a chat template, on a completion whose control tokens the tokenizer cannot read as text, and on
    a pair of more than `max_length` tokens.
    """
    encoded = []
    for row, pair in enumerate(pairs):
        found = pair if isinstance(pair, EncodedPair) else _encode(tokenizer, pair, row, end_ids)
        _refuse_empty(row, prompt=found.prompt_ids, completion=found.target_ids)
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
    """Rows as tensors `input_ids` and `labels`, one a line, filled up at the end.

    A causal model never looks ahead, so filling needs neither a mask nor a padding token. With `packing` lines are as
    long as the longest row and hold as many rows as fit (first-fit decreasing), and `position_ids` begin at 0 again with
    every row: that is how transformers knows, where no `attention_mask` is given, that rows may not see each other. The
    label of a row's first token is dropped, because nothing predicts it.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    for row, length in zip(rows, lengths, strict=True):
        if len(row["labels"]) != length or not length:
            raise InvalidInput(f"A row has one label for each token; got {len(row['labels'])} for {length} tokens.")
    lines = first_fit(lengths) if packing else [[i] for i in range(len(rows))]
    width = max(lengths)
    batch = {
        "input_ids": torch.zeros(len(lines), width, dtype=torch.long),
        "labels": torch.full((len(lines), width), IGNORED),
    }
    if packing:
        batch["position_ids"] = torch.zeros(len(lines), width, dtype=torch.long)
    for number, line in enumerate(lines):
        start = 0
        for i in line:
            end = start + lengths[i]
            batch["input_ids"][number, start:end] = torch.as_tensor(rows[i]["input_ids"])
            batch["labels"][number, start + 1 : end] = torch.as_tensor(rows[i]["labels"])[1:]
            if packing:
                batch["position_ids"][number, start:end] = torch.arange(lengths[i])
            start = end
        if packing:
            # Filling counts from 0 too: no position may lie beyond those that the model has.
            batch["position_ids"][number, start:] = torch.arange(width - start)
    return batch


def first_fit(lengths: Sequence[int]) -> list[list[int]]:
    """Items in bins that hold as much as the longest: the longest first, each in the first bin with room for it."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((place for place, left in enumerate(room) if lengths[i] <= left), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(max(lengths))
        bins[place].append(i)
        room[place] -= lengths[i]
    return bins


def _encode(tokenizer: Any, pair: Mapping[str, Any], row: int, end_ids: Collection[int]) -> EncodedPair:
    if not {"prompt", "completion"} <= pair.keys():
        raise InvalidInput(f"Row {row} needs `prompt` and `completion`; it has {sorted(pair)}.")
    prompt, completion = pair["prompt"], pair["completion"]
    if tokenizer is None:
        raise InvalidInput(f"Row {row} is text and needs a tokenizer; without one, give EncodedPair(prompt, target).")
    if tokenizer.eos_token_id is None:
        raise InvalidInput(
            "This tokenizer has no end token, so no model could learn to stop: set tokenizer.eos_token to a token of its "
            "vocabulary."
        )
    _refuse_empty(row, prompt=prompt, completion=completion)
    if isinstance(prompt, str) != isinstance(completion, str):
        raise InvalidInput(f"Row {row} mixes a text and messages; both are texts, or both are messages.")
    if isinstance(prompt, str):
        before = encode(tokenizer, prompt)
        answer = _continue(tokenizer, before, completion.removesuffix(tokenizer.eos_token), control=False)
        _refuse_control(tokenizer, answer, row)
        ends: set[int] = {tokenizer.eos_token_id}
    else:
        start, rest = _chat_texts(tokenizer, prompt, completion, row)
        # The template writes the start token itself.
        before = _plain(tokenizer, start)
        answer = _continue(tokenizer, before, rest)
        ends = {tokenizer.eos_token_id, *end_ids}
        # Many templates write a line end behind the end; a model that has ended never gets to it.
        last = max((i for i, token in enumerate(answer) if token in ends), default=len(answer))
        answer = answer[: last + 1]
    if not answer or answer[-1] not in ends:
        answer = [*answer, tokenizer.eos_token_id]
    return EncodedPair(tuple(before), tuple(answer))


def _chat_texts(
    tokenizer: Any, prompt: Sequence[Mapping[str, Any]], completion: Sequence[Mapping[str, Any]], row: int
) -> tuple[str, str]:
    """What the chat template writes for the prompt, the header of the answer included, and what it writes after that."""
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInput(
            f"Row {row} is messages and this tokenizer has no chat template. Give texts, or set tokenizer.chat_template."
        )
    if any(message["role"] != "assistant" for message in completion) or not any(m["content"] for m in completion):
        raise InvalidInput(
            f"Row {row}: a completion is what the assistant says, and not empty; its messages are from "
            f"{', '.join(str(message['role']) for message in completion)}. Earlier turns belong into the prompt."
        )
    try:
        before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    # Templates raise what their authors chose to, for a system message or two turns of one side.
    except Exception as error:
        raise InvalidInput(f"Row {row}: the chat template refuses this conversation: {error}.") from error
    if not whole.startswith(before):
        raise InvalidInput(
            f"Row {row}: the chat template writes the prompt differently when an answer follows ({before[-40:]!r} is not "
            "there), so the answer cannot be told apart. Use another template, or texts."
        )
    return before, whole[len(before) :]


def _continue(tokenizer: Any, before: list[int], text: str, *, control: bool = True) -> list[int]:
    """The tokens of a text behind those of another, tokenized by itself: no token of `before` may change.

    Without `control` the names of control tokens are text like any other.

    SentencePiece tokenizers (Llama 2, Mistral) begin every text with a space of their own, which would stand between the
    two. There the text is tokenized behind a line end, and the line end is cut off.
    """
    alone = _plain(tokenizer, text, control=control)
    if _reads(tokenizer, before, alone, text):
        return alone
    anchor, anchored = _plain(tokenizer, "\n"), _plain(tokenizer, "\n" + text, control=control)
    rest = anchored[len(anchor) :]
    return rest if anchored[: len(anchor)] == anchor and _reads(tokenizer, before, rest, text) else alone


def _reads(tokenizer: Any, before: list[int], answer: list[int], text: str) -> bool:
    start, whole = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (before, [*before, *answer]))
    return bool(whole == start + text)


def _plain(tokenizer: Any, text: str, *, control: bool = True) -> list[int]:
    split = {} if control else {"split_special_tokens": True}
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False, **split)["input_ids"]
    return ids


def _refuse_control(tokenizer: Any, answer: Sequence[int], row: int) -> None:
    # A vocabulary of whole words has the control tokens as words too.
    found = set(answer) & (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})
    if found:
        raise InvalidInput(
            f"Row {row}: the completion spells {', '.join(tokenizer.convert_ids_to_tokens(sorted(found)))}, which this "
            "tokenizer can only read as a control token. Take it out of the text."
        )


def _refuse_empty(row: int, **parts: Any) -> None:
    for what, part in parts.items():
        if not len(part):
            raise InvalidInput(f"Row {row} has an empty {what}. Leave the row out, or fill it.")
