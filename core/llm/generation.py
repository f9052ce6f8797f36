"""Text from a causal language model: greedy, sampled, or the n best by beam search.

One decoding loop over a key-value cache serves all three. The randomness of a prompt's samples depends on the seed and
the prompt alone, never on what else is in the batch.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from core.data.cache import digest
from core.errors import InvalidInput
from core.llm.batching import length_buckets, pad_left, patiently
from core.llm.scoring import accepts

Ended = Callable[[tuple[int, ...]], bool]


@dataclass(frozen=True)
class Continuation:
    """Generated token ids, the end token included, and the sum of their log-probabilities under the model."""

    token_ids: tuple[int, ...]
    log_prob: float


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; `temperature` 0 takes the most probable token, or the n best sequences by beam search."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    num_return: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that mean nothing, or that greedy search would ignore."""
        if not (self.temperature >= 0 and self.num_return >= 1):
            raise InvalidInput(
                f"Generation needs temperature >= 0 and num_return >= 1; got {self.temperature} and {self.num_return}."
            )
        if (self.top_k is not None and self.top_k < 1) or (self.top_p is not None and not 0 < self.top_p <= 1):
            raise InvalidInput(f"top_k must be at least 1 and top_p in (0, 1]; got {self.top_k} and {self.top_p}.")
        if self.temperature == 0 and (self.top_k, self.top_p) != (None, None):
            raise InvalidInput("top_k and top_p restrict sampling; give a temperature > 0, or leave them out.")


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    ended: Ended,
    max_batch_tokens: int,
) -> list[list[Continuation]]:
    """Continuations of every prompt, best first for beam search, in the order of `prompts`."""
    results: list[list[Continuation]] = [[] for _ in prompts]
    sizes = [(len(prompt) + max_new_tokens) * sampling.num_return for prompt in prompts]
    for batch in patiently(length_buckets(sizes, max_batch_tokens), f"Generating from {len(prompts)} prompts"):
        chosen = [prompts[i] for i in batch]
        search = (
            _BeamSearch(sampling.num_return, ended)
            if sampling.temperature == 0
            else _RandomSearch(sampling, chosen, ended)
        )
        _decode(model, chosen, search, max_new_tokens)
        for i, found in enumerate(search.results(len(chosen))):
            results[batch[i]] = found
    return results


@dataclass(frozen=True)
class _Row:
    """An unfinished continuation; `parent` is the row of the last step that it extends."""

    prompt: int
    parent: int
    sample: int = 0
    token_ids: tuple[int, ...] = ()
    log_prob: float = 0.0


def _decode(
    model: Any, prompts: Sequence[Sequence[int]], search: _BeamSearch | _RandomSearch, max_new_tokens: int
) -> None:
    ids, mask = (tensor.to(model.device) for tensor in pad_left(prompts))
    output = _forward(model, ids, mask, None)
    cache, log_probs = output.past_key_values, output.logits[:, -1].float().log_softmax(-1)
    rows = search.start(len(prompts))
    parents = torch.tensor([row.parent for row in rows], device=mask.device)
    log_probs = log_probs[parents]
    for step in range(max_new_tokens):
        last = step == max_new_tokens - 1
        extended = search.extend(rows, log_probs, last=last)
        if last or not extended:
            return
        # Rows of the first step still share the cache row of their prompt.
        origin = [rows[row.parent].parent if step == 0 else row.parent for row in extended]
        parents = torch.tensor(origin, device=mask.device)
        if origin != list(range(len(mask))):
            cache.batch_select_indices(parents)
        mask = torch.cat([mask[parents], mask.new_ones(len(extended), 1)], dim=1)
        rows = extended
        tokens = torch.tensor([[row.token_ids[-1]] for row in rows], device=mask.device)
        output = _forward(model, tokens, mask, cache)
        cache, log_probs = output.past_key_values, output.logits[:, -1].float().log_softmax(-1)


def _forward(model: Any, ids: Tensor, mask: Tensor, cache: object) -> Any:
    options: dict[str, object] = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
    if accepts(model, "position_ids"):
        # Filling at the front must not shift the positions of the real tokens.
        options["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(input_ids=ids, attention_mask=mask.long(), past_key_values=cache, use_cache=True, **options)


@dataclass
class _RandomSearch:
    sampling: Sampling
    prompts: Sequence[Sequence[int]]
    ended: Ended
    _done: dict[tuple[int, int], Continuation] = field(default_factory=dict)
    _draws: dict[tuple[int, int], np.random.Generator] = field(default_factory=dict)

    def start(self, num_prompts: int) -> list[_Row]:
        rows = [
            _Row(prompt, prompt, sample) for prompt in range(num_prompts) for sample in range(self.sampling.num_return)
        ]
        for row in rows:
            own = int(digest([np.asarray(self.prompts[row.prompt], dtype=np.int64).tobytes()])[:16], 16)
            self._draws[row.prompt, row.sample] = np.random.default_rng([self.sampling.seed, own, row.sample])
        return rows

    def extend(self, rows: list[_Row], log_probs: Tensor, *, last: bool) -> list[_Row]:
        draws = torch.tensor([self._draws[row.prompt, row.sample].random() for row in rows], dtype=torch.float64)
        tokens = _draw(_restrict(log_probs, self.sampling), draws.to(log_probs.device))
        gained = log_probs.gather(1, tokens[:, None])[:, 0].tolist()
        alive = []
        for i, (row, token, gain) in enumerate(zip(rows, tokens.tolist(), gained, strict=True)):
            longer = _Row(row.prompt, i, row.sample, (*row.token_ids, token), row.log_prob + gain)
            if last or self.ended(longer.token_ids):
                self._done[row.prompt, row.sample] = Continuation(longer.token_ids, longer.log_prob)
            else:
                alive.append(longer)
        return alive

    def results(self, num_prompts: int) -> list[list[Continuation]]:
        samples = range(self.sampling.num_return)
        return [[self._done[prompt, sample] for sample in samples] for prompt in range(num_prompts)]


def _restrict(log_probs: Float[Tensor, "rows vocabulary"], sampling: Sampling) -> Float[Tensor, "rows vocabulary"]:
    scaled = log_probs.double() / sampling.temperature
    if sampling.top_k is not None:
        threshold = scaled.topk(min(sampling.top_k, scaled.shape[1])).values[:, -1:]
        scaled = scaled.masked_fill(scaled < threshold, -torch.inf)
    probabilities = scaled.softmax(-1)
    if sampling.top_p is not None:
        ordered, order = probabilities.sort(descending=True, stable=True)
        # The token that crosses top_p stays, so at least one always does.
        dropped = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = probabilities.masked_fill(dropped.scatter(1, order, dropped), 0)
    return probabilities


def _draw(weights: Float[Tensor, "rows vocabulary"], draws: Float[Tensor, " rows"]) -> Tensor:
    # Inverting the distribution function needs one number a token, whatever the vocabulary; it is strictly inside, so
    # a token of weight 0 is never taken.
    cumulative = weights.cumsum(-1)
    points = draws[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True)[:, 0].clamp(max=weights.shape[1] - 1)


@dataclass
class _BeamSearch:
    width: int
    ended: Ended
    _done: dict[int, list[Continuation]] = field(default_factory=lambda: defaultdict(list))

    def start(self, num_prompts: int) -> list[_Row]:
        return [_Row(prompt, prompt) for prompt in range(num_prompts)]

    def extend(self, rows: list[_Row], log_probs: Tensor, *, last: bool) -> list[_Row]:
        # Twice the width leaves a full beam even if half of the best candidates end here.
        gains, tokens = log_probs.topk(min(2 * self.width, log_probs.shape[1]))
        candidates: dict[int, list[_Row]] = defaultdict(list)
        for i, (row, row_gains, row_tokens) in enumerate(zip(rows, gains.tolist(), tokens.tolist(), strict=True)):
            candidates[row.prompt] += [
                _Row(row.prompt, i, 0, (*row.token_ids, token), row.log_prob + gain)
                for gain, token in zip(row_gains, row_tokens, strict=True)
            ]
        alive = []
        for prompt, found in candidates.items():
            alive += self._keep(prompt, found, last)
        return alive

    def _keep(self, prompt: int, candidates: list[_Row], last: bool) -> list[_Row]:
        beam: list[_Row] = []
        for row in sorted(candidates, key=lambda row: -row.log_prob)[: 2 * self.width]:
            if last or self.ended(row.token_ids):
                self._done[prompt].append(Continuation(row.token_ids, row.log_prob))
            elif len(beam) < self.width:
                beam.append(row)
        self._done[prompt] = heapq.nlargest(self.width, self._done[prompt], key=lambda done: done.log_prob)
        done = self._done[prompt]
        # A continuation only loses probability as it grows, so what is behind the worst of n finished ones stays there.
        hopeless = len(done) == self.width and bool(beam) and done[-1].log_prob >= beam[0].log_prob
        return [] if hopeless else beam

    def results(self, num_prompts: int) -> list[list[Continuation]]:
        return [self._done[prompt] for prompt in range(num_prompts)]
