"""Claims, evidence and verdicts: the only experiment framework.

A claim is a function `preset -> Evidence` with the number it has in the method reference. A verdict about numbers comes
from `verdict(differences)`, an interval over seeds; a verdict about an identity comes from `Verdict.of(truth)`.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from core.errors import InvalidEvidence, InvalidInput, unknown_name
from core.metrics.statistics import Interval, cluster_bootstrap_interval, t_interval

if TYPE_CHECKING:
    import pandas as pd

MIN_SEEDS = 5
P = TypeVar("P", bound="Preset")


class Verdict(StrEnum):
    """What the evidence says about a claim."""

    HOLDS = "holds"
    FAILS = "fails"
    INCONCLUSIVE = "inconclusive"
    NOT_RUN = "not run"

    @classmethod
    def of(cls, truth: bool) -> Verdict:
        """The verdict of an exact check: it holds or it fails."""
        return cls.HOLDS if truth else cls.FAILS

    @classmethod
    def all_of(cls, verdicts: Iterable[Verdict]) -> Verdict:
        """The verdict on a conjunction: any part that fails decides, then any part that does not hold."""
        parts = list(verdicts)
        if not parts:
            raise InvalidEvidence("A conjunction of no verdicts says nothing; give at least one.")
        for decisive in (cls.FAILS, cls.NOT_RUN, cls.INCONCLUSIVE):
            if decisive in parts:
                return decisive
        return cls.HOLDS


class Kind(StrEnum):
    """What the evidence is worth."""

    EXACT = "exact"
    MEASURED = "measured"
    EMULATED = "emulated"
    CONSTRUCTED = "constructed"


@dataclass(frozen=True)
class Comparison:
    """An interval of differences in the claim's favour, against a margin, and the verdict that follows from it."""

    label: str
    verdict: Verdict
    interval: Interval
    margin: float
    unit: str = ""


def verdict(differences: Sequence[ArrayLike], margin: float = 0.0, *, label: str = "", unit: str = "") -> Comparison:
    """Judge paired differences, positive where the claim is right, by a two-sided 95 % interval.

    One number a seed gives a t-interval. One sequence of items a seed gives a cluster bootstrap of items within seeds.
    *Holds* when the whole interval is above `margin`, *fails* when it is below, else *inconclusive*; a negative margin
    asks for non-inferiority. Raises `InvalidEvidence` on fewer than five seeds (a shorter interval is not to be
    trusted) and on NaN or infinite differences. Differences that are all the same number are *inconclusive*.
    """
    if len(differences) < MIN_SEEDS:
        raise InvalidEvidence(
            f"A verdict needs at least {MIN_SEEDS} seeds and got {len(differences)}. Run with --seeds {MIN_SEEDS}."
        )
    one_number_a_seed = all(np.ndim(value) == 0 for value in differences)
    interval = t_interval(np.asarray(differences)) if one_number_a_seed else cluster_bootstrap_interval(differences)
    if one_number_a_seed and np.ptp(np.asarray(differences, dtype=float)) == 0:
        # Seeds that do not vary are one observation, however often it is written down.
        outcome = Verdict.INCONCLUSIVE
    elif interval.low > margin:
        outcome = Verdict.HOLDS
    elif interval.high < margin:
        outcome = Verdict.FAILS
    else:
        outcome = Verdict.INCONCLUSIVE
    return Comparison(label=label, verdict=outcome, interval=interval, margin=margin, unit=unit)


@dataclass(frozen=True)
class Control:
    """The negative control: the method replaced by its null, measured in the same run. It must not hold."""

    description: str
    verdict: Verdict
    comparisons: tuple[Comparison, ...] = ()

    @classmethod
    def of(cls, description: str, *comparisons: Comparison) -> Control:
        """A control of several parts: it holds as soon as one of them does."""
        parts = [comparison.verdict for comparison in comparisons]
        return cls(description, Verdict.HOLDS if Verdict.HOLDS in parts else Verdict.all_of(parts), comparisons)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What one run of a claim found.

    `table` has one row a thing measured; a cell that was not measured is `pd.NA`, never NaN. `figures` maps a caption
    to a matplotlib figure made by `core.plots`, or to its SVG. `provenance` says where each model and data set came
    from. Raises `InvalidEvidence` when a number is NaN or infinite, or when a verdict that was not run has no reason.
    """

    verdict: Verdict
    headline: str
    table: pd.DataFrame | None = None
    comparisons: tuple[Comparison, ...] = ()
    control: Control | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    provenance: tuple[str, ...] = ()
    not_run_reason: str = ""

    def __post_init__(self) -> None:
        """Refuse evidence that cannot be believed."""
        if (self.verdict is Verdict.NOT_RUN) != bool(self.not_run_reason):
            raise InvalidEvidence(
                "`not_run_reason` says in one sentence why, when and only when the verdict is not run."
            )
        if self.table is not None:
            _refuse_nan(self.table)

    @classmethod
    def not_run(cls, reason: str, *, table: pd.DataFrame | None = None) -> Evidence:
        """Evidence that there is none: the claim cannot run here, for a reason that fits in one sentence."""
        return cls(verdict=Verdict.NOT_RUN, headline="Not run", not_run_reason=reason, table=table)


def _refuse_nan(table: pd.DataFrame) -> None:
    for column in table.columns:
        for row, value in table[column].items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InvalidEvidence(
                    f"Evidence column {column!r}, row {row!r} is {value}. A quantity that was not measured is pd.NA in a "
                    "nullable column (dtype Float64); one that came out NaN is a failure to be found."
                )


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A scale: which models, data, sizes and seeds. Packages subclass it with their own fields."""

    name: str
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def __post_init__(self) -> None:
        """Refuse seeds with which no verdict is possible, before any work."""
        if len(set(self.seeds)) != len(self.seeds) or len(self.seeds) < MIN_SEEDS:
            raise InvalidInput(
                f"{self.name}: a verdict needs at least {MIN_SEEDS} seeds, all different, and got {self.seeds}. "
                f"Say --seeds {MIN_SEEDS} or more."
            )

    def with_values(self: P, assignments: Mapping[str, str]) -> P:
        """A copy with fields set from strings (`--set key=value`), read as YAML and checked against their types.

        Raises `InvalidInput` naming the closest fields for an unknown key, and the type for a value that does not fit.
        """
        import yaml
        from pydantic import TypeAdapter, ValidationError

        types = inspect.get_annotations(type(self), eval_str=True)
        for base in type(self).__mro__[1:-1]:
            types = {**inspect.get_annotations(base, eval_str=True), **types}
        known = {f.name for f in fields(self)} - {"name"}
        values = {}
        for key, text in assignments.items():
            if key not in known:
                raise unknown_name(f"setting of the {self.name} preset", key, known)
            try:
                values[key] = TypeAdapter(types[key]).validate_python(yaml.safe_load(text))
            except (ValidationError, yaml.YAMLError) as error:
                raise InvalidInput(f"--set {key}={text}: the value does not fit `{types[key]}` ({error})") from error
        return replace(self, **values)

    def values(self) -> dict[str, Any]:
        """Every field, for the record."""
        return asdict(self)


ClaimFunction = Callable[[Any], Evidence]


@dataclass(frozen=True)
class Claim:
    """One statement of a paper and the experiment that tests it."""

    package: str
    number: int
    kind: Kind
    statement: str
    expected: Mapping[str, Verdict]
    function: ClaimFunction
    isolated: bool
    exclusive: bool
    time_limit: float

    @property
    def name(self) -> str:
        """The function's name, in words."""
        return self.function.__name__.replace("_", " ")

    @property
    def explanation(self) -> str:
        """The function's docstring: how it is tested, and the reason for what is expected."""
        return inspect.getdoc(self.function) or ""


_registry: dict[tuple[str, int], Claim] = {}


def claim(
    package: str,
    number: int,
    *,
    kind: str,
    statement: str,
    expected: str | Mapping[str, str] = "holds",
    isolated: bool = False,
    exclusive: bool = False,
    time_limit: float = 600.0,
) -> Callable[[ClaimFunction], ClaimFunction]:
    """Register a function `preset -> Evidence` as the claim `number` of the method reference.

    `expected` is one verdict, or one a preset name. `isolated` asks for a process of its own, `exclusive` for a machine
    on which nothing else of this run goes on; `time_limit` is in wall seconds.
    """

    def register(function: ClaimFunction) -> ClaimFunction:
        key = (package, number)
        if key in _registry and _registry[key].function.__qualname__ != function.__qualname__:
            raise InvalidInput(f"Claim {number} of {package} is declared twice.")
        by_preset = expected if isinstance(expected, Mapping) else dict.fromkeys(("quick", "real", "full"), expected)
        _registry[key] = Claim(
            package=package,
            number=number,
            kind=Kind(kind),
            statement=statement,
            expected={name: Verdict(value) for name, value in by_preset.items()},
            function=function,
            isolated=isolated,
            exclusive=exclusive,
            time_limit=time_limit,
        )
        return function

    return register


def claims(package: str) -> tuple[Claim, ...]:
    """The claims of a package in the order in which they run: exact ones first, then by number."""
    importlib.import_module(f"{package}.claims")
    found = [entry for (name, _), entry in _registry.items() if name == package]
    return tuple(sorted(found, key=lambda entry: (entry.kind is not Kind.EXACT, entry.number)))


def contradicts(kind: Kind, expected: Verdict, found: Verdict) -> bool:
    """Whether a verdict is news: an exact claim not as expected, or an empirical one on the opposite side."""
    if found is Verdict.NOT_RUN:
        return False
    if kind is Kind.EXACT:
        return found is not expected
    return {expected, found} == {Verdict.HOLDS, Verdict.FAILS}


def load_preset(package: str, name: str) -> Preset:
    """The preset `quick`, `real` or `full` of a package (`<package>/presets.py`)."""
    module = importlib.import_module(f"{package}.presets")
    presets = {value.name: value for value in vars(module).values() if isinstance(value, Preset)}
    if name not in presets:
        raise unknown_name(f"preset of {package}", name, presets)
    return presets[name]
