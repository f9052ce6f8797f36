"""Published baselines without an iteration over the whole layer (reference 4): magnitude, Wanda, SparseGPT, DSnoT, random.

Those that rank fixed scores leave the weights as they are; SparseGPT moves them. All take any N:M pattern.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from core.errors import InvalidInput, unknown_name
from sparsity24.pattern import TWO_FOUR, Pattern
from sparsity24.problem import (
    ALONE,
    LayerContext,
    LayerResult,
    alive,
    check_at_least,
    check_setting,
    definite,
    prepared,
    result_of,
)


@dataclass(frozen=True)
class Magnitude:
    """The largest |W_ij| of every group (two of four), weights unchanged."""

    splits_rows: ClassVar[bool] = True

    pattern: Pattern = TWO_FOUR

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
        w0, h = prepared(dense, hessian, pattern=self.pattern)
        return _masked(self.pattern.mask(w0.abs()), dense, w0, h)


@dataclass(frozen=True)
class Wanda:
    """The largest |W_ij| * sqrt(H_jj) of every group (two of four), weights unchanged (arXiv 2306.11695; reference 4)."""

    splits_rows: ClassVar[bool] = True

    pattern: Pattern = TWO_FOUR

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
        w0, h = prepared(dense, hessian, pattern=self.pattern)
        return _masked(self.pattern.mask(wanda_score(w0, h)), dense, w0, h)


def wanda_score(w0: Float[Tensor, "rows width"], hessian: Float[Tensor, "width width"]) -> Float[Tensor, "rows width"]:
    """|W_ij| * sqrt(H_jj): a weight's magnitude times the root mean square of its input. Dead features score 0."""
    return w0.abs() * hessian.diagonal().clamp_min(0).sqrt()


@dataclass(frozen=True)
class Random:
    """Places of every group at random: the floor, and the negative control of every claim about masks."""

    seed: int = 0
    pattern: Pattern = TWO_FOUR

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
        w0, h = prepared(dense, hessian, pattern=self.pattern)
        score = torch.rand(w0.shape, generator=torch.Generator().manual_seed(self.seed))
        return _masked(self.pattern.mask(score.to(w0.device)), dense, w0, h)


def _masked(mask: Bool[Tensor, "rows width"], dense: Tensor, w0: Tensor, h: Tensor, iterations: int = 0) -> LayerResult:
    return result_of(w0 * mask, mask, dense, w0, h, iterations=iterations)


@dataclass(frozen=True)
class SparseGPT:
    """Optimal brain surgeon, left to right in blocks of columns (arXiv 2301.00774; reference 4)."""

    splits_rows: ClassVar[bool] = True

    block_size: int = 128
    damping: float = 0.01
    pattern: Pattern = TWO_FOUR

    def __post_init__(self) -> None:
        """Refuse blocks that would cut a group."""
        m = self.pattern.m
        check_setting(
            self.block_size >= m and self.block_size % m == 0,
            "block_size",
            self.block_size,
            f"a multiple of {m}, so that no block cuts a {self.pattern} group",
        )
        check_at_least(0, damping=self.damping)

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
        w0, h = prepared(dense, hessian, pattern=self.pattern)
        width, m = w0.shape[1], self.pattern.m
        factor = _upper_factor_of_inverse(h, self.damping)
        # Transposed, so that one input's weights over all rows are contiguous.
        w = torch.where(alive(h), w0, 0.0).t().contiguous()
        kept = torch.empty(w.shape, dtype=torch.bool, device=w.device)
        for start in range(0, width, self.block_size):
            stop = min(start + self.block_size, width)
            block, local = w[start:stop], factor[start:stop, start:stop]
            errors = torch.empty_like(block)
            for i in range(stop - start):
                if i % m == 0:
                    saliency = block[i : i + m].square() / local.diagonal()[i : i + m, None].square()
                    kept[start + i : start + i + m] = self.pattern.mask(saliency.t()).t()
                pruned = block[i] * kept[start + i]
                errors[i] = (block[i] - pruned) / local[i, i]
                block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
                block[i] = pruned
            w[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
        return result_of(w.t().contiguous(), kept.t().contiguous(), dense, w0, h)


def _upper_factor_of_inverse(h: Tensor, damping: float) -> Tensor:
    """U with U^T U = (H + damping)^-1, under more damping each time one of the two factorisations fails."""
    for attempt in range(4):
        _, factor = definite(h, max(damping, 1e-6 * (attempt > 0)) * 10**attempt)
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if not bool(failed):
            return upper
    raise InvalidInput(
        "The inverse of the Hessian has no Cholesky factor under any damping up to 1000 times the setting: its features "
        "differ too much in scale for float32. Give the Hessian in float64."
    )


@dataclass(frozen=True)
class DSnoT:
    """Dynamic sparse no training: swaps in an existing mask that lower the error of the mean output (arXiv 2310.08915).

    A row's error is the part of its mean output that the pruned weights would have given, sum of W_ij mean_j over them.
    Every cycle swaps one pair a row, all rows at once, inside one group, so that the pattern is kept:

    * revived is the pruned weight that takes most from the error for the variance of its input, W_ij mean_j / var_j with
      the sign of the error (its equation 3); var_j = H_jj - mean_j^2;
    * pruned is the kept weight of that group with the lowest Wanda score among those whose loss also takes from the error,
      W_ij mean_j of the other sign (its equation 4); a group without one is passed over. The authors' code asks for no
      sign in N:M groups, and there the error may grow;
    * a weight that has moved stays, and a row ends when a swap would turn the sign of its error, as in their code;
    * a row ends at an error of `threshold`. Published is 0.1, but of the sum over a calibration sequence of 2048 tokens;
      here errors are means over tokens;
    * the start is the mask of Wanda, or with `initial="sparsegpt"` that of the whole of SparseGPT (their code: the largest
      W_ij^2 / U_jj^2 of the dense weights). Weights are those of W0 either way.

    It needs the mean input (`LayerContext.mean`). The authors leave MLP layers as the start has them.
    """

    splits_rows: ClassVar[bool] = True

    initial: str = "wanda"
    max_cycles: int = 50
    threshold: float = 0.1 / 2048
    pattern: Pattern = TWO_FOUR

    def __post_init__(self) -> None:
        """Refuse unknown starts and negative limits."""
        if self.initial not in _STARTS:
            raise unknown_name("start of DSnoT", self.initial, _STARTS)
        check_at_least(0, max_cycles=self.max_cycles, threshold=self.threshold)
        _STARTS[self.initial](pattern=self.pattern)

    @property
    def name(self) -> str:
        """`DSnoT`."""
        return "DSnoT"

    def prune(
        self,
        dense: Float[Tensor, "rows width"],
        hessian: Float[Tensor, "width width"],
        context: LayerContext = ALONE,
    ) -> LayerResult:
        """The masked dense weight, and the largest number of swaps of a row. Raises `InvalidInput` without a mean input."""
        w0, h = prepared(dense, hessian, pattern=self.pattern)
        mean = _mean_input(context, w0)
        mask = _STARTS[self.initial](pattern=self.pattern).prune(w0, h, context).mask
        second_moment = h.diagonal()
        info = torch.finfo(w0.dtype)
        # A constant input has no variance: its weights are revived first.
        variance = (second_moment - mean.square()).clamp_min(info.eps * second_moment).clamp_min(info.tiny)
        given = w0 * mean
        missing = (given * ~mask).sum(1)
        toward = given * missing.sign()[:, None]
        error = missing.abs()
        revive = torch.where(~mask & (toward > 0), toward / variance, -torch.inf)
        drop = torch.where(mask & (toward < 0), wanda_score(w0, h), torch.inf)
        # Nothing can be revived where nothing can be dropped.
        m = self.pattern.m
        groups, choices = (score.view(len(w0), w0.shape[1] // m, m) for score in (drop, revive))
        choices[groups.amin(2) == torch.inf] = -torch.inf
        rows, cycles = (error > self.threshold).nonzero().squeeze(1), 0
        while len(rows) and cycles < self.max_cycles:
            best, place = revive[rows].max(1)
            group = place // m
            other = group * m + groups[rows, group].argmin(1)
            left = error[rows] - toward[rows, place] + toward[rows, other]
            swaps = (best > -torch.inf) & (left >= 0)
            rows, place, other, group, left = rows[swaps], place[swaps], other[swaps], group[swaps], left[swaps]
            if not len(rows):
                break
            cycles += 1
            mask[rows, place], mask[rows, other] = True, False
            error[rows] = left
            revive[rows, place], drop[rows, other] = -torch.inf, torch.inf
            spent = groups[rows, group].amin(1) == torch.inf
            choices[rows[spent], group[spent]] = -torch.inf
            rows = rows[left > self.threshold]
        return _masked(mask, dense, w0, h, iterations=cycles)


_STARTS: dict[str, type[Wanda] | type[SparseGPT]] = {"wanda": Wanda, "sparsegpt": SparseGPT}


def _mean_input(context: LayerContext, w0: Tensor) -> Tensor:
    if context.mean is None:
        raise InvalidInput(
            "DSnoT needs the mean input of the layer beside its Hessian: context=LayerContext(mean=x.mean(0)), x being the "
            "calibration inputs (tokens, width)."
        )
    if context.mean.shape != w0.shape[1:] or not bool(torch.isfinite(context.mean).all()):
        raise InvalidInput(
            f"The mean input must be {w0.shape[1]} finite numbers, one an input; got shape {tuple(context.mean.shape)}."
        )
    return context.mean.to(device=w0.device, dtype=w0.dtype)
