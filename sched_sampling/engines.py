"""Two exact samplers of the mixed sequence, whose tokens are drawn given the mixed tokens before them.

Both compute the same thing: with coins and noise fixed beforehand the mixed sequence is a deterministic function of the
model. `sequential` goes from left to right over a key-value cache. `parallel` starts from the gold sequence, redraws all
replaced positions at once, and repeats until nothing changes (the fixed point is unique: every pass settles at least the first
position that is still open).

A batch is filled up on the right, so that columns count from each row's first token and no mask is needed: a causal model
cannot look ahead.
"""

# B rows, L columns, N positions drawn at once, V vocabulary

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from core.errors import InvalidInput
from core.llm.scoring import accepts
from sched_sampling.noise import gumbel

# Elements of noise and scaled logits that are in memory at once.
_CHUNK = 1 << 23
# Columns behind the first open one that a pass looks at: what is further away would change again. On two cores 64 is as fast
# as whole rows at a mixing probability of 0.1 and faster at 0.3, for a tiny model and for SmolLM2-135M.
WINDOW = 64
# After so many passes for every window the sequential engine finishes what is left.
MAX_PASSES = 12


@dataclass(frozen=True)
class Proposal:
    """How a token is drawn: temperature (0 takes the most probable), truncation, the noise's seed, and what is never drawn.

    Where the drawn token is protected the gold token stays; the distribution is not renormalised.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    protected_ids: Collection[int] = ()

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if not 0 <= self.temperature < float("inf"):
            raise InvalidInput(
                f"temperature is a finite number, 0 (most probable token) or above; got {self.temperature}."
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise InvalidInput(
                f"top_k is at least 0 (0: all tokens) and top_p in (0, 1]; got {self.top_k}, {self.top_p}."
            )
        if self.seed < 0:
            raise InvalidInput(f"A seed is 0 or above; got {self.seed}.")

    @torch.inference_mode()
    def draw(
        self, logits: Float[Tensor, "N V"], rows: Int64[Tensor, " N"], positions: Int64[Tensor, " N"]
    ) -> Int64[Tensor, " N"]:
        """One token for every (row, position), by adding its Gumbel noise and taking the largest (in double precision)."""
        step = max(1, _CHUNK // logits.shape[1])
        parts = [slice(start, start + step) for start in range(0, len(logits), step)]
        return torch.cat([self._draw(logits[part], rows[part], positions[part]) for part in parts])

    def _draw(self, logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        # Half precision would tie what differs by noise alone.
        scores = logits.double() / self.temperature
        tokens = torch.arange(scores.shape[1], device=scores.device)[None]
        if self.top_k or self.top_p < 1:
            scores, tokens = scores.topk(min(self.top_k or scores.shape[1], scores.shape[1]), dim=-1)
        if self.top_p < 1:
            mass = scores.softmax(-1)
            # The token that crosses top_p stays, so at least one always does.
            scores = scores.masked_fill(mass.cumsum(-1) - mass >= self.top_p, -torch.inf)
        best = (scores + gumbel(self.seed, rows, positions, tokens)).argmax(-1, keepdim=True)
        return tokens.expand_as(scores).gather(1, best)[:, 0]


@dataclass
class Batch:
    """Rows in the making: the gold tokens, the columns still to be drawn, each prompt's length, and a number for the noise.

    `ids` are the tokens so far, at first the gold ones; `kept` says where a protected token was drawn and gold stayed;
    `passes` counts the forward passes that each row took part in.
    """

    gold: Int[Tensor, "B L"]
    open: Bool[Tensor, "B L"]
    starts: Int[Tensor, " B"]
    rows: Int[Tensor, " B"]
    ids: Int[Tensor, "B L"] = field(init=False)
    kept: Bool[Tensor, "B L"] = field(init=False)
    passes: Int[Tensor, " B"] = field(init=False)

    def __post_init__(self) -> None:
        """Begin with the gold tokens."""
        self.ids, self.kept, self.passes = self.gold.clone(), torch.zeros_like(self.open), torch.zeros_like(self.rows)

    def draw(self, proposal: Proposal, logits: Float[Tensor, "N V"], where: Tensor, columns: Tensor) -> Tensor:
        """Tokens for the positions (`where`, `columns`), given the logits before each; gold where a draw is protected."""
        drawn = proposal.draw(logits, self.rows[where], columns - self.starts[where])
        if proposal.protected_ids:
            protected = torch.isin(drawn, torch.tensor(sorted(proposal.protected_ids), device=drawn.device))
            self.kept[where, columns] = protected
            drawn = torch.where(protected, self.gold[where, columns], drawn)
        return drawn


@torch.inference_mode()
def from_gold(model: Any, batch: Batch, proposal: Proposal) -> None:
    """Draw every open position given the gold tokens before it: one pass (Mihaylova and Martins 2019, done offline)."""
    where, columns = batch.open.nonzero(as_tuple=True)
    if not len(where):
        return
    wanted, place = torch.unique(columns, return_inverse=True)
    logits, _ = _forward(model, batch.ids[:, : wanted[-1]], wanted - 1, keep=False)
    batch.ids[where, columns] = batch.draw(proposal, logits[where, place], where, columns)
    batch.open[:] = False
    batch.passes += 1


@torch.inference_mode()
def parallel(
    model: Any, batch: Batch, proposal: Proposal, *, max_passes: int | None = None, window: int = WINDOW
) -> None:
    """Settle the open positions by repeated passes, at most as many as there are; or stop after `max_passes`.

    A pass redraws the open positions of the next `window` columns. Rows that have settled are left out, and so are the
    columns before the first that can still change: their keys and values are in the cache. What is not settled in time
    stays open.
    """
    active = batch.open.any(dim=1).nonzero()[:, 0]
    cache, done, passes = None, 0, 0
    while len(active) and passes != max_passes:
        open_AL = batch.open[active]
        end = int(open_AL.any(dim=0).nonzero()[0]) + window
        where, columns = open_AL[:, :end].nonzero(as_tuple=True)
        wanted, place = torch.unique(columns, return_inverse=True)
        last = int(wanted[-1])
        logits, cache = _forward(model, batch.ids[active, :last], wanted - 1, cache, done)
        rows = active[where]
        drawn = batch.draw(proposal, logits[where, place], rows, columns)
        changed = drawn != batch.ids[rows, columns]
        batch.ids[rows, columns] = drawn
        batch.passes[active] += 1
        passes += 1
        # What stands before a row's first change was drawn from tokens that are final, and so was the change itself.
        first = torch.full((len(active),), last, device=active.device)
        first.scatter_reduce_(0, where[changed], columns[changed], "amin")
        settled = torch.arange(batch.ids.shape[1], device=active.device) <= first[:, None]
        batch.open[active] &= ~settled
        kept = batch.open[active].any(dim=1).nonzero()[:, 0]
        active = active[kept]
        if not len(active):
            break
        if _croppable(cache):
            done = int(first[kept].min())
            cache.crop(done - last)
            if len(kept) < len(first):
                cache.batch_select_indices(kept)
        else:
            cache, done = None, 0


@torch.inference_mode()
def sequential(model: Any, batch: Batch, proposal: Proposal) -> None:
    """Draw the open positions from left to right: one pass per run of columns up to the next where any row draws.

    At a mixing probability beta a batch of B rows skips a step with probability (1 - beta)^B only.
    """
    active = batch.open.any(dim=1).nonzero()[:, 0]
    cache: Any = None
    done = 0  # columns before `done` are in the cache
    for column in batch.open.any(dim=0).nonzero()[:, 0].tolist():
        kept = batch.open[active, column:].any(dim=1)
        if 2 * int(kept.sum()) <= len(active) and _croppable(cache):
            cache.batch_select_indices(kept.nonzero()[:, 0])
            active = active[kept]
        last = torch.tensor([column - 1], device=active.device)
        logits, cache = _forward(model, batch.ids[active, :column], last, cache, done)
        where = batch.open[active, column].nonzero()[:, 0]
        rows = active[where]
        batch.ids[rows, column] = batch.draw(proposal, logits[where, 0], rows, torch.full_like(rows, column))
        batch.passes[active] += 1
        done = 0 if cache is None else column
    batch.open[:] = False


def _forward(
    model: Any,
    ids: Int[Tensor, "B L"],
    wanted: Int[Tensor, " K"],
    cache: Any = None,
    done: int = 0,
    *,
    keep: bool = True,
) -> tuple[Float[Tensor, "B K V"], Any]:
    """The logits behind the columns `wanted` of `ids`, of which the first `done` are in the cache; and the new cache.

    It is None without `keep`, and where the model (Mamba, RWKV) takes no key-value cache: then all is read again each time.
    """
    keep = keep and accepts(model, "past_key_values")
    options = {
        # Ones everywhere: nothing is hidden, and models that count positions by the mask count right.
        "attention_mask": torch.ones_like(ids),
        "past_key_values": cache,
        "use_cache": keep,
        "logits_to_keep": wanted - done,
    }
    options = {name: value for name, value in options.items() if accepts(model, name)}
    output = model(input_ids=ids[:, done:], **options)
    logits = output.logits if "logits_to_keep" in options else output.logits[:, wanted - done]
    return logits, getattr(output, "past_key_values", None) if keep else None


def _croppable(cache: Any) -> bool:
    """Whether columns and rows can be taken out of the cache: not out of sliding windows or states of linear attention."""
    return all(type(layer) is DynamicLayer for layer in getattr(cache, "layers", [None]))
