"""Evidence as JSON, and the one self-contained HTML page that shows it.

`render` makes the page of a run from papers and claims; `render_page` makes a page of a package's own in the same
clothes. Nothing in a record is trusted: records are validated, text is escaped, and figures are reduced to shapes. A
policy in the page lets no script run but its own and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from core.errors import InvalidInput
from core.experiment import Comparison, Evidence, Verdict
from core.files import write_atomic
from core.plots import safe_svg, to_svg
from core.typeset import duration, number, numbers, typeset

if TYPE_CHECKING:
    import jinja2
    import pandas as pd
    from markupsafe import Markup

REFRESH_SECONDS = 4
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class PaperCard:
    """A paper as the page introduces it."""

    package: str
    title: str
    venue: str
    arxiv: str
    summary: str
    built: bool


@dataclass(frozen=True)
class ClaimRow:
    """A claim and what is known of it: `status` is waiting, running, done, raised, timed out, died or stale."""

    number: int
    name: str
    statement: str
    explanation: str
    kind: str
    expected: str
    status: str
    evidence: Mapping[str, Any] | None
    error: str
    wall_s: float | None
    cpu_s: float | None
    versions: Mapping[str, str]
    machine: Mapping[str, str]
    preset: str
    contradicts: bool


@dataclass(frozen=True)
class RunState:
    """Where a run stands; `ended` is None while it is on, and the page refreshes itself until then."""

    preset: str
    started: datetime
    ended: datetime | None = None
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a package's own page: a heading, then text, a table and figures (caption to SVG), each if there is one."""

    heading: str
    text: str = ""
    table: pd.DataFrame | None = None
    figures: Mapping[str, str] = field(default_factory=dict)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Interval(_Record):
    estimate: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    level: FiniteFloat = 0.95
    num_seeds: int
    num_items: int | None = None
    method: str


class _Comparison(_Record):
    label: str
    verdict: Verdict
    interval: _Interval
    margin: FiniteFloat
    unit: str = ""


class _Control(_Record):
    description: str
    verdict: Verdict
    comparisons: tuple[_Comparison, ...] = ()


class _Figure(_Record):
    caption: str
    svg: str


class _Table(_Record):
    columns: tuple[str, ...]
    rows: tuple[tuple[bool | int | FiniteFloat | str | None, ...], ...]


class _Evidence(_Record):
    """The shape of evidence in a record, and the check of one that was read from a file."""

    verdict: Verdict
    headline: str
    table: _Table | None = None
    comparisons: tuple[_Comparison, ...] = ()
    control: _Control | None = None
    figures: tuple[_Figure, ...] = ()
    seeds: tuple[int, ...] = ()
    provenance: tuple[str, ...] = ()
    not_run_reason: str = ""


def evidence_to_json(evidence: Evidence) -> dict[str, Any]:
    """Evidence as plain values that JSON can hold: missing cells are None, matplotlib figures are SVG."""
    control = evidence.control
    return {
        "verdict": evidence.verdict.value,
        "headline": evidence.headline,
        "table": None if evidence.table is None else _table_to_json(evidence.table),
        "comparisons": [_comparison_to_json(comparison) for comparison in evidence.comparisons],
        "control": None
        if control is None
        else {
            "description": control.description,
            "verdict": control.verdict.value,
            "comparisons": [_comparison_to_json(comparison) for comparison in control.comparisons],
        },
        "figures": [
            {"caption": caption, "svg": figure if isinstance(figure, str) else to_svg(figure)}
            for caption, figure in evidence.figures.items()
        ],
        "seeds": [int(seed) for seed in evidence.seeds],
        "provenance": list(evidence.provenance),
        "not_run_reason": evidence.not_run_reason,
    }


def _comparison_to_json(comparison: Comparison) -> dict[str, Any]:
    interval = {name: _plain(value) for name, value in asdict(comparison.interval).items()}
    return {
        "label": comparison.label,
        "verdict": comparison.verdict.value,
        "margin": float(comparison.margin),
        "unit": comparison.unit,
        "interval": interval,
    }


def _table_to_json(table: pd.DataFrame) -> dict[str, Any]:
    import pandas as pd

    if not isinstance(table.index, pd.RangeIndex):
        table = table.reset_index()
    columns = [" ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in table.columns]
    return {
        "columns": columns,
        "rows": [[_plain(cell) for cell in row] for row in table.itertuples(index=False, name=None)],
    }


def _plain(value: Any) -> bool | int | float | str | None:
    """The value as JSON has it: numpy's scalars as Python's, anything missing as None, anything else as text."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    import pandas as pd

    return None if value is pd.NA or value is pd.NaT else str(value)


def write_page(path: Path, papers: Sequence[tuple[PaperCard, Sequence[ClaimRow]]], state: RunState) -> None:
    """Write the page of a run to `path`; a reader finds the old page or the new one, never half of one."""
    write_atomic(path, render(papers, state))


def render(papers: Sequence[tuple[PaperCard, Sequence[ClaimRow]]], state: RunState) -> str:
    """The page of a run as HTML: a card a paper, a row a claim. While the run is on it refreshes itself."""
    views = [_PaperView(card, [_claim_view(card, row) for row in rows]) for card, rows in papers]
    claims = [claim for view in views for claim in view.claims]
    now = datetime.now(state.started.tzinfo)
    current = [claim for claim in claims if claim.outcome != "stale"]
    finished, total = sum(claim.finished for claim in current), len(current)
    return _template("report.html").render(
        title=f"tenfold · {finished}/{total} claims" if state.ended is None else "tenfold",
        papers=views,
        counts=_counts(claims),
        finished=finished,
        total=total,
        state=state,
        elapsed=duration(((state.ended or now) - state.started).total_seconds()),
        running=state.ended is None,
        written=now,
        verdicts=_VERDICTS,
        kinds=_KINDS,
    )


def render_page(title: str, intro: str, sections: Sequence[Section]) -> str:
    """A package's own page as HTML, in the style of the report: a title, an introduction and sections.

    Text is escaped and split into paragraphs at empty lines; figures are SVG from `core.plots.to_svg`.
    """
    shown = [
        {
            "heading": section.heading,
            "text": section.text,
            "table": None if section.table is None else _table_view(_Table(**_table_to_json(section.table))),
            "figures": [
                _figure_view(caption, svg, f"s{i}-{j}-") for j, (caption, svg) in enumerate(section.figures.items())
            ],
        }
        for i, section in enumerate(sections)
    ]
    return _template("page.html").render(title=title, intro=intro, sections=shown, running=False)


_VERDICTS = {
    "holds": "The whole 95 % interval lies beyond the margin on the claim's side; or, for an exact claim, the check passed.",
    "fails": "The whole interval lies on the other side, or the check failed.",
    "inconclusive": "The interval contains the margin: these runs cannot tell.",
    "not run": "This machine cannot run it; the row says why.",
}
_KINDS = {
    "exact": "An identity, an equality of bits or an enumeration. One counter-example would end it.",
    "measured": "The method against a named alternative, on trained models or real data.",
    "emulated": "A stand-in plays hardware, a user or a large model.",
    "constructed": "Data made so that the truth is known. It shows the mechanism, not the published result.",
}


@dataclass(frozen=True)
class _ClaimView:
    """A claim as the template shows it."""

    row: ClaimRow
    id: str
    command: str
    outcome: str
    finished: bool
    evidence: _Evidence | None
    headline: str
    error: str
    plots: Sequence[Mapping[str, Any]]
    table: Mapping[str, Any] | None
    figures: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class _PaperView:
    """A paper as the template shows it."""

    card: PaperCard
    claims: Sequence[_ClaimView]

    @property
    def counts(self) -> list[tuple[str, int]]:
        return _counts(self.claims)

    @property
    def finished(self) -> int:
        return sum(claim.finished for claim in self.claims)

    @property
    def arxiv_id(self) -> str:
        """The identifier when it is one: nothing else becomes part of a link."""
        return self.card.arxiv if re.fullmatch(r"\d{4}\.\d{4,5}(v\d+)?", self.card.arxiv) else ""


_OUTCOMES = ("holds", "fails", "inconclusive", "not run", "raised", "timed out", "died", "stale", "running", "waiting")


def _counts(claims: Sequence[_ClaimView]) -> list[tuple[str, int]]:
    """How many claims came out how, in the order of `_OUTCOMES`; the four verdicts are always there."""
    found = Counter(claim.outcome for claim in claims)
    return [(outcome, found[outcome]) for outcome in _OUTCOMES if found[outcome] or outcome in _VERDICTS]


def _claim_view(card: PaperCard, row: ClaimRow) -> _ClaimView:
    error, evidence = row.error, None
    if row.evidence is not None:
        try:
            evidence = _Evidence.model_validate(row.evidence)
        except ValidationError as problem:
            error = f"The record of this claim is damaged; run it again.\n{problem}"
    status = "raised" if row.status == "done" and evidence is None else row.status
    outcome = evidence.verdict.value if status == "done" and evidence else status
    identity = f"{re.sub(r'[^A-Za-z0-9_-]', '', card.package)}-{row.number}"
    headline = evidence.not_run_reason or evidence.headline if evidence else ""
    return _ClaimView(
        row=row,
        id=identity,
        command=f"papers reproduce {card.package}/{row.number} --preset full",
        outcome=outcome if outcome in _OUTCOMES else "stale",
        finished=status not in ("waiting", "running", "stale"),
        evidence=evidence,
        headline=headline or error.strip().rpartition("\n")[2],
        error=error,
        plots=_interval_plots(evidence) if evidence else (),
        table=_table_view(evidence.table) if evidence and evidence.table else None,
        figures=[
            _figure_view(figure.caption, figure.svg, f"{identity}-{i}-") for i, figure in enumerate(evidence.figures)
        ]
        if evidence
        else (),
    )


def _figure_view(caption: str, svg: str, prefix: str) -> dict[str, str]:
    try:
        return {"caption": caption, "svg": safe_svg(svg, prefix), "text": ""}
    except InvalidInput:
        return {"caption": caption, "svg": "", "text": svg}


def _interval_plots(evidence: _Evidence) -> list[dict[str, Any]]:
    """One plot a unit: the intervals of the claim and of its control on a common axis, positions in per cent."""
    found = [(comparison, False) for comparison in evidence.comparisons]
    found += [(comparison, True) for comparison in (evidence.control.comparisons if evidence.control else ())]
    plots = []
    for unit in dict.fromkeys(comparison.unit for comparison, _ in found):
        members = [(comparison, control) for comparison, control in found if comparison.unit == unit]
        # A ratio is judged against a margin such as 10 and has no use for a plus sign.
        signed = all(comparison.margin <= 0 for comparison, _ in members)
        extent = [0.0]
        for comparison, _ in members:
            extent += [comparison.interval.low, comparison.interval.high, comparison.margin]
        low, high = min(extent), max(extent)
        pad = 0.07 * (high - low) or 1.0
        low, high = low - pad, high + pad

        def place(value: float, low: float = low, high: float = high) -> float:
            return round(100 * (value - low) / (high - low), 3)

        rows = []
        for comparison, control in members:
            interval = comparison.interval
            estimate, low_text, high_text = _interval_texts(interval, signed=signed)
            rows.append(
                {
                    "label": comparison.label,
                    "control": control,
                    "verdict": comparison.verdict.value,
                    "estimate": estimate,
                    "low": low_text,
                    "high": high_text,
                    "x": place(interval.estimate),
                    "x_low": place(interval.low),
                    "x_high": place(interval.high),
                    "x_margin": place(comparison.margin),
                    "margin": number(comparison.margin),
                }
            )
        plots.append(
            {
                "unit": unit,
                "rows": rows,
                "zero": place(0.0),
                "ticks": [(place(tick), number(tick)) for tick in _ticks(low, high)],
                "margins": list(dict.fromkeys(row["margin"] for row in rows)),
                "basis": list(dict.fromkeys(_basis(comparison.interval) for comparison, _ in members)),
            }
        )
    return plots


def _interval_texts(interval: _Interval, *, signed: bool) -> tuple[str, str, str]:
    """The estimate and the ends, in as many decimals as the width has meaning: two digits of it."""
    width = interval.high - interval.low
    decimals = 1 - math.floor(math.log10(width)) if width > 0 else -1
    if not 0 <= decimals <= 5:
        return number(interval.estimate, signed=signed), number(interval.low), number(interval.high)
    estimate = f"{interval.estimate:{'+' if signed else ''},.{decimals}f}"
    return typeset(estimate), typeset(f"{interval.low:,.{decimals}f}"), typeset(f"{interval.high:,.{decimals}f}")


def _basis(interval: _Interval) -> str:
    seeds = f"{interval.num_seeds} seed{'' if interval.num_seeds == 1 else 's'}"
    items = "" if interval.num_items is None else f", {number(interval.num_items)} items"
    return f"{number(100 * interval.level)} % interval, {interval.method}, {seeds}{items}"


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between `low` and `high`, about five of them."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _table_view(table: _Table) -> dict[str, Any]:
    columns = [[row[i] if i < len(row) else None for row in table.rows] for i in range(len(table.columns))]
    numeric = [
        all(cell is None or (isinstance(cell, (int, float)) and not isinstance(cell, bool)) for cell in column)
        for column in columns
    ]
    shown = [
        numbers(column) if right else [_text(cell) for cell in column]
        for column, right in zip(columns, numeric, strict=True)
    ]
    return {
        "columns": list(zip(table.columns, numeric, strict=True)),
        "rows": list(zip(*shown, strict=True)),
        "numeric": numeric,
    }


def _text(cell: Any) -> str:
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, (int, float)):
        return number(cell)
    return "–" if cell is None else str(cell)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    script = (TEMPLATES / "script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals.update(
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),  # noqa: S704  (our own file)
        script=Markup(script),  # noqa: S704  (our own file)
        script_hash=f"sha256-{digest}",
        refresh_seconds=REFRESH_SECONDS,
    )
    environment.filters.update(
        duration=duration, paragraphs=_paragraphs, prose=_prose, slug=lambda text: text.replace(" ", "-")
    )
    return environment


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in re.split(r"\n\s*\n", text.strip()) if paragraph]


def _prose(text: str) -> Markup:
    """Text with `code` between backticks, as docstrings have it; everything else is escaped."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`\n]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704  (escaped on this line)


def _template(name: str) -> jinja2.Template:
    return _environment().get_template(name)
