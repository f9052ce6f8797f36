"""ADMM and ALPS against literal implementations, and what theory says of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sparsity24.admm import Admm, Alps
from sparsity24.pattern import Pattern
from sparsity24.problem import local_loss
from sparsity24.synthetic import LAYER_KINDS, synthetic_layer

PATTERNS = (Pattern(2, 4), Pattern(4, 8), Pattern(1, 2))


def _layer(kind: str = "low-rank", seed: int = 0, rows: int = 6, width: int = 24, dead: bool = False):
    layer = synthetic_layer(kind, rows=rows, width=width, seed=seed)
    weight, hessian = layer.weight.double(), layer.hessian.double()
    if dead:
        hessian[[3, 8], :] = 0
        hessian[:, [3, 8]] = 0
    return weight, hessian


def _best(score: Tensor, pattern: Pattern) -> Tensor:
    mask = torch.zeros(score.shape, dtype=torch.bool)
    for row in range(len(score)):
        for start in range(0, score.shape[1], pattern.m):
            order = sorted(range(start, start + pattern.m), key=lambda j: (-float(score[row, j]), j))
            for j in order[: pattern.n]:
                mask[row, j] = True
    return mask


@dataclass
class _Step:
    mask: Tensor
    z: Tensor
    u: Tensor
    weight: Tensor


def _literal_admm(weight: Tensor, hessian: Tensor, pattern: Pattern, steps: int, damping: float = 0.1) -> list[_Step]:
    """Reference 4, entry by entry where it says how the mask grows."""
    h, w = hessian.clone(), weight.clone()
    width = len(h)
    for j in range(width):
        if h[j, j] == 0:
            h[j, j] = 1
            w[:, j] = 0
    d = torch.tensor([float(h[j, j]) ** 0.5 for j in range(width)], dtype=torch.float64)
    a = torch.stack([torch.stack([h[i, j] / (d[i] * d[j]) for j in range(width)]) for i in range(width)])
    a = a + damping * torch.eye(width, dtype=torch.float64)
    v0 = w * d
    v, u = v0.clone(), torch.zeros_like(v0)
    found = []
    for t in range(1, steps + 1):
        score = (v + u).abs()
        if t <= 15:
            best = _best(score, pattern)
            others = sorted(
                (float(score[i, j]), i, j) for i in range(len(w)) for j in range(width) if not bool(best[i, j])
            )
            sparsity = (1 - pattern.n / pattern.m) * (1 - (1 - t / 15) ** 3)
            mask = torch.ones_like(best)
            for _, i, j in others[: int(sparsity * score.numel() + 1e-9)]:
                mask[i, j] = False
        z = (v + u) * mask
        u = u + v - z
        v = torch.linalg.solve(a + torch.eye(width, dtype=torch.float64), (v0 @ a + z - u).T).T
        found.append(_Step(mask, z, u, (v + u) * mask / d))
    return found


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", ["block-correlated", "power-law"])
def test_admm_equals_a_literal_implementation(kind: str, pattern: Pattern) -> None:
    weight, hessian = _layer(kind)
    found = Admm(pattern=pattern).prune(weight, hessian)
    literal = _literal_admm(weight, hessian, pattern, 20)[-1]
    assert torch.equal(found.mask, literal.mask)
    assert torch.allclose(found.weight, literal.weight, atol=1e-9)


def test_admm_gives_dead_features_weight_zero_and_the_rest_what_the_literal_gives() -> None:
    weight, hessian = _layer(dead=True)
    found = Admm().prune(weight, hessian)
    literal = _literal_admm(weight, hessian, Pattern(2, 4), 20)[-1]
    assert torch.allclose(found.weight, literal.weight, atol=1e-9)
    assert bool((found.weight[:, [3, 8]] == 0).all())
    assert not bool(found.mask[:, [3, 8]].any())


def _exact(mask: Tensor, dense: Tensor, hessian: Tensor) -> Tensor:
    solution = torch.zeros_like(dense)
    for row in range(len(dense)):
        kept = mask[row]
        solution[row, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ dense[row])
    return solution


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_admm_on_its_final_mask_converges_to_the_exact_least_squares(kind: str) -> None:
    weight, hessian = _layer(kind, width=16)
    found = Admm(steps=6000, damping=0.0).prune(weight, hessian)
    assert torch.equal(found.mask, Admm(damping=0.0).prune(weight, hessian).mask)
    assert torch.allclose(found.weight, _exact(found.mask, weight, hessian), atol=1e-6)


def test_once_the_mask_is_fixed_the_distance_of_primal_and_dual_to_the_solution_never_rises() -> None:
    # |z - z*|^2 + |u - u*|^2 is the Lyapunov function of ADMM on a convex problem (Boyd 2011, appendix A).
    weight, hessian = _layer("block-correlated", width=16)
    path = _literal_admm(weight, hessian, Pattern(2, 4), 400)
    for steps in (15, 16, 40):
        assert torch.allclose(Admm(steps=steps).prune(weight, hessian).weight, path[steps - 1].weight, atol=1e-9)
    end = path[-1]
    distance = [float((step.z - end.z).square().sum() + (step.u - end.u).square().sum()) for step in path[14:200]]
    assert distance[0] > 1e-3
    assert all(after <= before * (1 + 1e-9) + 1e-12 for before, after in itertools.pairwise(distance))


def _literal_alps(weight: Tensor, hessian: Tensor, method: Alps) -> tuple[Tensor, Tensor, int]:
    """Reference 4 with plain linear solves in place of the eigendecomposition, and CG row by row."""
    pattern, h, w = method.pattern, hessian.clone(), weight.clone()
    width, eye = len(h), torch.eye(len(h), dtype=torch.float64)
    mean = h.diagonal()[h.diagonal() > 0].mean()
    for j in range(width):
        if h[j, j] == 0:
            h[j, j] = mean
            w[:, j] = 0
    h = h + method.damping * mean * eye
    d = h.diagonal().sqrt()
    a, v0 = h / d / d[:, None], w * d
    initial = v0 * _best(v0.abs(), pattern)
    z, y, rho, moved, seen = initial, torch.zeros_like(v0), method.rho, False, initial != 0
    seen = _best(v0.abs(), pattern)
    steps = 0
    while steps < method.max_steps:
        steps += 1
        v = torch.linalg.solve(a + rho * eye, (v0 @ a - y + rho * z).T).T
        mask = _best((v + y / rho).abs(), pattern)
        z = (v + y / rho) * mask
        y = y + rho * (v - z)
        if steps % 3 == 0:
            changed = sum(bool(mask[i, j] != seen[i, j]) for i in range(len(w)) for j in range(width))
            share, seen = changed / int(mask.sum()), mask
            if share > 0.1:
                rho, moved = 1.3 * rho, True
            elif share > 0.005:
                rho, moved = 1.2 * rho, True
            elif not moved:
                z, y, rho = initial, torch.zeros_like(v0), rho / 5
            elif changed:
                rho = 1.1 * rho
            else:
                break
            if steps > 30 and share < 3e-4:
                break
    mask = _best(v.abs(), pattern)
    x = v * mask
    gradients = [((x[i] - v0[i]) @ a) * mask[i] for i in range(len(w))]
    directions = [-g for g in gradients]
    enough = [1e-8 * float((v0[i] * mask[i]).square().sum()) for i in range(len(w))]
    for _ in range(method.cg_steps):
        for i in range(len(w)):
            if float(gradients[i] @ gradients[i]) <= enough[i]:
                continue
            g, p = gradients[i], directions[i]
            bend = p @ a @ p
            length = (g @ g) / bend if bend > 0 else 0.0
            x[i] = x[i] + length * p
            gradients[i] = ((x[i] - v0[i]) @ a) * mask[i]
            square = g @ g
            directions[i] = -gradients[i] + ((gradients[i] @ gradients[i]) / square if square > 0 else 0.0) * p
    return x / d, mask, steps


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", ["block-correlated", "low-rank", "power-law"])
def test_alps_equals_a_literal_implementation(kind: str, pattern: Pattern) -> None:
    weight, hessian = _layer(kind)
    method = Alps(pattern=pattern)
    found = method.prune(weight, hessian)
    literal, mask, steps = _literal_alps(weight, hessian, method)
    assert found.iterations == steps
    assert torch.equal(found.mask, mask)
    assert torch.allclose(found.weight, literal, atol=1e-8)


@pytest.mark.parametrize("rho", [1e3, 1e-3])
def test_alps_starts_anew_with_a_fifth_of_rho_while_nothing_moves(rho: float) -> None:
    weight, hessian = _layer("block-correlated", dead=True)
    method = Alps(rho=rho)
    found = method.prune(weight, hessian)
    literal, mask, steps = _literal_alps(weight, hessian, method)
    assert found.iterations == steps
    assert torch.equal(found.mask, mask)
    assert torch.allclose(found.weight, literal, atol=1e-8)
    assert bool((found.weight[:, [3, 8]] == 0).all())


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_the_damped_masked_objective_never_rises_over_the_cg_steps_of_alps(kind: str) -> None:
    weight, hessian = _layer(kind, rows=12, width=32)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    losses = []
    for steps in (0, 1, 2, 3, 5, 10):
        found = Alps(cg_steps=steps).prune(weight, hessian)
        losses.append(local_loss(found.weight, weight, damped))
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0]
    exact = local_loss(_exact(found.mask, weight, damped), weight, damped)
    assert exact <= losses[-1] <= 1.01 * exact


def test_settings_under_which_the_mask_would_not_be_of_the_pattern_are_refused() -> None:
    for wrong, field in (
        ({"steps": 10}, "steps"),
        ({"ramp": 0}, "ramp"),
        ({"rho": 0.0}, "rho"),
        ({"rho": float("inf")}, "rho"),
        ({"damping": -0.1}, "damping"),
    ):
        with pytest.raises(ValueError, match=field):
            Admm(**wrong)
    for wrong, field in (
        ({"rho": -1.0}, "rho"),
        ({"max_steps": 0}, "max_steps"),
        ({"cg_steps": -1}, "cg_steps"),
        ({"damping": float("nan")}, "damping"),
    ):
        with pytest.raises(ValueError, match=field):
            Alps(**wrong)
