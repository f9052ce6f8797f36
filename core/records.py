"""The record of a claim: one JSON file each, the key under which it may be reused, and reading what is there.

A record whose key still fits is skipped by the next run; a file that is no record is set aside, never deleted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from core.data import catalog
from core.data.cache import files_digest
from core.errors import CannotRunHere
from core.experiment import Kind, Preset, Verdict, contradicts
from core.files import write_atomic
from core.machine import versions
from core.parallel import Status

SCHEMA = "tenfold.record/1"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of one claim after it ran: the content of `results/<package>/<number>.json`."""

    schema: str = SCHEMA
    key: str
    package: str
    number: int
    name: str
    statement: str
    explanation: str
    kind: str
    expected: str
    status: str
    evidence: dict[str, Any] | None
    error: str
    wall_s: float
    cpu_s: float | None
    preset: str
    preset_values: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, str]
    ended: str

    @property
    def verdict(self) -> Verdict | None:
        """The verdict, or None when the claim raised, hung or died."""
        return Verdict(self.evidence["verdict"]) if self.evidence else None

    @property
    def contradicts(self) -> bool:
        """Whether the verdict is not the expected one, in the sense of `core.experiment.contradicts`."""
        return self.verdict is not None and contradicts(Kind(self.kind), Verdict(self.expected), self.verdict)

    @property
    def reusable(self) -> bool:
        """Whether a run with the same key may skip this claim; what could not run is always tried again."""
        return self.status == Status.DONE and self.verdict is not Verdict.NOT_RUN


def save_record(out: Path, record: Record) -> None:
    """Write a record to its place below `out`; a failed write leaves the old one."""
    path = record_path(out, record.package, record.number)
    write_atomic(path, json.dumps(asdict(record), indent=1, allow_nan=False))


def record_path(out: Path, package: str, number: int) -> Path:
    """Where the record of a claim is."""
    return out / package / f"{number}.json"


def record_key(package: str, preset: Preset) -> str:
    """What the verdicts of a package depend on: the code of the package and of core, the preset, the versions, and the data."""
    code = {}
    for name in ("core", package):
        spec = importlib.util.find_spec(name)
        folder = Path(next(iter(spec.submodule_search_locations or ()))) if spec else Path()
        code[name] = files_digest(sorted(folder.rglob("*.py")))
    values = preset.values()
    specs = {text for value in values.values() for text in _strings(value) if catalog.is_spec(text)}
    data = {}
    for spec_name in sorted(specs):
        try:
            data[spec_name] = catalog.fingerprint(spec_name)
        except CannotRunHere as error:
            data[spec_name] = f"unavailable: {error}"
    identity = [SCHEMA, package, code, values, versions(), data]
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [text for item in value for text in _strings(item)] if isinstance(value, (list, tuple)) else []


def load_records(out: Path, console: Console | None = None) -> list[Record]:
    """The records in `out`. A file that is not one is set aside as `<name>.unreadable`, and said so."""
    records = []
    for path in sorted(out.glob("*/*.json")):
        if not path.stem.isdigit():
            continue
        try:
            values = json.loads(path.read_text())
            if values["schema"] != SCHEMA or (values["package"], values["number"]) != (
                path.parent.name,
                int(path.stem),
            ):
                raise ValueError(f"it is not the record of {path.parent.name}/{path.stem}")
            record = Record(**values)
            # Also what it says must make sense, or it would fail later, in the middle of a run.
            _ = record.contradicts
            records.append(record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            aside = path.with_suffix(".json.unreadable")
            path.replace(aside)
            if console:
                console.print(f"[yellow]{path} could not be read ({error}); kept as {aside.name}.[/]")
    return records
