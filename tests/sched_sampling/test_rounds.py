"""Rounds of training: each has randomness of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from core.llm.examples import EncodedPair
from core.llm.finetuning import Finetuning
from sched_sampling.bash import BatchScheduledSampling
from sched_sampling.rounds import Built, RoundJob
from sched_sampling.schedule import constant

VOCABULARY, END = 19, 1


@dataclass(frozen=True, kw_only=True)
class Watched(BatchScheduledSampling):
    """BASH that writes down which positions were replaced, and in which order rows are seen."""

    replaced: list[list[list[bool]]] = field(default_factory=list)
    seen: list[list[int]] = field(default_factory=list)

    def build(self, job: RoundJob) -> Built:
        built = super().build(job)
        self.replaced.append(list(built.rows["replaced"]))
        self.seen.append([])
        return built

    def batch(self, rows: Any) -> Any:
        self.seen[-1].extend(row["row"] for row in rows)
        return super().batch(rows)


def test_every_round_replaces_other_positions_and_sees_the_rows_in_another_order():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    rng = np.random.default_rng(0)
    pairs = [EncodedPair((2,), (*rng.integers(2, VOCABULARY, 8).tolist(), END)) for _ in range(24)]
    # The model stays as it is and beta too: nothing but the round's seed can make a difference.
    method = Watched(
        rounds=3, training=Finetuning(num_epochs=1, batch_size=4, learning_rate=1e-12), schedule=constant(0.5)
    )
    method.fit(model, None, pairs, seed=3)
    for i in range(3):
        assert sorted(method.seen[i]) == list(range(24))
        for k in range(i):
            assert method.replaced[i] != method.replaced[k]
            assert method.seen[i] != method.seen[k]
