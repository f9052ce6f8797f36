"""Progress of long work: a rich bar in a terminal, an event to the parent inside a worker process.

with progress("Training tiny_llama", total=400) as bar:
bar.advance(note="loss 2.31")

for layer in track(layers, "Pruning"):
...
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


@dataclass(frozen=True)
class ProgressEvent:
    """How far one piece of long work has come; `total` is None when it is unknown."""

    description: str
    completed: float
    total: float | None
    note: str


Sink = Callable[[ProgressEvent], None]
_sink: Sink | None = None


def set_sink(sink: Sink | None) -> None:
    """Send every event of this process to `sink` instead of drawing bars; None draws again."""
    global _sink
    _sink = sink


@runtime_checkable
class Bar(Protocol):
    """One running piece of work."""

    def advance(self, steps: float = 1, note: str = "") -> None:
        """Add `steps` to what is completed, and show `note` behind the bar."""


class _SinkBar:
    # Ten events a second are all that an eye or a log can use.
    _SECONDS_BETWEEN = 0.1

    def __init__(self, sink: Sink, description: str, total: float | None) -> None:
        self._sink, self._description, self._total = sink, description, total
        self._completed, self._last = 0.0, 0.0

    def advance(self, steps: float = 1, note: str = "") -> None:
        self._completed += steps
        now = time.monotonic()
        if now - self._last >= self._SECONDS_BETWEEN or self._completed == self._total:
            self._last = now
            self._sink(ProgressEvent(self._description, self._completed, self._total, note))


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator[Bar]:
    """A bar for the work done inside the `with` block."""
    if _sink is not None:
        _sink(ProgressEvent(description, 0, total, ""))
        yield _SinkBar(_sink, description, total)
    else:
        with _drawn(description, total) as bar:
            yield bar


def track(items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
    """Yield from `items` under a bar."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(description, total) as bar:
        for item in items:
            yield item
            bar.advance()


@contextmanager
def _drawn(description: str, total: float | None) -> Iterator[Bar]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        # A log gets one line, so that nobody watches a silent pipe.
        console.print(f"{description} ...", highlight=False)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total}") if total else TextColumn("{task.completed:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as drawing:
        task = drawing.add_task(description, total=total, note="")

        class _RichBar:
            def advance(self, steps: float = 1, note: str = "") -> None:
                drawing.update(task, advance=steps, note=note)

        yield _RichBar()
