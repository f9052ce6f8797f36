"""What is known in closed form: how mistakes compound, and what batch-scheduled sampling converges to (reference, "Theory").

two_state_off(0.05, 0.0, 12)         # without recovery 46 % of all answers are off after twelve tokens
bash_optimum(0.5, 0.5, beta=0.3)     # P(B|A) is 0.85 where the data say 1
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from core.errors import InvalidInput


def two_state_off(slip: float, recovery: float, after: ArrayLike) -> NDArray[np.float64]:
    """The probability that an answer is off track after so many tokens: slip / (slip + recovery) (1 - (1 - slip - recovery)^t).

    On track a token slips with probability `slip`; off track the next one finds back with probability `recovery`. Without
    recovery this is 1 - (1 - slip)^t, which over T tokens adds up to O(slip T^2) mistakes; with recovery to O(slip T).
    """
    _probabilities(slip=slip, recovery=recovery)
    tokens = np.asarray(after, dtype=np.float64)
    if (tokens < 0).any():
        raise InvalidInput(f"A number of tokens is not negative; got {after!r}.")
    rate = slip + recovery
    return np.zeros_like(tokens) if rate == 0 else np.asarray(slip / rate * (1 - (1 - rate) ** tokens))


def two_state_accuracy(
    slip: float, recovery: float, length: int, *, credit: float = 0.0, own_slip: float = 0.0
) -> NDArray[np.float64]:
    """The accuracy of the tokens 1 to `length` that were not slipped from outside, each judged on the state before it.

    A token is right where the answer was on track before it, unless the model itself slips there (`own_slip`, a part of
    `slip`); and off track with probability `credit`. The reference counts every token that follows a wrong one as wrong
    (`credit` 0, the mean is then its formula); a token that finds back equals gold, though, so that measured accuracy has
    `credit` equal to the recovery of a token that is left alone.
    """
    _probabilities(credit=credit, own_slip=own_slip)
    if length < 1:
        raise InvalidInput(f"An answer has at least one token; got length={length}.")
    off = two_state_off(slip, recovery, np.arange(length))
    return (1 - off) * (1 - own_slip) + off * credit


@dataclass(frozen=True)
class Optimum:
    """The conditionals of the second token that minimise the population loss; None where the first token never occurs."""

    b_given_a: float | None
    b_given_c: float | None


def bash_optimum(p: float, q: float, beta: float) -> Optimum:
    """What BASH learns for the answers AB (probability p) and CD (1 - p) when q is the proposal's P(A).

    P(B|A) = ((1 - beta) p + beta p q) / ((1 - beta) p + beta q), where the data say 1: the target stays B of the gold answer
    AB, or D of CD, whichever first token the context shows. So small betas, answers of little entropy, and beta = 0 for
    certainty; at beta = 1 only the marginal P(B) = p is left. P(B|C) follows with the roles exchanged.
    """
    _probabilities(p=p, q=q, beta=beta)
    a, c = (1 - beta) * p + beta * q, (1 - beta) * (1 - p) + beta * (1 - q)
    return Optimum(
        b_given_a=((1 - beta) * p + beta * p * q) / a if a else None,
        b_given_c=beta * p * (1 - q) / c if c else None,
    )


def _probabilities(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise InvalidInput(f"{name} is a probability, from 0 to 1; got {value}.")
