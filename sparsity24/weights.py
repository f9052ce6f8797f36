"""Which matrices of a model are pruned, and where each lies: a parameter, one expert of it, perhaps stored transposed."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class WeightRef:
    """One (rows, width) weight inside a parameter of a model.

    `name` is the module's name for a layer of its own, and `parameter[expert]` for an expert of a fused parameter.
    `parameter` is the key in the state dict. `transposed` weights are stored (width, rows), as GPT-2's Conv1D does.
    """

    name: str
    parameter: str
    expert: int | None = None
    transposed: bool = False

    def of(self, parameter: Float[Tensor, "..."]) -> Float[Tensor, "rows width"]:
        """The weight as a (rows, width) view of the parameter: writing to it writes to the parameter."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        return matrix.t() if self.transposed else matrix
