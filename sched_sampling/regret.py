"""Excess accumulated error: what own prefixes cost where the true distribution is known (Arora et al. 2022).

excess_accumulated_error(model, prompts, truth, length=12).excess[-1]     # 0: own prefixes do no harm
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import InvalidInput
from core.llm.examples import EncodedPair
from core.llm.modes import in_mode
from sched_sampling.engines import Proposal
from sched_sampling.forced import Forced, decode, predict

Floats = NDArray[np.float64]
Truth = Callable[[tuple[int, ...], tuple[int, ...]], Floats]


@dataclass(frozen=True)
class AccumulatedError:
    """Regret after l = 1, 2, ... tokens (nats, accumulated) and how much of it is due to own prefixes.

    `regret` is R(l), under the model's prefixes; `gold_regret` is l eps(l), under true ones; `excess` is (R - l eps) / (l eps).
    """

    regret: Floats
    gold_regret: Floats
    excess: Floats


def excess_accumulated_error(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    truth: Truth,
    *,
    length: int,
    samples: int = 32,
    seed: int = 0,
    max_batch_tokens: int | None = None,
) -> AccumulatedError:
    """The excess accumulated error of Arora et al. (2022), where the true conditional is known.

    `truth(prompt, prefix)` gives the true probabilities of the next token over the vocabulary, also behind prefixes that no
    data hold. The regret of a prefix is KL(truth || model), computed in full; prefixes are sampled from the model and from
    the truth, `samples` for each prompt. Excess 0 means that own prefixes do no harm; where mistakes compound it grows with l.

    Raises `InvalidInput` when `truth` gives no distribution, or when the model is the truth, so that there is no regret.
    """
    if length < 1 or samples < 1 or not prompts:
        raise InvalidInput(f"There must be prompts, tokens and samples; got length={length}, samples={samples}.")
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], Floats] = {}

    def true(prompt: tuple[int, ...], prefix: tuple[int, ...]) -> Floats:
        key = prompt, prefix
        if key not in known:
            known[key] = _distribution(truth(prompt, prefix), key)
        return known[key]

    rng = np.random.default_rng(seed)
    rows = []
    for prompt in prompts:
        for _ in range(samples):
            drawn: tuple[int, ...] = ()
            for _ in range(length):
                weights = true(tuple(prompt), drawn)
                drawn = (*drawn, int(rng.choice(len(weights), p=weights)))
            rows.append(Forced(EncodedPair(tuple(prompt), drawn), list(drawn), np.ones(length, dtype=bool)))
    with in_mode(model, training=False):
        gold = [tuple(row.tokens) for row in rows]
        own = decode(model, rows, Proposal(seed=seed), max_batch_tokens=max_batch_tokens)
        means = []
        for answers in (own, gold):
            log_probs = predict(
                model,
                [row.pair.prompt_ids for row in rows],
                answers,
                lambda _, logits: logits.double().log_softmax(-1).cpu().numpy(),
                max_batch_tokens=max_batch_tokens,
            )
            regret = np.array(
                [
                    [_divergence(true(row.pair.prompt_ids, tuple(answer[:t])), predicted[t]) for t in range(length)]
                    for row, answer, predicted in zip(rows, answers, log_probs, strict=True)
                ]
            )
            means.append(regret.mean(axis=0).cumsum())
    if not (means[1] > 0).all():
        raise InvalidInput("The model has no regret on true prefixes, so that there is nothing to compare with.")
    return AccumulatedError(means[0], means[1], (means[0] - means[1]) / means[1])


def _distribution(weights: Any, key: object) -> Floats:
    values = np.asarray(weights, dtype=np.float64)
    if values.ndim != 1 or (values < 0).any() or abs(values.sum() - 1) > 1e-6:
        raise InvalidInput(f"truth{key} must be probabilities that sum to 1; got {weights}.")
    return values / values.sum()


def _divergence(true: Floats, log_probs: Floats) -> float:
    held = true > 0
    return float((true[held] * (np.log(true[held]) - log_probs[held])).sum())
