"""N:M patterns: at most N non-zeros in every group of M neighbours along the input axis. 2:4 is the paper's."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from core.errors import InvalidInput
from sparsity24.prox import top2_mask


@dataclass(frozen=True)
class Pattern:
    """At most `n` non-zeros in every group of `m`; `str(pattern)` is "n:m"."""

    n: int
    m: int

    def __post_init__(self) -> None:
        """Refuse patterns that keep nothing or everything."""
        if not 1 <= self.n < self.m:
            raise InvalidInput(f"An N:M pattern keeps 1 <= N < M weights of every M; got {self.n}:{self.m}.")

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """The pattern written as "2:4"."""
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if found is None:
            raise InvalidInput(
                f"A sparsity pattern is N:M, such as 2:4, 1:2 or 4:8; got `{text}`. Unstructured sparsity is not offered: "
                "no kernel runs it faster."
            )
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def mask(self, score: Float[Tensor, "*batch width"]) -> Bool[Tensor, "*batch width"]:
        """True at the `n` largest scores of every group of the last dimension; equal scores go to the lower index."""
        if (self.n, self.m) == (2, 4):
            return top2_mask(score)
        order = self._groups(score).argsort(dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(order, dtype=torch.bool)
        return kept.scatter_(-1, order[..., : self.n], True).reshape(score.shape)

    def share(self, weight: Float[Tensor, "*batch width"]) -> float:
        """The share of groups that follow the pattern; 1 for a weight without groups."""
        groups = self._groups(weight)
        if not groups.numel():
            return 1.0
        return float(((groups != 0).sum(-1) <= self.n).double().mean())

    def holds(self, weight: Float[Tensor, "*batch width"]) -> bool:
        """Whether every group follows the pattern."""
        return bool(((self._groups(weight) != 0).sum(-1) <= self.n).all())

    def _groups(self, x: Tensor) -> Tensor:
        if x.shape[-1] % self.m:
            raise InvalidInput(
                f"{self} groups run along the last dimension, which must be a multiple of {self.m}; got shape "
                f"{tuple(x.shape)}."
            )
        return x.reshape(*x.shape[:-1], x.shape[-1] // self.m, self.m)


TWO_FOUR = Pattern(2, 4)
