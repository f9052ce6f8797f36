"""The paper's claims as experiments: on toy tasks, on the sampler, on correction, and on three families of tasks."""

from sched_sampling.claims import correction, families, mismatch, sampler, toy

__all__ = ["correction", "families", "mismatch", "sampler", "toy"]
