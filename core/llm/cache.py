"""Answers of chat models in a file: one line of JSON for each request, appended whole, never changed.

The same file is a cache (`load_chat(spec, cache=FILE)`) and a recording (`load_chat("replay:FILE")`). A request is the
model, where it runs, the messages and all settings; a key is never part of it. Any number of processes may share a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.data.cache import digest
from core.errors import InvalidInput
from core.llm.replies import Answer, Reply, Settings, Usage, shorten

Source = Mapping[str, str]


@dataclass(frozen=True)
class Request:
    """All that determines an answer: where it comes from (`source`), the messages, the settings."""

    source: Source
    messages: list[dict[str, str]]
    settings: Settings

    @property
    def key(self) -> str:
        """The hash of everything in the request."""
        return digest([json.dumps(_jsonable(self), sort_keys=True)])


class _Tokens(BaseModel):
    model_config = ConfigDict(extra="forbid")

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Record(BaseModel):
    """A line of the file."""

    model_config = ConfigDict(extra="forbid")

    source: dict[str, str]
    messages: list[dict[str, str]]
    settings: Settings
    replies: tuple[Reply, ...] = Field(min_length=1)
    usage: _Tokens


class ReplyFile:
    """The answers that a file holds, read as far as it has been written."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser()
        # Where each line starts and how long it is: the file may be larger than memory.
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0
        self._read_on()

    def __len__(self) -> int:
        return len(self._places)

    def get(self, request: Request) -> Answer | None:
        """The recorded answer to a request, with `cached` set, or None."""
        if request.key not in self._places:
            self._read_on()
        place = self._places.get(request.key)
        return None if place is None else self._read(place)[1]

    def add(self, request: Request, answer: Answer) -> Answer:
        """Append an answer and return it, or the one that another process has recorded for this request meanwhile."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f"{self.path.name}.lock")):
            if found := self.get(request):
                return found
            line = json.dumps(_jsonable(request) | _outcome(answer), ensure_ascii=False).encode() + b"\n"
            with self.path.open("ab+") as file:
                # A process that was killed in mid-line leaves a tail that nobody has read.
                file.truncate(self._end)
                file.seek(max(0, self._end - 1))
                separator = b"" if file.read(1) in (b"", b"\n") else b"\n"
                try:
                    file.write(separator + line)
                    file.flush()
                    os.fsync(file.fileno())
                except BaseException:
                    file.truncate(self._end)
                    raise
            self._read_on()
        return answer

    def records(self) -> Iterator[tuple[Request, Answer]]:
        """Every request and its answer, in the order in which they were recorded."""
        for place in list(self._places.values()):
            yield self._read(place)

    def _read_on(self) -> None:
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size < self._end:
            # Somebody emptied or replaced the file; what was read of it is gone.
            self._places, self._end = {}, 0
        if size == self._end:
            return
        with self.path.open("rb") as file:
            file.seek(self._end)
            for line in file:
                if not line.endswith(b"\n") and not _is_json(line):
                    if not line.startswith(_START[: len(line)]):
                        raise self._unreadable(self._end, line, "it is no JSON")
                    return
                if line.strip():
                    place = (self._end, len(line))
                    self._places.setdefault(self._parsed(place, line)[0].key, place)
                self._end += len(line)

    def _read(self, place: tuple[int, int]) -> tuple[Request, Answer]:
        with self.path.open("rb") as file:
            file.seek(place[0])
            return self._parsed(place, file.read(place[1]))

    def _parsed(self, place: tuple[int, int], line: bytes) -> tuple[Request, Answer]:
        try:
            record = _Record.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise self._unreadable(place[0], line, f"{first['msg']}{f' at {where}' if where else ''}") from error
        request = Request(record.source, record.messages, record.settings)
        return request, Answer(record.replies, Usage(requests=1, **record.usage.model_dump()), cached=True)

    def _unreadable(self, start: int, line: bytes, why: str) -> InvalidInput:
        with self.path.open("rb") as file:
            number = file.read(start).count(b"\n") + 1
        return InvalidInput(
            f"{self.path}, line {number}: no recorded answer ({why}): {shorten(line.decode(errors='replace'), 80)!r}. "
            "Delete the line, or give another file."
        )


# Every line that `add` writes begins so; a file of something else is refused, not overwritten.
_START = b'{"source": '


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _jsonable(request: Request) -> dict[str, Any]:
    settings = asdict(request.settings)
    # 0 and 0.0 are one temperature and must be one key.
    settings |= {"temperature": float(settings["temperature"]), "top_p": float(settings["top_p"])}
    return {"source": dict(request.source), "messages": request.messages, "settings": settings}


def _outcome(answer: Answer) -> dict[str, Any]:
    usage = {"prompt_tokens": answer.usage.prompt_tokens, "completion_tokens": answer.usage.completion_tokens}
    return {"replies": [asdict(reply) for reply in answer.replies], "usage": usage}


def nearest_difference(request: Request, recorded: Iterator[Request]) -> str:
    """In what the most similar of the recorded requests differs, as the end of a sentence."""
    nearest = max(recorded, key=lambda other: _likeness(request, other), default=None)
    if nearest is None:
        return "it holds none at all"
    asked, known = (_jsonable(r)["settings"] for r in (request, nearest))
    differences = [
        f"{name} is {asked[name]!r} here, {known[name]!r} there" for name in asked if asked[name] != known[name]
    ]
    here, there = ([message["role"] for message in r.messages] for r in (request, nearest))
    if here != there:
        differences.append(f"the messages are of {', '.join(here)} here, of {', '.join(there)} there")
        return f"the nearest differs: {'; '.join(differences)}"
    for i, (message, other) in enumerate(zip(request.messages, nearest.messages, strict=True)):
        a, b = message["content"], other["content"]
        if a != b:
            at = _common(a, b)
            differences.append(
                f"message {i} ({message['role']}) from character {at} on is {shorten(a[at:], 60)!r} here, "
                f"{shorten(b[at:], 60)!r} there"
            )
            break
    return f"the nearest differs: {'; '.join(differences)}"


def _likeness(request: Request, other: Request) -> tuple[float, int]:
    """How much of the messages agrees, counted from the last one, then how many settings do."""
    pairs = zip(reversed(request.messages), reversed(other.messages), strict=False)
    agreeing = sum(_agreement(a["content"], b["content"]) for a, b in pairs if a["role"] == b["role"])
    settings = zip(asdict(request.settings).values(), asdict(other.settings).values(), strict=True)
    return agreeing / max(len(request.messages), len(other.messages)), sum(a == b for a, b in settings)


def _agreement(a: str, b: str) -> float:
    longest = max(len(a), len(b), 1)
    return 1.0 if a == b else min(_common(a, b) + _common(a[::-1], b[::-1]), longest - 1) / longest


def _common(a: str, b: str) -> int:
    """How many characters two texts share at the beginning, by bisection: they may be long and many."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low
