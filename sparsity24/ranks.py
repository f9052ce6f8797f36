"""Many processes under `torchrun` (reference 14): each takes a share of the calibration batches, then of a weight's rows.

Rows are independent given the Gram, so the only traffic is a sum of Grams and the gathering of pruned rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributed as dist

from core.errors import InvalidInput


@dataclass(frozen=True)
class Ranks:
    """This process among all that prune one model together; alone, every method changes nothing."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """The default process group of torch.distributed where there is one, else one process alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def share(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Every `size`-th batch. Raises `InvalidInput` when some process would have none."""
        if len(batches) < self.size:
            raise InvalidInput(
                f"{self.size} processes share {len(batches)} calibration batches: give at least one batch a process."
            )
        return batches[self.rank :: self.size]

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def rows(self, num_rows: int) -> slice:
        """The rows of a weight that this process prunes: a share as even as it can be."""
        return slice(self.rank * num_rows // self.size, (self.rank + 1) * num_rows // self.size)

    def gather(self, part: Float[Tensor, "own width"], num_rows: int) -> Float[Tensor, "rows width"]:
        """All rows, in order, from the shares of all processes."""
        if self.size == 1:
            return part
        # A sum of disjoint rows, since gathering wants equal shares on some backends.
        whole = torch.zeros(num_rows, part.shape[1], dtype=part.dtype, device=part.device)
        whole[self.rows(num_rows)] = part
        return self.total(whole)
