"""Baselines behind the same call as the paper's two methods, with the same rounds, settings and order of the data."""

from __future__ import annotations

from sched_sampling.baselines.neftune import NEFTune
from sched_sampling.baselines.online import OnlineScheduledSampling
from sched_sampling.baselines.preference import Preference, tune_on_preferences
from sched_sampling.baselines.random_tokens import RandomTokenReplacement
from sched_sampling.baselines.spin import SPIN
from sched_sampling.baselines.supervised import SupervisedFineTuning
from sched_sampling.baselines.two_pass import TwoPassScheduledSampling

__all__ = [
    "SPIN",
    "NEFTune",
    "OnlineScheduledSampling",
    "Preference",
    "RandomTokenReplacement",
    "SupervisedFineTuning",
    "TwoPassScheduledSampling",
    "tune_on_preferences",
]
