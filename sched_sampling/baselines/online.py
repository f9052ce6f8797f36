"""Scheduled sampling online (Bengio et al. 2015; the paper's appendix A.3 compares it with BASH).

The mixed answers are those of BASH, but drawn anew for every batch, with the weights of that very step: a round per step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from core.llm.finetuning import completion_loss
from sched_sampling.baselines.steps import StepwiseMethod
from sched_sampling.bash import mixed_row, protected_ids
from sched_sampling.mixing import Mixing, mix_rows
from sched_sampling.rounds import Loss, RoundJob, Rows


@dataclass(frozen=True, kw_only=True)
class OnlineScheduledSampling(StepwiseMethod):
    """Mix inside the step. `mixing` says how tokens are drawn; most of the time goes there."""

    mixing: Mixing = field(default_factory=Mixing)

    def batch(self, rows: Rows) -> Any:
        """The gold rows as tensors, and their numbers, by which the loss finds the pairs to mix."""
        return {**super().batch(rows), "numbers": torch.tensor([row["row"] for row in rows])}

    def loss(self, job: RoundJob) -> Loss:
        """The loss of the batch's rows, mixed by the model as it is now."""
        protected = protected_ids(job.model, job.tokenizer) | frozenset(self.mixing.protected_ids)
        options = {**vars(self.mixing), "protected_ids": protected}

        def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
            beta, seed = self.now(job)
            numbers = batch["numbers"].tolist()
            pairs = [job.pairs[number] for number in numbers]
            # Not `model`, which may be the wrapper that keeps processes in step.
            mixed = mix_rows(job.model, pairs, beta, seed=seed, row_ids=numbers, **options)
            rows = [mixed_row(*of_row) for of_row in zip(pairs, mixed, numbers, strict=True)]
            made: dict[str, Tensor] = super(OnlineScheduledSampling, self).batch(rows)
            device = batch["labels"].device
            return completion_loss(model, {**batch, **{name: tensor.to(device) for name, tensor in made.items()}})

        return loss
