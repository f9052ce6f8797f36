"""Which weight multiplies which input: what calibration needs of a forward pass (reference 3.5 and 10).

Products are watched at the level of functions and matched to parameters by their storage, so that `nn.Linear`, GPT-2's
`Conv1D` and the fused experts of a mixture are one thing. Which axis of a stored weight is the input axis follows from the
operand's place and strides, never from its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from core.errors import InvalidInput


class GramAccumulator:
    """The mean over tokens of x x^T and of x: products in float32, a batch each, and their sum in float64.

    So the order of the batches, and how processes share them, does not change the mean but for a rounding of the last bit
    that hardly ever happens; a mask may hang on it.
    """

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.sum_x: Tensor | None = None
        self.num_tokens = 0

    def add(self, x: Float[Tensor, "tokens width"]) -> None:
        """Add the inputs of some tokens."""
        x = x.float()
        self.add_sums(x.T @ x, x.sum(0), len(x))

    def add_sums(self, product: Tensor, total: Tensor, num_tokens: int) -> None:
        """Add sums over tokens that were made elsewhere."""
        self.sum = product.double() if self.sum is None else self.sum.add_(product)
        self.sum_x = total.double() if self.sum_x is None else self.sum_x.add_(total)
        self.num_tokens += num_tokens

    def gram(self) -> Float[Tensor, "width width"]:
        """The mean of x x^T over everything added, symmetric to the last bit."""
        if self.sum is None or self.num_tokens == 0:
            raise InvalidInput("No token reached this layer: calibration is empty.")
        mean = (self.sum / self.num_tokens).float()
        return (mean + mean.T) / 2

    def mean(self) -> Float[Tensor, " width"]:
        """The mean of x over everything added."""
        if self.sum_x is None or self.num_tokens == 0:
            raise InvalidInput("No token reached this layer: calibration is empty.")
        return (self.sum_x / self.num_tokens).float()


@dataclass(frozen=True)
class Use:
    """One product with a watched parameter: `x` (..., width) was multiplied by it, or by one expert of it.

    `transposed` says that the parameter (or the expert) is stored (width, rows).
    """

    parameter: str
    expert: int | None
    transposed: bool
    x: Tensor


class WeightWatch(TorchFunctionMode):
    """While entered, calls `seen` with every product of an input with one of the `parameters` (2-D, or 3-D by expert)."""

    def __init__(self, parameters: Mapping[str, Tensor], seen: Callable[[Use], None]) -> None:
        super().__init__()
        self._parameters = {
            parameter.untyped_storage().data_ptr(): (name, parameter) for name, parameter in parameters.items()
        }
        self._seen = seen

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        operands = _PRODUCTS.get(func)
        if operands is not None:
            for weight, x, contracted, expert_axis in operands(*args, **(kwargs or {})):
                self._match(weight, x, contracted, expert_axis)
        return output

    def _match(self, weight: Tensor, x: Tensor, contracted: int, expert_axis: int | None) -> None:
        """`contracted` and `expert_axis` are axes of `weight`; the last axis of `x` runs along the first of them."""
        if weight.device.type == "meta" or weight.ndim not in (2, 3):
            return
        known = self._parameters.get(weight.untyped_storage().data_ptr())
        if known is None:
            return
        name, parameter = known
        stride = weight.stride(contracted)
        transposed = stride == parameter.stride(-2) and stride != parameter.stride(-1)
        if parameter.ndim == 2:
            self._seen(Use(name, None, transposed, x))
        elif expert_axis is None:
            expert = (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
            self._seen(Use(name, expert, transposed, x))
        else:
            for expert, inputs in enumerate(x.unbind(0)):
                # Tokens that were not routed here come in as zeros.
                self._seen(Use(name, expert, transposed, inputs[inputs.ne(0).any(-1)]))


# A weight, the inputs with the contracted axis last, the weight's contracted axis, and its axis of experts.
Operands = Iterator[tuple[Tensor, Tensor, int, int | None]]


def _linear(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Operands:
    yield weight, input, -1, None


def _matmul(input: Tensor, other: Tensor, *_: Any, **__: Any) -> Operands:
    if other.ndim == 2:
        yield other, input, -2, None
    elif other.ndim == 3 and input.ndim == 3:
        yield other, input, -2, 0
    if input.ndim == 2 and other.ndim >= 2:
        yield input, other.transpose(-1, -2), -1, None
    elif input.ndim == 3 and other.ndim == 3:
        yield input, other.transpose(-1, -2), -1, 0


def _reversed_matmul(other: Tensor, input: Tensor, *_: Any, **__: Any) -> Operands:
    return _matmul(input, other)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *_: Any, **__: Any) -> Operands:
    return _matmul(mat1, mat2)


def _baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *_: Any, **__: Any) -> Operands:
    return _matmul(batch1, batch2)


def _einsum(equation: Any, *operands: Any, **_: Any) -> Operands:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation:
        return
    inputs, _arrow, result = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    for (weight, letters), (x, others) in (
        ((operands[1], names[1]), (operands[0], names[0])),
        ((operands[0], names[0]), (operands[1], names[1])),
    ):
        contracted = [letter for letter in letters if letter in others and letter not in result]
        experts = [letter for letter in letters if letter in others and letter in result]
        if len(contracted) != 1 or len(experts) > 1 or len(letters) != 2 + len(experts):
            continue
        order = [*experts, *(letter for letter in others if letter not in (*experts, *contracted)), *contracted]
        arranged = x.permute([others.index(letter) for letter in order])
        yield weight, arranged, letters.index(contracted[0]), letters.index(experts[0]) if experts else None


_PRODUCTS: dict[Any, Callable[..., Operands]] = {
    functional.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: _reversed_matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    torch.bmm: _matmul,
    Tensor.bmm: _matmul,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.baddbmm: _baddbmm,
    Tensor.baddbmm: _baddbmm,
    torch.einsum: _einsum,
}
