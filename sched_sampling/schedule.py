"""Mixing schedules: how probable it is that a position shows the model's own token, over rounds or steps.

A schedule is called as `schedule(step, total)` and returns beta: `step` is the round for batch-scheduled sampling and the
optimizer step for the online form. Bengio et al. (2015) wrote theirs for the probability of the *gold* token, epsilon = 1 -
beta; here all give beta. Each is monotone with values in [0, 1], and parameters that would not make it so are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from core.errors import InvalidInput


@dataclass(frozen=True)
class Schedule:
    """A function `(step, total) -> beta` that knows its name and parameters, so that a run can be described by them."""

    name: str
    parameters: tuple[float, ...]
    _function: Callable[[int, int], float]

    def __call__(self, step: int, total: int) -> float:
        """Beta at `step` of `total`."""
        # Rounding may leave the unit interval by a bit.
        return min(1.0, max(0.0, self._function(step, total)))


def constant(beta: float) -> Schedule:
    """The same beta throughout."""
    _probability(beta, "beta")
    return Schedule("constant", (beta,), lambda step, total: beta)


def linear(start: float = 0.0, end: float = 0.3) -> Schedule:
    """From `start` in the first step to `end` in the last, in equal parts; `start` when there is only one."""
    _probability(start, "start")
    _probability(end, "end")
    return Schedule("linear", (start, end), lambda step, total: start + (end - start) * step / max(1, total - 1))


def linear_decay(offset: float = 1.0, slope: float = 0.1, floor: float = 0.0) -> Schedule:
    """Bengio's linear decay of the gold probability, epsilon_i = max(floor, offset - slope * i)."""
    _probability(floor, "floor")
    _probability(offset, "offset")
    if not (slope >= 0 and math.isfinite(slope)):
        raise InvalidInput(f"slope is how fast the gold probability falls, at least 0; got {slope}.")
    parameters = (offset, slope, floor)
    return Schedule("linear_decay", parameters, lambda step, total: 1.0 - max(floor, offset - slope * step))


def exponential(base: float = 0.99) -> Schedule:
    """Bengio's exponential decay of the gold probability, epsilon_i = base ** i with 0 < base < 1."""
    if not 0 < base < 1:
        raise InvalidInput(f"base is between 0 and 1, so that base ** i decays; got {base}.")
    return Schedule("exponential", (base,), lambda step, total: 1.0 - base**step)


def inverse_sigmoid(decay: float = 10.0) -> Schedule:
    """Bengio's inverse sigmoid decay, epsilon_i = decay / (decay + exp(i / decay)) with decay >= 1.

    It begins at beta = 1 / (decay + 1), not at 0.
    """
    if not (decay >= 1 and math.isfinite(decay)):
        raise InvalidInput(f"decay is at least 1; got {decay}.")

    def beta(step: int, total: int) -> float:
        exponent = step / decay
        # exp overflows at 709; the gold probability is zero long before.
        return 1.0 if exponent > 700 else 1.0 - decay / (decay + math.exp(exponent))

    return Schedule("inverse_sigmoid", (decay,), beta)


def _probability(value: float, name: str) -> None:
    if not 0 <= value <= 1:
        raise InvalidInput(f"{name} is a probability, from 0 to 1; got {value}.")
