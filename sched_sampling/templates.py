"""Correction prompts c(x, draft) of RAC: the question, the model's own answer, and a request for a better one.

`RAC_CHAT` continues a conversation (user x / assistant draft / user "please correct"), `RAC_TEXT` writes one text, and
`TokenTemplate` joins token ids of tasks without a tokenizer. A draft is whatever a model said, so it is encoded as plain text:
control tokens in it become ordinary characters or are left out. Where a prompt is too long the draft loses its beginning; the
question never does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.errors import InvalidInput
from core.llm.causal import encode

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]


@dataclass(frozen=True)
class Draft:
    """An answer that a model gave: its tokens without the end token, its text, and whether it came to an end by itself."""

    token_ids: tuple[int, ...]
    text: str
    ended: bool


@dataclass(frozen=True)
class Frame:
    """What stands before and after the draft in a correction prompt."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.before) + len(self.after)


def is_conversation(prompt: Prompt) -> bool:
    """Whether a prompt is messages, and not a text or token ids."""
    return not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)


def prompt_ids(tokenizer: Any, prompt: Prompt) -> tuple[int, ...]:
    """The token ids of a prompt as the plain model gets it; token ids are taken as they are.

    Raises `InvalidInput` on an empty prompt and on messages that the tokenizer has no chat template for.
    """
    ids: Any = prompt
    if isinstance(prompt, str):
        ids = encode(_needed(tokenizer), prompt)
    elif is_conversation(prompt):
        ids = control_ids(tokenizer, _rendered(tokenizer, prompt))
    if not ids:
        raise InvalidInput("A prompt is empty; an answer needs at least one token before it.")
    return tuple(int(token) for token in ids)


def plain_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The token ids of a text in which control tokens are ordinary characters."""
    ids = _needed(tokenizer)(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    # A vocabulary of whole words has them as words too.
    return without_control(ids, tokenizer.all_special_ids)


def control_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The token ids of a text that a chat template wrote, whose control tokens are meant."""
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def without_control(ids: Sequence[int], control: Collection[int]) -> tuple[int, ...]:
    """Token ids without those in `control`."""
    control = frozenset(control)
    return tuple(int(token) for token in ids if token not in control)


class Template(ABC):
    """How a question and a draft become the prompt of a correction."""

    @abstractmethod
    def frame(self, tokenizer: Any, prompt: Prompt) -> Frame:
        """What stands before and after the draft. Raises `InvalidInput` on a kind of prompt that the template is not for."""

    def control(self, tokenizer: Any) -> Collection[int]:
        """The token ids that may not stand in a draft."""
        return () if tokenizer is None else tokenizer.all_special_ids

    def encode(
        self, tokenizer: Any, prompt: Prompt, draft: Draft | Sequence[int] | str, *, max_length: int | None = None
    ) -> tuple[int, ...]:
        """The token ids of c(prompt, draft); see `frame` and `fill`."""
        return self.fill(tokenizer, self.frame(tokenizer, prompt), draft, max_length=max_length)

    def fill(
        self, tokenizer: Any, frame: Frame, draft: Draft | Sequence[int] | str, *, max_length: int | None = None
    ) -> tuple[int, ...]:
        """The frame with the draft in it, at most `max_length` tokens: what is too much goes from the draft's beginning.

        A draft that is a text is encoded here. Raises `InvalidInput` when the frame alone is too long.
        """
        if isinstance(draft, str):
            ids = plain_ids(tokenizer, draft)
        else:
            ids = tuple(draft.token_ids if isinstance(draft, Draft) else draft)
        ids = without_control(ids, self.control(tokenizer))
        if max_length is not None:
            room = max_length - len(frame)
            if room < 0:
                raise InvalidInput(
                    f"A correction prompt takes {len(frame)} tokens besides the draft and may have {max_length}. Shorten the "
                    "question or the answers, or use a model with a longer context."
                )
            ids = ids[max(0, len(ids) - room) :]
        return (*frame.before, *ids, *frame.after)


@dataclass(frozen=True)
class TextTemplate(Template):
    """The single-turn form: the prompt, `reference`, the draft, `request`, then the answer."""

    reference: str = "\n\nReference answer, which may contain mistakes:\n"
    request: str = "\n\nFinal answer:\n"

    def frame(self, tokenizer: Any, prompt: Prompt) -> Frame:
        """The prompt's own tokens with `reference` behind them, and `request`."""
        if is_conversation(prompt):
            raise InvalidInput("RAC_TEXT corrects texts; these prompts are messages. Use template=RAC_CHAT.")
        # Encoded by itself: the prompt keeps the tokens that the direct example has.
        before = (*prompt_ids(tokenizer, prompt), *plain_ids(tokenizer, self.reference))
        return Frame(before, plain_ids(tokenizer, self.request))


@dataclass(frozen=True)
class ChatTemplate(Template):
    """The chat form: the conversation, the draft as the assistant's turn, `request` as the user's next, then the answer."""

    request: str = "Please correct your answer. If it was right, repeat it."

    def frame(self, tokenizer: Any, prompt: Prompt) -> Frame:
        """The rendered conversation up to the draft, and the rest."""
        if not is_conversation(prompt):
            raise InvalidInput("RAC_CHAT corrects conversations; this prompt is none. Use template=RAC_TEXT.")
        messages: Any = prompt
        mark = _absent_from(messages, self.request)
        # The template sees a mark for the draft, so that nothing in a draft is ever read as a control token.
        text = _rendered(
            tokenizer,
            [*messages, {"role": "assistant", "content": mark}, {"role": "user", "content": self.request}],
        )
        before, found, after = text.partition(mark)
        if not found or mark in after:
            raise InvalidInput(
                f"The chat template of this tokenizer writes an assistant's message {text.count(mark)} times, not once, when "
                "another turn follows. Use template=RAC_TEXT and prompts that are texts."
            )
        return Frame(control_ids(tokenizer, before), control_ids(tokenizer, after))


@dataclass(frozen=True)
class TokenTemplate(Template):
    """For tasks on token ids, without a tokenizer: the prompt, the draft, `separator_ids`, `request_ids`, then the answer.

    Separators and `end_ids` that a draft holds are left out of it; the tokens of the request are ordinary ones.
    """

    separator_ids: tuple[int, ...]
    request_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a template in which a correction could not be told from an answer."""
        if not self.separator_ids:
            raise InvalidInput("A correction prompt needs a separator, or it is the prompt with an answer begun.")

    def frame(self, tokenizer: Any, prompt: Prompt) -> Frame:
        """The prompt, and the separators with the request."""
        return Frame(prompt_ids(tokenizer, prompt), (*self.separator_ids, *self.request_ids))

    def control(self, tokenizer: Any) -> Collection[int]:
        """Separators and ends."""
        return (*self.separator_ids, *self.end_ids, *super().control(tokenizer))


RAC_TEXT = TextTemplate()
RAC_CHAT = ChatTemplate()


def chosen_template(template: Template | None, prompts: Sequence[Prompt]) -> Template:
    """`template`, or where it is None `RAC_CHAT` for conversations and `RAC_TEXT` for texts.

    Raises `InvalidInput` for token ids, whose task alone knows what separates a draft from a correction.
    """
    if template is not None:
        return template
    if all(isinstance(prompt, str) for prompt in prompts):
        return RAC_TEXT
    if all(map(is_conversation, prompts)):
        return RAC_CHAT
    raise InvalidInput(
        "Prompts of token ids need template=TokenTemplate(separator_ids=...), and texts and conversations do not mix."
    )


def _needed(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise InvalidInput("Texts and messages need a tokenizer; without one, prompts and answers are token ids.")
    return tokenizer


def _rendered(tokenizer: Any, messages: Any) -> str:
    if not getattr(_needed(tokenizer), "chat_template", None):
        raise InvalidInput(
            "These prompts are messages and the tokenizer has no chat template. Give prompts as texts, or set "
            "tokenizer.chat_template."
        )
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    # Templates raise what their authors chose to, for a system message or two turns of one side.
    except Exception as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise InvalidInput(f"The chat template refuses a conversation of {roles}: {error}.") from error
    return text


def _absent_from(messages: Sequence[Mapping[str, str]], request: str) -> str:
    texts = [request, *(str(message.get("content")) for message in messages)]
    # Letters only, because some templates strip or escape anything else.
    number = 0
    while any((mark := f"DRAFT{number}DRAFT") in text for text in texts):
        number += 1
    return mark
