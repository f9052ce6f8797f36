"""All methods on one model: each recipe prunes the same dense model on the same calibration draws (reference 5 and 6).

comparison = compare("testbed:tiny_llama", Path("compared"), recipes=("wanda", "sparsegpt+cg", "prox-fast+cg"))
print(comparison.table())

Every pruned model leaves one JSON file, so that an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from core.errors import CheckpointError, InvalidInput, unknown_name
from core.files import sole_writer, write_atomic
from core.llm.causal import CausalLM
from core.machine import versions
from core.metrics.statistics import t_interval
from core.progress import progress
from sparsity24.calibration import excerpt, random_sequences
from sparsity24.evaluation import TokenizedText, cloze, load_text, tokenized
from sparsity24.methods import METHODS, as_method
from sparsity24.model import PruneReport, prune_model
from sparsity24.refinement import check_settings

DENSE = "dense"

# Where refinement has settled to within a few per cent (reference 3.4); gradient descent as often as the paper's tables.
DEFAULT_STEPS = {"cg": 20, "nesterov": 30, "gd": 100, "exact": 0}

DEFAULT_RECIPES = (
    "magnitude",
    "wanda",
    "dsnot",
    "sparsegpt",
    "admm",
    "alps",
    "wanda+cg",
    "sparsegpt+cg",
    "admm+cg",
    "alps+cg",
    "prox+cg",
    "prox-fast+cg",
)
"""What is compared unless something else is asked: every method as published, and the stronger ones refined."""


@dataclass(frozen=True)
class Recipe:
    """A method by its name in `METHODS`, and the refinement of its weights ("none" leaves them)."""

    method: str
    refine: str = "none"
    steps: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before any model is pruned."""
        as_method(self.method)
        check_settings(self.refine, self.steps, tol=0.0)

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The recipe written `method`, `method+refinement` or `method+refinement:steps`, as in `wanda+gd:100`."""
        method, plus, rest = text.partition("+")
        refine, colon, steps = rest.partition(":")
        if not method or (plus and not refine) or (colon and not steps.isdecimal()):
            raise InvalidInput(
                f"A recipe is `method`, `method+refinement` or `method+refinement:steps`, such as wanda+gd:100; got {text!r}."
            )
        if refine and refine not in DEFAULT_STEPS:
            raise unknown_name("refinement", refine, DEFAULT_STEPS)
        if not refine:
            return cls(method)
        return cls(method, refine, int(steps) if colon else DEFAULT_STEPS[refine])

    def __str__(self) -> str:
        """The recipe as `parse` takes it; steps that are the default are left out."""
        if self.refine == "none":
            return self.method
        steps = "" if self.steps == DEFAULT_STEPS[self.refine] else f":{self.steps}"
        return f"{self.method}+{self.refine}{steps}"


@dataclass(frozen=True)
class Run:
    """One model, dense or pruned: log-perplexity on every text, cloze scores, and how the pruning went.

    `seconds` is the whole pruning without loading and evaluating; `cloze` holds accuracy and mean choice log-likelihood.
    """

    recipe: str
    draw: int
    nll: dict[str, float]
    num_windows: dict[str, int]
    cloze: tuple[float, float] | None
    report: PruneReport | None

    def to_json(self) -> str:
        """The run as JSON text."""
        values = {**asdict(self), "report": None if self.report is None else self.report.to_dict()}
        return json.dumps(values, indent=1)

    @classmethod
    def read(cls, path: Path) -> Run:
        """The run that a file holds; raises `CheckpointError` on one that is damaged."""
        try:
            values = json.loads(path.read_text())
            report = None if values["report"] is None else PruneReport.from_dict(values["report"])
            scores = None if values["cloze"] is None else tuple(values["cloze"])
            return cls(**{**values, "report": report, "cloze": scores})
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is no run of a comparison ({error}). Remove it to have it run again."
            ) from error


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: a run for every recipe and draw, that of the dense model, and the settings of them all."""

    settings: Mapping[str, Any]
    recipes: tuple[str, ...]
    reference: str
    dense: Run
    runs: tuple[Run, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The data sets that perplexity was measured on."""
        return tuple(self.settings["texts"])

    def of(self, recipe: str) -> list[Run]:
        """The runs of a recipe, one a draw."""
        return [run for run in self.runs if run.recipe == recipe]

    def table(self) -> pd.DataFrame:
        """A row a recipe, the dense model first; means over the draws.

        For every text its perplexity (of the mean log), and log ratio of the perplexity to that of the reference recipe
        on the same draws (negative is better) with the ends of its 95 % t-interval, which needs three draws. Losses are
        means over the layers, after and before refinement. `solve_s` is the time in the methods and refinements, `total_s`
        also the forward passes and Grams.
        """
        rows = [self._row(DENSE, [self.dense]), *(self._row(recipe, self.of(recipe)) for recipe in self.recipes)]
        return pd.DataFrame(rows).dropna(axis=1, how="all")

    def _row(self, recipe: str, runs: Sequence[Run]) -> dict[str, Any]:
        row: dict[str, Any] = {"recipe": recipe, "draws": len(runs)}
        for text in self.texts:
            row[f"perplexity {text}"] = math.exp(np.mean([run.nll[text] for run in runs]))
            row |= self._ratio(recipe, runs, text)
        reports = [run.report for run in runs if run.report is not None]
        row["rel_loss"] = _mean([report.mean_rel_loss for report in reports])
        row["mask_rel_loss"] = _mean([layer.mask_rel_loss for report in reports for layer in report.layers])
        row["solve_s"] = _mean([report.solve_seconds for report in reports])
        row["total_s"] = _mean([report.seconds for report in reports])
        scores = [run.cloze for run in runs if run.cloze is not None]
        row["cloze accuracy"] = _mean([accuracy for accuracy, _ in scores])
        row["cloze log-likelihood"] = _mean([log_likelihood for _, log_likelihood in scores])
        return row

    def _ratio(self, recipe: str, runs: Sequence[Run], text: str) -> dict[str, float]:
        names = [f"log ratio {text}", f"low {text}", f"high {text}"]
        if recipe in (DENSE, self.reference):
            return dict.fromkeys(names, math.nan)
        others = {run.draw: run.nll[text] for run in self.of(self.reference)}
        differences = [run.nll[text] - others[run.draw] for run in runs]
        if len(differences) < 3:
            return dict(zip(names, (_mean(differences), math.nan, math.nan), strict=True))
        interval = t_interval(differences)
        return dict(zip(names, (interval.estimate, interval.low, interval.high), strict=True))

    def layer_table(self) -> pd.DataFrame:
        """A row a layer in the order of pruning, a column a recipe: its relative loss, mean over the draws."""
        names = [layer.name for layer in _report(self.runs[0]).layers]
        return pd.DataFrame({"layer": names, **{recipe: self.layer_losses(recipe) for recipe in self.recipes}})

    def layer_losses(self, recipe: str) -> NDArray[np.float64]:
        """The relative loss of every layer, mean over the draws."""
        return np.mean([[layer.rel_loss for layer in _report(run).layers] for run in self.of(recipe)], axis=0)

    def write(self, output_dir: Path) -> Path:
        """Write `index.html`, `table.csv`, `layers.csv` and `table.md` into a folder; the path of the page."""
        from sparsity24.comparison_page import write_page

        return write_page(self, output_dir)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _report(run: Run) -> PruneReport:
    if run.report is None:
        raise CheckpointError(
            f"The run of {run.recipe} on draw {run.draw} holds no report. Remove its file to have it again."
        )
    return run.report


def compare(
    model: str | Callable[[], CausalLM],
    output_dir: Path,
    *,
    recipes: Sequence[str] = DEFAULT_RECIPES,
    draws: Sequence[int] = (0, 1, 2),
    calibration: str = "embedded:corpus",
    calibration_split: str | None = None,
    num_sequences: int = 128,
    calibration_window: int | None = None,
    texts: Sequence[str] = ("embedded:corpus",),
    window: int | None = None,
    max_windows: int | None = None,
    cloze_items: int = 0,
    skip: Sequence[str] = (),
    reference: str | None = None,
    device: str | None = None,
) -> Comparison:
    """Prune one dense model by every recipe on every calibration draw, and measure what is left of it.

    `model` is a spec of `CausalLM.load`, or something that gives the model. Recipes are written as `Recipe.parse` takes
    them; `reference` is the one that others are compared with (default: `sparsegpt` where it is among them, else the
    first). Perplexity follows the protocol of each text (`sparsity24.evaluation`); windows None are 2048 or the model's
    context. `cloze_items` above 0 also asks the offline zero-shot proxy, on the first text.

    Each pruned model leaves `runs/RECIPE-DRAW.json` in `output_dir`, and a later call goes on from what it finds there;
    recipes and draws may be added, everything else must be as it was. One copy of the model is in memory besides the
    dense one. Raises `InvalidInput` on settings that cannot work or that differ from those of the folder, and
    `RunInProgress` when another process is writing to it.
    """
    wanted = tuple(dict.fromkeys(str(Recipe.parse(recipe)) for recipe in recipes))
    _check(wanted, draws, texts, num_sequences, cloze_items)
    baseline = _reference(wanted, reference)
    output_dir.mkdir(parents=True, exist_ok=True)
    busy = f"Another comparison is writing to {output_dir}. Wait for it, or choose another folder."
    with sole_writer(output_dir / ".lock", busy):
        lm = CausalLM.load(model, device=device) if isinstance(model, str) else model()
        bench = _Bench.prepare(
            lm,
            calibration,
            calibration_split,
            texts,
            num_sequences,
            calibration_window,
            window,
            max_windows,
            cloze_items,
            skip,
        )
        _same_settings(output_dir / "settings.json", bench.settings)
        jobs = [(DENSE, 0), *((recipe, int(draw)) for draw in dict.fromkeys(draws) for recipe in wanted)]
        found = []
        with progress(f"Comparing {len(wanted)} recipes on {len(set(draws))} draws", total=len(jobs)) as bar:
            for recipe, draw in jobs:
                path = output_dir / "runs" / f"{recipe.replace(':', '-')}-{draw}.json"
                if not path.exists():
                    write_atomic(path, bench.run(recipe, draw).to_json())
                found.append(Run.read(path))
                bar.advance(note=f"{recipe}, draw {draw}: perplexity {math.exp(found[-1].nll[texts[0]]):.4g}")
    return Comparison(bench.settings, wanted, baseline, found[0], tuple(found[1:]))


def _check(
    recipes: Sequence[str], draws: Sequence[int], texts: Sequence[str], num_sequences: int, cloze_items: int
) -> None:
    if not recipes or not draws or not texts or min(draws) < 0:
        raise InvalidInput(
            f"A comparison needs recipes, texts and draws >= 0; got {list(recipes)}, {list(texts)}, {list(draws)}. Methods: "
            f"{', '.join(METHODS)}."
        )
    if num_sequences < 1 or cloze_items < 0:
        raise InvalidInput(
            f"num_sequences must be at least 1 and cloze_items 0; got {num_sequences} and {cloze_items}."
        )


def _reference(recipes: Sequence[str], given: str | None) -> str:
    if given is None:
        return "sparsegpt" if "sparsegpt" in recipes else recipes[0]
    name = str(Recipe.parse(given))
    if name not in recipes:
        raise InvalidInput(f"The reference {name} is not among the recipes {', '.join(recipes)}. Add it to them.")
    return name


def _same_settings(path: Path, settings: Mapping[str, Any]) -> None:
    if not path.exists():
        write_atomic(path, json.dumps(settings, indent=1))
        return
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}). Choose another folder, or remove this one.") from error
    different = [key for key in settings if before.get(key) != settings[key]]
    if different:
        changes = "; ".join(f"{key} was {before.get(key)!r} and is {settings[key]!r}" for key in different)
        raise InvalidInput(
            f"{path.parent} holds a comparison with other settings: {changes}. Choose another folder, or remove this one."
        )


@dataclass(frozen=True)
class _Bench:
    """The dense model and all that does not change between runs."""

    lm: CausalLM
    calibration: torch.Tensor
    texts: dict[str, TokenizedText]
    settings: dict[str, Any]

    @classmethod
    def prepare(
        cls,
        lm: CausalLM,
        calibration: str,
        calibration_split: str | None,
        texts: Sequence[str],
        num_sequences: int,
        calibration_window: int | None,
        window: int | None,
        max_windows: int | None,
        cloze_items: int,
        skip: Sequence[str],
    ) -> _Bench:
        loaded = load_text(calibration, calibration_split, default="train")
        prepared = {text: tokenized(lm, text) for text in texts}
        context = lm.context_length or 2048
        given = {"calibration_window": calibration_window, "window": window}
        sizes = {name: min(2048, context) if size is None else size for name, size in given.items()}
        for name, size in sizes.items():
            if not 2 <= size <= context:
                raise InvalidInput(f"{name} must be from 2 tokens to the model's context, {context}; got {size}.")
        settings = {
            "model": lm.provenance,
            "device": lm.device.type,
            "calibration": loaded.provenance,
            "num_sequences": num_sequences,
            **sizes,
            "texts": {name: text.provenance for name, text in prepared.items()},
            "max_windows": max_windows,
            "cloze_items": cloze_items,
            "cloze_text": texts[0] if cloze_items else None,
            "skip": sorted(skip),
            "versions": {name: version for name, version in versions().items() if name in ("torch", "transformers")},
        }
        drawn = num_sequences * sizes["calibration_window"]
        ids = torch.tensor(lm.encode(excerpt(loaded.text, num_tokens=drawn)))
        # A text that is too short is refused before anything is evaluated.
        random_sequences(ids, num_sequences=1, window=sizes["calibration_window"])
        return cls(lm, ids, prepared, settings)

    def run(self, recipe: str, draw: int) -> Run:
        """Prune a copy of the model by a recipe (`dense` leaves it as it is) and evaluate it."""
        lm, report = self.lm, None
        if recipe != DENSE:
            parsed = Recipe.parse(recipe)
            batches = random_sequences(
                self.calibration,
                num_sequences=self.settings["num_sequences"],
                window=self.settings["calibration_window"],
                seed=draw,
            )
            lm = copy.copy(self.lm)
            lm.model = copy.deepcopy(self.lm.model)
            report = prune_model(
                lm.model,
                batches,
                as_method(parsed.method, seed=draw),
                refine=parsed.refine,
                steps=parsed.steps,
                skip=self.settings["skip"],
            )
        size = {"window": self.settings["window"], "max_windows": self.settings["max_windows"]}
        measured = {name: text.perplexity(lm, **size) for name, text in self.texts.items()}
        scores = None
        if self.settings["cloze_items"]:
            ids = torch.tensor(self.texts[self.settings["cloze_text"]].ids)
            items = cloze(lm, ids, self.settings["cloze_items"])
            scores = (float(items.correct.mean()), float(items.log_likelihood.mean()))
        return Run(
            recipe,
            draw,
            nll={name: found.log for name, found in measured.items()},
            num_windows={name: len(found.measured.window_nll) for name, found in measured.items()},
            cloze=scores,
            report=report,
        )
