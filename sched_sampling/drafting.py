"""Drafts: a model's own answers to prompts, free-running, from a model in memory or from any `Chat`.

A prompt that occurs several times gets as many different drafts. Which drafts a prompt gets depends on the seed, the prompt and
its occurrence, never on what else is asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.errors import InvalidInput
from core.llm.base import Chat
from core.llm.causal import end_tokens
from core.llm.generation import Continuation, Sampling, generate
from core.llm.modes import in_mode
from sched_sampling.rounds import context_length
from sched_sampling.templates import Draft, is_conversation, plain_ids


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """How drafts are drawn: at most `max_new_tokens` tokens at `temperature` (0 takes the most probable token each time).

    `max_new_tokens` None is the length of the longest reference answer, its end included.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    max_batch_tokens: int = 8192

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing, before a model is asked."""
        self.at(0)
        for name in ("max_new_tokens", "max_batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInput(f"{name} must be at least 1; got {value}.")

    def at(self, seed: int, num_return: int = 1) -> Sampling:
        """The same for core's generation; 0 and 1.0 mean that nothing is cut off."""
        top_p = None if self.top_p == 1 else self.top_p
        return Sampling(self.temperature, self.top_k or None, top_p, num_return, seed)

    def limit(self, answers: Sequence[Sequence[int]]) -> int:
        """`max_new_tokens`, or the length of the longest of `answers`."""
        return max(map(len, answers)) if self.max_new_tokens is None else self.max_new_tokens


def check_room(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise `InvalidInput` when a prompt and `max_new_tokens` do not fit the model's context."""
    limit = context_length(model)
    for i, prompt in enumerate(prompts):
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise InvalidInput(
                f"Prompt {i} of {len(prompt)} tokens and {max_new_tokens} new tokens do not fit the model, which reads at "
                f"most {limit}. Shorten the prompt or lower max_new_tokens."
            )


def draft_with_model(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    drafting: Drafting,
    *,
    max_new_tokens: int,
    seed: int = 0,
) -> list[Draft]:
    """A draft for every prompt of token ids, in their order, with dropout off; end tokens are not part of drafts.

    Raises `InvalidInput` before any work when a prompt and `max_new_tokens` do not fit the model's context,
    and when nothing would end an answer.
    """
    check_room(model, prompts, max_new_tokens)
    ends = end_tokens(model, tokenizer)
    if not ends:
        raise InvalidInput(
            "Neither the model nor the tokenizer has an end token. Set model.generation_config.eos_token_id."
        )
    drafts: dict[int, Draft] = {}
    with in_mode(model, training=False):
        for count, places in _by_count([tuple(prompt) for prompt in prompts]).items():
            distinct = [prompts[where[0]] for where in places]
            # At temperature 0 several samples would be a beam search; there is one answer, whoever asks.
            num_return = 1 if drafting.temperature == 0 else count
            found = generate(
                model,
                distinct,
                drafting.at(seed, num_return),
                max_new_tokens=max_new_tokens,
                ended=lambda ids: ids[-1] in ends,
                max_batch_tokens=drafting.max_batch_tokens,
            )
            for where, continuations in zip(places, found, strict=True):
                for k, place in enumerate(where):
                    drafts[place] = _draft(tokenizer, prompts[place], continuations[k % num_return], ends)
    return [drafts[i] for i in range(len(prompts))]


def draft_with_chat(
    chat: Chat,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[Mapping[str, str]]],
    drafting: Drafting,
    *,
    max_new_tokens: int,
    seed: int = 0,
) -> list[Draft]:
    """A draft for every text or conversation from a chat model; a text is asked as one message of the user.

    With `cache=FILE` of the chat no answer is asked for twice, also when the server failed in between. Raises `InvalidInput`
    on prompts of token ids and on `top_k`, which servers do not share, and `ChatError` when an answer cannot be had.
    """
    if drafting.top_k:
        raise InvalidInput("top_k is no setting of a chat model; use top_p.")
    asked: list[list[dict[str, str]]] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            asked.append([{"role": "user", "content": prompt}])
        elif is_conversation(prompt):
            asked.append([dict(message) for message in prompt])
        else:
            raise InvalidInput("A chat model answers texts and messages; these prompts are token ids.")
    keys = [tuple(tuple(sorted(message.items())) for message in conversation) for conversation in asked]
    drafts: dict[int, Draft] = {}
    for count, places in _by_count(keys).items():
        n = 1 if drafting.temperature == 0 else count
        answers = chat.complete(
            [asked[where[0]] for where in places],
            n=n,
            temperature=drafting.temperature,
            top_p=drafting.top_p,
            max_tokens=max_new_tokens,
            seed=seed,
        )
        for where, answer in zip(places, answers, strict=True):
            for k, place in enumerate(where):
                reply = answer.replies[k % n]
                ids = plain_ids(tokenizer, reply.text)
                drafts[place] = Draft(ids, reply.text, reply.finish_reason != "length")
    return [drafts[i] for i in range(len(prompts))]


def _by_count(keys: Sequence[Hashable]) -> dict[int, list[list[int]]]:
    """The places of equal keys, by how many there are: places that occur equally often can be asked for together."""
    places = places_of(keys)
    by_count: dict[int, list[list[int]]] = defaultdict(list)
    for where in places:
        by_count[len(where)].append(where)
    return by_count


def places_of(keys: Sequence[Hashable]) -> list[list[int]]:
    """For every distinct key, in the order of first occurrence, the places where it stands."""
    places: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        places.setdefault(key, []).append(i)
    return list(places.values())


def _draft(tokenizer: Any, prompt: Sequence[int], continuation: Continuation, ends: Collection[int]) -> Draft:
    ids = continuation.token_ids
    ended = ids[-1] in ends
    ids = ids[:-1] if ended else ids
    return Draft(ids, _text_behind(tokenizer, prompt, ids), ended)


def _text_behind(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids))
    # Decoded behind its prompt: some tokenizers swallow the space before the first token of a text.
    before = tokenizer.decode(list(prompt), skip_special_tokens=True)
    text: str = tokenizer.decode([*prompt, *ids], skip_special_tokens=True)[len(before) :]
    return text
