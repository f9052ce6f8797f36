"""Chat completions on the wire: the body of a request, and what a response says, believed only where it has that form."""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from core.llm.replies import Answer, Conversation, Reply, Settings, Usage, shorten


class Trouble(Exception):
    """An attempt that failed and may be made again, not before `retry_after` seconds."""

    def __init__(self, what: str, retry_after: float = 0.0) -> None:
        super().__init__(what)
        self.retry_after = retry_after


def payload(model: str, conversation: Conversation, settings: Settings, *, openai_itself: bool) -> dict[str, Any]:
    """The arguments of a chat completion; what has the server's default is left out, for servers that know few."""
    # OpenAI's own newer models refuse max_tokens; every other server knows it.
    limit = "max_completion_tokens" if openai_itself else "max_tokens"
    optional = {
        "n": settings.n if settings.n > 1 else None,
        "top_p": settings.top_p if settings.top_p < 1 else None,
        "stop": list(settings.stop) or None,
        "seed": settings.seed,
        "logprobs": settings.log_probs or None,
    }
    required = {"model": model, "messages": list(conversation), "temperature": settings.temperature}
    return required | {limit: settings.max_tokens} | {k: v for k, v in optional.items() if v is not None}


def may_pass(status: int, body: str) -> bool:
    """Whether a failure with this HTTP status may be over at the next attempt."""
    # An account without money answers 429 as well, and for ever.
    return status in (408, 409) or status >= 500 or (status == 429 and "insufficient_quota" not in body)


def advice(status: int) -> str:
    """What to do about a refusal."""
    return {
        401: "Check the key (OPENAI_API_KEY, or api_key=).",
        403: "The key may not use this model; check the account.",
        404: "Check the model's name and the server's address, which usually ends in /v1.",
        429: "The account has no quota left.",
    }.get(status, "Change the request as the server says: a smaller max_tokens or prompt, or settings that it knows.")


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait: `retry-after-ms`, or `retry-after` in seconds or as a date; 0 for none."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * scale
        except ValueError:
            continue
        return seconds if 0 < seconds < float("inf") else 0.0
    date = email.utils.parsedate_tz(headers.get("retry-after", ""))
    return 0.0 if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Token(BaseModel):
    logprob: float


class _LogProbs(BaseModel):
    content: list[_Token] | None = None


class _Choice(BaseModel):
    index: int = 0
    message: _Message
    finish_reason: str | None = None
    logprobs: _LogProbs | None = None


class _Tokens(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Tokens | None = None


def read(content_type: str, body: str) -> Answer:
    """The answer in a response of status 200; anything but a chat completion is `Trouble`."""
    if "json" not in content_type:
        raise Trouble(f"content of type {content_type} instead of JSON: {shorten(body)!r}")
    try:
        completion = _Completion.model_validate(json.loads(body))
    except (ValidationError, ValueError, RecursionError):
        raise Trouble(f"a body that is no chat completion: {shorten(body)!r}") from None
    usage = completion.usage or _Tokens()
    return Answer(
        tuple(_reply(choice) for choice in sorted(completion.choices, key=lambda choice: choice.index)),
        Usage(requests=1, **usage.model_dump()),
    )


def _reply(choice: _Choice) -> Reply:
    log_probs = choice.logprobs.content if choice.logprobs else None
    log_prob = None if log_probs is None else sum(token.logprob for token in log_probs)
    text, reason = choice.message.content, choice.finish_reason or "unknown"
    if text is None and choice.message.refusal is not None:
        text, reason = choice.message.refusal, "refusal"
    # JSON can hold half of a surrogate pair, and no file can.
    return Reply((text or "").encode(errors="replace").decode(), reason, log_prob)
