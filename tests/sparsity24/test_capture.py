"""Which weight meets which input: every kind of product against the inputs that were really multiplied."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparsity24.capture import GramAccumulator, Use, WeightWatch

# W is (8, 6) as nn.Linear stores it, T (6, 8) as Conv1D does; E and F hold three experts of each kind.
W, T, E, F = torch.randn(8, 6), torch.randn(6, 8), torch.randn(3, 8, 6), torch.randn(3, 6, 8)
X, X3 = torch.randn(5, 6), torch.randn(3, 5, 6)

PRODUCTS: dict[str, tuple[Callable[[], Tensor], list[tuple[str, int | None, bool, Tensor]]]] = {
    "linear": (lambda: functional.linear(X, W), [("W", None, False, X)]),
    "linear by name": (lambda: functional.linear(input=X, weight=W), [("W", None, False, X)]),
    "operator": (lambda: X @ T, [("T", None, True, X)]),
    "operator on a transposed view": (lambda: X @ W.t(), [("W", None, False, X)]),
    "matmul of a batch": (lambda: torch.matmul(X3, T), [("T", None, True, X3)]),
    "weight on the left": (lambda: W @ X.t(), [("W", None, False, X)]),
    "addmm, as Conv1D": (lambda: torch.addmm(torch.zeros(8), X, T), [("T", None, True, X)]),
    "mm method": (lambda: X.mm(T), [("T", None, True, X)]),
    "one expert by linear": (lambda: functional.linear(X, E[torch.tensor(1)]), [("E", 1, False, X)]),
    "one expert by operator": (lambda: X @ F[2], [("F", 2, True, X)]),
    "all experts by bmm": (lambda: torch.bmm(X3, F), [("F", e, True, X3[e]) for e in range(3)]),
    "all experts by baddbmm": (
        lambda: torch.baddbmm(torch.zeros(3, 5, 8), X3, F),
        [("F", e, True, X3[e]) for e in range(3)],
    ),
    "einsum": (lambda: torch.einsum("bi,oi->bo", X, W), [("W", None, False, X)]),
    "einsum, weight first": (lambda: torch.einsum("io,bi->bo", T, X), [("T", None, True, X)]),
    "einsum over experts": (
        lambda: torch.einsum("ebi,eoi->ebo", X3, E),
        [("E", e, False, X3[e]) for e in range(3)],
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_names_its_weight_its_expert_its_orientation_and_its_input(name: str) -> None:
    run, expected = PRODUCTS[name]
    uses: list[Use] = []
    with WeightWatch({"W": W, "T": T, "E": E, "F": F}, uses.append):
        run()
    run()
    assert [(use.parameter, use.expert, use.transposed) for use in uses] == [e[:3] for e in expected]
    for use, (*_, x) in zip(uses, expected, strict=True):
        assert torch.equal(use.x, x)


def test_a_square_weight_is_told_from_its_transpose() -> None:
    square, x = torch.randn(4, 4), torch.randn(3, 4)
    uses: list[Use] = []
    with WeightWatch({"S": square}, uses.append):
        _ = functional.linear(x, square) + x @ square
    assert [use.transposed for use in uses] == [False, True]


def test_tokens_that_were_not_routed_to_an_expert_do_not_count() -> None:
    x = X3.clone()
    x[1, 2:] = 0
    uses: list[Use] = []
    with WeightWatch({"F": F}, uses.append):
        torch.bmm(x, F)
    assert [len(use.x) for use in uses] == [5, 2, 5]


def test_products_with_other_tensors_are_not_seen() -> None:
    uses: list[Use] = []
    with WeightWatch({"W": W}, uses.append):
        _ = X @ T, functional.linear(X, W.clone()), torch.einsum("bi->b", X)
    assert uses == []


def test_the_gram_accumulator_does_not_depend_on_how_tokens_are_batched() -> None:
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    whole, parts = GramAccumulator(), GramAccumulator()
    whole.add(x)
    for part in x.split([1, 9, 50]):
        parts.add(part)
    assert parts.num_tokens == whole.num_tokens == 60
    assert torch.allclose(parts.gram(), whole.gram(), rtol=1e-5, atol=1e-6)
    assert torch.allclose(parts.gram(), x.T @ x / 60, rtol=1e-5, atol=1e-6)
    assert torch.allclose(parts.mean(), x.mean(0), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="No token"):
        GramAccumulator().gram()
