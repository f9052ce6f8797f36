"""The mixed sequence z: gold tokens, and at random positions the model's own (reference, "BASH", steps 2 to 4).

z_t = y_t where the coin of position t says gold, else a token of the frozen model q, drawn by one of

| proposal | from | costs |
| --- | --- | --- |
| `mixed` | q(. given x, z_<t): scheduled sampling exactly, done offline | a few passes, or one step a drawn token |
| `gold` | q(. given x, y_<t) | one pass |
| `rollout` | token t of a free-running answer; gold beyond its end | plain generation |
| `random` | the vocabulary, uniformly: the control, which knows nothing of the model | nothing |

The last token of y, its end, is never replaced: nothing is predicted from it. A protected token (an end, a start, padding) is
never drawn: gold stays there. All randomness is a function of (seed, row, position), so neither the batch nor the engine nor
the number of processes changes a token, and proposals that share a seed share their coins.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from core.errors import InvalidInput, unknown_name
from core.llm.batching import length_buckets, pad_right, patiently
from core.llm.examples import EncodedPair
from core.llm.modes import in_mode
from core.llm.scoring import default_batch_tokens
from sched_sampling.engines import MAX_PASSES, WINDOW, Batch, Proposal, from_gold, parallel, sequential
from sched_sampling.noise import coins, token_draws

PROPOSALS = ("mixed", "gold", "rollout", "random")
ENGINES = ("auto", "parallel", "sequential")
# Above, whole-row passes cost more than single steps on a CPU: tests/benchmarks/test_sched_sampling.py.
PARALLEL_UP_TO = 0.3


@dataclass(frozen=True)
class MixedRow:
    """One mixed answer: its tokens, where they were drawn (protected draws are not counted), and the passes it took."""

    tokens: tuple[int, ...]
    replaced: tuple[bool, ...]
    passes: int


@dataclass(frozen=True)
class Mixed:
    """A batch of mixed answers. `changed` is the share of answer tokens that differ from gold; `passes` the most of any row."""

    tokens: Int[Tensor, "rows target"]
    replaced: Bool[Tensor, "rows target"]
    changed: float
    passes: int


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """How answers are mixed: the options of `mix` and `mix_rows`, checked once."""

    proposal: str = "mixed"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    protected_ids: Collection[int] = ()
    engine: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what does not exist."""
        if self.proposal not in PROPOSALS:
            raise unknown_name("proposal", self.proposal, PROPOSALS)
        if self.engine not in ENGINES:
            raise unknown_name("engine", self.engine, ENGINES)
        self.at(0)

    def at(self, seed: int) -> Proposal:
        """The distribution and its noise for one seed."""
        return Proposal(self.temperature, self.top_k, self.top_p, seed, self.protected_ids)


def mix(
    model: Any,
    prompt_ids: Int[Tensor, "rows prompt"],
    target_ids: Int[Tensor, "rows target"],
    beta: float | Sequence[float],
    *,
    prompt_mask: Bool[Tensor, "rows prompt"] | None = None,
    target_mask: Bool[Tensor, "rows target"] | None = None,
    seed: int = 0,
    row_ids: Sequence[int] | None = None,
    rollouts: Sequence[Sequence[int]] | None = None,
    **options: Any,
) -> Mixed:
    """Mix a batch of answers; prompts may be filled up at either end, answers at their end, as the masks say.

    `beta` is one probability or one for each position of an answer; `options` are those of `Mixing`. Where the mask of the
    answers is false the tokens come back as they are. See `mix_rows` for the rest, and for what is raised.
    """
    prompts = _ragged(prompt_ids, prompt_mask)
    targets = _ragged(target_ids, target_mask)
    if target_mask is not None and not bool((target_mask.cummin(dim=1).values == target_mask).all()):
        raise InvalidInput("Answers are filled up at their end: a row of target_mask is true first and false after.")
    pairs = [EncodedPair(tuple(prompt), tuple(target)) for prompt, target in zip(prompts, targets, strict=True)]
    mixed = mix_rows(model, pairs, beta, seed=seed, row_ids=row_ids, rollouts=rollouts, **options)
    tokens, replaced = target_ids.clone(), torch.zeros_like(target_ids, dtype=torch.bool)
    for i, row in enumerate(mixed):
        tokens[i, : len(row.tokens)] = torch.tensor(row.tokens, device=tokens.device)
        replaced[i, : len(row.tokens)] = torch.tensor(row.replaced, device=tokens.device)
    total = sum(map(len, targets))
    return Mixed(
        tokens, replaced, int((tokens != target_ids).sum()) / total, max((row.passes for row in mixed), default=0)
    )


def mix_rows(
    model: Any,
    pairs: Sequence[EncodedPair],
    beta: float | Sequence[float],
    *,
    seed: int = 0,
    row_ids: Sequence[int] | np.ndarray | None = None,
    rollouts: Sequence[Sequence[int]] | None = None,
    max_batch_tokens: int | None = None,
    **options: Any,
) -> list[MixedRow]:
    """Mix answers of any lengths, in their order; batches hold rows of like length.

    `row_ids` name the rows for the random numbers (None: 0, 1, 2, ...): rows that are built in parts, or by several
    processes, keep their numbers. `rollouts` are the free-running answers of the proposal `rollout`, without end tokens;
    None generates them with `model`. `options` are those of `Mixing`. The model is in evaluation mode meanwhile, and
    afterwards as it was.

    Raises `InvalidInput` before any work on a beta outside [0, 1], options that do not exist, rows that are longer than the
    model reads, and token ids that it does not have.
    """
    mixing = Mixing(**options)
    proposal = mixing.at(seed)
    betas = position_betas(beta, pairs)
    if row_ids is not None and len(row_ids) != len(pairs):
        raise InvalidInput(f"row_ids has one number for each row; got {len(row_ids)} for {len(pairs)} rows.")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for row, pair in enumerate(pairs):
        if not pair.prompt_ids or not pair.target_ids:
            raise InvalidInput(f"Row {row} has an empty prompt or answer.")
        if limit is not None and len(pair.prompt_ids) + len(pair.target_ids) > limit:
            raise InvalidInput(
                f"Row {row} has {len(pair.prompt_ids) + len(pair.target_ids)} tokens; the model reads at most {limit}."
            )
    check_vocabulary(model, pairs)
    numbers = np.arange(len(pairs)) if row_ids is None else np.asarray(row_ids, dtype=np.int64)
    chosen = _coins(pairs, betas, seed, numbers)
    if mixing.proposal == "random":
        return _random(pairs, chosen, proposal, numbers, model.config.get_text_config().vocab_size)
    if mixing.proposal == "rollout":
        if rollouts is None:
            rollouts = own_rollouts(model, pairs, proposal, row_ids=numbers, max_batch_tokens=max_batch_tokens)
        if len(rollouts) != len(pairs):
            raise InvalidInput(f"rollouts has one answer for each row; got {len(rollouts)} for {len(pairs)} rows.")
        _check_ids(model, rollouts, "of the rollouts")
        return _from_rollouts(pairs, chosen, rollouts, proposal)
    engine = mixing.engine
    if engine == "auto":
        engine = "parallel" if betas.mean() <= PARALLEL_UP_TO else "sequential"
    results = [MixedRow(pair.target_ids, (False,) * len(pair.target_ids), 0) for pair in pairs]
    # A row without a drawn token is gold and needs no model.
    wanted = [i for i, mask in enumerate(chosen) if mask.any()]
    lengths = [len(pairs[i].prompt_ids) + len(pairs[i].target_ids) for i in wanted]
    buckets = length_buckets(lengths, max_batch_tokens or default_batch_tokens(model))
    with in_mode(model, training=False):
        for bucket in patiently(buckets, f"Mixing {len(wanted)} answers"):
            rows = [wanted[i] for i in bucket]
            batch = _batch([pairs[i] for i in rows], [chosen[i] for i in rows], numbers[rows], model.device)
            if mixing.proposal == "gold":
                from_gold(model, batch, proposal)
            elif engine == "parallel":
                windows = -(-batch.ids.shape[1] // WINDOW)
                parallel(model, batch, proposal, max_passes=MAX_PASSES * windows if mixing.engine == "auto" else None)
            if mixing.proposal == "mixed":
                # What a bounded number of passes left open, or everything.
                sequential(model, batch, proposal)
            mixed = _unbatched(batch, [pairs[i] for i in rows], [chosen[i] for i in rows])
            for i, result in zip(rows, mixed, strict=True):
                results[i] = result
    return results


def own_rollouts(
    model: Any,
    pairs: Sequence[EncodedPair],
    proposal: Proposal,
    *,
    row_ids: Sequence[int] | np.ndarray | None = None,
    max_batch_tokens: int | None = None,
) -> list[tuple[int, ...]]:
    """A free-running answer of the model to every prompt, up to its end, as far as tokens of the gold answer are replaced.

    Rows with the same prompt get different samples: a row's is decided by the seed, its number and its prompt.
    """
    free = mix_rows(
        model,
        pairs,
        1.0,
        seed=proposal.seed,
        row_ids=row_ids,
        max_batch_tokens=max_batch_tokens,
        temperature=proposal.temperature,
        top_k=proposal.top_k,
        top_p=proposal.top_p,
        engine="sequential",
    )
    return [tuple(takewhile(lambda token: token not in proposal.protected_ids, row.tokens[:-1])) for row in free]


def check_vocabulary(model: Any, pairs: Sequence[EncodedPair]) -> None:
    """Raise `InvalidInput` on token ids that the model does not have, as those of another model's tokenizer."""
    _check_ids(model, [(*pair.prompt_ids, *pair.target_ids) for pair in pairs], "of the pairs")


def _check_ids(model: Any, rows: Sequence[Sequence[int]], what: str) -> None:
    vocabulary = model.config.get_text_config().vocab_size
    for i, row in enumerate(rows):
        for token in row:
            if not 0 <= token < vocabulary:
                raise InvalidInput(
                    f"Row {i} {what} has the token {token}; the vocabulary of the model has {vocabulary} tokens, from 0. "
                    "Take the model's own tokenizer."
                )


def position_betas(beta: float | Sequence[float], pairs: Sequence[EncodedPair]) -> np.ndarray:
    """Beta for every position of the longest answer; raises `InvalidInput` on what is no probability."""
    values = np.asarray(beta, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise InvalidInput(f"beta is the probability of the model's own token, from 0 to 1; got {beta}.")
    longest = max((len(pair.target_ids) for pair in pairs), default=0)
    if values.ndim == 0:
        return np.full(longest, values)
    if values.ndim != 1 or len(values) < longest:
        raise InvalidInput(
            f"beta is one number or one for each position; got shape {values.shape} for answers of {longest}."
        )
    return values


def _coins(pairs: Sequence[EncodedPair], betas: np.ndarray, seed: int, numbers: np.ndarray) -> list[np.ndarray]:
    """Which positions of each answer are drawn: Bernoulli(beta), independent of everything, and never the last."""
    lengths = np.array([len(pair.target_ids) for pair in pairs], dtype=np.int64)
    ends = np.cumsum(lengths)
    positions = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)
    rows = np.repeat(numbers, lengths)
    thrown = coins(seed, torch.from_numpy(rows), torch.from_numpy(positions)).numpy() < betas[positions]
    thrown[ends[lengths > 0] - 1] = False
    return np.split(thrown, ends[:-1]) if len(pairs) else []


def _batch(
    pairs: Sequence[EncodedPair], chosen: Sequence[np.ndarray], numbers: np.ndarray, device: torch.device
) -> Batch:
    gold = pad_right([[*pair.prompt_ids, *pair.target_ids] for pair in pairs]).to(device)
    opened = torch.zeros(gold.shape, dtype=torch.bool)
    starts = [len(pair.prompt_ids) for pair in pairs]
    for i, (start, mask) in enumerate(zip(starts, chosen, strict=True)):
        opened[i, start : start + len(mask)] = torch.from_numpy(mask)
    return Batch(gold, opened.to(device), torch.tensor(starts, device=device), torch.from_numpy(numbers).to(device))


def _unbatched(batch: Batch, pairs: Sequence[EncodedPair], chosen: Sequence[np.ndarray]) -> list[MixedRow]:
    ids, kept, passes = batch.ids.cpu().numpy(), batch.kept.cpu().numpy(), batch.passes.tolist()
    rows = []
    for i, (pair, mask) in enumerate(zip(pairs, chosen, strict=True)):
        answer = slice(len(pair.prompt_ids), len(pair.prompt_ids) + len(mask))
        rows.append(MixedRow(tuple(ids[i, answer].tolist()), tuple((mask & ~kept[i, answer]).tolist()), passes[i]))
    return rows


def _random(
    pairs: Sequence[EncodedPair], chosen: Sequence[np.ndarray], proposal: Proposal, numbers: np.ndarray, vocabulary: int
) -> list[MixedRow]:
    allowed = np.setdiff1d(np.arange(vocabulary), np.array(list(proposal.protected_ids), dtype=np.int64))
    if not len(allowed):
        raise InvalidInput("Every token of the vocabulary is protected; there is nothing to draw.")
    results = []
    for pair, mask, number in zip(pairs, chosen, numbers, strict=True):
        tokens = np.array(pair.target_ids)
        where = np.flatnonzero(mask)
        draws = token_draws(proposal.seed, torch.full((len(where),), int(number)), torch.from_numpy(where)).numpy()
        tokens[where] = allowed[(draws * len(allowed)).astype(np.int64)]
        results.append(MixedRow(tuple(tokens.tolist()), tuple(mask.tolist()), 0))
    return results


def _from_rollouts(
    pairs: Sequence[EncodedPair],
    chosen: Sequence[np.ndarray],
    rollouts: Sequence[Sequence[int]],
    proposal: Proposal,
) -> list[MixedRow]:
    results = []
    for pair, mask, rollout in zip(pairs, chosen, rollouts, strict=True):
        drawn = mask.copy()
        drawn[len(rollout) :] = False
        tokens = np.array(pair.target_ids)
        where = np.flatnonzero(drawn)
        offered = np.asarray(rollout, dtype=np.int64)[where]
        protected = np.isin(offered, list(proposal.protected_ids))
        drawn[where[protected]] = False
        tokens[where[~protected]] = offered[~protected]
        results.append(MixedRow(tuple(tokens.tolist()), tuple(drawn.tolist()), 0))
    return results


def _ragged(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    if mask is None:
        return ids.tolist()
    if mask.shape != ids.shape:
        raise InvalidInput(f"A mask has the shape of its tokens; got {tuple(mask.shape)} for {tuple(ids.shape)}.")
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
