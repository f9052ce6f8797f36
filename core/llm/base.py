"""`Chat`: what every model that answers conversations has in common, whether it is local, behind a server or recorded."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import cast, overload

from core.errors import InvalidInput
from core.llm.cache import ReplyFile, Request
from core.llm.replies import Answer, ChatError, Conversation, Prices, Settings, Usage, checked
from core.progress import progress


class Chat(ABC):
    """A model that answers conversations. A subclass says where answers come from (`source`) and gives them (`answers`).

    `usage` sums all requests that were answered; `spent` those of them that were really made, not read from a cache.
    """

    def __init__(self, *, cache: Path | str | None = None, prices: Prices | None = None) -> None:
        self._file = None if cache is None else ReplyFile(cache)
        self._prices = prices
        self.usage = Usage()
        self.spent = Usage()

    @property
    @abstractmethod
    def source(self) -> Mapping[str, str]:
        """What identifies the model, for the cache: its name, and where it runs."""

    @abstractmethod
    def answers(self, conversations: Sequence[Conversation], settings: Settings) -> Iterator[tuple[int, Answer]]:
        """Each conversation's position and answer, as they arrive."""

    @overload
    def complete(
        self,
        messages: Conversation,
        *,
        n: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_tokens: int = 512,
        stop: Sequence[str] = (),
        seed: int | None = None,
        log_probs: bool = False,
    ) -> Answer: ...

    @overload
    def complete(
        self,
        messages: Sequence[Conversation],
        *,
        n: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_tokens: int = 512,
        stop: Sequence[str] = (),
        seed: int | None = None,
        log_probs: bool = False,
    ) -> list[Answer]: ...

    def complete(
        self,
        messages: Conversation | Sequence[Conversation],
        *,
        n: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_tokens: int = 512,
        stop: Sequence[str] = (),
        seed: int | None = None,
        log_probs: bool = False,
    ) -> Answer | list[Answer]:
        """The answer to a conversation, or the answers to a list of conversations in their order.

        Each answer holds `n` samples; the settings are those of `Settings`. Equal conversations of one call are asked
        once, and with a cache a request that was ever answered is not made again, also at a temperature above 0: it
        returns the samples of the first time. More samples are a larger `n` or another `seed`. Every answer is on the
        disk before the next is awaited, so a call that was interrupted goes on where it stopped.

        Raises `InvalidInput` before anything is asked, and `ChatError` when an answer cannot be had.
        """
        if isinstance(messages, str):
            raise InvalidInput('Messages are a list; for one question write [{"role": "user", "content": question}].')
        settings = Settings(n, temperature, top_p, max_tokens, stop, seed, log_probs)
        if not messages or not isinstance(messages[0], Mapping):
            return self._complete_all(cast("Sequence[Conversation]", messages), settings)
        return self._complete_all([cast("Conversation", messages)], settings)[0]

    def _complete_all(self, conversations: Sequence[Conversation], settings: Settings) -> list[Answer]:
        requests = [Request(self.source, checked(conversation), settings) for conversation in conversations]
        keys = [request.key for request in requests]
        distinct = dict(zip(keys, requests, strict=True))
        found = {key: answer for key, request in distinct.items() if (answer := self._recorded(request))}
        missing = [key for key in distinct if key not in found]
        if missing:
            arriving = self.answers([distinct[key].messages for key in missing], settings)
            # Closed here and now, because a traceback that somebody keeps would keep the requests running.
            try:
                with closing(_watched(arriving, len(missing), self._description)) as watched:
                    for i, answer in watched:
                        found[missing[i]] = self._account(distinct[missing[i]], answer)
            except ChatError as error:
                if self._file is not None:
                    error.add_note(
                        f"{len(found)} of {len(distinct)} answers are in {self._file.path}; run again to go on."
                    )
                raise
        priced = {key: replace(answer, usage=answer.usage.priced(self._prices)) for key, answer in found.items()}
        self.usage = sum((answer.usage for answer in priced.values()), self.usage)
        return [priced[key] for key in keys]

    @property
    def _description(self) -> str:
        # What is behind the comma of a provenance would fill the line.
        return f"Asking {self.source['model'].partition(',')[0]}"

    def _recorded(self, request: Request) -> Answer | None:
        return None if self._file is None else self._file.get(request)

    def _account(self, request: Request, answer: Answer) -> Answer:
        if not answer.cached:
            self.spent += answer.usage.priced(self._prices)
            if self._file is not None:
                return self._file.add(request, answer)
        return answer


def _watched(
    arriving: Iterator[tuple[int, Answer]], total: int, description: str
) -> Generator[tuple[int, Answer], None, None]:
    """Yield what arrives, under a progress bar once the pace shows that all of it takes more than two seconds."""
    start, bar = time.monotonic(), None
    with ExitStack() as stack:
        if isinstance(arriving, Generator):
            stack.callback(arriving.close)
        for done, item in enumerate(arriving, start=1):
            yield item
            if bar is not None:
                bar.advance()
            elif (time.monotonic() - start) / done * (total - done) > 2:
                bar = stack.enter_context(progress(description, total))
                bar.advance(done)
