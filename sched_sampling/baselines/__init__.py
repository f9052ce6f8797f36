"""Baselines behind the same call as the paper's two methods, with the same rounds, settings and order of the data."""

from __future__ import annotations

from sched_sampling.baselines.random_tokens import RandomTokenReplacement
from sched_sampling.baselines.supervised import SupervisedFineTuning

__all__ = ["RandomTokenReplacement", "SupervisedFineTuning"]
