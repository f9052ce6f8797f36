"""The training runs that claims 9, 10 and 13 share: on every task and seed, supervised fine-tuning and what continues it.

All methods of a seed continue the same fine-tuned model on the same demonstrations with the same number of updates on equally
many rows, except where the name says otherwise. Runs are kept for the process, by their weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import InvalidInput
from core.llm.causal import CausalLM
from core.llm.examples import EncodedPair, collate, encode_pairs, supervised_row
from core.llm.finetuning import Finetuning, add_lora, completion_loss
from core.llm.modes import in_mode, one_thread
from sched_sampling.baselines import (
    SPIN,
    NEFTune,
    OnlineScheduledSampling,
    Preference,
    RandomTokenReplacement,
    SupervisedFineTuning,
    TwoPassScheduledSampling,
    tune_on_preferences,
)
from sched_sampling.bash import BatchScheduledSampling
from sched_sampling.correction import correct
from sched_sampling.drafting import Drafting, draft_with_model
from sched_sampling.evaluation import exposure_gap
from sched_sampling.mixing import Mixing
from sched_sampling.presets import OTHER_DRAW, SamplingPreset
from sched_sampling.rac import ReferenceAnswerCorrection
from sched_sampling.rounds import Method, RoundReport
from sched_sampling.schedule import constant, linear
from sched_sampling.task_rows import Item
from sched_sampling.tasks import SPLITS, Scores, Task, load_task
from sched_sampling.templates import Template
from sched_sampling.weights import restore, trained_state
from sched_sampling.world_models import correction_template, world_llama

BASE = "SFT"
LONGER = "longer SFT"
EQUAL_TIME = "SFT, CPU time of BASH"
RANDOM = "random tokens"
BASH = "BASH"
RAC = "RAC"
# Longer SFT as BASH runs it at beta = 0, under another seed: the null of every comparison.
NULL = "BASH, beta = 0, another seed"
CONTINUATIONS = (LONGER, EQUAL_TIME, RANDOM, BASH, RAC, NULL)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trained:
    """What a run left: the parameters that it trained, its updates after the base, and the CPU seconds of either half."""

    weights: Mapping[str, Tensor]
    steps: int
    build_seconds: float
    train_seconds: float

    @property
    def seconds(self) -> float:
        """CPU seconds of building data and training."""
        return self.build_seconds + self.train_seconds


@dataclass(frozen=True)
class Answers:
    """Every score of direct answers, greedy and sampled at temperature 1, and of RAC's after one correction (else empty)."""

    greedy: Scores
    sampled: Scores
    corrected: Scores
    corrected_samples: Scores


@cache
def task_of(preset: SamplingPreset, name: str, seed: int) -> Task:
    """The items of a seed: a draw of the world, or of a data set those short enough for `task_context` tokens."""
    numbers = (preset.task_pairs, preset.task_valid, preset.task_test)
    if name.startswith("world:"):
        return load_task(name, num_train=numbers[0], num_valid=numbers[1], num_test=numbers[2], seed=seed)
    task = load_task(name, calculator_marks=False)
    train, valid, test = (
        _short(preset, task, split, number, seed) for split, number in zip(SPLITS, numbers, strict=True)
    )
    return replace(task, train=train, valid=valid, test=test)


def _short(preset: SamplingPreset, task: Task, split: str, number: int, seed: int) -> tuple[Item, ...]:
    tokenizer = model_of(preset, task.name).tokenizer
    items = task.items(split)
    chosen: list[Item] = []
    for i in np.random.default_rng(seed).permutation(len(items)):
        (pair,) = encode_pairs(tokenizer, [items[i].pair])
        if len(pair.prompt_ids) + len(pair.target_ids) <= (preset.task_context or math.inf):
            chosen.append(items[i])
        if len(chosen) == number:
            return tuple(chosen)
    raise InvalidInput(
        f"{task.name} [{split}] has {len(chosen)} items of at most {preset.task_context} tokens; {number} are asked for."
    )


@cache
def model_of(preset: SamplingPreset, name: str) -> CausalLM:
    """The one model in memory that every run of a task puts its weights into."""
    lm = world_llama(name) if preset.task_model == "world" else CausalLM.load(preset.task_model)
    if preset.task_lora_rank is not None:
        lm.model = add_lora(lm.model, rank=preset.task_lora_rank)
        lm.model.eval()
    return lm


@cache
def _pretrained(preset: SamplingPreset, name: str) -> Mapping[str, Tensor]:
    return trained_state(model_of(preset, name).model)


@cache
def encoded(preset: SamplingPreset, name: str, seed: int, split: str) -> tuple[EncodedPair, ...]:
    """The items of a split as token ids."""
    return tuple(encode_pairs(model_of(preset, name).tokenizer, task_of(preset, name, seed).pairs(split)))


@cache
def trained(preset: SamplingPreset, seed: int, name: str, method: str) -> Trained:
    """Train `method` on task `name` under a seed; "SFT" is the base that all others continue."""
    if method == BASE:
        settings = _settings(preset, preset.task_base_steps)
        return fitted(preset, seed, name, SupervisedFineTuning(rounds=1, training=settings), _pretrained(preset, name))
    steps = preset.task_round_steps
    if method == EQUAL_TIME:
        other = trained(preset, seed, name, BASH)
        steps = math.ceil(steps * other.seconds / other.train_seconds)
    own_seed = seed + OTHER_DRAW if method == NULL else seed
    made = _method(preset, name, method, steps)
    return fitted(preset, own_seed, name, made, trained(preset, seed, name, BASE).weights, data_seed=seed)


def _settings(preset: SamplingPreset, num_steps: int) -> Finetuning:
    return Finetuning(
        num_steps=num_steps,
        batch_size=preset.task_batch,
        learning_rate=preset.task_learning_rate,
        warmup_steps=min(5, num_steps - 1),
        packing=preset.task_packing,
    )


def _method(preset: SamplingPreset, name: str, method: str, steps: int) -> Method:
    common: dict[str, Any] = {"rounds": preset.task_rounds, "training": _settings(preset, steps)}
    rising = linear(0.0, preset.task_beta)
    if method in (LONGER, EQUAL_TIME):
        return SupervisedFineTuning(**common)
    if method == RANDOM:
        return RandomTokenReplacement(schedule=rising, **common)
    if method == RAC:
        drafting = Drafting(max_new_tokens=answer_limit(preset, name))
        return ReferenceAnswerCorrection(template=template_of(preset, name), drafting=drafting, **common)
    return BatchScheduledSampling(schedule=constant(0.0) if method == NULL else rising, **common)


def bash_with(preset: SamplingPreset, *, beta: float, temperature: float) -> BatchScheduledSampling:
    """BASH as the claims run it, but for beta and the temperature."""
    return BatchScheduledSampling(
        rounds=preset.task_rounds,
        training=_settings(preset, preset.task_round_steps),
        schedule=linear(0.0, beta),
        mixing=Mixing(temperature=temperature),
    )


def other_baselines(preset: SamplingPreset) -> dict[str, Method]:
    """The baselines that only the table of one seed shows, with the rounds and updates of all others."""
    common: dict[str, Any] = {"rounds": preset.task_rounds, "training": _settings(preset, preset.task_round_steps)}
    rising = linear(0.0, preset.task_beta)
    return {
        "online scheduled sampling": OnlineScheduledSampling(schedule=rising, **common),
        "two-pass scheduled sampling": TwoPassScheduledSampling(schedule=rising, **common),
        "NEFTune": NEFTune(**common),
        "SPIN": SPIN(**common),
    }


def fitted(
    preset: SamplingPreset,
    seed: int,
    name: str,
    method: Method,
    start: Mapping[str, Tensor],
    *,
    data_seed: int | None = None,
) -> Trained:
    """What `method` makes of the weights `start` on the demonstrations of `data_seed` (None: of `seed`)."""
    lm = model_of(preset, name)
    _pretrained(preset, name)
    restore(lm.model, start)
    pairs = task_of(preset, name, seed if data_seed is None else data_seed).pairs("train")
    with threads(preset):
        reports: list[RoundReport] = method.fit(lm.model, lm.tokenizer, pairs, seed=seed)
    return Trained(
        trained_state(lm.model),
        sum(report.history.num_steps for report in reports),
        sum(report.build_seconds for report in reports),
        sum(report.train_seconds for report in reports),
    )


def threads(preset: SamplingPreset) -> AbstractContextManager[None]:
    """One thread for the small models, all there are for a real one."""
    return one_thread() if preset.task_model == "world" else nullcontext()


def template_of(preset: SamplingPreset, name: str) -> Template | None:
    """The correction prompt: words for models that read, a token of their own for the small ones."""
    prompt = str(task_of(preset, name, preset.seeds[0]).train[0].prompt)
    return correction_template(model_of(preset, name).tokenizer, prompt)


def answer_limit(preset: SamplingPreset, name: str) -> int:
    """How many tokens an answer may have."""
    limit = task_of(preset, name, preset.seeds[0]).max_new_tokens
    return limit if preset.task_answer_tokens is None else min(limit, preset.task_answer_tokens)


@cache
def answers(preset: SamplingPreset, seed: int, name: str, method: str) -> Answers:
    """The scores of a run on the test items of its seed."""
    weights = trained(preset, seed, name, method).weights
    found = [scored(preset, seed, name, weights, temperature=t, rounds=int(method == RAC)) for t in (0.0, 1.0)]
    (greedy, corrected), (sampled, corrected_samples) = ((each[0], each[1] if method == RAC else {}) for each in found)
    return Answers(greedy, sampled, corrected, corrected_samples)


def scored(
    preset: SamplingPreset,
    seed: int,
    name: str,
    weights: Mapping[str, Tensor],
    *,
    temperature: float,
    rounds: int = 0,
    split: str = "test",
) -> list[Scores]:
    """Scores of direct answers and of those after each of `rounds` corrections."""
    lm = model_of(preset, name)
    restore(lm.model, weights)
    task = task_of(preset, name, seed)
    items = task.items(split)
    with threads(preset):
        found = correct(
            lm.model,
            lm.tokenizer,
            [item.prompt for item in items],
            rounds,
            max_new_tokens=answer_limit(preset, name),
            template=template_of(preset, name),
            temperature=temperature,
            seed=seed,
        )
    return [task.score(found.texts(number), items) for number in range(rounds + 1)]


@dataclass(frozen=True)
class Exposure:
    """Of every test answer, nats a token: the gap between own and gold prefixes, and the NLL on gold ones."""

    gap: Floats
    gold_nll: Floats


@cache
def exposure(preset: SamplingPreset, seed: int, name: str, method: str) -> Exposure:
    """The exposure gap of a run on the test items of its seed."""
    lm = model_of(preset, name)
    restore(lm.model, trained(preset, seed, name, method).weights)
    pairs = encoded(preset, name, seed, "test")
    return Exposure(
        exposure_gap(lm.model, pairs, tokenizer=lm.tokenizer, seed=seed).by_pair, _gold_nll(lm.model, pairs)
    )


@torch.inference_mode()
def _gold_nll(model: Any, pairs: Sequence[EncodedPair]) -> Floats:
    device = next(model.parameters()).device
    with in_mode(model, training=False):
        return np.array(
            [
                float(completion_loss(model, {k: v.to(device) for k, v in collate([supervised_row(pair)]).items()}))
                for pair in pairs
            ]
        )


@cache
def preferences(preset: SamplingPreset, seed: int, name: str) -> tuple[Preference, ...]:
    """The demonstrations of a seed, each chosen over a sample of the base; where the two are the same there is none."""
    lm = model_of(preset, name)
    restore(lm.model, trained(preset, seed, name, BASE).weights)
    pairs = encoded(preset, name, seed, "train")
    drafts = draft_with_model(
        lm.model,
        lm.tokenizer,
        [pair.prompt_ids for pair in pairs],
        Drafting(),
        max_new_tokens=answer_limit(preset, name),
        seed=seed,
    )
    ends = [pair.target_ids[-1:] if draft.ended else () for pair, draft in zip(pairs, drafts, strict=True)]
    return tuple(
        Preference(pair.prompt_ids, pair.target_ids, (*draft.token_ids, *end))
        for pair, draft, end in zip(pairs, drafts, ends, strict=True)
        if (*draft.token_ids, *end) != pair.target_ids
    )


@cache
def preferred(preset: SamplingPreset, seed: int, name: str, method: str) -> Scores:
    """Scores of greedy direct answers after preference tuning that began with a run; all runs get the same preferences."""
    lm = model_of(preset, name)
    chosen = preferences(preset, seed, name)
    start = trained(preset, seed, name, method).weights
    restore(lm.model, start)
    settings = replace(
        _settings(preset, preset.preference_steps), learning_rate=preset.preference_learning_rate, packing=False
    )
    tune_on_preferences(lm.model, chosen, settings, seed=seed)
    (scores,) = scored(preset, seed, name, trained_state(lm.model), temperature=0.0)
    return scores
