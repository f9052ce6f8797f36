"""The training runs that claims 1, 2, 3, 7 and 12 share: tiny GPTs on toy tasks, five bases and what continues them.

All runs of a seed continue one base with as many updates on as many target tokens. They are kept for the process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from core.experiment import Comparison, verdict
from core.llm.examples import EncodedPair
from core.llm.finetuning import Finetuning
from core.llm.modes import one_thread
from core.progress import track
from sched_sampling.baselines import OnlineScheduledSampling, RandomTokenReplacement, SupervisedFineTuning
from sched_sampling.bash import BatchScheduledSampling
from sched_sampling.evaluation import noisy_accuracy, position_curves, recovery_rate
from sched_sampling.mixing import Mixing, mix_rows
from sched_sampling.presets import OTHER_DRAW, SamplingPreset
from sched_sampling.rounds import Method
from sched_sampling.schedule import linear
from sched_sampling.toys import SUMS_END, SUMS_VOCABULARY, counting, running_sums, tiny_gpt

SFT = "SFT"
LONGER = "SFT, beta = 0 in every round"
BASH = "BASH mixed"
RANDOM = "random tokens"
ONLINE = "online scheduled sampling"
MODULUS, LENGTH = 16, 12


@dataclass(frozen=True)
class Run:
    """A trained model, the CPU seconds that its rounds took, and the share of target tokens that the last one changed."""

    model: Any
    build_seconds: float
    train_seconds: float
    changed: float


@dataclass(frozen=True)
class Scores:
    """A model on all sixteen counts: recovery, accuracy under noise, and NLL and accuracy of gold tokens on gold prefixes."""

    recovery: float
    noisy: float
    nll: float
    accuracy: float


def all_counts() -> list[EncodedPair]:
    """The whole task."""
    return sorted(set(counting(64 * MODULUS, length=LENGTH, modulus=MODULUS)), key=lambda pair: pair.prompt_ids)


@cache
def counting_run(preset: SamplingPreset, seed: int, name: str) -> Run:
    """The run `name` on counting: the base `SFT`, or a continuation of it."""
    pairs = counting(preset.toy_pairs, length=LENGTH, modulus=MODULUS, seed=seed)
    if name == SFT:
        method: Method = SupervisedFineTuning(
            rounds=1, training=_training(preset.toy_base_steps, preset.toy_batch, preset.toy_learning_rate)
        )
        return _fitted(method, tiny_gpt(MODULUS, LENGTH + 1, seed), pairs, seed)
    training = _training(preset.toy_round_steps, preset.toy_batch, preset.toy_learning_rate)
    method = _method(name, preset.toy_rounds, training, preset.toy_beta, preset.toy_temperature)
    return _fitted(method, copy.deepcopy(counting_run(preset, seed, SFT).model), pairs, seed)


@cache
def scratchpad_run(preset: SamplingPreset, seed: int, name: str) -> Run:
    """The run `name` on running sums; own tokens are drawn at temperature 1."""
    digits = preset.scratchpad_digits
    pairs = running_sums(preset.scratchpad_pairs, digits=digits, seed=seed)
    if name == SFT:
        training = _training(
            preset.scratchpad_base_steps, preset.scratchpad_batch, preset.toy_learning_rate, schedule="cosine"
        )
        model = tiny_gpt(SUMS_VOCABULARY, 2 * digits + 1, seed, end_id=SUMS_END)
        return _fitted(SupervisedFineTuning(rounds=1, training=training), model, pairs, seed)
    training = _training(preset.scratchpad_round_steps, preset.scratchpad_batch, preset.toy_learning_rate / 2)
    method = _method(name, preset.scratchpad_rounds, training, preset.scratchpad_beta, 1.0)
    return _fitted(method, copy.deepcopy(scratchpad_run(preset, seed, SFT).model), pairs, seed)


@cache
def counting_scores(preset: SamplingPreset, seed: int, name: str) -> Scores:
    """Scores of a run; all runs of a seed meet the same wrong tokens and the same noise."""
    model, pairs = counting_run(preset, seed, name).model, all_counts()
    curves = position_curves(model, pairs)
    return Scores(
        recovery=recovery_rate(model, pairs, seed=seed).value,
        noisy=noisy_accuracy(model, pairs, draws=preset.toy_draws, seed=seed).value,
        nll=float(curves.gold_nll.mean()),
        accuracy=float(curves.gold_accuracy.mean()),
    )


@cache
def scratchpad_accuracy(preset: SamplingPreset, seed: int, name: str, temperature: float) -> float:
    """The share of new running sums that are right to the last, greedy (temperature 0) or sampled."""
    pairs = running_sums(preset.scratchpad_test, digits=preset.scratchpad_digits, seed=seed + OTHER_DRAW)
    answers = mix_rows(scratchpad_run(preset, seed, name).model, pairs, 1.0, temperature=temperature, seed=seed)
    return float(np.mean([row.tokens == pair.target_ids for row, pair in zip(answers, pairs, strict=True)]))


def ready(
    preset: SamplingPreset, names: Sequence[str], description: str, run: Callable[..., object] = counting_scores
) -> None:
    """Run what is not there yet under one progress bar."""
    with one_thread():
        for seed, name in track([(seed, name) for seed in preset.seeds for name in names], description):
            run(preset, seed, name)


def compared(
    preset: SamplingPreset, value: Callable[[int], float], *, margin: float = 0.0, label: str, unit: str
) -> Comparison:
    """The verdict on a difference that every seed gives."""
    return verdict([value(seed) for seed in preset.seeds], margin, label=label, unit=unit)


def counting_provenance(preset: SamplingPreset) -> str:
    """The settings of the runs on counting, in a sentence."""
    return (
        f"Counting modulo {MODULUS}, {LENGTH} numbers; GPT-2 of two layers of width 64; {preset.toy_base_steps} + "
        f"{preset.toy_rounds} x {preset.toy_round_steps} updates of {preset.toy_batch} rows; beta to {preset.toy_beta}, own "
        f"tokens at temperature {preset.toy_temperature}"
    )


def _method(name: str, rounds: int, training: Finetuning, beta: float, temperature: float) -> Method:
    if name == LONGER:
        return SupervisedFineTuning(rounds=rounds, training=training)
    schedule = linear(0, beta)
    if name == RANDOM:
        return RandomTokenReplacement(rounds=rounds, training=training, schedule=schedule)
    if name == ONLINE:
        mixing = Mixing(temperature=temperature)
        return OnlineScheduledSampling(rounds=rounds, training=training, schedule=schedule, mixing=mixing)
    mixing = Mixing(proposal=name.removeprefix("BASH "), temperature=temperature)
    return BatchScheduledSampling(rounds=rounds, training=training, schedule=schedule, mixing=mixing)


def _training(num_steps: int, batch_size: int, learning_rate: float, *, schedule: str = "constant") -> Finetuning:
    return Finetuning(num_steps=num_steps, batch_size=batch_size, learning_rate=learning_rate, schedule=schedule)


def _fitted(method: Method, model: Any, pairs: Sequence[EncodedPair], seed: int) -> Run:
    reports = method.fit(model, None, pairs, seed=seed)
    model.eval()
    return Run(
        model,
        sum(report.build_seconds for report in reports),
        sum(report.train_seconds for report in reports),
        reports[-1].built.get("changed", 0.0),
    )
