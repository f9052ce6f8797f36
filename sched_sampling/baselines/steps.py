"""Methods whose contexts are made inside the training step, so that beta follows optimizer steps instead of rounds."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from core.llm.examples import supervised_row
from sched_sampling.rounds import Built, Method, RoundJob
from sched_sampling.schedule import Schedule, linear


@dataclass(frozen=True, kw_only=True)
class StepwiseMethod(Method):
    """The demonstrations as rows; `schedule` gives beta at every optimizer step of all rounds together."""

    schedule: Schedule = field(default_factory=linear)

    def build(self, job: RoundJob) -> Built:
        """The demonstrations, numbered."""
        return Built([{**supervised_row(pair), "row": number} for number, pair in enumerate(job.pairs)])

    def now(self, job: RoundJob) -> tuple[float, int]:
        """Beta of the step that is being computed, and a seed of its own."""
        step = job.clock.step
        a_round = self.training.steps(len(job.pairs))
        beta = self.schedule(job.round * a_round + step, self.rounds * a_round)
        return beta, int(np.random.SeedSequence([job.seed, step]).generate_state(1)[0])
