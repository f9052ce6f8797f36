"""What a run of claims shows in the terminal: a line a verdict, and below it what is going on now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from core.experiment import Verdict
from core.progress import ProgressEvent

if TYPE_CHECKING:
    from core.records import Record

STYLES = {
    Verdict.HOLDS: ("✓", "green"),
    Verdict.FAILS: ("✗", "red"),
    Verdict.INCONCLUSIVE: ("~", "yellow"),
    Verdict.NOT_RUN: ("-", "dim"),
}


class RunDisplay:
    """A live display in a terminal; plain lines elsewhere. One bar for the run, one for each running claim."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}", style="dim"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._claims = self._progress.add_task("claims", total=None, note="")
        self._expected = self._done = 0
        self._running: dict[str, TaskID] = {}

    def __enter__(self) -> RunDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, markup: str) -> None:
        """Print a line above the bars."""
        self._console.print(markup, highlight=False)

    def expect(self, total: int) -> None:
        """So many claims are to be run."""
        self._expected = total
        self._show_total()

    def started(self, key: str) -> None:
        """A claim, or the loading of a package, has begun."""
        self._running[key] = self._progress.add_task(key, total=None, note="starting")

    def progressed(self, key: str, event: ProgressEvent) -> None:
        """Long work inside a claim has come further."""
        if key in self._running:
            note = f"{event.description} {event.note}".strip()
            self._progress.update(self._running[key], total=event.total, completed=event.completed, note=note)

    def ended(self, key: str) -> None:
        """A claim, or the loading of a package, has ended."""
        self._progress.remove_task(self._running.pop(key))

    def verdict(self, record: Record) -> None:
        """Print what came of a claim."""
        self._done += 1
        self._show_total()
        if record.evidence is None:
            mark, style, outcome = "!", "bold red", record.status
            text = record.error.strip().splitlines()[-1] if record.error.strip() else ""
        else:
            found = Verdict(record.evidence["verdict"])
            mark, style = STYLES[found]
            outcome, text = str(found), record.evidence["not_run_reason"] or record.evidence["headline"]
        news = "  [bold red](expected: " + record.expected + ")[/]" if record.contradicts else ""
        where = f"{record.package}/{record.number}"
        self.say(
            f"[{style}]{mark} {outcome:<12}[/] [bold]{where:<16}[/] {escape(text)} [dim]{record.wall_s:.1f} s[/]{news}"
        )

    def _show_total(self) -> None:
        note = f"{self._done} of {self._expected}"
        self._progress.update(self._claims, total=self._expected or None, completed=self._done, note=note)
