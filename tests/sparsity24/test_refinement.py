"""Masked refinement: every solver against the exact one, and never a rise."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsity24 import refinement
from sparsity24.methods import Wanda
from sparsity24.pattern import Pattern
from sparsity24.problem import largest_eigenvalue, local_loss
from sparsity24.prox import top2_mask
from sparsity24.refinement import refine
from sparsity24.synthetic import LAYER_KINDS, synthetic_layer


def _problem(kind: str, seed: int = 0, width: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layer = synthetic_layer(kind, rows=24, width=width, seed=seed)
    dense, hessian = layer.weight.double(), layer.hessian.double()
    found = Wanda().prune(dense, hessian)
    return found.weight, found.mask, dense, hessian


def _literal_exact(mask: Tensor, dense: Tensor, hessian: Tensor) -> Tensor:
    solution = torch.zeros_like(dense)
    for row in range(len(dense)):
        kept = mask[row]
        solution[row, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ dense[row])
    return solution


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_exact_solves_the_normal_equations_of_every_row(kind: str) -> None:
    weight, mask, dense, hessian = _problem(kind)
    found, info = refine(weight, mask, dense, hessian, "exact")
    assert torch.allclose(found, _literal_exact(mask, dense, hessian), atol=1e-8)
    assert info.relative_residual < 1e-10


def test_exact_takes_masks_of_any_size() -> None:
    weight, _, dense, hessian = _problem("low-rank")
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[0] = False
    mask[1] = True
    found, _ = refine(weight, mask, dense, hessian, "exact")
    assert torch.allclose(found, _literal_exact(mask, dense, hessian), atol=1e-8)
    assert torch.allclose(found[1], dense[1], atol=1e-8)


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize(("how", "steps"), [("cg", 500), ("nesterov", 4000), ("gd", 200_000)])
def test_every_solver_converges_to_the_exact_solution(kind: str, how: str, steps: int) -> None:
    if how == "gd" and kind == "power-law":
        pytest.skip("plain gradient steps need millions of iterations at this condition number")
    weight, mask, dense, hessian = _problem(kind)
    found, info = refine(weight, mask, dense, hessian, how, steps=steps, tol=1e-9)
    assert info.relative_residual <= 1e-8
    exact = local_loss(_literal_exact(mask, dense, hessian), dense, hessian)
    assert local_loss(found, dense, hessian) == pytest.approx(exact, rel=1e-9)


def test_gd_takes_the_gradient_steps_of_the_paper() -> None:
    weight, mask, dense, hessian = _problem("block-correlated")
    eta, literal = 1 / (2 * largest_eigenvalue(hessian)), weight.clone()
    for _ in range(7):
        literal = literal - eta * (2 * (literal - dense) @ hessian) * mask
    found, info = refine(weight, mask, dense, hessian, "gd", steps=7)
    assert torch.allclose(found, literal, atol=1e-12)
    assert info.steps == 7


@given(
    st.sampled_from(["gd", "nesterov", "cg", "exact"]),
    st.sampled_from(sorted(LAYER_KINDS)),
    st.integers(0, 30),
    st.integers(0, 1000),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=60, deadline=None)
def test_no_row_loss_ever_rises_and_the_mask_stays(
    how: str, kind: str, steps: int, seed: int, dtype: torch.dtype
) -> None:
    layer = synthetic_layer(kind, rows=8, width=16, samples_per_feature=1, seed=seed)
    dense, hessian = layer.weight.to(dtype), layer.hessian.to(dtype)
    start = torch.randn(dense.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    mask = top2_mask(start)
    found, _ = refine(start, mask, dense, hessian, how, steps=steps)
    assert bool((found[~mask] == 0).all())
    for row in range(len(dense)):
        before = local_loss((start * mask)[row : row + 1].double(), dense[row : row + 1].double(), hessian.double())
        after = local_loss(found[row : row + 1].double(), dense[row : row + 1].double(), hessian.double())
        assert after <= before * (1 + 1e-5) + 1e-12


def test_a_row_that_a_solver_would_leave_worse_keeps_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, mask, dense, hessian = _problem("low-rank")

    def overshoots(v: Tensor, gradient: Tensor, problem: Any, steps: int) -> int:
        move = torch.zeros_like(v)
        move[::2] = 10 * problem.free[::2]
        v += move
        gradient += move @ problem.a
        return 1

    monkeypatch.setattr(refinement, "_conjugate_gradient", overshoots)
    found, _ = refine(weight, mask, dense, hessian, "cg")
    assert torch.allclose(found, weight * mask, atol=1e-6)


def test_twenty_cg_steps_come_within_one_per_cent_of_the_exact_loss() -> None:
    for kind in ("iid", "block-correlated", "low-rank"):
        weight, mask, dense, hessian = _problem(kind, width=128)
        found, _ = refine(weight, mask, dense, hessian, "cg", steps=20)
        exact, _ = refine(weight, mask, dense, hessian, "exact")
        assert local_loss(found, dense, hessian) <= 1.01 * local_loss(exact, dense, hessian)


def test_zero_steps_change_nothing_and_report_the_residual() -> None:
    weight, mask, dense, hessian = _problem("low-rank")
    found, info = refine(weight, mask, dense, hessian, "cg", steps=0)
    assert torch.allclose(found, weight, rtol=1e-14)
    assert info.steps == 0
    assert info.relative_residual > 1e-3


def test_it_stops_at_the_tolerance() -> None:
    weight, mask, dense, hessian = _problem("iid")
    _, info = refine(weight, mask, dense, hessian, "cg", steps=500, tol=1e-3)
    assert info.steps < 20
    assert info.relative_residual <= 1e-3


def test_weights_of_features_that_were_never_seen_stay() -> None:
    weight, mask, dense, hessian = _problem("iid")
    hessian[5, :] = hessian[:, 5] = 0
    for how in ("gd", "nesterov", "cg", "exact"):
        found, _ = refine(weight, mask, dense, hessian, how)
        assert torch.equal(found[:, 5], weight[:, 5])
        assert bool(torch.isfinite(found).all())


def test_a_negative_number_of_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="steps"):
        refine(*_problem("iid"), "cg", steps=-1)


def test_masks_of_any_pattern_and_width_are_refined() -> None:
    layer = synthetic_layer("low-rank", rows=5, width=18 + 6, seed=1)
    dense, hessian = layer.weight.double()[:, :21], layer.hessian.double()[:21, :21]
    mask = Pattern(1, 3).mask(dense.abs())
    found, _ = refine(dense * mask, mask, dense, hessian, "cg", steps=200, tol=1e-10)
    assert torch.allclose(found, _literal_exact(mask, dense, hessian), atol=1e-8)


def test_other_shapes_and_nan_are_refused() -> None:
    weight, mask, dense, hessian = _problem("iid")
    # Without the tests' own check of annotations.
    with pytest.raises(ValueError, match="one shape"):
        inspect.unwrap(refine)(weight[:3], mask[:3], dense, hessian)
    for argument in range(4):
        given = [weight.clone(), mask, dense.clone(), hessian.clone()]
        if argument != 1:
            given[argument][0, 0] = torch.nan
            with pytest.raises(ValueError, match="NaN"):
                refine(*given)


def test_half_precision_is_refined_in_single_and_comes_back_in_half() -> None:
    weight, mask, dense, hessian = _problem("low-rank")
    for dtype in (torch.bfloat16, torch.float16):
        found, _ = refine(weight.to(dtype), mask, dense.to(dtype), hessian.float(), "cg", steps=100)
        expected = _literal_exact(mask, dense.to(dtype).double(), hessian)
        assert found.dtype == dtype
        assert torch.allclose(found.double(), expected, rtol=1e-2, atol=1e-2)
