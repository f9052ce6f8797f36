"""Methods that choose a 2:4 mask for one layer: `method.prune(W0, H) -> LayerResult`.

`ProxPruner` is the paper's Algorithm 2 (reference 3.3); the others are what it is compared with (reference 4). Each is a
frozen dataclass of its settings; a method is anything with `name` and `prune`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from core.errors import InvalidInput, unknown_name
from sparsity24.pattern import TWO_FOUR, Pattern
from sparsity24.problem import (
    ALONE,
    LayerContext,
    LayerResult,
    ProxHistory,
    alive,
    damped,
    largest_eigenvalue,
    prepared,
    relative_loss,
)
from sparsity24.prox import MAX_DENSE, prox_planes, top2_mask


@runtime_checkable
class Method(Protocol):
    """What prunes a layer."""

    @property
    def name(self) -> str:
        """How reports call the method."""

    def prune(
        self,
        dense: Float[Tensor, "rows width"],
        hessian: Float[Tensor, "width width"],
        context: LayerContext = ALONE,
    ) -> LayerResult:
        """The pruned weight and its mask, before any refinement."""


def pattern_of(method: Method) -> Pattern:
    """The pattern of a method's masks: its `pattern`, 2:4 where it has none."""
    return getattr(method, "pattern", TWO_FOUR)


def _require(truth: bool, field: str, given: object, allowed: str) -> None:
    if not truth:
        raise InvalidInput(f"`{field}` must be {allowed}; got {given}.")


@dataclass(frozen=True)
class ProxPruner:
    """Algorithm 2, "Matrix Prox Pruner 2:4": gradient steps on the local loss, each followed by prox_{lam_k}.

    lam_k = lam0 * beta^k in units of 1 / (weight scale), so that one setting fits all layers. The published lam_0, beta and
    iteration counts could not be confirmed; lam0 = 0.01 and beta = 1.05 were measured for the reference (its section 3.3).

    * `precondition` works on V = W diag(H)^(1/2) and D^-1 H D^-1; without it on W and H, with step 1/L either way.
    * `row_scale` measures lambda in the root mean square of each row; without it of the whole matrix.
    * `momentum` extrapolates before each gradient step (our extension; 0 is the paper).
    * `stop` ends the loop at this share of 2:4 groups; the others are projected. `damping` is relative to mean(diag H).
    """

    lam0: float = 0.01
    beta: float = 1.05
    momentum: float = 0.0
    precondition: bool = True
    row_scale: bool = True
    stop: float = 0.999
    max_iter: int = 2000
    damping: float = 1e-4

    def __post_init__(self) -> None:
        """Refuse settings under which the loop could not work."""
        _require(math.isfinite(self.lam0) and self.lam0 > 0, "lam0", self.lam0, "above 0")
        _require(math.isfinite(self.beta) and self.beta >= 1, "beta", self.beta, "at least 1")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        _require(0 < self.stop <= 1, "stop", self.stop, "in (0, 1]")
        _require(self.max_iter >= 1, "max_iter", self.max_iter, "at least 1")
        _require(math.isfinite(self.damping) and self.damping >= 0, "damping", self.damping, "at least 0")

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
        """`prox`."""
        return "prox"

    def prune(
        self,
        dense: Float[Tensor, "rows width"],
        hessian: Float[Tensor, "width width"],
        context: LayerContext = ALONE,
    ) -> LayerResult:
        """The mask in which Algorithm 2 ends, and the iterate on it. Dead features get weight 0."""
        w0, h = prepared(dense, hessian)
        rows, width = w0.shape
        live = alive(h)
        metric = damped(h, self.damping)
        scale = metric.diagonal().sqrt() if self.precondition else torch.ones_like(metric.diagonal())
        target = torch.where(live, w0 * scale, 0.0)
        row = target.square().mean(1, keepdim=True).sqrt()
        if not self.row_scale:
            row = row.square().mean().sqrt().expand(rows, 1)
        row = torch.where(row > 0, row, 1.0)
        # Planes of group members are contiguous when columns go 0, 4, 8, ..., 1, 5, 9, ... and weights lie transposed.
        planar = torch.arange(width, device=w0.device).view(-1, 4).t().reshape(-1)
        v0 = (target / row).t()[planar].contiguous()
        curvature = metric / (scale[:, None] * scale)
        curvature = (curvature / largest_eigenvalue(curvature))[planar][:, planar]
        step = torch.eye(width, dtype=v0.dtype, device=v0.device) - curvature
        offset = v0 - step @ v0
        v, previous = v0, v0
        num_groups, lams, shares, smallest = v0.numel() // 4, [], [], math.inf
        for k in range(self.max_iter):
            lam = self.lam0 * self.beta**k
            point = v if self.momentum == 0 or k == 0 else torch.lerp(previous, v, 1 + self.momentum)
            moved = torch.addmm(offset, step, point)
            planes = moved.view(4, -1)
            smallest = min(smallest, _smallest_peak(planes))
            num_over = prox_planes(planes, lam, out=planes)
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
        return _result(iterate * mask, mask, dense, w0, h, iterations=len(lams), history=history)

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


@dataclass(frozen=True)
class SparseGPT:
    """Optimal brain surgeon, left to right in blocks of columns (arXiv 2301.00774; reference 4)."""

    block_size: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        """Refuse blocks that would cut a group."""
        _require(self.block_size >= 4 and self.block_size % 4 == 0, "block_size", self.block_size, "a multiple of 4")
        _require(math.isfinite(self.damping) and self.damping >= 0, "damping", self.damping, "at least 0")

    @property
    def name(self) -> str:
        """`SparseGPT`."""
        return "SparseGPT"

    def prune(
        self,
        dense: Float[Tensor, "rows width"],
        hessian: Float[Tensor, "width width"],
        context: LayerContext = ALONE,
    ) -> LayerResult:
        """Weights with the compensation that the greedy order allows. Dead features get weight 0."""
        w0, h = prepared(dense, hessian)
        width = w0.shape[1]
        factor = _upper_factor_of_inverse(h, self.damping)
        # Transposed, so that one input's weights over all rows are contiguous.
        w = torch.where(alive(h), w0, 0.0).t().contiguous()
        kept = torch.empty(w.shape, dtype=torch.bool, device=w.device)
        for start in range(0, width, self.block_size):
            stop = min(start + self.block_size, width)
            block, local = w[start:stop], factor[start:stop, start:stop]
            errors = torch.empty_like(block)
            for i in range(stop - start):
                if i % 4 == 0:
                    saliency = block[i : i + 4].square() / local.diagonal()[i : i + 4, None].square()
                    kept[start + i : start + i + 4] = top2_mask(saliency.t()).t()
                pruned = block[i] * kept[start + i]
                errors[i] = (block[i] - pruned) / local[i, i]
                block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
                block[i] = pruned
            w[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
        return _result(w.t().contiguous(), kept.t().contiguous(), dense, w0, h)


def _upper_factor_of_inverse(h: Tensor, damping: float) -> Tensor:
    """U with U^T U = (H + damping)^-1, under ten times more damping each time the factorisation fails."""
    for attempt in range(8):
        factor, failed = torch.linalg.cholesky_ex(damped(h, max(damping, 1e-6 * (attempt > 0)) * 10**attempt))
        if not bool(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not bool(failed):
                return upper
    raise InvalidInput("The Hessian is not positive semi-definite: no damping up to 1e7 times the setting makes it so.")


@dataclass(frozen=True)
class Wanda:
    """The two largest |W_ij| * sqrt(H_jj) of every group, weights unchanged (arXiv 2306.11695; reference 4)."""

    @property
    def name(self) -> str:
        """`Wanda`."""
        return "Wanda"

    def prune(
        self,
        dense: Float[Tensor, "rows width"],
        hessian: Float[Tensor, "width width"],
        context: LayerContext = ALONE,
    ) -> LayerResult:
        """The masked dense weight."""
        return _by_score(dense, hessian, lambda w, h: w.abs() * h.diagonal().clamp_min(0).sqrt())


@dataclass(frozen=True)
class Magnitude:
    """The two largest |W_ij| of every group, weights unchanged."""

    @property
    def name(self) -> str:
        """`magnitude`."""
        return "magnitude"

    def prune(
        self,
        dense: Float[Tensor, "rows width"],
        hessian: Float[Tensor, "width width"],
        context: LayerContext = ALONE,
    ) -> LayerResult:
        """The masked dense weight."""
        return _by_score(dense, hessian, lambda w, _: w.abs())


@dataclass(frozen=True)
class Random:
    """Two places of every group at random: the floor, and the negative control of every claim about masks."""

    seed: int = 0

    @property
    def name(self) -> str:
        """`random`."""
        return "random"

    def prune(
        self,
        dense: Float[Tensor, "rows width"],
        hessian: Float[Tensor, "width width"],
        context: LayerContext = ALONE,
    ) -> LayerResult:
        """The masked dense weight."""
        generator = torch.Generator().manual_seed(self.seed)
        score = torch.rand(dense.shape, generator=generator)
        return _by_score(dense, hessian, lambda w, _: score.to(w.device))


def _by_score(dense: Tensor, hessian: Tensor, score: Callable[[Tensor, Tensor], Tensor]) -> LayerResult:
    w0, h = prepared(dense, hessian)
    mask = top2_mask(score(w0, h))
    return _result(w0 * mask, mask, dense, w0, h)


def _result(
    weight: Tensor,
    mask: Bool[Tensor, "rows width"],
    dense: Tensor,
    w0: Tensor,
    h: Tensor,
    *,
    iterations: int = 0,
    history: ProxHistory | None = None,
) -> LayerResult:
    # A product with a mask can leave -0.0.
    weight = (weight + 0.0).to(dense.dtype)
    return LayerResult(weight, mask, relative_loss(weight, w0, h), iterations, history)


METHODS: dict[str, Method] = {
    "prox": ProxPruner(),
    "prox-paper": ProxPruner.variant("paper"),
    "prox-fast": ProxPruner.variant("fast"),
    "prox-quality": ProxPruner.variant("quality"),
    "sparsegpt": SparseGPT(),
    "wanda": Wanda(),
    "magnitude": Magnitude(),
    "random": Random(),
}


def as_method(method: str | Method, *, seed: int | None = None) -> Method:
    """The method of that name (`METHODS`), or `method` itself; `seed` replaces that of `Random`."""
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise unknown_name("pruning method", method, METHODS)
    found = METHODS[method]
    return replace(found, seed=seed) if seed is not None and isinstance(found, Random) else found
