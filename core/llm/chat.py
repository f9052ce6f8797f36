"""Language models that answer conversations, the same way from a server, on this machine, or from a recording.

    chat = load_chat("openai:gpt-4o", cache="run/replies.jsonl", prices=Prices(prompt=2.5, completion=10))
    answer = chat.complete([{"role": "user", "content": "Which table holds prices?"}], n=3, temperature=0.7)
    answer.text, answer.usage.completion_tokens, chat.spent.cost
    parse(answer.replies[0], Choice)                       # a pydantic object, or UnparsedReply
    load_chat("replay:run/replies.jsonl")                  # the same answers, without the model

A model of one's own, for a test or a rule, is a subclass of `Chat` with `source` and `answers`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.errors import DataUnavailable, InvalidInput, unknown_name
from core.llm.base import Chat
from core.llm.cache import ReplyFile, Request, nearest_difference
from core.llm.remote import OPENAI_URL, OpenAIChat, Patience
from core.llm.replies import (
    Answer,
    ChatError,
    ChatRefused,
    ChatUnavailable,
    Conversation,
    Message,
    Prices,
    Reply,
    Settings,
    UnknownRequest,
    UnparsedReply,
    Usage,
    parse,
)

__all__ = [
    "Answer",
    "Chat",
    "ChatError",
    "ChatRefused",
    "ChatUnavailable",
    "Conversation",
    "Message",
    "OpenAIChat",
    "Patience",
    "Prices",
    "ReplayChat",
    "Reply",
    "Settings",
    "UnknownRequest",
    "UnparsedReply",
    "Usage",
    "load_chat",
    "parse",
]

_LOCAL = ("hf", "hub", "testbed", "pretrained", "folder")
_MODEL_OPTIONS = ("device", "dtype")


def load_chat(spec: str, **options: Any) -> Chat:
    """The model that `spec` names.

    `openai:MODEL` is OpenAI's, `openai:MODEL@http://127.0.0.1:8000/v1` one behind any compatible server (vLLM, SGLang);
    options are those of `OpenAIChat`. `hf:OWNER/NAME[@REVISION]` and every other spec of `CausalLM.load`
    (`testbed:tiny_llama`, `pretrained:smollm2-135m`, `folder:PATH`) run here; options are `device`, `dtype` and those of
    `LocalChat`. `replay:FILE.jsonl` gives recorded answers (`ReplayChat`).

    `cache=FILE.jsonl` reads answers from the file and records new ones in it; such a file can be replayed. `prices` makes
    costs of tokens. Raises `InvalidInput` on a malformed spec or an unknown option, and `MissingExtra`, `DataUnavailable`
    or `ChatUnavailable` when the model cannot be had here.
    """
    home, _, rest = spec.partition(":")
    if home not in ("openai", "replay", *_LOCAL):
        raise unknown_name("home of a chat model", home, ["openai", "replay", *_LOCAL])
    if not rest:
        raise InvalidInput(
            f"`{spec}` names no model; write for example openai:gpt-4o, hf:owner/name or replay:FILE.jsonl."
        )
    if home == "openai":
        model, at, address = rest.partition("@http")
        _check_options(spec, options, OpenAIChat, ())
        return OpenAIChat(model, f"http{address}" if at else OPENAI_URL, **options)
    if home == "replay":
        _check_options(spec, options, ReplayChat, ())
        return ReplayChat(rest, **options)
    from core.llm.causal import CausalLM
    from core.llm.local import LocalChat

    _check_options(spec, options, LocalChat, _MODEL_OPTIONS)
    where = {name: options.pop(name) for name in _MODEL_OPTIONS if name in options}
    return LocalChat(CausalLM.load(f"hub:{rest}" if home == "hf" else spec, **where), **options)


def _check_options(spec: str, options: Mapping[str, Any], kind: type[Chat], more: Sequence[str]) -> None:
    signature = inspect.signature(kind.__init__)
    known = [name for name, p in signature.parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for name in options:
        if name not in (*known, *more):
            raise unknown_name(f"option of {spec.partition(':')[0]}:", name, [*known, *more])


class ReplayChat(Chat):
    """Answers from a file that was a `cache`; a request that the file does not hold is refused, never made.

    A file with the answers of several models needs `model`, the name of one. `usage` counts what was recorded, and
    `spent` stays zero.
    """

    def __init__(self, path: Path | str, *, model: str | None = None, prices: Prices | None = None) -> None:
        super().__init__(prices=prices)
        self._recording = ReplyFile(path)
        if not len(self._recording):
            raise DataUnavailable(
                f"`{path}` holds no recorded answers. Record them with load_chat(SPEC, cache={str(path)!r})."
            )
        sources = {tuple(sorted(request.source.items())) for request, _ in self._recording.records()}
        chosen = [dict(source) for source in sources if model in (None, dict(source).get("model"))]
        if len(chosen) != 1:
            names = ", ".join(sorted({dict(source).get("model", "?") for source in sources}))
            raise InvalidInput(
                f"`{path}` holds answers of {names}; {len(chosen)} of its {len(sources)} sources match model={model!r}. "
                "Give the model of one, or keep the lines of one source."
            )
        self._source = chosen[0]

    @property
    def source(self) -> Mapping[str, str]:
        """The recorded model."""
        return self._source

    def answers(self, conversations: Sequence[Conversation], settings: Settings) -> Iterator[tuple[int, Answer]]:
        """Each conversation's position and recorded answer; raises `UnknownRequest` where there is none."""
        for i, conversation in enumerate(conversations):
            request = Request(self._source, [dict(message) for message in conversation], settings)
            answer = self._recording.get(request)
            if answer is None:
                own = (other for other, _ in self._recording.records() if other.source == self._source)
                raise UnknownRequest(
                    f"{self._recording.path} has no answer to this request among {len(self._recording)}; "
                    f"{nearest_difference(request, own)}. Repeat the recorded request, or record this one with cache=."
                )
            yield i, answer
