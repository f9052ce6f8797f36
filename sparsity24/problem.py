"""The layer-wise problem (reference 2): find a 2:4-sparse W near W0 in the metric of the layer's inputs.

L(W) = Tr((W - W0) H (W - W0)^T), with H the mean of x x^T over calibration tokens. Weights are (rows, width) as
`nn.Linear` stores them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from core.errors import InvalidInput
from sparsity24.pattern import TWO_FOUR, Pattern
from sparsity24.prox import WrongDtype, all_finite


@dataclass(frozen=True)
class ProxHistory:
    """How Algorithm 2 went: per iteration lambda and the share of groups that were 2:4 after it.

    `final_iterate` is W before the projection onto 2:4. `steps_promised` is the number of iterations after which the
    threshold of the proximal operator makes every group 2:4, from the smallest of the largest magnitudes that a group had
    on the way; None when lambda does not grow. Where the rows are split over processes, `share_24` counts all of them,
    `steps_promised` looks at the process' own.
    """

    lams: tuple[float, ...]
    share_24: tuple[float, ...]
    final_iterate: Float[Tensor, "rows width"]
    steps_promised: int | None


@dataclass(frozen=True)
class LayerResult:
    """A pruned weight, its mask (exactly N kept places in M), and its loss relative to that of the zero weight.

    `iterations` counts the method's own steps (0 where it has none). `relative_residual` is that of the refinement, None
    without one.
    """

    weight: Float[Tensor, "rows width"]
    mask: Bool[Tensor, "rows width"]
    rel_loss: float
    iterations: int = 0
    history: ProxHistory | None = None
    relative_residual: float | None = None


def _own(total: Tensor) -> Tensor:
    return total


@dataclass(frozen=True)
class LayerContext:
    """What a method may need beyond W0 and H.

    `mean` is the mean input, for `DSnoT`. `total` sums a tensor over the processes that hold the layer's other rows, for
    methods that split rows and look at all of them (the stopping share of `ProxPruner`); alone it changes nothing. All
    processes must call it equally often.
    """

    mean: Float[Tensor, " width"] | None = None
    total: Callable[[Tensor], Tensor] = _own

    def sum(self, value: float, device: torch.device) -> float:
        """A number summed over all processes; `device` is where `total` wants its tensor."""
        if self.total is _own:
            return value
        return float(self.total(torch.tensor(value, dtype=torch.float64, device=device)))


ALONE = LayerContext()


def local_loss(
    weight: Float[Tensor, "rows width"], dense: Float[Tensor, "rows width"], hessian: Float[Tensor, "width width"]
) -> float:
    """L(W) = Tr((W - W0) H (W - W0)^T), the squared output error a token summed over outputs (reference 2)."""
    difference = weight.to(hessian.dtype) - dense.to(hessian.dtype)
    return float((difference @ hessian).mul_(difference).sum(dtype=torch.float64))


def relative_loss(
    weight: Float[Tensor, "rows width"], dense: Float[Tensor, "rows width"], hessian: Float[Tensor, "width width"]
) -> float:
    """L(W) / L(0); 0 for a layer whose inputs or weights are all zero."""
    return relative_losses([weight], dense, hessian)[0]


def relative_losses(
    weights: Sequence[Float[Tensor, "rows width"]],
    dense: Float[Tensor, "rows width"],
    hessian: Float[Tensor, "width width"],
) -> list[float]:
    """L(W) / L(0) of several weights for one layer."""
    # Divided by their largest entries, so that tiny and huge weights neither vanish nor overflow when they are squared. A
    # product in the Hessian's own precision is enough beside a sum in float64: its rounding is 1e-7 of the loss of zero.
    if not (bool(dense.any()) and bool(hessian.diagonal().any())):
        return [0.0] * len(weights)
    kind = torch.promote_types(dense.dtype, hessian.dtype)
    size, peak = dense.to(kind).abs().max(), hessian.diagonal().max()
    h, w0 = hessian.to(kind) / peak.to(kind), dense.to(kind) / size
    scale = local_loss(torch.zeros_like(w0), w0, h)
    if scale <= 0:
        return [0.0] * len(weights)
    # Rounding can leave a loss of nothing below zero.
    return [max(0.0, local_loss(weight.to(kind) / size, w0, h) / scale) for weight in weights]


def prepared(
    dense: Float[Tensor, "rows width"],
    hessian: Float[Tensor, "width width"],
    *,
    pattern: Pattern | None = TWO_FOUR,
    name: str = "the layer",
) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "width width"]]:
    """`dense` and the symmetrised `hessian`, both in float64 if one is, else in float32.

    Raises `InvalidInput` on NaN, on infinities and on a width that is not a multiple of the pattern's M (any width will do
    without one), `TypeError` on weights that are not real floating-point numbers; each message says `name`.
    """
    if not dense.is_floating_point():
        raise WrongDtype(f"The weights of {name} are {dense.dtype}; real floating-point numbers are needed.")
    if dense.ndim != 2 or hessian.shape != (dense.shape[1], dense.shape[1]):
        raise InvalidInput(
            f"A weight is (rows, width) and its Hessian (width, width); {name} has {tuple(dense.shape)} and "
            f"{tuple(hessian.shape)}."
        )
    if pattern is not None and dense.shape[1] % pattern.m:
        raise InvalidInput(
            f"{pattern} groups run along the input axis, which must be a multiple of {pattern.m}; the weight of "
            f"{name} has shape {tuple(dense.shape)}. Leave it dense: skip=[...] names layers to leave."
        )
    for value, what in ((dense, "weights"), (hessian, "Hessian (the calibration activations)")):
        if not all_finite(value):
            raise InvalidInput(f"The {what} of {name} hold NaN or infinite values; nothing of this layer was changed.")
    if bool((hessian.diagonal() < 0).any()):
        raise InvalidInput(f"The Hessian of {name} has a negative diagonal entry: it is not a mean of x x^T.")
    dtype = torch.float64 if torch.float64 in (dense.dtype, hessian.dtype) else torch.float32
    hessian = hessian.to(device=dense.device, dtype=dtype)
    return dense.to(dtype), 0.5 * (hessian + hessian.T)


def damped(hessian: Float[Tensor, "width width"], damping: float) -> Float[Tensor, "width width"]:
    """H + damping * mean(diag H) * I, the mean over live features, which a dead one (H_jj = 0) gets for its diagonal.

    SparseGPT's code gives a dead feature 1, whatever the others have, so that one of them makes the damping of all depend
    on the scale of the inputs.
    """
    diagonal = hessian.diagonal()
    live = diagonal > 0
    mean = diagonal[live].mean() if bool(live.any()) else torch.ones((), dtype=hessian.dtype, device=hessian.device)
    result = hessian.clone()
    result.diagonal().copy_(torch.where(live, diagonal, mean))
    result.diagonal().add_(damping * mean)
    return result


def definite(
    hessian: Float[Tensor, "width width"], damping: float, *, slack: float = 0.0
) -> tuple[Float[Tensor, "width width"], Float[Tensor, "width width"]]:
    """`damped(H, d)` with the least d on the ladder damping, 10 damping, 100 damping, ... that has a Cholesky factor, and
    the lower factor of `damped(H, d + slack)`.

    With a slack, eigenvalues as low as -slack * mean(diag H) pass. A warning says when d is not `damping`. Raises
    `InvalidInput` where no d up to 1e7 times the setting helps: H then is no mean of x x^T.
    """
    for attempt in range(8):
        used = max(damping, 1e-6 * (attempt > 0)) * 10**attempt
        metric = damped(hessian, used)
        factor, failed = torch.linalg.cholesky_ex(damped(hessian, used + slack) if slack else metric)
        if not bool(failed) and bool(torch.isfinite(factor.diagonal()).all()):
            if attempt:
                warnings.warn(
                    f"A Hessian of width {len(hessian)} is not positive definite with damping {damping:g}; {used:g} is "
                    "used. Calibrate on more tokens, or in float32.",
                    stacklevel=3,
                )
            return metric, factor
    raise InvalidInput("The Hessian is not positive semi-definite: no damping up to 1e7 times the setting makes it so.")


def alive(hessian: Float[Tensor, "width width"]) -> Bool[Tensor, "width"]:
    """The features that were ever non-zero: H_jj > 0."""
    return hessian.diagonal() > 0


def largest_eigenvalue(matrix: Float[Tensor, "width width"], num_steps: int = 100) -> float:
    """An estimate of a PSD matrix' largest eigenvalue that is hardly ever low: power iteration and two per cent.

    The 30 steps and one per cent of reference 12 (hint 5) leave a Gaussian Gram's crowded top up to 2.5 % short, and a step
    of 1/L then is too long. The steps are matrix-vector products and cost nothing beside one over all rows.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(matrix.shape[0], generator=generator, dtype=matrix.dtype).to(matrix.device)
    for _ in range(num_steps):
        x = matrix @ x
        x /= x.norm().clamp_min(torch.finfo(x.dtype).tiny)
    return 1.02 * float(x @ (matrix @ x)) or 1.0


def result_of(
    weight: Float[Tensor, "rows width"],
    mask: Bool[Tensor, "rows width"],
    dense: Float[Tensor, "rows width"],
    w0: Float[Tensor, "rows width"],
    hessian: Float[Tensor, "width width"],
    *,
    iterations: int = 0,
    history: ProxHistory | None = None,
) -> LayerResult:
    """The result of a method: `weight` in the dtype of `dense`, and the loss that it has there."""
    # A product with a mask can leave -0.0.
    weight = (weight + 0.0).to(dense.dtype)
    return LayerResult(weight, mask, relative_loss(weight, w0, hessian), iterations, history)


def check_setting(truth: bool, field: str, given: object, allowed: str) -> None:
    """Refuse a setting: `field` must be `allowed`; got `given`."""
    if not truth:
        raise InvalidInput(f"`{field}` must be {allowed}; got {given}.")


def check_at_least(least: float, **settings: float) -> None:
    """Refuse settings that are not finite or below `least`."""
    for field, value in settings.items():
        check_setting(math.isfinite(value) and value >= least, field, value, f"a finite number of at least {least:g}")
