"""What is asked of a chat model and what comes back: settings, replies, their tokens and cost, and typed objects in them.

    class Choice(BaseModel): ...
    choice = parse(answer.replies[0], Choice)     # or parse(reply, list[Action])

A reply is data. `parse` reads JSON out of it and checks its shape; nothing in a reply is ever executed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, overload

from pydantic import TypeAdapter, ValidationError

from core.errors import CannotRunHere, InvalidInput, TenfoldError, unknown_name

T = TypeVar("T")

Message = Mapping[str, str]
Conversation = Sequence[Message]

ROLES = ("system", "user", "assistant")


class ChatError(TenfoldError):
    """Base of everything that goes wrong between a question and its reply."""


class ChatRefused(ChatError):
    """The server understood and said no; asking again would not help. `status` is the HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the status when a worker process hands the error over."""
        return type(self), (str(self), self.status)


class ChatUnavailable(ChatError, CannotRunHere):
    """No usable reply within the retries and the time allowed, or no key to ask with."""


class UnknownRequest(ChatError, LookupError):
    """A recording that holds no reply to this request."""


class UnparsedReply(ChatError, ValueError):
    """A reply without the object that was asked for. `problem` is one sentence that can be sent back to the model."""

    def __init__(self, problem: str, text: str) -> None:
        super().__init__(f"{problem} The reply: {shorten(text)!r}. Ask again with this problem, or skip the item.")
        self.problem, self.text = problem, text

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep both parts when a worker process hands the error over."""
        return type(self), (self.problem, self.text)


@dataclass(frozen=True)
class Settings:
    """How replies are drawn: `n` independent samples of at most `max_tokens` tokens each.

    `temperature` 0 takes the most probable token each time. `seed` None leaves the seed to the server; a local model then
    takes 0. With `log_probs` a server is asked for log-probabilities, which not every server gives.
    """

    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 512
    stop: Sequence[str] = ()
    seed: int | None = None
    log_probs: bool = False

    def __post_init__(self) -> None:
        """Refuse values that mean nothing, or that greedy decoding would ignore."""
        if not (self.n >= 1 and self.max_tokens >= 1 and 0 <= self.temperature < math.inf and 0 < self.top_p <= 1):
            raise InvalidInput(
                "A request needs n >= 1, max_tokens >= 1, temperature >= 0 and top_p in (0, 1]; got "
                f"{self.n}, {self.max_tokens}, {self.temperature}, {self.top_p}."
            )
        if self.temperature == 0 and (self.n > 1 or self.top_p < 1):
            raise InvalidInput(
                f"Temperature 0 gives one reply, whatever n and top_p are; got n={self.n}, top_p={self.top_p}. Give a "
                "temperature > 0 (the n best of a local model: `CausalLM.generate`)."
            )
        if isinstance(self.stop, str) or not all(self.stop):
            raise InvalidInput(f"Stop strings are a list of texts that are not empty; got {self.stop!r}.")
        object.__setattr__(self, "stop", tuple(self.stop))


@dataclass(frozen=True)
class Reply:
    """One reply of a model.

    `finish_reason` is "stop" where the model ended by itself or at a stop string, "length" where `max_tokens` cut it off,
    and else what the server calls it ("content_filter", "refusal"). `log_prob` is the sum of the log-probabilities of the
    generated tokens at temperature 1, None where the server gave none.
    """

    text: str
    finish_reason: str = "stop"
    log_prob: float | None = None


@dataclass(frozen=True)
class Prices:
    """What a million tokens of the prompt and of the replies cost, in one currency of your choice."""

    prompt: float
    completion: float


@dataclass(frozen=True)
class Usage:
    """Requests that were answered, how many attempts they took beyond the first, their tokens and their cost.

    Tokens are None where a server did not count them and the cost where no prices are known: a sum with an unknown part
    is unknown.
    """

    requests: int = 0
    retries: int = 0
    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    cost: float | None = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.requests + other.requests,
            self.retries + other.retries,
            _sum(self.prompt_tokens, other.prompt_tokens),
            _sum(self.completion_tokens, other.completion_tokens),
            _sum(self.cost, other.cost),
        )

    def priced(self, prices: Prices | None) -> Usage:
        """The same usage with its cost at `prices`."""
        if prices is None or self.prompt_tokens is None or self.completion_tokens is None:
            return replace(self, cost=None)
        total = self.prompt_tokens * prices.prompt + self.completion_tokens * prices.completion
        return replace(self, cost=total / 1e6)


def _sum(a: Any, b: Any) -> Any:
    return None if a is None or b is None else a + b


@dataclass(frozen=True)
class Answer:
    """The `n` replies to one conversation and what they took; `cached` says that they were read, not asked for.

    `usage` is what the request took when it was made, also when it is read from a cache.
    """

    replies: tuple[Reply, ...]
    usage: Usage
    cached: bool = False

    @property
    def text(self) -> str:
        """The text of the first reply."""
        return self.replies[0].text


def checked(conversation: Conversation) -> list[dict[str, str]]:
    """The messages as plain dictionaries; raises `InvalidInput` when one is no message."""
    messages = [dict(message) for message in conversation]
    if not messages:
        raise InvalidInput("A conversation needs at least one message.")
    for message in messages:
        if message.keys() != {"role", "content"} or not isinstance(message["content"], str):
            raise InvalidInput(f'A message is {{"role": ..., "content": "text"}}; got {shorten(str(message))}.')
        if message["role"] not in ROLES:
            raise unknown_name("role of a message", message["role"], ROLES)
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(
                f"A message holds half of a surrogate pair, which no server can read ({error}). "
                "Clean it with text.encode(errors='replace').decode()."
            ) from error
    return messages


def shorten(text: str, limit: int = 300) -> str:
    """The beginning of a text that is too long for an error message."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


# Some templates open the thoughts in the prompt, and then the reply only closes them.
_THOUGHTS = re.compile(r"\A(?:.*?</think>|\s*<think>.*)", re.DOTALL)
_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


@overload
def parse(reply: Reply | str, schema: type[T]) -> T: ...


@overload
def parse(reply: Reply | str, schema: Any) -> Any: ...


def parse(reply: Reply | str, schema: Any) -> Any:
    """The first JSON value in a reply that has the shape of `schema`: a pydantic model, or a type such as `list[Action]`.

    Fenced code blocks are read before prose, and what a model thinks up to `</think>` not at all. The inside of a value
    is never taken for a value: a list that was cut off does not yield its first element. Raises `UnparsedReply`.
    """
    text = reply if isinstance(reply, str) else reply.text
    shape: TypeAdapter[Any] = TypeAdapter(schema)
    name = getattr(schema, "__name__", str(schema))
    visible = _THOUGHTS.sub("", text)
    problem = ""
    for part in (*_FENCE.findall(visible), _FENCE.sub("", visible)):
        for source in _values(part):
            try:
                json.loads(source, parse_constant=_refuse_constant)
                return shape.validate_json(source)
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                where = ".".join(map(str, first["loc"]))
                problem = problem or f"The JSON is no {name}: {first['msg']}{f' at `{where}`' if where else ''}."
            except (ValueError, RecursionError) as error:
                problem = problem or f"The text at {shorten(source, 40)!r} is no valid JSON: {error}."
    if not problem:
        problem = f"There is no JSON for {name} in the reply."
    if isinstance(reply, Reply) and reply.finish_reason == "length":
        problem += " The reply was cut off by max_tokens."
    raise UnparsedReply(problem, text)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _values(text: str) -> Iterator[str]:
    """What stands between balanced outermost brackets, in order; an open one without its end takes all the rest."""
    start, depth, quoted = -1, 0, False
    for token in re.finditer(r'\\.|["{}\[\]]', text, re.DOTALL):
        mark = token.group()
        if depth == 0:
            if mark in "{[":
                start, depth = token.start(), 1
        elif mark == '"':
            quoted = not quoted
        elif quoted or mark.startswith("\\"):
            continue
        elif mark in "{[":
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                yield text[start : token.end()]
    if depth:
        yield text[start:]
