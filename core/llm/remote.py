"""`OpenAIChat`: a model behind any server that speaks OpenAI's chat completions, asked patiently and never without end.

Transport is the `openai` library's; retries, waiting and the check of what comes back are here, because a server under
load answers with 429, 500, half a body or a proxy's page, and none of these may reach a method as a reply.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from core.errors import InvalidInput, require
from core.llm.base import Chat
from core.llm.replies import (
    Answer,
    ChatError,
    ChatRefused,
    ChatUnavailable,
    Conversation,
    Prices,
    Settings,
    shorten,
)
from core.llm.wire import Trouble, advice, may_pass, payload, read, retry_after

OPENAI_URL = "https://api.openai.com/v1"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long a request may take: `timeout` seconds an attempt, `total_timeout` for all attempts and the waits between.

    After a failure that may pass, the next attempt comes after `backoff` seconds, doubled each time up to `max_backoff`
    and shortened at random by up to half, but never sooner than the server's Retry-After.
    """

    max_retries: int = 5
    timeout: float = 120.0
    total_timeout: float = 900.0
    backoff: float = 1.0
    max_backoff: float = 60.0

    def __post_init__(self) -> None:
        """Refuse times that are not above zero."""
        if self.max_retries < 0 or not all(
            seconds > 0 for seconds in (self.timeout, self.total_timeout, self.backoff, self.max_backoff)
        ):
            raise InvalidInput(f"Patience needs max_retries >= 0 and times above 0 seconds; got {self}.")

    def wait(self, attempt: int) -> float:
        """Seconds to wait after the failure of attempt 0, 1, ..."""
        # The jitter keeps clients that failed together from coming back together; it touches no result.
        return min(self.max_backoff, self.backoff * 2.0**attempt) * random.uniform(0.5, 1)  # noqa: S311


class OpenAIChat(Chat):
    """A model behind an OpenAI-compatible server; at most `max_concurrency` requests are open at a time.

    The key is `api_key`, else the environment's OPENAI_API_KEY; it is sent to `base_url` and goes nowhere else: not into
    the cache, an error, a log or a pickle.

    When a request fails for good, no new one is started, those that are open may end (and reach the cache), and the error
    is raised: `ChatRefused` when asking again would not help, else `ChatUnavailable`.
    """

    def __init__(
        self,
        model: str,
        base_url: str = OPENAI_URL,
        *,
        api_key: str | None = None,
        max_concurrency: int = 8,
        patience: Patience | None = None,
        cache: Path | str | None = None,
        prices: Prices | None = None,
    ) -> None:
        require("openai", "chat")
        super().__init__(cache=cache, prices=prices)
        if max_concurrency < 1:
            raise InvalidInput(f"max_concurrency must be at least 1; got {max_concurrency}.")
        self.model, self.base_url = model, _checked_url(base_url)
        self.max_concurrency, self.patience = max_concurrency, patience or Patience()
        self._api_key = api_key
        if not self._key and self.base_url == OPENAI_URL:
            raise ChatUnavailable(
                f"{model} at {OPENAI_URL} needs a key: set OPENAI_API_KEY in the environment, or name another server: "
                f"openai:{model}@http://127.0.0.1:8000/v1."
            )

    @property
    def source(self) -> Mapping[str, str]:
        """The model's name and the server's address."""
        return {"model": self.model, "base_url": self.base_url}

    def __getstate__(self) -> dict[str, object]:
        if self._api_key is not None:
            raise InvalidInput(
                "A chat with its key in an argument is not handed to another process; set OPENAI_API_KEY in the "
                "environment instead."
            )
        return self.__dict__

    @property
    def _key(self) -> str:
        key = self._api_key or os.environ.get("OPENAI_API_KEY", "")
        # The transport's complaint about a line break in a header would quote the key.
        if not all("!" <= character <= "~" for character in key):
            raise InvalidInput("The key holds a space, a line break or another character that no key has; check it.")
        return key

    def answers(self, conversations: Sequence[Conversation], settings: Settings) -> Iterator[tuple[int, Answer]]:
        """Each conversation's position and answer, as they arrive. Closing the iterator cancels what is still open."""
        batch = _Batch(self, conversations, settings)
        # A thread of its own, because the caller may have an event loop already (a notebook has).
        thread = Thread(target=lambda: asyncio.run(batch.run()), name=f"asking {self.model}", daemon=True)
        thread.start()
        try:
            while (item := batch.arrivals.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            batch.cancel()
            thread.join()


class _Batch:
    """The requests of one call, asked by `max_concurrency` workers in an event loop."""

    def __init__(self, chat: OpenAIChat, conversations: Sequence[Conversation], settings: Settings) -> None:
        self.chat, self.conversations, self.settings = chat, conversations, settings
        self.arrivals: SimpleQueue[tuple[int, Answer] | BaseException | None] = SimpleQueue()
        self._running: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[None] | None]] = Future()
        self._failure: ChatError | None = None
        self._failed = asyncio.Event()
        self._pause_until = 0.0

    def cancel(self) -> None:
        """Stop everything that is still open; nothing when all has ended."""
        loop, task = self._running.result()
        if task is not None:
            try:
                loop.call_soon_threadsafe(task.cancel)
            except RuntimeError:
                # The loop has ended by itself in the meantime.
                pass

    async def run(self) -> None:
        self._running.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        try:
            openai: Any = require("openai", "chat")
            # The library wants some key; a server without one ignores it.
            client = openai.AsyncOpenAI(
                api_key=self.chat._key or "none", base_url=self.chat.base_url, max_retries=0, timeout=None
            )
            async with client:
                pending = iter(enumerate(self.conversations))
                workers = min(self.chat.max_concurrency, len(self.conversations))
                await asyncio.gather(*(self._work(client, pending) for _ in range(workers)))
        except BaseException as error:
            self.arrivals.put(error)
        else:
            self.arrivals.put(self._failure)

    async def _work(self, client: Any, pending: Iterator[tuple[int, Conversation]]) -> None:
        for index, conversation in pending:
            if self._failed.is_set():
                return
            try:
                self.arrivals.put((index, await self._answer(client, conversation)))
            except ChatError as error:
                self._failure = self._failure or error
                self._failed.set()

    async def _answer(self, client: Any, conversation: Conversation) -> Answer:
        """All samples of one conversation; a server that ignores `n` is asked for the rest, with other seeds."""
        deadline = time.monotonic() + self.chat.patience.total_timeout
        answer = await self._ask(client, conversation, self.settings, deadline)
        while (count := len(answer.replies)) < self.settings.n:
            seed = self.settings.seed
            rest = replace(self.settings, n=self.settings.n - count, seed=None if seed is None else seed + count)
            more = await self._ask(client, conversation, rest, deadline)
            usage = replace(answer.usage + more.usage, requests=1)
            answer = Answer(answer.replies + more.replies, usage)
        return replace(answer, replies=answer.replies[: self.settings.n])

    async def _ask(self, client: Any, conversation: Conversation, settings: Settings, deadline: float) -> Answer:
        patience = self.chat.patience
        for attempt in range(patience.max_retries + 1):
            # A server that asked one request to wait means all of them.
            pause = max(0.0, self._pause_until - time.monotonic())
            if time.monotonic() + pause >= deadline:
                raise self._too_late(conversation, pause, "with the server asking for patience")
            await asyncio.sleep(pause)
            limit = min(patience.timeout, deadline - time.monotonic())
            try:
                async with asyncio.timeout(limit):
                    answer = await self._attempt(client, conversation, settings)
                    return replace(answer, usage=replace(answer.usage, retries=attempt))
            except TimeoutError:
                trouble = Trouble(f"no whole answer within {limit:.3g} s")
            except Trouble as error:
                trouble = error
            what = f"attempt {attempt + 1} failed with {trouble}"
            if attempt == patience.max_retries:
                break
            wait = max(patience.wait(attempt), trouble.retry_after)
            if time.monotonic() + wait >= deadline:
                raise self._too_late(conversation, wait, what)
            if trouble.retry_after:
                self._pause_until = max(self._pause_until, time.monotonic() + wait)
            _log.warning("%s at %s: %s; asking again in %.1f s", self.chat.model, self.chat.base_url, what, wait)
            if await self._failed_within(wait):
                break
        raise self._unavailable(conversation, what)

    async def _failed_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._failed.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _attempt(self, client: Any, conversation: Conversation, settings: Settings) -> Answer:
        openai: Any = require("openai", "chat")
        try:
            raw = await client.chat.completions.with_raw_response.create(
                **payload(self.chat.model, conversation, settings, openai_itself=self.chat.base_url == OPENAI_URL)
            )
        except openai.APIStatusError as error:
            status, body = error.response.status_code, self._redacted(error.response.text)
            if may_pass(status, body):
                raise Trouble(f"HTTP {status}: {shorten(body)!r}", retry_after(error.response.headers)) from None
            raise ChatRefused(
                f"{self._asked(conversation)}: the server refused with HTTP {status}: {shorten(body)!r}. {advice(status)}",
                status,
            ) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise Trouble(self._redacted(f"{type(cause).__name__}: {cause}")) from None
        response = raw.http_response
        return read(response.headers.get("content-type", "unknown"), self._redacted(response.text))

    def _asked(self, conversation: Conversation) -> str:
        question = shorten(self._redacted(conversation[-1]["content"]), 60)
        return f"Asked {self.chat.model} at {self.chat.base_url} for a reply to {question!r}"

    def _too_late(self, conversation: Conversation, wait: float, what: str) -> ChatUnavailable:
        total = f"total_timeout={self.chat.patience.total_timeout:g} s leaves no time to wait another {wait:.3g} s"
        return self._unavailable(conversation, f"{what}, and {total}")

    def _unavailable(self, conversation: Conversation, what: str) -> ChatUnavailable:
        return ChatUnavailable(
            f"{self._asked(conversation)}: {what}. Check that the server runs and is not overloaded, or give more patience "
            "(Patience) or less max_concurrency."
        )

    def _redacted(self, text: str) -> str:
        # Servers quote keys in their complaints. A short one is a placeholder such as EMPTY, and common in prose.
        return text.replace(self.chat._key, "[key]") if len(self.chat._key) >= 8 else text


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise InvalidInput(
            "A server's address holds no user name, password or query, because it is written to caches and errors; give "
            "the key as OPENAI_API_KEY or api_key."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidInput(f"A server's address is like http://127.0.0.1:8000/v1; got {url!r}.")
    return url.rstrip("/")
