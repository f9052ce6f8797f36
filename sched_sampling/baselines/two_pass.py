"""Two-pass scheduled sampling for Transformers (Mihaylova and Martins 2019).

A first pass over gold prefixes predicts every answer token; where a coin says so the second pass, the one with gradients, reads
the prediction instead of the gold token. The prediction for the token at place i + 1 is what the first pass says *at* place i
(the authors' public code reads it at i + 1), and every place of every row has a coin of its own (theirs share one a place).
"""

# L lines, W width, N places that are replaced, K tokens of a mixture, D embedding size

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional

from core.errors import InvalidInput
from core.llm.examples import IGNORED
from core.llm.finetuning import completion_loss
from core.llm.modes import in_mode
from sched_sampling.baselines.steps import StepwiseMethod
from sched_sampling.bash import protected_ids
from sched_sampling.noise import coins
from sched_sampling.rounds import Loss, RoundJob, Rows


@dataclass(frozen=True, kw_only=True)
class TwoPassScheduledSampling(StepwiseMethod):
    """`top_k` 1 reads the most probable token; above, the mean of the `top_k` embeddings by their renormalised probabilities.

    Where the most probable token is protected (an end, a start, padding) gold stays.
    """

    top_k: int = 1

    def __post_init__(self) -> None:
        """Refuse an empty mixture."""
        super().__post_init__()
        if self.top_k < 1:
            raise InvalidInput(f"top_k is how many embeddings are mixed, at least 1; got {self.top_k}.")

    def batch(self, rows: Rows) -> Any:
        """The gold rows as tensors, and for every place the number of its row, as a name for its coin."""
        named = [{**row, "labels": [row["row"]] * len(row["input_ids"])} for row in rows]
        return {**super().batch(rows), "numbers": super().batch(named)["labels"]}

    def loss(self, job: RoundJob) -> Loss:
        """The loss of the second pass."""
        protected = torch.tensor(sorted(protected_ids(job.model, job.tokenizer)), dtype=torch.long)

        def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
            beta, seed = self.now(job)
            chosen = replaced_places(batch, beta, seed)
            if not chosen.any():
                return completion_loss(model, batch)
            lines, places = chosen.nonzero(as_tuple=True)
            weights, tokens = _predicted(job.model, batch, lines, places - 1, self.top_k)
            kept = ~torch.isin(tokens[:, 0], protected.to(tokens.device))
            embed = job.model.get_input_embeddings()
            gold = embed(batch["input_ids"])
            mixture = (weights[kept, :, None] * embed(tokens[kept])).sum(dim=1).to(gold.dtype)
            read = gold.index_put((lines[kept], places[kept]), mixture)
            return completion_loss(model, {**batch, "inputs_embeds": read})

        return loss


def replaced_places(batch: Mapping[str, Tensor], beta: float, seed: int) -> Bool[Tensor, "L W"]:
    """Where a coin of probability `beta` falls on the prediction: on answer tokens, but never on the last of an answer."""
    labels = batch["labels"]
    eligible = (labels != IGNORED) & (functional.pad(labels[:, 1:], (0, 1), value=IGNORED) != IGNORED)
    lines, places = eligible.nonzero(as_tuple=True)
    chosen = torch.zeros_like(eligible)
    # A row keeps its coins wherever packing puts it.
    within = batch["position_ids"][lines, places] if "position_ids" in batch else places
    chosen[lines, places] = coins(seed, batch["numbers"][lines, places], within) < beta
    return chosen


@torch.no_grad()
def _predicted(
    model: Any, batch: Mapping[str, Tensor], lines: Tensor, places: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """The probabilities (N, K), summing to one, and the tokens (N, K) that the first pass gives at some places."""
    inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    with in_mode(model, training=False):
        logits = model(**inputs, use_cache=False).logits[lines, places]
    best = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    return best.values.float().softmax(-1), best.indices
