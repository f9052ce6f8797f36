"""How far a model is from its own prefixes: recovery, noisy decoding, exposure gap (reference, "Metric definitions").

pairs = encode_pairs(lm.tokenizer, task.pairs("test"))
recovery_rate(lm.model, pairs, positions=8, tokenizer=lm.tokenizer).value     # right behind one wrong token, as a share
exposure_gap(lm.model, pairs, tokenizer=lm.tokenizer).value    # gold NLL on own prefixes minus on gold ones, nats a token

Everything works on token ids as they are, so that nothing is tokenized twice; answers are compared position by position.
Prompts may have any lengths: a batch holds rows of like length, which decode together over one cache. What follows an end
token that the model chose is wrong: its answer was over. `tokenizer` adds its special tokens to those that the model's
configuration names. The model is in evaluation mode meanwhile, and afterwards as it was.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import InvalidInput
from core.llm.causal import end_tokens
from core.llm.examples import EncodedPair
from core.llm.modes import in_mode
from sched_sampling.bash import protected_ids
from sched_sampling.engines import Proposal
from sched_sampling.forced import Forced, decode, predict
from sched_sampling.mixing import mix_rows

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Recovery:
    """How much of an answer is right after one forced wrong token.

    `value` is the mean of `by_pair`; `by_lag[k]` is the accuracy of the token k + 1 places behind the wrong one.
    """

    value: float
    by_pair: Floats
    by_lag: Floats


def recovery_rate(
    model: Any,
    pairs: Sequence[EncodedPair],
    *,
    wrong_tokens: int = 3,
    positions: int | None = None,
    candidates: Collection[int] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    max_batch_tokens: int | None = None,
) -> Recovery:
    """The share of gold tokens that greedy decoding still gives after a gold prefix and one forced wrong token.

    For every answer of T tokens the prefix has t = 1, ..., T - 3 gold tokens (or `positions` of these, drawn at random),
    each with `wrong_tokens` different wrong tokens; the share is over the T - t - 1 tokens behind, and averaged. Wrong
    tokens are uniform over `candidates` (None: the vocabulary without special tokens).

    Raises `InvalidInput` on an answer of fewer than four tokens, and on too few candidates.
    """
    _refuse(pairs, 4, "a prefix, a wrong token and two tokens to judge")
    allowed = _candidates(model, tokenizer, candidates)
    if wrong_tokens < 3 or (positions is not None and positions < 1):
        raise InvalidInput(
            "recovery_rate takes at least three different wrong tokens and at least one position; got "
            f"wrong_tokens={wrong_tokens}, positions={positions}."
        )
    rows, origins = [], []
    for i, pair in enumerate(pairs):
        rng = np.random.default_rng([seed, i])
        prefixes = np.arange(1, len(pair.target_ids) - 2)
        if positions is not None and positions < len(prefixes):
            prefixes = np.sort(rng.choice(prefixes, positions, replace=False))
        for t in prefixes.tolist():
            others = allowed[allowed != pair.target_ids[t]]
            if len(others) < wrong_tokens:
                raise InvalidInput(
                    f"Pair {i} needs {wrong_tokens} wrong tokens at position {t}, and {len(others)} of the candidates differ "
                    "from gold there. Give more candidates."
                )
            for token in rng.choice(others, wrong_tokens, replace=False).tolist():
                forced = [*pair.target_ids[:t], token, *pair.target_ids[t + 1 :]]
                rows.append(Forced(pair, forced, np.arange(len(forced)) > t))
                origins.append((i, t))
    right = [
        found[t + 1 :] for found, (_, t) in zip(_right(model, rows, tokenizer, max_batch_tokens), origins, strict=True)
    ]
    shares: list[list[float]] = [[] for _ in pairs]
    for (i, _), found in zip(origins, right, strict=True):
        shares[i].append(float(found.mean()))
    by_pair = np.array([np.mean(found) for found in shares])
    return Recovery(float(by_pair.mean()), by_pair, _mean_by_position(right))


@dataclass(frozen=True)
class NoisyDecoding:
    """Accuracy of the tokens that were left alone in decoding with noise: the mean over pairs, and by position.

    `slips` and `returns` are how often a token was wrong behind a right one, and right behind a wrong one, whether it was
    left alone or not: the rates of the two-state law (`sched_sampling.theory`). None where there was no occasion, as
    `by_position` is NaN where the noise replaced every answer's token.
    """

    value: float
    by_pair: Floats
    by_position: Floats
    slips: float | None
    returns: float | None


def noisy_accuracy(
    model: Any,
    pairs: Sequence[EncodedPair],
    *,
    rate: float = 0.05,
    draws: int = 8,
    candidates: Collection[int] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    max_batch_tokens: int | None = None,
) -> NoisyDecoding:
    """Greedy decoding in which every emitted token is replaced by a random one with probability `rate`.

    The random token is uniform over `candidates` (None: the vocabulary without special tokens) and may be the gold one.
    Every answer is decoded under `draws` draws of the noise, as far as gold goes. Models compared under one seed get the
    same noise. Raises `InvalidInput` before any work on a rate outside [0, 1), on empty answers, and when the noise leaves
    none of a pair's tokens alone.
    """
    if not 0 <= rate < 1 or draws < 1:
        raise InvalidInput(f"Noisy decoding needs a rate in [0, 1) and at least one draw; got {rate} and {draws}.")
    _refuse(pairs, 1, "something to judge")
    allowed = _candidates(model, tokenizer, candidates)
    rows, alone = [], []
    for i, pair in enumerate(pairs):
        for draw in range(draws):
            rng = np.random.default_rng([seed, i, draw])
            replaced = rng.random(len(pair.target_ids)) < rate
            tokens = np.where(replaced, rng.choice(allowed, len(replaced)), pair.target_ids)
            rows.append(Forced(pair, tokens.tolist(), ~replaced))
            alone.append(~replaced)
        if not any(kept.any() for kept in alone[-draws:]):
            raise InvalidInput(
                f"Pair {i} has no token that the noise left alone: its answer has {len(pair.target_ids)} tokens, and all are "
                f"replaced at rate {rate} in {draws} draws. Take more draws or a lower rate."
            )
    right = _right(model, rows, tokenizer, max_batch_tokens)
    # What was replaced is not counted.
    counted = [np.where(kept, found, np.nan) for found, kept in zip(right, alone, strict=True)]
    by_pair = np.array([np.nanmean(counted[i * draws : (i + 1) * draws]) for i in range(len(pairs))])
    before = np.concatenate([np.concatenate([[True], found[:-1]]) for found in right])
    now = np.concatenate(right)
    return NoisyDecoding(
        value=float(by_pair.mean()),
        by_pair=by_pair,
        by_position=_mean_by_position(counted),
        slips=float((~now)[before].mean()) if before.any() else None,
        returns=float(now[~before].mean()) if not before.all() else None,
    )


@dataclass(frozen=True)
class PositionCurves:
    """Mean NLL (nats) and accuracy of the gold token at each position, on gold and on own prefixes; and how many answers
    reach the position. Accuracy is that of the most probable token.
    """

    gold_nll: Floats
    own_nll: Floats
    gold_accuracy: Floats
    own_accuracy: Floats
    count: NDArray[np.int64]


def position_curves(
    model: Any,
    pairs: Sequence[EncodedPair],
    *,
    proposal: str = "mixed",
    temperature: float = 1.0,
    samples: int = 1,
    tokenizer: Any = None,
    seed: int = 0,
    max_batch_tokens: int | None = None,
) -> PositionCurves:
    """How well the gold token is predicted at every position of an answer, on gold prefixes and on own ones.

    Own prefixes are free-running answers (`samples` of each, at `temperature`), aligned with gold position by position. A
    special token that the model would emit is replaced by gold, as in training data, so that no answer ends early. `proposal`
    (`sched_sampling.mixing`) "gold" draws every token behind gold ones instead: mistakes that cannot cascade.
    """
    gold, own = _both(model, pairs, tokenizer, proposal, temperature, samples, seed, max_batch_tokens)
    reach = np.bincount([len(found.nll) for found in gold])
    return PositionCurves(
        gold_nll=_mean_by_position([found.nll for found in gold]),
        own_nll=_mean_by_position([found.nll for found in own]),
        gold_accuracy=_mean_by_position([found.right for found in gold]),
        own_accuracy=_mean_by_position([found.right for found in own]),
        count=reach[::-1].cumsum()[::-1][1:],
    )


@dataclass(frozen=True)
class ExposureGap:
    """Gold NLL on own prefixes minus gold NLL on gold prefixes, nats a token: over all answers, and of each."""

    value: float
    by_pair: Floats


def exposure_gap(
    model: Any,
    pairs: Sequence[EncodedPair],
    *,
    temperature: float = 1.0,
    samples: int = 1,
    tokenizer: Any = None,
    seed: int = 0,
    max_batch_tokens: int | None = None,
) -> ExposureGap:
    """How much worse gold tokens are predicted on the model's own prefixes than on gold ones; `value` is the mean over pairs.

    Own prefixes are those of `position_curves`. Gold must be what should come at its position whatever stands before it, as
    in the toy tasks; on open text an answer that puts things in another order counts as a gap too.
    """
    gold, own = _both(model, pairs, tokenizer, "mixed", temperature, samples, seed, max_batch_tokens)
    by_pair = np.array(
        [
            np.mean([found.nll.mean() for found in own[i * samples : (i + 1) * samples]]) - gold[i].nll.mean()
            for i in range(len(pairs))
        ]
    )
    return ExposureGap(float(by_pair.mean()), by_pair)


def _right(model: Any, rows: Sequence[Forced], tokenizer: Any, budget: int | None) -> list[NDArray[np.bool_]]:
    """Which tokens of the greedily decoded answers equal gold, before the model ended its answer."""
    with in_mode(model, training=False):
        decoded = decode(model, rows, Proposal(temperature=0.0), max_batch_tokens=budget)
    ends = sorted(end_tokens(model, tokenizer))
    results = []
    for row, tokens in zip(rows, decoded, strict=True):
        found = np.array(tokens)
        ended = np.logical_or.accumulate(np.isin(found, ends) & row.open)
        results.append((found == row.pair.target_ids) & ~np.concatenate([[False], ended[:-1]]))
    return results


@dataclass(frozen=True)
class _Scores:
    nll: Floats
    right: NDArray[np.bool_]


def _both(
    model: Any,
    pairs: Sequence[EncodedPair],
    tokenizer: Any,
    proposal: str,
    temperature: float,
    samples: int,
    seed: int,
    budget: int | None,
) -> tuple[list[_Scores], list[_Scores]]:
    """Scores of gold tokens on gold prefixes, one a pair, and on own ones, `samples` a pair (those of a pair in a row)."""
    if samples < 1:
        raise InvalidInput(f"There must be at least one own prefix; got samples={samples}.")
    _refuse(pairs, 1, "something to judge")
    many = [pair for pair in pairs for _ in range(samples)]
    own = mix_rows(
        model,
        many,
        1.0,
        proposal=proposal,
        temperature=temperature,
        protected_ids=protected_ids(model, tokenizer),
        seed=seed,
        max_batch_tokens=budget,
    )
    with in_mode(model, training=False):
        return (
            _scores(model, pairs, [pair.target_ids for pair in pairs], budget),
            _scores(model, many, [row.tokens for row in own], budget),
        )


def _scores(
    model: Any, pairs: Sequence[EncodedPair], contexts: Sequence[tuple[int, ...]], budget: int | None
) -> list[_Scores]:
    """NLL and hits of each pair's gold tokens when the context shows other tokens in their place."""

    def judge(pair: EncodedPair, logits: Tensor) -> _Scores:
        gold = torch.tensor(pair.target_ids, device=logits.device)
        nll = logits.logsumexp(-1) - logits.gather(1, gold[:, None])[:, 0]
        return _Scores(nll.double().cpu().numpy(), (logits.argmax(-1) == gold).cpu().numpy())

    return predict(
        model, [pair.prompt_ids for pair in pairs], contexts, lambda i, x: judge(pairs[i], x), max_batch_tokens=budget
    )


def _candidates(model: Any, tokenizer: Any, candidates: Collection[int] | None) -> NDArray[np.int64]:
    vocabulary = model.config.get_text_config().vocab_size
    if candidates is None:
        return np.setdiff1d(np.arange(vocabulary), np.array(sorted(protected_ids(model, tokenizer)), dtype=np.int64))
    allowed = np.unique(np.array(list(candidates), dtype=np.int64))
    if not len(allowed) or allowed[0] < 0 or allowed[-1] >= vocabulary:
        raise InvalidInput(f"candidates are token ids from 0 to {vocabulary - 1}, at least one; got {candidates}.")
    return allowed


def _refuse(pairs: Sequence[EncodedPair], least: int, what: str) -> None:
    if not pairs:
        raise InvalidInput("There are no pairs to judge.")
    for i, pair in enumerate(pairs):
        if len(pair.target_ids) < least or not pair.prompt_ids:
            raise InvalidInput(
                f"Pair {i} has {len(pair.prompt_ids)} prompt and {len(pair.target_ids)} answer tokens; a prompt and at least "
                f"{least} answer tokens ({what}) are needed. Leave it out."
            )


def _mean_by_position(rows: Sequence[NDArray[Any]]) -> Floats:
    """The mean over rows of any lengths at each position, NaN left out; NaN where nothing is left."""
    filled = np.full((len(rows), max(map(len, rows))), np.nan)
    for i, row in enumerate(rows):
        filled[i, : len(row)] = row
    count = (~np.isnan(filled)).sum(axis=0)
    return np.divide(np.nansum(filled, axis=0), count, out=np.full(len(count), np.nan), where=count > 0)
