"""Two splitting methods that update weights and mask together (reference 4): ADMM (arXiv 2401.02938) and ALPS (2406.07831).

Both work in the metric of the inputs: V = W D with D = diag(H)^(1/2), curvature A = D^-1 H D^-1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsity24.pattern import TWO_FOUR, Pattern
from sparsity24.problem import (
    ALONE,
    LayerContext,
    LayerResult,
    alive,
    check_at_least,
    check_setting,
    damped,
    definite,
    prepared,
    result_of,
)
from sparsity24.refinement import refine


@dataclass(frozen=True)
class Admm:
    """ADMM with a mask that grows sparser by a cubic schedule (Boža 2024, arXiv 2401.02938; reference 4).

    While the mask ramps up it keeps the best N of every group and the largest others of the whole layer, for which rows
    cannot be split. `damping` is added to A, whose mean diagonal is 1, in the steps and in the target.
    """

    steps: int = 20
    ramp: int = 15
    rho: float = 1.0
    damping: float = 0.1
    pattern: Pattern = TWO_FOUR

    def __post_init__(self) -> None:
        """Refuse settings under which the mask would never be of the pattern."""
        check_at_least(1, ramp=self.ramp)
        check_setting(self.steps >= self.ramp, "steps", self.steps, f"at least ramp, {self.ramp}")
        check_setting(self.rho > 0, "rho", self.rho, "above 0")
        check_at_least(0, damping=self.damping, rho=self.rho)

    @property
    def name(self) -> str:
        """`ADMM`."""
        return "ADMM"

    def prune(
        self,
        dense: Float[Tensor, "rows width"],
        hessian: Float[Tensor, "width width"],
        context: LayerContext = ALONE,
    ) -> LayerResult:
        """The masked sum of the dense and the dual variable after the last step. Dead features get weight 0."""
        w0, h = prepared(dense, hessian, pattern=self.pattern)
        scale = damped(h, 0.0).diagonal().sqrt()
        curvature, _ = definite(h / scale / scale[:, None], self.damping)
        target = torch.where(alive(h), w0 * scale, 0.0)
        offset = target @ curvature
        system = curvature.clone()
        system.diagonal().add_(self.rho)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
        v, u, mask = target, torch.zeros_like(target), torch.ones_like(target, dtype=torch.bool)
        for step in range(1, self.steps + 1):
            moved = v + u
            if step <= self.ramp:
                mask = self._mask(moved.abs(), step / self.ramp)
            z = moved * mask
            u = moved - z
            v = (offset + self.rho * (z - u)) @ inverse
        return result_of((v + u) * mask / scale, mask, dense, w0, h, iterations=self.steps)

    def _mask(self, score: Float[Tensor, "rows width"], progress: float) -> Bool[Tensor, "rows width"]:
        best = self.pattern.mask(score)
        if progress >= 1 or not score.numel():
            return best
        sparsity = (1 - self.pattern.n / self.pattern.m) * (1 - (1 - progress) ** 3)
        others = score.masked_fill(best, torch.inf)
        return others >= others.flatten().kthvalue(int(score.numel() * sparsity) + 1).values


@dataclass(frozen=True)
class Alps:
    """ADMM with projection onto the pattern and a penalty that follows the mask, then CG (arXiv 2406.07831; reference 4).

    Every third step rho grows by 1.3, 1.2 or 1.1 where more than 10 %, 0.5 % or none but some of the places changed since
    the last look, and the loop ends where none did. A mask that never changed by more than 0.5 % means that rho began too
    large: everything starts anew with rho / 5. As in the authors' code it also ends below 0.03 % of change after 30 steps,
    and rho stays below 1e6. `damping` is relative to mean(diag H). The change is that of the whole layer, for which rows
    are not split.
    """

    rho: float = 0.1
    max_steps: int = 300
    cg_steps: int = 10
    damping: float = 0.01
    pattern: Pattern = TWO_FOUR

    def __post_init__(self) -> None:
        """Refuse settings under which the loop could not work."""
        check_setting(self.rho > 0, "rho", self.rho, "above 0")
        check_at_least(0, rho=self.rho, cg_steps=self.cg_steps, damping=self.damping)
        check_at_least(1, max_steps=self.max_steps)

    @property
    def name(self) -> str:
        """`ALPS`."""
        return "ALPS"

    def prune(
        self,
        dense: Float[Tensor, "rows width"],
        hessian: Float[Tensor, "width width"],
        context: LayerContext = ALONE,
    ) -> LayerResult:
        """The pattern's largest entries of the last dense iterate, polished by CG. Dead features get weight 0."""
        w0, h = prepared(dense, hessian, pattern=self.pattern)
        live = alive(h)
        w0_alive = torch.where(live, w0, 0.0)
        metric, _ = definite(h, self.damping)
        scale = metric.diagonal().sqrt()
        v, steps = self._solve(w0_alive * scale, metric / scale / scale[:, None])
        # Rounding of the eigenvectors leaks into features that were never seen.
        v = torch.where(live, v, 0.0)
        mask = self.pattern.mask(v.abs())
        # On the damped H, as published; its diagonal is the metric that CG works in.
        weight, _ = refine(v * mask / scale, mask, w0_alive, metric, "cg", steps=self.cg_steps)
        return result_of(weight, mask, dense, w0, h, iterations=steps)

    def _solve(
        self, target: Float[Tensor, "rows width"], curvature: Float[Tensor, "width width"]
    ) -> tuple[Float[Tensor, "rows width"], int]:
        """The last dense iterate, and the steps taken."""
        # In double precision: the smallest eigenvalues are what 1 / (eigenvalue + rho) is large for.
        eigenvalues, vectors = (part.to(target.dtype) for part in torch.linalg.eigh(curvature.double()))
        offset = target @ curvature
        seen = first = self.pattern.mask(target.abs())
        d, dual = target * first, torch.zeros_like(target)
        v, rho, has_moved, inverse = target, self.rho, False, None
        for step in range(1, self.max_steps + 1):
            if inverse is None:
                inverse = (vectors / (eigenvalues + rho)) @ vectors.T
            v = (offset - dual + rho * d) @ inverse
            candidate = v + dual / rho
            mask = self.pattern.mask(candidate.abs())
            d = candidate * mask
            dual = rho * (candidate - d)
            if step % _LOOK:
                continue
            change = float((mask ^ seen).sum()) / max(1, int(first.sum()))
            seen, inverse = mask, None
            has_moved = has_moved or change > 0.005
            if not has_moved:
                rho, d, dual = rho / 5, target * first, torch.zeros_like(target)
            elif change == 0:
                return v, step
            else:
                rho = min(rho * (1.3 if change > 0.1 else 1.2 if change > 0.005 else 1.1), 1e6)
            if step > _LATE and change < 3e-4:
                return v, step
        return v, self.max_steps


# Steps between two looks at the mask, and the step from which on little change is none.
_LOOK = 3
_LATE = 30
