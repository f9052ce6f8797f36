"""Inputs of linear layers, as Grams: what calibration needs of the data (reference 3.5 and 10).

Calls are watched at the level of functions, not modules, and matched to weights by their storage, so that what counts is
which weight multiplies which input. Weights that are fed the same tensor share one Gram.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from core.errors import InvalidInput


class GramAccumulator:
    """The mean over tokens of x x^T, summed in float32 batch by batch."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self.num_tokens = 0

    def add(self, x: Float[Tensor, "tokens width"]) -> None:
        """Add the inputs of some tokens."""
        x = x.float()
        product = x.T @ x
        self._sum = product if self._sum is None else self._sum.add_(product)
        self.num_tokens += len(x)

    def mean(self) -> Float[Tensor, "width width"]:
        """The Gram of everything added, symmetric to the last bit."""
        if self._sum is None or self.num_tokens == 0:
            raise InvalidInput("No token reached this layer: calibration is empty or all padding.")
        mean = self._sum / self.num_tokens
        return (mean + mean.T) / 2


class GramCapture(TorchFunctionMode):
    """While entered, adds the input of every watched weight to a Gram; `groups` says which weights share one.

    Weights that receive the very same tensor within a call of `batch` are one group. `batch` is entered once a batch
    with the mask of tokens that count (None: all).
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {weight.data_ptr(): name for name, weight in weights.items()}
        self._leader: dict[str, str] = {}
        self.grams: dict[str, GramAccumulator] = {}
        # Kept alive until the batch has ended, or a freed tensor's address could be taken for the same input.
        self._inputs: list[tuple[Tensor, str]] = []
        self._keep: Tensor | None = None

    def batch(self, run: Callable[[], Any], keep: Bool[Tensor, "batch sequence"] | None) -> Any:
        """What `run()` returns, with the inputs of its watched weights added."""
        self._keep = keep
        try:
            with self:
                return run()
        finally:
            self._inputs.clear()

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The watched weights that were used, by shared input, in the order of first use."""
        members: dict[str, list[str]] = {}
        for name, leader in self._leader.items():
            members.setdefault(leader, []).append(name)
        return [tuple(names) for names in members.values()]

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is functional.linear:
            x, weight = args[0], (args[1] if len(args) > 1 else (kwargs or {})["weight"])
            name = self._names.get(weight.data_ptr())
            if name is not None:
                self._see(name, x)
        return output

    def _see(self, name: str, x: Tensor) -> None:
        leader = next((other for seen, other in self._inputs if seen is x or _same(seen, x)), None)
        if leader is None:
            leader = name
            self._inputs.append((x, name))
            rows = x.reshape(-1, x.shape[-1]) if self._keep is None else x[self._keep.to(x.device)]
            self.grams.setdefault(name, GramAccumulator()).add(rows)
        if self._leader.setdefault(name, leader) != leader:
            raise InvalidInput(
                f"`{name}` shared its input with `{self._leader[name]}` in one batch and not in another."
            )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
