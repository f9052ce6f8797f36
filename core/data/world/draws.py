"""Random draws that are the same on every platform and under every version of numpy.

numpy promises a stable stream for its bit generators and seed sequences, not for the methods of `Generator`; so the
bits come from PCG64 and everything else is made of them here. A scalar draw costs a fifth of one of `Generator`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_BLOCK = 2048


class Draws:
    """Independent uniform draws, determined by a key of non-negative integers."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))
        self._block: list[int] = []

    def below(self, bound: int) -> int:
        """An integer of 0 .. bound - 1 (uneven by at most bound / 2^64)."""
        if not self._block:
            self._block = self._bits.random_raw(_BLOCK).tolist()
        return self._block.pop() * bound >> 64

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.below(1 << 32) < probability * (1 << 32)

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """The options in random order."""
        result = list(options)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different positions of the options, in random order; all of them when there are not more."""
        size = len(options)
        if count * 4 >= size:
            return self.shuffled(options)[:count]
        chosen: dict[int, None] = {}
        while len(chosen) < count:
            chosen[self.below(size)] = None
        return [options[i] for i in chosen]
