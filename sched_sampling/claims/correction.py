"""Claims 5, 6 and 11: a model that is trained on its own drafts corrects itself, keeps what it could, and needs no judge.

The task is parity with the answer before its working (`toys.parity`): the first token needs look-ahead and stays near chance,
the rest is a local rule. One set of runs serves all three claims: on every seed supervised fine-tuning, then RAC, and as many
further updates on as many target tokens without it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from core.experiment import Comparison, Control, Evidence, Verdict, claim, verdict
from core.llm.examples import EncodedPair, supervised_row
from core.llm.finetuning import Finetuning, finetune
from core.llm.modes import one_thread
from core.llm.scoring import Scored, score
from core.plots import COLORS, figure
from core.progress import track
from sched_sampling.baselines import SupervisedFineTuning
from sched_sampling.correction import correct, correction_report, same_tokens
from sched_sampling.drafting import Drafting, draft_with_model
from sched_sampling.presets import SamplingPreset
from sched_sampling.rac import ReferenceAnswerCorrection, rac_dataset, row_shares
from sched_sampling.rounds import RoundReport
from sched_sampling.templates import TokenTemplate
from sched_sampling.toys import PARITY_END, PARITY_SEPARATOR, PARITY_VOCABULARY, parity, tiny_gpt

TEMPLATE = TokenTemplate(separator_ids=(PARITY_SEPARATOR,), end_ids=(PARITY_END,))
# 1 - rho of the reference's run: the loss is that of the corrections and half that of the direct rows.
DIRECT_SHARE = 1 / 3
# Added to a seed where drafts are judged that decided nothing, neither the training nor when it ended.
FRESH = 5000
MARGIN = 0.25
BROKEN = 0.02
DIRECT_MARGIN = -0.05

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Judged:
    """A model on the task: which drafts for held-out prompts were right before and after one correction, one each.

    `direct` is the probability of the reference answer to every prompt, held-out ones first: the accuracy of a direct answer,
    without the noise of drawing it.
    """

    before: Floats
    after: Floats
    direct: Floats
    num_held_out: int

    @property
    def scores(self) -> dict[str, float]:
        """Accuracies and shares, as they stand in the table."""
        report = correction_report(self.before, self.after)
        return {
            "drafts right": report.before,
            "corrected right": report.after,
            "fixed": report.fixed_share,
            "broken": report.broken_share,
            "direct, held out": float(self.direct[: self.num_held_out].mean()),
            "direct, seen": float(self.direct[self.num_held_out :].mean()),
        }


@dataclass(frozen=True)
class Run:
    """What is kept of a seed: SFT, RAC and longer SFT judged on fresh drafts, RAC's scores by round, CPU seconds.

    `weights` are those of SFT, and `untrained` judges the model that all began with.
    """

    untrained: Judged
    base: Judged
    rac: Judged
    longer: Judged
    rounds: tuple[Mapping[str, float], ...]
    switched: bool
    seconds: Mapping[str, float]
    weights: Mapping[str, torch.Tensor]


@cache
def run(preset: SamplingPreset, seed: int) -> Run:
    """Train on parity with one seed: SFT, then RAC until it corrects held-out prompts, and SFT for as many updates."""
    pairs = _train_pairs(preset, seed)
    model = _model(preset, seed)
    with one_thread():
        untrained = _judge(preset, model, seed + FRESH)
        begin = time.process_time()
        finetune(model, list(map(supervised_row, pairs)), _training(preset, preset.parity_base_steps), seed=seed)
        middle = time.process_time()
        base, weights = _judge(preset, model, seed + FRESH), copy.deepcopy(model.state_dict())
        rounds = [base.scores]

        def evaluate(number: int) -> Mapping[str, float]:
            rounds.append(_judge(preset, model, seed).scores)
            return rounds[-1]

        def stop(scores: Mapping[str, float]) -> bool:
            return scores["corrected right"] >= preset.parity_switched

        method = ReferenceAnswerCorrection(
            rounds=preset.parity_rounds,
            training=_training(preset, preset.parity_round_steps),
            template=TEMPLATE,
            direct_share=DIRECT_SHARE,
        )
        reports = method.fit(model, None, pairs, seed=seed, evaluate=evaluate, stop=stop)
        rac = _judge(preset, model, seed + FRESH)
        model.load_state_dict(weights)
        longer = SupervisedFineTuning(rounds=len(reports), training=method.training).fit(model, None, pairs, seed=seed)
        seconds = {"SFT": middle - begin, "RAC": _seconds(reports), "longer SFT": _seconds(longer)}
        after = _judge(preset, model, seed + FRESH)
    return Run(untrained, base, rac, after, tuple(rounds), stop(rounds[-1]), seconds, weights)


def _model(preset: SamplingPreset, seed: int) -> Any:
    # x, a draft that did not end, the separator, y with its end: no draft is ever cut.
    return tiny_gpt(PARITY_VOCABULARY, 3 * preset.parity_bits + 5, seed, end_id=PARITY_END)


def _training(preset: SamplingPreset, num_steps: int) -> Finetuning:
    return Finetuning(
        num_steps=num_steps,
        batch_size=preset.parity_batch,
        learning_rate=preset.parity_learning_rate,
        schedule="constant",
    )


def _train_pairs(preset: SamplingPreset, seed: int) -> list[EncodedPair]:
    return parity(preset.parity_pool, bits=preset.parity_bits, held_out_share=preset.parity_held_out, seed=seed)


def _prompts(preset: SamplingPreset, split: str) -> list[EncodedPair]:
    """Every prompt of a split once, in a fixed order."""
    num = 2**preset.parity_bits
    pairs = parity(num, bits=preset.parity_bits, split=split, held_out_share=preset.parity_held_out)
    return sorted(set(pairs), key=lambda pair: pair.prompt_ids)


def _judge(preset: SamplingPreset, model: Any, seed: int) -> Judged:
    """Drafts at temperature 1 for the held-out prompts, each corrected once by the most probable tokens."""
    held = _prompts(preset, "test")
    items = [held[i % len(held)] for i in range(preset.parity_drafts)]
    prompts = [pair.prompt_ids for pair in items]
    longest = len(items[0].target_ids)
    drafts = draft_with_model(model, None, prompts, Drafting(), max_new_tokens=longest, seed=seed)
    found = correct(model, None, prompts, 1, max_new_tokens=longest, template=TEMPLATE, drafts=drafts).answers
    before, after = (
        np.array([same_tokens(answer, pair) for answer, pair in zip(answers, items, strict=True)], dtype=float)
        for answers in found
    )
    every = [*held, *_prompts(preset, "train")]
    likelihoods = score(model, [Scored([*p.prompt_ids, *p.target_ids], len(p.prompt_ids)) for p in every])
    direct = np.array([np.exp(log_probs.double().sum().item()) for log_probs in likelihoods])
    return Judged(before, after, direct, len(held))


def _seconds(reports: Sequence[RoundReport]) -> float:
    return sum(report.build_seconds + report.train_seconds for report in reports)


def _runs(preset: SamplingPreset) -> dict[int, Run]:
    return {seed: run(preset, seed) for seed in track(preset.seeds, "Training to correct on parity")}


@claim(
    "sched_sampling",
    5,
    kind="measured",
    statement="A model trained to correct its own answers corrects itself, without a stronger model.",
    time_limit=1800,
)
def correction_is_learned(preset: SamplingPreset) -> Evidence:
    """Accuracy on drafts for held-out prompts: after one correction minus before, margin 0.25; minus longer SFT, margin 0.

    Prompts are held out, so that a correction cannot be a memory; a bit more than in the reference's task leaves enough
    of them and keeps the tiny model from learning parity by heart. Rounds end when 99 % of held-out answers are right after
    the correction; both differences are taken on drafts that had no part in that. A seed that does not get there in ten
    rounds is a failure (reference, claim 5) and counts as no gain, however near it came; the gains as they were measured
    stand beside and decide nothing. Longer SFT continues the same base for as many updates on as many target tokens; on some
    seeds it begins to see through parity itself.

    Control: longer SFT under the same correction prompt, and its gain over SFT by the same margin.
    """
    runs = _runs(preset)

    def compared(ours: str, other: str, margin: float, *, label: str, strict: bool = False) -> Comparison:
        def value(found: Run, name: str) -> float:
            who, _, what = name.partition(" ")
            return getattr(found, who).scores[what]

        gains = []
        for found in runs.values():
            gain = value(found, ours) - value(found, other)
            gains.append(min(gain, 0.0) if strict and not found.switched else gain)
        return verdict(gains, margin, label=label, unit="accuracy")

    corrected = "rac corrected right"
    comparisons, measured = (
        (
            compared(corrected, "rac drafts right", MARGIN, label=f"RAC corrected − its drafts{how}", strict=strict),
            compared(corrected, "longer drafts right", 0.0, label=f"RAC corrected − longer SFT{how}", strict=strict),
        )
        for how, strict in (("", True), (", as measured", False))
    )
    nulls = (
        compared("longer corrected right", "longer drafts right", MARGIN, label="longer SFT corrected − its drafts"),
        compared("longer drafts right", "base drafts right", MARGIN, label="longer SFT − SFT"),
    )
    ended = [len(found.rounds) - 1 for found in runs.values() if found.switched]
    after = [found.rac.scores["corrected right"] for found in runs.values()]
    before = [found.rac.scores["drafts right"] for found in runs.values()]
    # With no seed that switched all gains are the same zero, which is a failure and no lack of data.
    parts = [comparison.verdict for comparison in comparisons] if ended else [Verdict.FAILS]
    return Evidence(
        verdict=Verdict.all_of(parts),
        headline=f"{np.mean(before):.0%} of drafts are right, {np.mean(after):.1%} after one correction (lowest seed "
        f"{min(after):.1%}); {len(ended)} of {len(runs)} seeds reached {preset.parity_switched:.0%}"
        + (f", in rounds {', '.join(map(str, ended))}" if ended else ""),
        table=_table(runs),
        comparisons=(*comparisons, *measured),
        control=Control.of("SFT for as many updates: under a correction prompt, and against SFT.", *nulls),
        figures={"Accuracy after one correction, and answers broken by it, round by round": _by_round(runs)},
        seeds=preset.seeds,
        provenance=_provenance(preset),
    )


@claim(
    "sched_sampling",
    6,
    kind="measured",
    statement="Learning to correct keeps the direct answers, and correction does no harm to right ones.",
    time_limit=1800,
)
def direct_answers_are_kept(preset: SamplingPreset) -> Evidence:
    """Probability of the reference answer, RAC minus SFT, over all prompts within seeds: not worse by more than 0.05.

    And of the drafts that were right, fewer than 2 % are broken by the correction once it has been learned; the table has
    the share of every round before, because a half-trained corrector does harm. Against longer SFT the difference is shown
    and decides nothing: what it gains in the end it gains by three times the direct rows.

    Control: the model before any training against SFT, and the harm that longer SFT does under a correction prompt.
    """
    runs = _runs(preset)
    if not all(judged.before.any() for found in runs.values() for judged in (found.rac, found.longer)):
        return Evidence.not_run(
            "On some seed no draft was right, so that none could be broken; more updates are needed."
        )

    def direct(ours: str, other: str, label: str) -> Comparison:
        items = [getattr(found, ours).direct - getattr(found, other).direct for found in runs.values()]
        return verdict(items, DIRECT_MARGIN, label=label, unit="probability of the reference answer")

    def harmless(who: str, label: str) -> Comparison:
        found = [getattr(each, who) for each in runs.values()]
        items = [BROKEN - (1 - each.after[each.before == 1]) for each in found]
        return verdict(items, label=label, unit="share of right drafts")

    comparisons = (
        direct("rac", "base", "RAC − SFT, direct answers"),
        harmless("rac", "2 % − right drafts broken by RAC"),
    )
    shown = direct("rac", "longer", "RAC − longer SFT, direct answers")
    nulls = (
        direct("untrained", "base", "untrained − SFT, direct answers"),
        harmless("longer", "2 % − right drafts broken by longer SFT"),
    )
    means = {who: np.mean([getattr(found, who).direct.mean() for found in runs.values()]) for who in ("base", "rac")}
    broken = [found.rac.scores["broken"] for found in runs.values()]
    worst = max(scores["broken"] for found in runs.values() for scores in found.rounds[1:])
    return Evidence(
        verdict=Verdict.all_of(comparison.verdict for comparison in comparisons),
        headline=f"Direct answers are right with probability {means['rac']:.3f} (SFT {means['base']:.3f}); correction breaks "
        f"{np.mean(broken):.1%} of right drafts once learned, up to {worst:.0%} in a round before",
        table=pd.concat([_table(runs), _round_table(runs)], ignore_index=True),
        comparisons=(*comparisons, shown),
        control=Control.of("The untrained model's direct answers; longer SFT's harm.", *nulls),
        figures={"Accuracy after one correction, and answers broken by it, round by round": _by_round(runs)},
        seeds=preset.seeds,
        provenance=_provenance(preset),
    )


class _Judged(EncodedPair):
    """A demonstration that offers a judge, which raises when anyone asks it."""

    def judge(self, answer: object) -> float:
        """Refuse."""
        raise AssertionError("The builder asked a judge.")

    @property
    def reward(self) -> float:
        """Refuse."""
        raise AssertionError("The builder asked for a reward.")


@claim(
    "sched_sampling",
    11,
    kind="exact",
    statement="Correction is learned without an oracle: no reward, judge or stronger model has a part in the data.",
    time_limit=1800,
)
def no_oracle_is_asked(preset: SamplingPreset) -> Evidence:
    """Three facts about the data of claim 5's first round, on every seed.

    They are the same when the demonstrations offer a judge that raises when asked; every row follows from the prompt, the
    reference answer and what the model says by itself; and with other reference answers every context stays as it is, so
    that no draft was chosen or scored by its answer.

    Control: the data that keep right drafts only, as a reward filter would; their contexts change with the answers.
    """
    facts = ("a judge that raises is offered", "rebuilt from prompt, answer and model", "contexts under other answers")
    rows: list[dict[str, Any]] = []
    filtered_alike = True
    for seed in track(preset.seeds, "Rebuilding data without a judge"):
        model = _model(preset, seed)
        model.load_state_dict(run(preset, seed).weights)
        pairs = _train_pairs(preset, seed)
        built = _built(model, pairs, seed)
        judged = _built(model, [_Judged(pair.prompt_ids, pair.target_ids) for pair in pairs], seed)
        others = _built(model, _other_answers(pairs), seed)
        pairwise: tuple[tuple[list[Any], list[Any]], ...] = (
            (built, judged),
            (_tokens(built), _rebuilt(model, pairs, seed)),
            (_contexts(built), _contexts(others)),
        )
        for fact, (ours, theirs) in zip(facts, pairwise, strict=True):
            different = sum(a != b for a, b in zip(ours, theirs, strict=True))
            rows.append({"seed": seed, "fact": fact, "rows": len(ours), "different": different})
        filtered_alike &= _contexts(built, right_only=True) == _contexts(others, right_only=True)
    table = pd.DataFrame(rows)
    total = int(table["different"].sum())
    return Evidence(
        verdict=Verdict.of(total == 0),
        headline=f"{int(table['rows'].sum())} rows compared in {len(facts)} ways, {total} different",
        table=table,
        control=Control("Only right drafts are kept: contexts under other answers.", Verdict.of(filtered_alike)),
        seeds=preset.seeds,
        provenance=_provenance(preset),
    )


def _built(model: Any, pairs: Sequence[EncodedPair], seed: int) -> list[dict[str, Any]]:
    data = rac_dataset(model, None, pairs, template=TEMPLATE, direct_share=DIRECT_SHARE, seed=seed)
    return sorted(data, key=lambda row: (row["row"], row["kind"]))


def _rebuilt(model: Any, pairs: Sequence[EncodedPair], seed: int) -> list[dict[str, Any]]:
    """Tokens and labels of the rows, as the method's definition has them."""
    direct, corrected = row_shares(len(pairs), DIRECT_SHARE, seed)
    longest = max(len(pair.target_ids) for pair in pairs)
    said = draft_with_model(model, None, [p.prompt_ids for p in pairs], Drafting(), max_new_tokens=longest, seed=seed)
    rows = []
    for i, (pair, draft) in enumerate(zip(pairs, said, strict=True)):
        shown = [token for token in draft.token_ids if token not in (PARITY_SEPARATOR, PARITY_END)]
        contexts = ([*pair.prompt_ids, *shown, PARITY_SEPARATOR], list(pair.prompt_ids))
        for context, wanted in zip(contexts, (i in corrected, i in direct), strict=True):
            if wanted:
                target = list(pair.target_ids)
                rows.append({"input_ids": [*context, *target], "labels": [-100] * len(context) + target})
    return rows


def _tokens(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in ("input_ids", "labels")} for row in rows]


def _other_answers(pairs: Sequence[EncodedPair]) -> list[EncodedPair]:
    """The same prompts with every bit of the answers turned round."""
    return [EncodedPair(pair.prompt_ids, (*(1 - bit for bit in pair.target_ids[:-1]), PARITY_END)) for pair in pairs]


def _contexts(rows: Sequence[Mapping[str, Any]], *, right_only: bool = False) -> list[tuple[int, ...]]:
    return [
        tuple(token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100)
        for row in rows
        if not right_only or (row["kind"] == "correction" and row["draft_quality"] == 1)
    ]


def _table(runs: Mapping[int, Run]) -> pd.DataFrame:
    """Scores on fresh drafts of every seed, and the CPU seconds that each part took."""
    rows: list[dict[str, Any]] = []
    for seed, found in runs.items():
        for name, judged in (("SFT", found.base), ("longer SFT", found.longer), ("RAC", found.rac)):
            rounds = 0 if name == "SFT" else len(found.rounds) - 1
            rows.append({"seed": seed, "model": name, "rounds": rounds, **judged.scores, "CPU s": found.seconds[name]})
    return pd.DataFrame(rows)


def _round_table(runs: Mapping[int, Run]) -> pd.DataFrame:
    rows = [
        {"seed": seed, "model": f"RAC, round {number}", "rounds": number, **scores, "CPU s": pd.NA}
        for seed, found in runs.items()
        for number, scores in enumerate(found.rounds)
        if number
    ]
    return pd.DataFrame(rows).astype({"CPU s": "Float64"})


def _by_round(runs: Mapping[int, Run]) -> Any:
    plot, axes = figure(width=7.2, ncols=2)
    for ax, name in zip(axes, ("corrected right", "broken"), strict=True):
        for number, (seed, found) in enumerate(runs.items()):
            values = [100 * scores[name] for scores in found.rounds]
            ax.plot(
                range(len(values)), values, "o-", markersize=3, color=COLORS[number % len(COLORS)], label=f"seed {seed}"
            )
        ax.set(xlabel="round (0: SFT)", ylabel=f"{name}, %", ylim=(-3, 103))
    axes[0].legend(fontsize=8)
    return plot


def _provenance(preset: SamplingPreset) -> tuple[str, ...]:
    held = round(2**preset.parity_bits * preset.parity_held_out)
    return (
        f"parity of {preset.parity_bits} bits, answer before working; {held} of {2**preset.parity_bits} prompts held out, "
        f"{preset.parity_drafts} drafts for them at temperature 1",
        f"GPT-2 of two layers of width 64, AdamW {preset.parity_learning_rate}, batches of {preset.parity_batch}: "
        f"{preset.parity_base_steps} updates, then rounds of {preset.parity_round_steps}",
    )
