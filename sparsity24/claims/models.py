"""Claims 8 and 10 to 13: whole language models, pruned block by block and evaluated.

One set of pruned models serves all of them: for every seed each method prunes the same dense model on the same
calibration draw, and its perplexity, layer losses and cloze scores are kept.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from core.data import catalog
from core.experiment import Comparison, Control, Evidence, Verdict, claim, verdict
from core.llm.causal import CausalLM
from core.plots import COLORS, figure
from core.progress import track
from sparsity24.blocks import block_skips
from sparsity24.calibration import random_sequences
from sparsity24.evaluation import Cloze, cloze
from sparsity24.methods import Magnitude, Method, ProxPruner, SparseGPT, Wanda, as_method
from sparsity24.model import dense_grams, prune_model
from sparsity24.presets import OTHER_DRAW, SparsityPreset


@dataclass(frozen=True)
class Recipe:
    """A method, whether its weights are refined, and which data it is calibrated on."""

    method: Method | str
    refined: bool = False
    steps: int | None = None
    other_draw: bool = False
    swapped: bool = False


RECIPES = {
    "random": Recipe("random"),
    "magnitude": Recipe(Magnitude()),
    "Wanda": Recipe(Wanda()),
    "SparseGPT": Recipe(SparseGPT()),
    "Wanda + refinement": Recipe(Wanda(), refined=True),
    "SparseGPT + refinement": Recipe(SparseGPT(), refined=True),
    "prox + refinement": Recipe(ProxPruner.variant("fast"), refined=True),
    # Controls.
    "magnitude + refinement": Recipe(Magnitude(), refined=True),
    "Wanda + 0 steps": Recipe(Wanda(), refined=True, steps=0),
    "prox, other draw": Recipe(ProxPruner.variant("fast"), refined=True, other_draw=True),
    # Claim 12 the other way round: calibrated on the other domain, all refined.
    "Wanda, swapped": Recipe(Wanda(), refined=True, swapped=True),
    "SparseGPT, swapped": Recipe(SparseGPT(), refined=True, swapped=True),
    "prox, swapped": Recipe(ProxPruner.variant("fast"), refined=True, swapped=True),
}
TABLE = tuple(RECIPES)[:7]
# The models that claim 13 asks; scoring its items is dear on a real model.
CLOZE = ("dense", "random", "magnitude", "magnitude + refinement", "prox + refinement")


@dataclass(frozen=True)
class ModelScores:
    """What is kept of a pruned model: mean negative log-likelihood a token on both texts, layer losses, cloze scores."""

    nll_in: float
    nll_out: float
    layer_losses: tuple[float, ...]
    cloze: Cloze | None


@cache
def dense_model(spec: str) -> CausalLM:
    """The dense model of a seed, loaded once."""
    return CausalLM.load(spec)


@cache
def token_ids(spec: str, data: tuple[str, str]) -> Tensor:
    """The tokens of a text, encoded once, without special tokens."""
    name, split = data
    return torch.tensor(dense_model(spec).encode(catalog.load(name, split or None).text))


def calibration_batches(preset: SparsityPreset, seed: int, *, swapped: bool = False) -> list[Tensor]:
    """Calibration sequences of a seed; `swapped` takes them from the other domain."""
    data = (
        (preset.out_of_distribution[0], "train" if preset.out_of_distribution[1] else "")
        if swapped
        else preset.calibration
    )
    ids = token_ids(preset.model.format(seed=preset.seeds[0]), data)
    size = {"num_sequences": preset.calibration_sequences, "window": preset.calibration_window}
    return random_sequences(ids, **size, seed=seed)


def dense_layers(preset: SparsityPreset, seed: int) -> list[tuple[Tensor, Tensor]]:
    """(weight, hessian) of every linear layer in the model's first blocks, from inputs of the dense model."""
    lm = dense_model(preset.model.format(seed=seed))
    batches = calibration_batches(preset, seed)
    grams = dense_grams(lm.model, batches, num_blocks=preset.num_blocks)
    return [(gram.weight, gram.hessian) for gram in grams if fnmatch(gram.name, preset.layer_pattern)]


@cache
def model_scores(preset: SparsityPreset, seed: int, name: str) -> ModelScores:
    """Prune the model of `seed` by a recipe and evaluate it; `name` "dense" leaves it as it is."""
    if name == "dense" and seed != preset.seeds[0] and "{seed}" not in preset.model:
        return model_scores(preset, preset.seeds[0], name)
    lm = dense_model(preset.model.format(seed=seed))
    losses: tuple[float, ...] = ()
    if name != "dense":
        recipe = RECIPES[name]
        lm = copy.copy(lm)
        lm.model = copy.deepcopy(lm.model)
        report = prune_model(
            lm.model,
            calibration_batches(preset, seed + OTHER_DRAW * recipe.other_draw, swapped=recipe.swapped),
            as_method(recipe.method, seed=seed),
            refine=preset.refinement if recipe.refined else "none",
            steps=preset.refinement_steps if recipe.steps is None else recipe.steps,
            skip=block_skips(lm.model, preset.num_blocks),
        )
        losses = tuple(layer.rel_loss for layer in report.layers)
    first = preset.model.format(seed=preset.seeds[0])
    nll = [
        float(
            lm.perplexity(
                token_ids(first, data).tolist(), window=preset.window, max_windows=preset.max_windows
            ).window_nll.mean()
        )
        for data in (preset.in_distribution, preset.out_of_distribution)
    ]
    items = cloze(lm, token_ids(first, preset.in_distribution), preset.cloze_items) if name in CLOZE else None
    return ModelScores(nll[0], nll[1], losses, items)


@cache
def shuffled_cloze(preset: SparsityPreset, seed: int) -> Cloze:
    """The cloze scores of the dense model when every context is another item's."""
    lm = dense_model(preset.model.format(seed=seed))
    ids = token_ids(preset.model.format(seed=preset.seeds[0]), preset.in_distribution)
    return cloze(lm, ids, preset.cloze_items, other_context=11)


def _scope(preset: SparsityPreset) -> str:
    """What the headline must say when only a part of the model was pruned."""
    return "" if preset.num_blocks is None else f"First {preset.num_blocks} blocks: "


def all_scores(preset: SparsityPreset, names: Sequence[str]) -> dict[tuple[str, int], ModelScores]:
    """Scores of several recipes on every seed, under one progress bar."""
    jobs = [(name, seed) for seed in preset.seeds for name in names]
    return {job: model_scores(preset, job[1], job[0]) for job in track(jobs, "Pruning and evaluating models")}


def _provenance(preset: SparsityPreset) -> tuple[str, ...]:
    data = dict.fromkeys((preset.calibration, preset.in_distribution, preset.out_of_distribution))
    window = f"perplexity over at most {preset.max_windows} windows of {preset.window} tokens"
    blocks = "every block" if preset.num_blocks is None else f"the first {preset.num_blocks} blocks"
    return (
        dense_model(preset.model.format(seed=preset.seeds[0])).provenance,
        *(catalog.load(name, split or None).provenance for name, split in data),
        f"{blocks} pruned; calibration {preset.calibration_sequences} sequences of {preset.calibration_window}; {window}",
    )


def _better(
    scores: dict[tuple[str, int], ModelScores],
    preset: SparsityPreset,
    ours: str,
    other: str,
    *,
    where: str = "nll_in",
    margin: float = 0.0,
) -> Comparison:
    """Paired difference of log perplexity, positive where `ours` is better."""
    differences = [getattr(scores[other, s], where) - getattr(scores[ours, s], where) for s in preset.seeds]
    return verdict(differences, margin, label=f"{other} / {ours}", unit="log of the ratio of perplexities")


def _perplexity_table(
    scores: dict[tuple[str, int], ModelScores], preset: SparsityPreset, names: Sequence[str]
) -> pd.DataFrame:
    rows = []
    for name in names:
        losses = [loss for s in preset.seeds for loss in scores[name, s].layer_losses]
        rows.append(
            (
                name,
                math.exp(np.mean([scores[name, s].nll_in for s in preset.seeds])),
                math.exp(np.mean([scores[name, s].nll_out for s in preset.seeds])),
                float(np.mean(losses)) if losses else pd.NA,
            )
        )
    table = pd.DataFrame(rows, columns=["method", "perplexity", "out of distribution", "mean relative layer loss"])
    return table.astype({"mean relative layer loss": "Float64"})


@claim(
    "sparsity24", 8, kind="measured", statement="Masked gradient updates improve Wanda and SparseGPT.", time_limit=3600
)
def masked_gradients_improve_every_mask(preset: SparsityPreset) -> Evidence:
    """Log perplexity before and after refinement on every seed, and the mean log loss of the layers; margin 0.

    Before and after are two runs, and what enters a later block depends on the blocks before it, so that single layers may
    come out higher; how many do is in the headline.

    Control: a refinement of zero steps.
    """
    names = ("Wanda", "Wanda + refinement", "SparseGPT", "SparseGPT + refinement", "Wanda + 0 steps")
    scores = all_scores(preset, names)
    comparisons = []
    for name in ("Wanda", "SparseGPT"):
        comparisons.append(_better(scores, preset, f"{name} + refinement", name))
        falls = [
            float(
                np.mean(np.log(scores[name, s].layer_losses))
                - np.mean(np.log(scores[f"{name} + refinement", s].layer_losses))
            )
            for s in preset.seeds
        ]
        comparisons.append(
            verdict(falls, label=f"{name}: layer loss before / after", unit="mean log of the ratio of losses")
        )
    null = _better(scores, preset, "Wanda + 0 steps", "Wanda")
    rises = sum(
        after > before * (1 + 1e-4)
        for name in ("Wanda", "SparseGPT")
        for s in preset.seeds
        for before, after in zip(
            scores[name, s].layer_losses, scores[f"{name} + refinement", s].layer_losses, strict=True
        )
    )
    change = [1 - math.exp(-comparison.interval.estimate) for comparison in comparisons[1::2]]
    return Evidence(
        verdict=Verdict.all_of(comparison.verdict for comparison in comparisons),
        headline=f"{_scope(preset)}Mean layer loss falls by {change[0]:.0%} (Wanda) and {change[1]:.0%} (SparseGPT), "
        f"perplexity with it; single layers end higher {rises} times",
        table=_perplexity_table(scores, preset, names),
        comparisons=tuple(comparisons),
        control=Control.of("A refinement of zero steps, which must change nothing.", null),
        seeds=preset.seeds,
        provenance=_provenance(preset),
    )


@claim(
    "sparsity24",
    10,
    kind="measured",
    statement="End to end: magnitude is worse than Wanda, that than SparseGPT, that than refined SparseGPT; prox is no worse.",
    time_limit=3600,
)
def end_to_end_order(preset: SparsityPreset) -> Evidence:
    """Log perplexity of neighbours in the order, over seeds; margin 0, and non-inferiority by log 1.005 for the last.

    Controls: a random 2:4 mask against magnitude, and the prox against itself under another calibration draw.
    """
    order = ("magnitude", "Wanda", "SparseGPT", "SparseGPT + refinement", "prox + refinement")
    names = ("dense", "random", *order, "Wanda + refinement", "prox, other draw")
    scores = all_scores(preset, names)
    steps = [
        _better(scores, preset, ours, other, margin=-math.log(1.005) if ours == order[-1] else 0.0)
        for other, ours in itertools.pairwise(order)
    ]
    floor = _better(scores, preset, "random", "magnitude")
    null = _better(scores, preset, "prox + refinement", "prox, other draw")
    shown = ("dense", *TABLE)
    table = _perplexity_table(scores, preset, shown)
    plot, axes = figure()
    for position, name in enumerate(shown[2:]):
        ratios = [math.exp(scores[name, s].nll_in - scores["dense", s].nll_in) for s in preset.seeds]
        axes.plot(ratios, [position] * len(ratios), "o", color=COLORS[0], alpha=0.6)
    axes.set_yticks(range(len(shown) - 2), shown[2:])
    axes.set(xlabel="perplexity relative to the dense model")
    axes.invert_yaxis()
    ppl = dict(zip(table["method"], table["perplexity"], strict=True))
    return Evidence(
        verdict=Verdict.all_of(comparison.verdict for comparison in steps),
        headline=f"{_scope(preset)}Perplexity " + ", ".join(f"{name} {ppl[name]:.4g}" for name in ("dense", *order)),
        table=table,
        comparisons=tuple(steps),
        control=Control.of(
            "A random mask against magnitude, and the prox under another calibration draw.", floor, null
        ),
        figures={"Every seed's perplexity relative to its dense model": plot},
        seeds=preset.seeds,
        provenance=_provenance(preset),
    )


@claim(
    "sparsity24",
    11,
    kind="measured",
    statement="Better up to 13B parameters; at 70B on par with the best earlier method.",
)
def parity_at_70b(preset: SparsityPreset) -> Evidence:
    """Never run offline, and nothing smaller is put in its place: sizes 32, 64 and 128 say nothing about 70B."""
    return Evidence.not_run(
        "The statement compares 13B with 70B models; it needs their weights, C4 and about 2e17 floating-point operations."
    )


@claim(
    "sparsity24",
    12,
    kind="measured",
    statement="The prox is also better out of distribution.",
    expected={"quick": "holds", "real": "inconclusive", "full": "holds"},
    time_limit=3600,
)
def better_out_of_distribution(preset: SparsityPreset) -> Evidence:
    """Log perplexity on text of another domain than the calibration's, both ways round, against refined Wanda and SparseGPT.

    Margin 0. On the real model the reference found no advantage out of distribution. Control: the prox against itself
    under another calibration draw.
    """
    names = ("dense", *TABLE, "prox, other draw", "Wanda, swapped", "SparseGPT, swapped", "prox, swapped")
    scores = all_scores(preset, names)
    there = [
        _better(scores, preset, "prox + refinement", f"{other} + refinement", where="nll_out")
        for other in ("Wanda", "SparseGPT")
    ]
    back = [_better(scores, preset, "prox, swapped", f"{other}, swapped") for other in ("Wanda", "SparseGPT")]
    null = _better(scores, preset, "prox + refinement", "prox, other draw", where="nll_out")
    return Evidence(
        verdict=Verdict.all_of(comparison.verdict for comparison in (*there, *back)),
        headline=f"{_scope(preset)}Out of distribution, perplexity against refined SparseGPT "
        f"{math.exp(-there[1].interval.estimate) - 1:+.1%}, the other way round "
        f"{math.exp(-back[1].interval.estimate) - 1:+.1%}",
        table=_perplexity_table(scores, preset, ("dense", *TABLE)),
        comparisons=(*there, *back),
        control=Control.of("The prox under another calibration draw.", null),
        seeds=preset.seeds,
        provenance=_provenance(preset),
    )


@claim(
    "sparsity24",
    13,
    kind="measured",
    statement="Zero-shot accuracy is kept better (cloze proxy).",
    expected="inconclusive",
    time_limit=3600,
)
def zero_shot_is_kept_better(preset: SparsityPreset) -> Evidence:
    """Choice log-likelihood of a cloze task, prox against magnitude, as it is and refined, items within seeds; margin 0.

    Against magnitude as it is the prox wins, as in the reference; refinement alone brings magnitude so near that the
    difference is not expected to be decided.

    Accuracy is reported. Control: the dense model with every item's context taken from another, which knows nothing.
    """
    scores = all_scores(preset, CLOZE)
    found = {job: score.cloze for job, score in scores.items() if score.cloze is not None}

    def gain(other: str) -> Comparison:
        ours = "prox + refinement"
        items = [found[ours, s].log_likelihood - found[other, s].log_likelihood for s in preset.seeds]
        return verdict(items, label=f"{ours} − {other}", unit="choice log-likelihood")

    comparisons = (gain("magnitude"), gain("magnitude + refinement"))
    chance = [100 * float(shuffled_cloze(preset, s).correct.mean()) - 25 for s in preset.seeds]
    null = verdict(chance, margin=5.0, label="dense model, contexts shuffled, above chance", unit="points of accuracy")
    table = pd.DataFrame(
        [
            (
                name,
                float(np.mean([found[name, s].correct.mean() for s in preset.seeds])),
                float(np.mean([found[name, s].log_likelihood.mean() for s in preset.seeds])),
            )
            for name in CLOZE
        ],
        columns=["method", "accuracy", "choice log-likelihood"],
    )
    accuracy = dict(zip(table["method"], table["accuracy"], strict=True))
    return Evidence(
        verdict=Verdict.all_of(comparison.verdict for comparison in comparisons),
        headline="Accuracy (chance 25 %) " + ", ".join(f"{name} {accuracy[name]:.1%}" for name in CLOZE),
        table=table,
        comparisons=comparisons,
        control=Control.of("The dense model with the contexts shuffled, by five points above chance.", null),
        seeds=preset.seeds,
        provenance=_provenance(preset),
    )
