"""Algorithm 2 of the paper, "Matrix Prox Pruner 2:4": gradient steps under a growing regulariser (reference 3.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from core.errors import unknown_name
from sparsity24.problem import (
    ALONE,
    LayerContext,
    LayerResult,
    ProxHistory,
    alive,
    check_at_least,
    check_setting,
    definite,
    largest_eigenvalue,
    prepared,
    result_of,
)
from sparsity24.prox import MAX_DENSE, check_backend, prox_planes, top2_mask

# A negative eigenvalue of this share of mean(diag H) is rounding and does no harm in hundreds of steps.
_SLACK = 1e-4


@dataclass(frozen=True)
class ProxPruner:
    """Algorithm 2, "Matrix Prox Pruner 2:4": gradient steps on the local loss, each followed by prox_{lam_k}.

    lam_k = lam0 * beta^k in units of 1 / (weight scale), so that one setting fits all layers. The published lam_0, beta and
    iteration counts could not be confirmed; lam0 = 0.01 and beta = 1.05 were measured for the reference (its section 3.3).

    * `precondition` works on V = W diag(H)^(1/2) and D^-1 H D^-1; without it on W and H, with step 1/L either way.
    * `row_scale` measures lambda in the root mean square of each row; without it of the whole matrix.
    * `momentum` extrapolates before each gradient step (our extension; 0 is the paper).
    * `stop` ends the loop at this share of 2:4 groups; the others are projected. `damping` is relative to mean(diag H).
    * `backend` "compiled" runs the operator through `torch.compile`, for long runs and GPUs.
    """

    splits_rows: ClassVar[bool] = True

    lam0: float = 0.01
    beta: float = 1.05
    momentum: float = 0.0
    precondition: bool = True
    row_scale: bool = True
    stop: float = 0.999
    max_iter: int = 2000
    damping: float = 1e-4
    backend: str = "eager"

    def __post_init__(self) -> None:
        """Refuse settings under which the loop could not work."""
        check_setting(math.isfinite(self.lam0) and self.lam0 > 0, "lam0", self.lam0, "above 0")
        check_at_least(1, beta=self.beta, max_iter=self.max_iter)
        check_setting(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        check_setting(0 < self.stop <= 1, "stop", self.stop, "in (0, 1]")
        check_at_least(0, damping=self.damping)
        check_backend(self.backend)

    @classmethod
    def variant(cls, name: str) -> ProxPruner:
        """The settings called `paper` (as published), `default`, `fast` (momentum 0.9) or `quality` (beta 1.02).

        `paper` is the literal algorithm: no preconditioning, no row scale, no damping, run until every group is 2:4.
        """
        variants = {
            "paper": cls(precondition=False, row_scale=False, damping=0.0, stop=1.0),
            "default": cls(),
            "fast": cls(momentum=0.9),
            "quality": cls(beta=1.02),
        }
        if name not in variants:
            raise unknown_name("variant of ProxPruner", name, variants)
        return variants[name]

    @property
    def name(self) -> str:
        """`prox`, or `prox-fast`, `prox-quality`, `prox-paper` with the settings of that variant."""
        plain = replace(self, backend="eager")
        known = (name for name in ("fast", "quality", "paper") if plain == ProxPruner.variant(name))
        return "-".join(["prox", *known])

    def prune(
        self,
        dense: Float[Tensor, "rows width"],
        hessian: Float[Tensor, "width width"],
        context: LayerContext = ALONE,
    ) -> LayerResult:
        """The mask in which Algorithm 2 ends, and the iterate on it. Dead features get weight 0.

        With rows split over processes, `context.total` makes all of them stop at the same iteration.
        """
        w0, h = prepared(dense, hessian)
        rows, width = w0.shape
        live = alive(h)
        # Rounding below -slack of the mean curvature would grow from step to step.
        metric, _ = definite(h, self.damping, slack=_SLACK)
        scale = metric.diagonal().sqrt() if self.precondition else torch.ones_like(metric.diagonal())
        target = torch.where(live, w0 * scale, 0.0)
        row = target.square().mean(1, keepdim=True).sqrt()
        if not self.row_scale:
            # In double precision, so that the scale does not depend on how rows are shared out.
            square = context.sum(float(row.double().square().sum()), w0.device)
            row = torch.full_like(row, math.sqrt(square / max(1, context.sum(rows, w0.device))))
        row = torch.where(row > 0, row, 1.0)
        # Planes of group members are contiguous when columns go 0, 4, 8, ..., 1, 5, 9, ... and weights lie transposed.
        planar = torch.arange(width, device=w0.device).view(-1, 4).t().reshape(-1)
        v0 = (target / row).t()[planar].contiguous()
        curvature = metric / (scale[:, None] * scale)
        curvature = (curvature / largest_eigenvalue(curvature))[planar][:, planar]
        step = torch.eye(width, dtype=v0.dtype, device=v0.device) - curvature
        offset = v0 - step @ v0
        v, previous = v0, v0
        num_groups = context.sum(v0.numel() // 4, w0.device)
        lams, shares, smallest = [], [], math.inf
        for k in range(self.max_iter):
            lam = self.lam0 * self.beta**k
            point = v if self.momentum == 0 or k == 0 else torch.lerp(previous, v, 1 + self.momentum)
            moved = torch.addmm(offset, step, point)
            planes = moved.view(4, -1)
            smallest = min(smallest, _smallest_peak(planes))
            num_over = context.sum(prox_planes(planes, lam, out=planes, backend=self.backend), w0.device)
            previous, v = v, moved
            lams.append(lam)
            shares.append(1 - num_over / num_groups if num_groups else 1.0)
            if shares[-1] >= self.stop:
                break
        back = torch.empty_like(planar)
        back[planar] = torch.arange(width, device=w0.device)
        solution = v[back].t().contiguous()
        mask = top2_mask(solution.abs())
        iterate = solution * row / scale
        history = ProxHistory(tuple(lams), tuple(shares), iterate, self._steps_promised(smallest))
        return result_of(iterate * mask, mask, dense, w0, h, iterations=len(lams), history=history)

    def _steps_promised(self, smallest: float) -> int | None:
        if self.beta == 1:
            return None
        if smallest == math.inf:
            return 1
        return max(1, math.ceil(math.log(MAX_DENSE / (self.lam0 * smallest)) / math.log(self.beta)) + 1)


def _smallest_peak(planes: Tensor) -> float:
    """The smallest over groups of the largest magnitude, zero groups left out."""
    peak = planes.abs().amax(0)
    least = float(peak.amin()) if peak.numel() else math.inf
    return least if least > 0 else float(torch.where(peak > 0, peak, math.inf).amin())
