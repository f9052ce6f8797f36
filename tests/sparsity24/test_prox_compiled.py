"""The straight-line operator, run as it stands: what a compiler is given must be right before it is made fast."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sparsity24 import prox_compiled
from sparsity24.methods import ProxPruner
from sparsity24.prox import group_support, prox24
from sparsity24.prox_compiled import prox_straight
from sparsity24.reference_solvers import prox24_brute_force, prox_objective
from sparsity24.synthetic import PROX_INPUTS, prox_inputs, synthetic_layer


def _straight(z: Tensor, lam: float) -> Tensor:
    solved, over = prox_straight(z.float().t().contiguous(), torch.tensor(lam))
    assert torch.equal(over, group_support(solved.t()).squeeze(1) > 2)
    return solved.t()


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prox_compiled, "compiled_prox", lambda: prox_straight)


@pytest.mark.parametrize("family", PROX_INPUTS)
@pytest.mark.parametrize("lam", [0.3, 1.0, 2.0])
def test_the_straight_line_reaches_the_global_minimum(family: str, lam: float) -> None:
    z = prox_inputs(family, 1000, seed=5).float().double()
    best = prox24_brute_force(z, lam, seed=5)
    gap = prox_objective(_straight(z, lam).double(), z, lam).squeeze(-1) - best
    assert float(gap.max()) <= 1e-6


def test_signs_and_order_do_not_matter_and_ties_go_to_the_lower_index() -> None:
    z = prox_inputs(
        "three-near-equal" if "three-near-equal" in PROX_INPUTS else next(iter(PROX_INPUTS)), 50, seed=1
    ).float()
    base = _straight(z, 0.9)
    for signs in itertools.product((1.0, -1.0), repeat=4):
        assert torch.equal(_straight(z * torch.tensor(signs), 0.9), base * torch.tensor(signs))
    for order in itertools.permutations(range(4)):
        distinct = (z.sort(1).values.diff(dim=1) > 0).all(1)
        assert torch.equal(_straight(z[:, list(order)], 0.9)[distinct], base[:, list(order)][distinct])
    assert torch.equal(_straight(torch.ones(1, 4), 3.0), torch.tensor([[1.0, 1.0, 0.0, 0.0]]))


@pytest.mark.parametrize("lam", [1e-30, 1e-3, 0.5, 1.0, 5.0, 1e30])
def test_both_backends_agree(uncompiled: None, lam: float) -> None:
    z = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    z[0], z[1, 4:] = 0, -0.0
    one, other = prox24(z, lam), prox24(z, lam, backend="compiled")
    assert torch.equal(group_support(one), group_support(other))
    assert torch.allclose(prox24(z.double(), lam), other.double(), rtol=1e-5, atol=2e-6)
    two = (group_support(one) <= 2).repeat_interleave(4, 1)
    assert torch.equal(one[two], other[two])


def test_algorithm_2_finds_the_same_mask_with_both_backends(uncompiled: None) -> None:
    layer = synthetic_layer("low-rank", rows=32, width=64)
    one, other = (
        ProxPruner(beta=1.1, backend=name).prune(layer.weight, layer.hessian) for name in ("eager", "compiled")
    )
    assert one.iterations == other.iterations
    assert float((one.mask == other.mask).double().mean()) > 0.999


def test_what_the_compiled_operator_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="float32"):
        prox24(torch.randn(2, 4, dtype=torch.float64), 1.0, backend="compiled")
    with pytest.raises(ValueError, match="eager"):
        prox24(torch.randn(2, 4), 1.0, backend="fast")
    with pytest.raises(ValueError, match="compiled"):
        ProxPruner(backend="numba")
