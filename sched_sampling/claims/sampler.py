"""Claims 4, 7 and 8: what BASH converges to, what it costs, and that its parallel sampler is exact."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from core.experiment import Comparison, Control, Evidence, Verdict, claim, verdict
from core.llm.examples import EncodedPair
from core.llm.finetuning import Finetuning
from core.llm.modes import one_thread
from core.plots import COLORS, figure
from core.progress import track
from sched_sampling.baselines import OnlineScheduledSampling
from sched_sampling.bash import BatchScheduledSampling, bash_dataset
from sched_sampling.claims.toy_runs import (
    BASH,
    LENGTH,
    LONGER,
    MODULUS,
    ONLINE,
    SFT,
    compared,
    counting_provenance,
    counting_scores,
    ready,
)
from sched_sampling.mixing import Mixing, mix
from sched_sampling.presets import SamplingPreset
from sched_sampling.rounds import Method
from sched_sampling.schedule import constant
from sched_sampling.theory import bash_optimum
from sched_sampling.toys import counting, tiny_gpt

A, B, C, D, PROMPT = range(5)
BETAS = (0.0, 0.1, 0.3, 0.5, 1.0)
# The share of answers AB and the proposal's P(A), a seed each in turn.
SHARES = ((0.5, 0.5), (0.6, 0.6), (0.35, 0.5), (0.65, 0.4), (0.45, 0.7))
BIAS = 0.02
SPEED = 3.0
# Two implementations of the reference put the same run at 0.62 to 0.97: what differs by less is of one class.
SAME = 0.2


@claim(
    "sched_sampling",
    4,
    kind="constructed",
    statement="BASH is biased where answers are multi-modal, by exactly the formula.",
    time_limit=1800,
)
def bash_is_biased_as_the_formula_says(preset: SamplingPreset) -> Evidence:
    """Answers AB (share p) and CD, and a proposal whose P(A) is q: BASH's data set is built at five betas, and P(B|A) and
    P(B|C) of the table (next token given the last) that minimises its loss are compared with the population optimum.

    That table is the share of targets behind each token, so that nothing is left to training. 0.02 minus the largest error of
    a seed, margin 0; p and q differ between seeds. Control: the formula of teacher forcing, P(B|A) = 1 and P(B|C) = 0.
    """
    rows: list[_Conditional] = []
    with one_thread():
        for number, seed in enumerate(track(preset.seeds, "Mixing two answers")):
            rows += _bias_rows(preset, seed, *SHARES[number % len(SHARES)])
    errors, naive = (dict.fromkeys(preset.seeds, 0.0) for _ in range(2))
    for row in rows:
        errors[row.seed] = max(errors[row.seed], abs(row.learned - row.optimum))
        naive[row.seed] = max(naive[row.seed], abs(row.learned - row.unbiased))
    unit = "probability"
    close = compared(preset, lambda s: BIAS - errors[s], label="0.02 − largest error", unit=unit)
    null = compared(preset, lambda s: BIAS - naive[s], label="teacher forcing: 0.02 − largest error", unit=unit)
    plot, axes = figure()
    for color, given in zip(COLORS, ("A", "C"), strict=False):
        found = [row for row in rows if row.given == given]
        axes.plot(
            [row.optimum for row in found],
            [row.learned for row in found],
            "o",
            color=color,
            alpha=0.6,
            label=f"P(B|{given})",
        )
    axes.plot([0, 1], [0, 1], color="black", alpha=0.4, linewidth=0.8)
    axes.set(xlabel="optimum of the formula", ylabel="learned")
    axes.legend(frameon=False)
    at_half = [row.learned for row in rows if row.beta == 0.5 and row.given == "A"]
    table = pd.DataFrame(rows).drop(columns="seed").groupby(["beta", "given"], as_index=False).mean()
    return Evidence(
        verdict=close.verdict,
        headline=f"Largest error {max(errors.values()):.3f} over {len(rows)} conditionals; at beta = 0.5 P(B|A) is "
        f"{min(at_half):.2f} to {max(at_half):.2f} in the place of 1",
        table=table,
        comparisons=(close,),
        control=Control.of("Teacher forcing's conditionals, 1 and 0.", null),
        figures={"Conditionals of all seeds and betas against the formula": plot},
        seeds=preset.seeds,
        provenance=(f"{preset.bias_pairs} rows a seed and beta",),
    )


@dataclass(frozen=True)
class _Conditional:
    """P(B | given) from BASH's data at `beta`, and what the formula and teacher forcing say."""

    seed: int
    p: float
    q: float
    beta: float
    given: str
    optimum: float
    learned: float
    unbiased: float


def _bias_rows(preset: SamplingPreset, seed: int, p: float, q: float) -> list[_Conditional]:
    first = round(p * preset.bias_pairs)
    pairs = [EncodedPair((PROMPT,), (A, B) if i < first else (C, D)) for i in range(preset.bias_pairs)]
    proposal = _Table(5, {(PROMPT, A): q, (PROMPT, C): 1 - q})
    rows = []
    for beta in BETAS:
        counts = np.zeros((5, 5))
        for row in bash_dataset(proposal, None, pairs, beta, seed=seed):
            counts[row["input_ids"][1], row["labels"][2]] += 1
        optimum = bash_optimum(p, q, beta)
        for name, token, expected, unbiased in (("A", A, optimum.b_given_a, 1.0), ("C", C, optimum.b_given_c, 0.0)):
            learned = counts[token, B] / counts[token].sum()
            # Both first tokens occur, whatever beta is.
            rows.append(_Conditional(seed, p, q, beta, name, float(expected or 0), float(learned), unbiased))
    return rows


class _Table(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Probabilities of the next token given the last; those that are not given are 0 as nearly as matters."""

    def __init__(self, vocabulary: int, probabilities: Mapping[tuple[int, int], float]) -> None:
        config: Any = PreTrainedConfig()
        config.vocab_size = vocabulary
        super().__init__(config)
        table = torch.full((vocabulary, vocabulary), -40.0)
        for place, value in probabilities.items():
            table[place] = math.log(value)
        self.table = torch.nn.Parameter(table)

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, past_key_values: Any = None, use_cache: bool = False
    ) -> CausalLMOutputWithPast:
        """Look up; there is nothing to remember."""
        return CausalLMOutputWithPast(logits=self.table[input_ids], past_key_values=past_key_values or DynamicCache())


@claim(
    "sched_sampling",
    7,
    kind="measured",
    exclusive=True,
    statement="Offline mixing recovers nearly as well as online scheduled sampling, in a third of the time or less.",
    expected="fails",
    time_limit=3600,
)
def offline_is_as_good_and_faster(preset: SamplingPreset) -> Evidence:
    """Counting: recovery after BASH minus after online scheduled sampling, at equal updates, margin −0.2 (set after one seed
    had shown 0.61 against 0.72). Time: CPU seconds of one round, building and training, at beta 0.25; the online method
    generates token by token over a cache in every step, as it is published. Margin log 3, on the counting that recovery is
    measured on, and on counting to 96 with batches of 8.

    Expected to fail: with answers of 12 tokens and batches of 64 training itself is most of the time. On long answers the
    ratio is there, and given our parallel sampler the online method is faster as well: all are in the table. Every row of
    the pool is used 6.25 times a round, as in the runs on counting.

    Control: SFT in the place of BASH for recovery, and the online method against itself for time.
    """
    ready(preset, (SFT, LONGER, BASH, ONLINE), "Learning to count")

    def recovery(seed: int, name: str) -> float:
        return counting_scores(preset, seed, name).recovery

    def no_worse(name: str) -> Comparison:
        return compared(
            preset,
            lambda s: recovery(s, name) - recovery(s, ONLINE),
            margin=-SAME,
            label=f"{name} − {ONLINE}",
            unit="recovery",
        )

    same, not_same = no_worse(BASH), no_worse(LONGER)
    settings = {
        "long answers": (preset.timing_length, preset.timing_batch, preset.timing_steps),
        "counting": (LENGTH, preset.toy_batch, 2 * preset.timing_steps),
    }
    seconds: dict[tuple[str, str], list[float]] = {}
    with one_thread():
        for seed in track(preset.seeds, "Timing rounds"):
            for setting, sizes in settings.items():
                for method, time_taken in _round_times(*sizes, seed=seed, again=setting == "long answers").items():
                    seconds.setdefault((setting, method), []).append(time_taken)
    logs = {place: np.log(times) for place, times in seconds.items()}
    unit = "log of the ratio of CPU times"
    on_counting, faster, null = (
        verdict(list(logs[setting, _TOKENS] - logs[setting, other]), math.log(SPEED), label=label, unit=unit)
        for setting, other, label in (
            ("counting", _OFFLINE, f"{_TOKENS} / {_OFFLINE}, counting"),
            ("long answers", _OFFLINE, f"{_TOKENS} / {_OFFLINE}, long answers"),
            ("long answers", _AGAIN, f"{_TOKENS} / itself"),
        )
    )
    ratio = {place: math.exp(np.mean(log - logs[place[0], _OFFLINE])) for place, log in logs.items()}
    table = pd.DataFrame(
        [
            (setting, method, float(np.median(times)), ratio[setting, method])
            for (setting, method), times in seconds.items()
            if method != _AGAIN
        ],
        columns=["setting", "method", "CPU seconds", "ratio to BASH"],
    )
    return Evidence(
        verdict=Verdict.all_of([same.verdict, on_counting.verdict, faster.verdict]),
        headline=f"Recovery {np.mean([recovery(s, BASH) for s in preset.seeds]):.2f} offline, "
        f"{np.mean([recovery(s, ONLINE) for s in preset.seeds]):.2f} online. Token by token the online method takes "
        f"{ratio['long answers', _TOKENS]:.1f} times as long on answers of {preset.timing_length} tokens "
        f"({ratio['long answers', _PARALLEL]:.1f} with our sampler), on counting to 12 {ratio['counting', _TOKENS]:.1f} "
        f"({ratio['counting', _PARALLEL]:.1f})",
        table=table,
        comparisons=(same, on_counting, faster),
        control=Control.of("SFT for recovery, the online method against itself for time.", not_same, null),
        seeds=preset.seeds,
        provenance=(
            counting_provenance(preset),
            f"Timed: {preset.timing_steps} updates of {preset.timing_batch} rows (counting to 12: {2 * preset.timing_steps} of "
            f"{preset.toy_batch}), one thread, CPU time",
        ),
    )


_OFFLINE, _TOKENS, _PARALLEL, _AGAIN = "BASH", "online, token by token", "online, our parallel sampler", "again"


def _round_times(length: int, batch: int, steps: int, *, seed: int, again: bool) -> dict[str, float]:
    """CPU seconds of a round of every method, from one model that has begun to count."""
    pairs = counting(max(1, round(steps * batch / 6.25)), length=length, modulus=MODULUS, seed=seed)
    training = Finetuning(num_steps=steps, batch_size=batch, learning_rate=1e-3)
    base = tiny_gpt(MODULUS, length + 1, seed)
    # Also warms up what is slow the first time.
    warm = BatchScheduledSampling(
        rounds=1, schedule=constant(0.25), training=Finetuning(num_steps=10, learning_rate=3e-3)
    )
    warm.fit(base, None, pairs, seed=seed)
    methods: dict[str, Method] = {
        _OFFLINE: BatchScheduledSampling(
            rounds=1, schedule=constant(0.25), training=training, mixing=Mixing(temperature=2.0)
        )
    }
    for name, engine in ((_TOKENS, "sequential"), (_PARALLEL, "auto"), *(((_AGAIN, "sequential"),) if again else ())):
        methods[name] = OnlineScheduledSampling(
            rounds=1, schedule=constant(0.25), training=training, mixing=Mixing(temperature=2.0, engine=engine)
        )
    times = {}
    for name, method in methods.items():
        model = copy.deepcopy(base)
        start = time.process_time()
        method.fit(model, None, pairs, seed=seed)
        times[name] = time.process_time() - start
    return times


@claim(
    "sched_sampling",
    8,
    kind="exact",
    statement="The parallel sampler gives the tokens of sequential sampling, every one of them.",
)
def parallel_sampling_is_exact(preset: SamplingPreset) -> Evidence:
    """Random models, mixing probabilities, temperatures and masks: parallel against sequential sampling over a cache, and
    against one row at a time without filling. Prompts are filled up on the left, answers on the right.

    Control: a single pass, that is tokens drawn behind gold ones.
    """
    rows, exact, null = [], [], []
    with one_thread():
        for draw in track(range(preset.sampler_draws), "Sampling in parallel"):
            rng = np.random.default_rng([preset.seeds[0], draw])
            model = _random_model(draw)
            beta, temperature = float(rng.uniform(0.05, 1.0)), float(rng.choice([0.0, 0.5, 1.0, 2.0]))
            num, width, length = 6, 7, 24
            prompt, target = (torch.from_numpy(rng.integers(0, _VOCABULARY, (num, size))) for size in (width, length))
            masks: dict[str, Any] = {
                "prompt_mask": torch.arange(width) >= torch.from_numpy(rng.integers(0, width, num))[:, None],
                "target_mask": torch.arange(length) < torch.from_numpy(rng.integers(4, length + 1, num))[:, None],
            }
            options: dict[str, Any] = {"temperature": temperature, "seed": draw, "protected_ids": (0,)}
            parallel, sequential, gold = (mix(model, prompt, target, beta, **masks, **options, **how) for how in _WAYS)
            alone = torch.cat([_alone(model, i, prompt, target, beta, masks, options) for i in range(num)])
            exact.append(torch.equal(parallel.tokens, sequential.tokens) and torch.equal(parallel.tokens, alone))
            null.append(torch.equal(gold.tokens, sequential.tokens))
            rows.append((type(model).__name__, beta, temperature, parallel.changed, parallel.passes, exact[-1]))
    table = pd.DataFrame(rows, columns=["model", "beta", "temperature", "changed", "passes", "equal"])
    return Evidence(
        verdict=Verdict.of(all(exact)),
        headline=f"{sum(exact)} of {len(exact)} draws equal token for token, in {table['passes'].min()} to "
        f"{table['passes'].max()} passes",
        table=table,
        control=Control(
            f"A single pass behind gold tokens, equal in {sum(null)} of {len(null)} draws.", Verdict.of(all(null))
        ),
        seeds=preset.seeds[:1],
    )


_VOCABULARY = 23
_WAYS: tuple[dict[str, Any], ...] = ({"engine": "parallel"}, {"engine": "sequential"}, {"proposal": "gold"})


def _alone(
    model: Any, i: int, prompt: Any, target: Any, beta: float, masks: dict[str, Any], options: dict[str, Any]
) -> Tensor:
    """Row i sampled sequentially by itself, without any filling, and filled up again."""
    row_prompt, row_target = prompt[i][masks["prompt_mask"][i]], target[i][masks["target_mask"][i]]
    found = mix(model, row_prompt[None], row_target[None], beta, row_ids=[i], engine="sequential", **options)
    whole = target[i : i + 1].clone()
    whole[:, : len(row_target)] = found.tokens
    return whole


def _random_model(seed: int) -> Any:
    """A GPT-2 or a Llama whose predictions are far from uniform and depend on the whole context."""
    if seed % 2:
        model: Any = tiny_gpt(_VOCABULARY, 40, seed)
    else:
        config = LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model
