"""Supervised fine-tuning (teacher forcing): every context is gold. The baseline of everything, and the control at beta = 0."""

from __future__ import annotations

from dataclasses import dataclass

from core.llm.examples import supervised_row
from sched_sampling.rounds import Built, Method, RoundJob


@dataclass(frozen=True, kw_only=True)
class SupervisedFineTuning(Method):
    """The same rows in every round, in the order in which the mixed rows of BASH would come."""

    def build(self, job: RoundJob) -> Built:
        """The demonstrations as they are."""
        return Built([supervised_row(pair) for pair in job.pairs])
