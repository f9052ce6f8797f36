"""Random-token replacement: BASH whose tokens know nothing of the model.

The essential control: it tells robustness to the model's own mistakes from robustness to noise of any kind. It shares its
coins with BASH of the same seed, so that the same positions are replaced.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sched_sampling.bash import BatchScheduledSampling
from sched_sampling.mixing import Mixing


@dataclass(frozen=True, kw_only=True)
class RandomTokenReplacement(BatchScheduledSampling):
    """Tokens uniform over the vocabulary without protected ones, with the probability that `schedule` gives to a round."""

    mixing: Mixing = field(default_factory=lambda: Mixing(proposal="random"))
