"""Claims 9, 10 and 13: the exposure gap on text, the three task families, and the start that preference tuning gets.

Differences are taken item by item between runs of one seed (`family_runs`), and judged by a bootstrap of items within seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from core.experiment import Comparison, Control, Evidence, Verdict, claim, verdict
from core.progress import track
from sched_sampling.claims.family_runs import (
    BASE,
    BASH,
    CONTINUATIONS,
    EQUAL_TIME,
    LONGER,
    NULL,
    RAC,
    RANDOM,
    Floats,
    answers,
    bash_with,
    exposure,
    fitted,
    model_of,
    other_baselines,
    preferred,
    scored,
    task_of,
    trained,
)
from sched_sampling.pictures import cost_and_gain
from sched_sampling.presets import SamplingPreset
from sched_sampling.rounds import Method

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Settings that one sensitivity row each departs from: (beta, temperature) of BASH.
_SENSITIVITY = ((0.1, 1.0), (0.3, 1.0), (0.5, 1.0), (0.3, 0.7), (0.3, 1.5))


def _differences(
    preset: SamplingPreset, value: Callable[[int, str], Floats], ours: str, other: str, *, label: str, unit: str
) -> Comparison:
    items = [value(seed, ours) - value(seed, other) for seed in preset.seeds]
    return verdict(items, label=label, unit=unit)


def _headline(preset: SamplingPreset, name: str, *, sampled: bool = False) -> Callable[[int, str], Floats]:
    """The headline score of every test item, as a function of seed and run; RAC's corrected answers are a run too."""
    score = task_of(preset, name, preset.seeds[0]).headline

    def value(seed: int, method: str) -> Floats:
        found = answers(preset, seed, name, RAC if method == _CORRECTED else method)
        direct, corrected = (found.sampled, found.corrected_samples) if sampled else (found.greedy, found.corrected)
        return (corrected if method == _CORRECTED else direct)[score]

    return value


_CORRECTED = "RAC, corrected once"
_ROWS = (BASE, LONGER, EQUAL_TIME, RANDOM, BASH, RAC, _CORRECTED, NULL)


@claim(
    "sched_sampling",
    10,
    kind="measured",
    statement="Both methods improve on supervised fine-tuning in summarisation, question answering and mathematics.",
    expected={"quick": "fails", "real": "inconclusive", "full": "holds"},
    time_limit=7200,
)
def overall_improvement(preset: SamplingPreset) -> Evidence:
    """Headline score of greedy answers: BASH and RAC (direct) minus as many further updates of SFT; every task must hold.

    All continue the same fine-tuned model on the same demonstrations; margin 0. Besides: BASH against SFT for as much CPU
    time (its steps depend on the machine) and against random tokens, RAC after one correction, sampled answers, and, on
    valid items of one seed, other beta and temperatures. Sizes were chosen on valid items with SFT alone. The correction
    prompt of the small models was changed once, on valid items, after corrected answers had come out badly on test items.

    At the quick scale BASH is expected to be undecided on every task, while RAC costs direct summaries a few points of
    ROUGE-L: half of its rows teach a small model to correct, which a hundred updates do not reach.

    Control: the same rounds at beta = 0 under another seed.
    """
    jobs = [(name, seed, method) for name in preset.tasks for seed in preset.seeds for method in (BASE, *CONTINUATIONS)]
    for name, seed, method in track(jobs, "Fine-tuning on three families"):
        answers(preset, seed, name, method)
    decisive, further, null = [], [], []
    for name in preset.tasks:
        greedy, sampled = _headline(preset, name), _headline(preset, name, sampled=True)
        unit = task_of(preset, name, preset.seeds[0]).headline
        for ours in (BASH, RAC):
            label = f"{name}: {ours} − {LONGER}"
            decisive.append(_differences(preset, greedy, ours, LONGER, label=label, unit=unit))
            further.append(_differences(preset, sampled, ours, LONGER, label=f"{label}, sampled", unit=unit))
        for ours, other in ((BASH, EQUAL_TIME), (BASH, RANDOM), (_CORRECTED, LONGER), (_CORRECTED, RAC)):
            further.append(_differences(preset, greedy, ours, other, label=f"{name}: {ours} − {other}", unit=unit))
        null.append(_differences(preset, greedy, NULL, LONGER, label=f"{name}: beta = 0 − {LONGER}", unit=unit))
    means = {
        (name, method): 100 * np.mean([_headline(preset, name)(seed, method).mean() for seed in preset.seeds])
        for name in preset.tasks
        for method in (LONGER, BASH, RAC, _CORRECTED)
    }
    shown = "; ".join(
        f"{name} {task_of(preset, name, preset.seeds[0]).headline} "
        + " / ".join(f"{means[name, method]:.1f}" for method in (LONGER, BASH, RAC, _CORRECTED))
        for name in preset.tasks
    )
    return Evidence(
        verdict=Verdict.all_of(comparison.verdict for comparison in decisive),
        headline=f"Longer SFT / BASH / RAC / RAC corrected, percent: {shown}",
        table=pd.concat([_family_table(preset), _sensitivity(preset)], ignore_index=True),
        comparisons=(*decisive, *further),
        control=Control.of("The same rounds at beta = 0 under another seed.", *null),
        figures={f"{name}: cost against gain, a dot a seed": _cost_and_gain(preset, name) for name in preset.tasks},
        seeds=preset.seeds,
        provenance=_provenance(preset, preset.tasks),
    )


def _cost_and_gain(preset: SamplingPreset, name: str) -> Figure:
    score = _headline(preset, name)
    points = {
        method: (
            [trained(preset, seed, name, method).seconds for seed in preset.seeds],
            [100 * float(score(seed, method).mean()) for seed in preset.seeds],
        )
        for method in (LONGER, RANDOM, BASH, RAC)
    }
    return cost_and_gain(points, f"{task_of(preset, name, preset.seeds[0]).headline}, percent")


def _family_table(preset: SamplingPreset) -> pd.DataFrame:
    """Every score of every run, means over seeds in percent, with updates after the base and CPU seconds a seed."""
    rows: list[dict[str, Any]] = []
    for name in preset.tasks:
        for method in _ROWS:
            run = RAC if method == _CORRECTED else method
            found = [answers(preset, seed, name, run) for seed in preset.seeds]
            runs = [trained(preset, seed, name, run) for seed in preset.seeds]
            greedy = [each.corrected if method == _CORRECTED else each.greedy for each in found]
            sampled = [each.corrected_samples if method == _CORRECTED else each.sampled for each in found]
            rows += [
                {
                    "task": name,
                    "method": method,
                    "score": score,
                    "greedy": 100 * float(np.mean([each[score].mean() for each in greedy])),
                    "sampled": 100 * float(np.mean([each[score].mean() for each in sampled])),
                    "updates": round(float(np.mean([each.steps for each in runs]))),
                    "CPU seconds": float(np.mean([each.seconds for each in runs])),
                }
                for score in greedy[0]
            ]
    return pd.DataFrame(rows)


def _sensitivity(preset: SamplingPreset) -> pd.DataFrame:
    """BASH with other beta and temperatures, and the other baselines, on the valid items of the first seed."""
    name, seed = preset.sensitivity_task, preset.seeds[0]
    score = task_of(preset, name, seed).headline
    start = trained(preset, seed, name, BASE).weights
    rows = []
    methods: dict[str, Method] = {
        f"BASH, beta to {beta:g}, temperature {temperature:g}": bash_with(preset, beta=beta, temperature=temperature)
        for beta, temperature in _SENSITIVITY
    } | other_baselines(preset)
    for label, method in track(list(methods.items()), "Other settings and baselines"):
        run = fitted(preset, seed, name, method, start)
        greedy, sampled = (
            100 * float(scored(preset, seed, name, run.weights, temperature=t, split="valid")[0][score].mean())
            for t in (0.0, 1.0)
        )
        rows.append(
            {
                "task": f"{name}, valid, one seed",
                "method": label,
                "score": score,
                "greedy": greedy,
                "sampled": sampled,
                "updates": run.steps,
                "CPU seconds": run.seconds,
            }
        )
    return pd.DataFrame(rows)


def _provenance(preset: SamplingPreset, names: Sequence[str]) -> tuple[str, ...]:
    lines = [
        line
        for name in names
        for line in (model_of(preset, name).provenance, *task_of(preset, name, preset.seeds[0]).provenance)
    ]
    adapters = "all weights" if preset.task_lora_rank is None else f"LoRA of rank {preset.task_lora_rank}"
    return (
        *dict.fromkeys(lines),
        f"a seed is another draw of {preset.task_pairs} demonstrations and {preset.task_test} test items; {adapters}; base "
        f"of {preset.task_base_steps} updates of {preset.task_batch} rows, then {preset.task_rounds} rounds of "
        f"{preset.task_round_steps}",
    )


@claim(
    "sched_sampling",
    9,
    kind="measured",
    statement="On text, BASH narrows the gap between the model's quality on gold prefixes and on its own.",
    expected={"quick": "holds", "real": "inconclusive", "full": "holds"},
    time_limit=7200,
)
def exposure_gap_on_text(preset: SamplingPreset) -> Evidence:
    """Exposure gap of longer SFT minus that of BASH, items within seeds, every task together; margin 0.

    The gap is gold NLL on own prefixes (sampled at temperature 1) minus on gold ones. Where an answer can be said in another
    order or wording, its gold tokens need not follow own ones, so that a gap also counts what is no mistake; the NLL on gold
    prefixes stands beside it, since a worse model of gold has a smaller gap too. Random tokens stand there as well: they
    narrow the gap about as much. RAC trains on no such prefix, and is reported without entering the verdict.

    Control: the same rounds at beta = 0 under another seed.
    """
    shown = (LONGER, RANDOM, BASH, RAC, NULL)
    jobs = [(name, seed, method) for name in preset.tasks for seed in preset.seeds for method in shown]
    found = {job: exposure(preset, job[1], job[0], job[2]) for job in track(jobs, "Measuring exposure")}

    def narrowed(ours: str, names: Sequence[str], label: str) -> Comparison:
        items = [
            np.concatenate([found[name, seed, LONGER].gap - found[name, seed, ours].gap for name in names])
            for seed in preset.seeds
        ]
        return verdict(items, label=label, unit="nats a token")

    main = narrowed(BASH, preset.tasks, f"{LONGER} − BASH, all tasks")
    further = [narrowed(RAC, preset.tasks, f"{LONGER} − RAC, all tasks")]
    further += [narrowed(ours, [name], f"{name}: {LONGER} − {ours}") for name in preset.tasks for ours in (BASH, RAC)]
    null = narrowed(NULL, preset.tasks, f"{LONGER} − beta = 0, all tasks")
    table = pd.DataFrame(
        [
            {
                "task": name,
                "method": method,
                "exposure gap": float(np.mean([found[name, seed, method].gap.mean() for seed in preset.seeds])),
                "gold NLL": float(np.mean([found[name, seed, method].gold_nll.mean() for seed in preset.seeds])),
            }
            for name in preset.tasks
            for method in shown
        ]
    )
    means = table.groupby("method")["exposure gap"].mean()
    return Evidence(
        verdict=main.verdict,
        headline="Exposure gap, nats a token, mean of the tasks: "
        + ", ".join(f"{method} {means[method]:.3f}" for method in (LONGER, RANDOM, BASH, RAC)),
        table=table,
        comparisons=(main, *further),
        control=Control.of("The same rounds at beta = 0 under another seed.", null),
        seeds=preset.seeds,
        provenance=_provenance(preset, preset.tasks),
    )


@claim(
    "sched_sampling",
    13,
    kind="measured",
    statement="Models trained with BASH or RAC are a better start for preference tuning than supervised ones.",
    expected={"quick": "not run", "real": "not run", "full": "holds"},
    time_limit=24 * 3600,
)
def better_start_for_preference_tuning(preset: SamplingPreset) -> Evidence:
    """Headline score of greedy answers after DPO, from BASH and RAC minus from longer SFT; margin 0, every task must hold.

    The chosen answers are the demonstrations, the rejected ones samples of the model that all three continue, the same for
    each start. Small models are not run: their preference would be what supervised fine-tuning already teaches them.
    Control: a start from the same rounds at beta = 0 under another seed.
    """
    if not preset.preference:
        return Evidence.not_run(
            "Preference tuning is for models that answer open questions; the full preset names tasks for it."
        )
    starts = (LONGER, BASH, RAC, NULL)
    jobs = [(name, seed, method) for name in preset.preference for seed in preset.seeds for method in starts]
    found = {job: preferred(preset, job[1], job[0], job[2]) for job in track(jobs, "Tuning on preferences")}
    decisive, null, rows = [], [], []
    for name in preset.preference:
        score = task_of(preset, name, preset.seeds[0]).headline

        def value(seed: int, method: str, name: str = name, score: str = score) -> Floats:
            return found[name, seed, method][score]

        for ours in (BASH, RAC):
            label = f"{name}: DPO from {ours} − from {LONGER}"
            decisive.append(_differences(preset, value, ours, LONGER, label=label, unit=score))
        null.append(_differences(preset, value, NULL, LONGER, label=f"{name}: from beta = 0", unit=score))
        before = _headline(preset, name)
        rows += [
            {
                "task": name,
                "start": method,
                "score": score,
                "before": 100 * float(np.mean([before(seed, method).mean() for seed in preset.seeds])),
                "after": 100 * float(np.mean([value(seed, method).mean() for seed in preset.seeds])),
            }
            for method in starts
        ]
    return Evidence(
        verdict=Verdict.all_of(comparison.verdict for comparison in decisive),
        headline="After DPO, percent: "
        + ", ".join(f"{row['task']} from {row['start']} {row['after']:.1f}" for row in rows),
        table=pd.DataFrame(rows),
        comparisons=tuple(decisive),
        control=Control.of("A start from the same rounds at beta = 0 under another seed.", *null),
        seeds=preset.seeds,
        provenance=_provenance(preset, preset.preference),
    )
