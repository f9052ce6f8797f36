"""Run claims: a fresh worker a package, a live display, one JSON a claim, a page that fills, and exact resume.

Nothing is kept in memory that is not on the disk: a run killed anywhere loses at most the claims that were running.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from core import report
from core.errors import CannotRunHere, InvalidEvidence, TenfoldError, unknown_name
from core.experiment import Evidence, Kind, Preset, Verdict, claims, load_preset
from core.files import sole_writer, write_atomic
from core.machine import machine, versions
from core.parallel import Outcome, Pool, Progressed, Started, Status, Task
from core.records import Record, load_records, record_key, record_path, save_record
from core.report import ClaimRow, PaperCard, RunState


@dataclass(frozen=True)
class Selection:
    """The claims of one package that a run is about: all of them, or those with the given numbers."""

    package: str
    preset: Preset
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class RunSummary:
    """How a run ended. `records` are those of this run, skipped ones included; `broken` names packages that would not
    load.
    """

    records: tuple[Record, ...]
    skipped: int
    page: Path
    broken: tuple[str, ...] = ()

    @property
    def contradictions(self) -> tuple[Record, ...]:
        """Claims that came out against what is expected."""
        return tuple(record for record in self.records if record.contradicts)

    @property
    def failures(self) -> tuple[Record, ...]:
        """Claims that raised, hung or died."""
        return tuple(record for record in self.records if record.status != Status.DONE)

    @property
    def ok(self) -> bool:
        """Whether every claim ran to a verdict and none contradicts what is expected."""
        return not (self.contradictions or self.failures or self.broken)


def select(
    names: Sequence[str],
    built: Sequence[str],
    preset: str,
    assignments: Mapping[str, str],
    num_seeds: int | None = None,
) -> list[Selection]:
    """Selections for names like `sparsity24` and `sparsity24/8` (none: everything that is built).

    A setting goes to every selected package that has it; one that no package has raises `InvalidInput` with the close
    names, and so do an unknown package and an unknown preset.
    """
    numbers: dict[str, list[int]] = {}
    for name in names or built:
        package, slash, number = name.partition("/")
        if package not in built:
            raise unknown_name("package", package, built)
        chosen = numbers.setdefault(package, [])
        if slash:
            if not number.isdecimal():
                raise unknown_name(f"claim of {package}; claims have numbers, as in", number, [f"{package}/1"])
            chosen.append(int(number))
    for package in set(names) & set(numbers):
        # The package as a whole was asked for, whatever single claims stand beside it.
        numbers[package] = []
    presets = {package: load_preset(package, preset) for package in numbers}
    settings = {package: {f.name for f in fields(value)} - {"name"} for package, value in presets.items()}
    for key in assignments:
        if not any(key in known for known in settings.values()):
            raise unknown_name("setting", key, set().union(*settings.values()))
    selections = []
    for package, value in presets.items():
        given = {key: text for key, text in assignments.items() if key in settings[package]}
        if num_seeds is not None:
            given["seeds"] = str(list(range(num_seeds)))
        selections.append(Selection(package, value.with_values(given), tuple(numbers[package])))
    return selections


def run_claims(
    selections: Sequence[Selection],
    cards: Sequence[PaperCard],
    *,
    out: Path,
    jobs: int | None = None,
    ray_address: str | None = None,
    again: bool = False,
    console: Console | None = None,
) -> RunSummary:
    """Run the selected claims, writing records and the page into `out`; claims whose record is up to date are skipped.

    Raises `RunInProgress` when another run writes to `out`, `InvalidInput` for a claim number that a package does not
    have, and `TenfoldError` when `out` cannot be written (what has ended is kept).
    """
    with ExitStack() as stack:
        stack.enter_context(_sole_writer(out))
        console = console or Console()
        run = _Run(selections, cards, out, again, console)
        pool = stack.enter_context(Pool(jobs=jobs, ray_address=ray_address, log_dir=out / "logs"))
        return run.carry_out(pool)


class _Run:
    """One run: the rows of the page, what is running, and the display."""

    def __init__(
        self, selections: Sequence[Selection], cards: Sequence[PaperCard], out: Path, again: bool, console: Console
    ) -> None:
        self.selections = {selection.package: selection for selection in selections}
        self.cards, self.out, self.again, self.console = cards, out, again, console
        self.started = datetime.now(UTC)
        self.records = {(r.package, r.number): r for r in load_records(out, console)}
        # What is still true is shown as it is, whether or not this run is about it.
        current = {package: record_key(package, selection.preset) for package, selection in self.selections.items()}
        self.rows = {
            identity: _row_of(record, fresh=record.key == current.get(record.package))
            for identity, record in self.records.items()
        }
        self.keys: dict[str, str] = {}  # by package
        self.plan: list[tuple[str, int]] = []
        self.skipped = 0
        self.broken: list[str] = []

    def carry_out(self, pool: Pool) -> RunSummary:
        from core.display import RunDisplay

        self.write_page()
        for package in self.selections:
            pool.submit(Task(_describe, (package,), key=package, **self._worker_of(package), time_limit=300))
        note = "Interrupted: start again to resume."
        try:
            with RunDisplay(self.console) as display:
                for event in pool.events():
                    if isinstance(event, Started):
                        display.started(event.task.key)
                        if event.task.function is not _describe:
                            self._running(event.task)
                    elif isinstance(event, Progressed):
                        display.progressed(event.task.key, event.progress)
                    elif event.task.function is _describe:
                        display.ended(event.task.key)
                        self._described(event, pool, display)
                    else:
                        display.ended(event.task.key)
                        self._finished(event, display)
            note = self._skip_note()
        finally:
            self.write_page(ended=datetime.now(UTC), note=note)
        return RunSummary(
            tuple(self.records[key] for key in self.plan if key in self.records),
            self.skipped,
            self.out / "index.html",
            tuple(self.broken),
        )

    def write_page(self, ended: datetime | None = None, note: str | None = None) -> None:
        preset = ", ".join(sorted({selection.preset.name for selection in self.selections.values()}))
        state = RunState(preset=preset, started=self.started, ended=ended, note=note or self._skip_note())
        try:
            report.write_page(self.out / "index.html", _by_paper(self.cards, self.rows), state)
        except OSError as error:
            raise self._cannot_write(self.out / "index.html", error) from error

    def _worker_of(self, package: str) -> dict[str, Any]:
        return {"group": package, "environment": worker_environment(package)}

    def _described(self, outcome: Outcome, pool: Pool, display: Any) -> None:
        package = outcome.task.key
        selection = self.selections[package]
        if outcome.status is not Status.DONE:
            self.broken.append(package)
            display.say(f"[bold red]{package}: its claims could not be loaded[/]\n{outcome.error}")
            return
        known = {description.number: description for description in outcome.value}
        unknown = [number for number in selection.numbers if number not in known]
        if unknown:
            raise unknown_name(f"claim of {package}", str(unknown[0]), [str(number) for number in known])
        skipped = []
        key = self.keys[package] = record_key(package, selection.preset)
        for description in outcome.value:
            if selection.numbers and description.number not in selection.numbers:
                continue
            identity = (package, description.number)
            self.plan.append(identity)
            old = self.records.get(identity)
            if old and old.key == key and old.reusable and not self.again:
                self.rows[identity] = _row_of(old, fresh=True)
                skipped.append(str(description.number))
                continue
            self.rows[identity] = description.row(selection.preset, "waiting")
            worker = self._worker_of(package)
            if description.isolated:
                worker["group"] = None
            pool.submit(
                Task(
                    _run_claim,
                    (package, description.number, selection.preset),
                    key=_task_key(identity),
                    time_limit=description.time_limit,
                    exclusive=description.exclusive,
                    **worker,
                )
            )
        self.skipped += len(skipped)
        if skipped:
            display.say(f"[dim]{package}: unchanged, skipped: {', '.join(skipped)} (--again runs them anyway)[/]")
        display.expect(len(self.plan) - self.skipped)
        self.write_page()

    def _running(self, task: Task) -> None:
        identity = (task.args[0], task.args[1])
        self.rows[identity] = _with_status(self.rows[identity], "running")
        self.write_page()

    def _finished(self, outcome: Outcome, display: Any) -> None:
        package, number, preset = outcome.task.args
        row = self.rows[package, number]
        evidence, where = outcome.value if outcome.status is Status.DONE else (None, machine())
        record = Record(
            key=self.keys[package],
            package=package,
            number=number,
            name=row.name,
            statement=row.statement,
            explanation=row.explanation,
            kind=row.kind,
            expected=row.expected,
            status=str(outcome.status),
            evidence=evidence,
            error=outcome.error,
            wall_s=outcome.wall_s,
            cpu_s=outcome.cpu_s,
            preset=preset.name,
            preset_values=preset.values(),
            versions=versions(),
            machine=where,
            ended=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        try:
            save_record(self.out, record)
        except OSError as error:
            raise self._cannot_write(record_path(self.out, package, number), error) from error
        self.records[package, number] = record
        self.rows[package, number] = _row_of(record, fresh=True)
        display.verdict(record)
        self.write_page()

    def _skip_note(self) -> str:
        return f"{self.skipped} claims unchanged and skipped" if self.skipped else ""

    def _cannot_write(self, path: Path, error: OSError) -> TenfoldError:
        return TenfoldError(
            f"Cannot write {path}: {error.strerror}. The claims that ended before are kept; make room or choose "
            "another folder with --out, and start again to resume."
        )


@dataclass(frozen=True)
class _Description:
    """A claim without its function: what the parent needs to know, so that it never imports a method."""

    number: int
    name: str
    statement: str
    explanation: str
    kind: str
    expected: Mapping[str, str]
    isolated: bool
    exclusive: bool
    time_limit: float

    def row(self, preset: Preset, status: str) -> ClaimRow:
        return ClaimRow(
            number=self.number,
            name=self.name,
            statement=self.statement,
            explanation=self.explanation,
            kind=self.kind,
            expected=self.expected[preset.name],
            status=status,
            evidence=None,
            error="",
            wall_s=None,
            cpu_s=None,
            versions={},
            machine={},
            preset=preset.name,
            contradicts=False,
        )


def _describe(package: str) -> list[_Description]:
    return [
        _Description(
            number=entry.number,
            name=entry.name,
            statement=entry.statement,
            explanation=entry.explanation,
            kind=str(entry.kind),
            expected={name: str(value) for name, value in entry.expected.items()},
            isolated=entry.isolated,
            exclusive=entry.exclusive,
            time_limit=entry.time_limit,
        )
        for entry in claims(package)
    ]


def describe(package: str) -> list[_Description]:
    """The claims of a package, read in a worker with its environment so that this process stays light."""
    with Pool(jobs=1) as pool:
        pool.submit(Task(_describe, (package,), key=package, environment=worker_environment(package), time_limit=300))
        outcome = next(event for event in pool.events() if isinstance(event, Outcome))
    if outcome.status is not Status.DONE:
        raise TenfoldError(f"The claims of {package} cannot be loaded:\n{outcome.error}")
    return list(outcome.value)


def _run_claim(package: str, number: int, preset: Preset) -> tuple[dict[str, Any], dict[str, str]]:
    entry = next(entry for entry in claims(package) if entry.number == number)
    try:
        evidence = entry.function(preset)
    except CannotRunHere as error:
        evidence = Evidence.not_run(str(error))
    if evidence.verdict is not Verdict.NOT_RUN and entry.kind is not Kind.EXACT and evidence.control is None:
        raise InvalidEvidence(f"{package}/{number} is {entry.kind}: its evidence needs a negative control.")
    return report.evidence_to_json(evidence), machine()


def worker_environment(package: str) -> dict[str, str]:
    """The environment that a package declares for its workers (`ENVIRONMENT` in its presets)."""
    return dict(getattr(importlib.import_module(f"{package}.presets"), "ENVIRONMENT", {}))


def write_report(cards: Sequence[PaperCard], out: Path, console: Console | None = None) -> Path:
    """Write the page of the records in `out` again, without running anything."""
    records = load_records(out, console)
    ended = max((datetime.fromisoformat(record.ended) for record in records), default=datetime.now(UTC))
    state = RunState(
        preset=", ".join(sorted({record.preset for record in records})) or "none",
        started=min((datetime.fromisoformat(record.ended) for record in records), default=ended),
        ended=ended,
        note="",
    )
    rows = {(record.package, record.number): _row_of(record, fresh=True) for record in records}
    report.write_page(out / "index.html", _by_paper(cards, rows), state)
    return out / "index.html"


def _by_paper(
    cards: Sequence[PaperCard], rows: Mapping[tuple[str, int], ClaimRow]
) -> list[tuple[PaperCard, list[ClaimRow]]]:
    return [(card, [row for (package, _), row in sorted(rows.items()) if package == card.package]) for card in cards]


def _row_of(record: Record, *, fresh: bool) -> ClaimRow:
    shared = {f.name: getattr(record, f.name) for f in fields(ClaimRow)}
    return ClaimRow(**{**shared, "status": record.status if fresh else "stale"})


def _with_status(row: ClaimRow, status: str) -> ClaimRow:
    return ClaimRow(**{**{f.name: getattr(row, f.name) for f in fields(ClaimRow)}, "status": status})


def _task_key(identity: tuple[str, int]) -> str:
    return f"{identity[0]}/{identity[1]}"


@contextmanager
def _sole_writer(out: Path) -> Iterator[None]:
    """Holds the lock of an output folder; says who has it when it is taken."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TenfoldError(f"Cannot write into {out}: {error.strerror}. Choose a folder with --out.") from error
    writer = out / ".writer"
    who = writer.read_text() if writer.exists() else "another process"
    with sole_writer(out / ".lock", f"{who} is writing to {out}/. Wait for it, or choose another folder with --out."):
        since = datetime.now().astimezone().strftime("%H:%M")
        write_atomic(writer, f"Process {os.getpid()} on {socket.gethostname()}, since {since},")
        yield
