"""Masked refinement (reference 3.4): the weights on a fixed mask that minimise the local loss, from any mask.

Rows share H, so one step of any of the iterative solvers is one matrix product for the whole layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from core.errors import InvalidInput, unknown_name
from sparsity24.problem import largest_eigenvalue, prepared
from sparsity24.prox import all_finite

How = Literal["gd", "nesterov", "cg", "exact"]

# Rows of a chunk: the working arrays stay in cache between the products.
_CHUNK_NUMEL = 1 << 19
# The stacked sub-matrices of `exact` stay below this many doubles.
_EXACT_NUMEL = 1 << 25


@dataclass(frozen=True)
class RefineInfo:
    """Steps taken, and the norm of the masked gradient relative to that of the target weights (preconditioned units)."""

    steps: int
    relative_residual: float


def check_settings(how: str, steps: int, tol: float) -> None:
    """Refuse settings under which `refine` could not work; "none" is for callers that then do not call it."""
    known = ("none", *get_args(How))
    if how not in known:
        raise unknown_name("refinement", how, known)
    if steps < 0:
        raise InvalidInput(f"`steps` must be at least 0; got {steps}.")
    if not (math.isfinite(tol) and tol >= 0):
        raise InvalidInput(f"`tol` must be a finite number of at least 0; got {tol}.")


def refine(
    weight: Float[Tensor, "rows width"],
    mask: Bool[Tensor, "rows width"],
    dense: Float[Tensor, "rows width"],
    hessian: Float[Tensor, "width width"],
    how: How | str = "cg",
    *,
    steps: int = 20,
    tol: float = 1e-4,
) -> tuple[Float[Tensor, "rows width"], RefineInfo]:
    """Weights on `mask` with a lower local loss, started from `weight`: min of Tr((W - W0) H (W - W0)^T).

    `gd` takes the paper's gradient steps of length 1/L; `nesterov` and `cg` work in the metric of diag(H); `exact` solves
    every row by Cholesky factorisation and ignores `steps`. A row is done early at a relative residual of `tol`. No
    row's loss rises: a row that rounding or momentum would leave worse keeps its start. Raises `InvalidInput` on NaN, on
    shapes that differ, on an unknown `how` and on negative `steps`.
    """
    check_settings(how, steps, tol)
    solvers: dict[str, Solver] = {"gd": _gradient, "nesterov": _nesterov, "cg": _conjugate_gradient, "exact": _exact}
    w0, h = prepared(dense, hessian, pattern=None)
    if weight.shape != dense.shape or mask.shape != dense.shape:
        raise InvalidInput(
            f"Weight, mask and target have one shape; got {tuple(weight.shape)}, {tuple(mask.shape)} and {tuple(dense.shape)}."
        )
    if not all_finite(weight):
        raise InvalidInput("The weights to refine hold NaN or infinite values.")
    # V = W D and A = D^-1 H D^-1 with D = diag(H)^(1/2): Jacobi preconditioning, once and for all.
    scale = h.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    a = h * inverse * inverse[:, None]
    if how == "gd":
        rate = scale.square() / largest_eigenvalue(h)
    else:
        rate = torch.ones_like(scale) / (largest_eigenvalue(a) if how == "nesterov" else 1.0)
    # A product with a mask of bools takes ten times one with numbers.
    kept = mask.to(w0.dtype)
    start = weight.to(w0.dtype) * kept
    seen = (scale > 0).to(w0.dtype)
    result, num_steps, residual, size = torch.empty_like(w0), 0, 0.0, 0.0
    rows_a_chunk = max(1, _CHUNK_NUMEL // max(1, w0.shape[1]))
    for first in range(0, len(w0), rows_a_chunk):
        piece = slice(first, first + rows_a_chunk)
        # A feature that was never seen keeps its weight: no loss depends on it.
        free = kept[piece] * seen
        target, origin = w0[piece] * scale, start[piece] * scale
        norm = (target * free).square().sum(1, keepdim=True)
        before = (origin - target) @ a
        v = origin.clone()
        after = before.clone()
        num_steps = max(num_steps, solvers[how](v, after, _Problem(a, free, rate, tol**2 * norm), steps))
        worse = ((after * (v - target)).sum(1) > (before * (origin - target)).sum(1)).nonzero().squeeze(1)
        v[worse], after[worse] = origin[worse], before[worse]
        residual += float(after.mul_(free).square_().sum())
        size += float(norm.sum())
        result[piece] = v.mul_(inverse)
    unseen = (scale == 0).nonzero().squeeze(1)
    result[:, unseen] = start[:, unseen]
    relative = (residual / size) ** 0.5 if size > 0 else 0.0
    return (result + 0.0).to(dense.dtype), RefineInfo(num_steps, relative)


@dataclass(frozen=True)
class _Problem:
    """Curvature A, the places that may move (1 or 0), step length a feature, squared gradient norm that is enough.

    A row that has enough stands still, so that its weights do not depend on which other rows are solved with it.
    """

    a: Tensor
    free: Tensor
    rate: Tensor
    enough: Float[Tensor, "rows 1"]


# Moves `v` and with it the gradient (v - target) A, both in place; returns the steps taken. The gradient of a quadratic
# changes by the move times the curvature: one product a step, and none to know the loss at the end.
Solver = Callable[[Tensor, Tensor, _Problem, int], int]


def _gradient(v: Tensor, gradient: Tensor, problem: _Problem, steps: int) -> int:
    for step in range(steps):
        masked = gradient * problem.free
        going = masked.square().sum(1, keepdim=True) > problem.enough
        if not bool(going.any()):
            return step
        move = masked.mul_(problem.rate).mul_(going)
        v -= move
        gradient -= move @ problem.a
    return steps


def _nesterov(v: Tensor, gradient: Tensor, problem: _Problem, steps: int) -> int:
    point, ahead, momentum = v.clone(), gradient.clone(), 1.0
    for step in range(steps):
        going = (gradient * problem.free).square().sum(1, keepdim=True) > problem.enough
        if not bool(going.any()):
            return step
        downhill = ahead * problem.free
        move = downhill * problem.rate
        after, after_gradient = point - move, ahead - move @ problem.a
        # Rows that turn uphill start their momentum anew.
        uphill = ((after - v) * downhill).sum(1, keepdim=True) > 0
        following = 0.5 * (1 + (1 + 4 * momentum**2) ** 0.5)
        push = torch.where(uphill, 0.0, (momentum - 1) / following)
        point = after + push * (after - v)
        ahead = after_gradient + push * (after_gradient - gradient)
        torch.where(going, after, v, out=v)
        torch.where(going, after_gradient, gradient, out=gradient)
        momentum = following
    return steps


def _conjugate_gradient(v: Tensor, gradient: Tensor, problem: _Problem, steps: int) -> int:
    eps = torch.finfo(v.dtype).eps
    uphill = -problem.free
    # The negative gradient on the places that may move.
    masked = gradient * uphill
    image = torch.empty_like(masked)
    direction, square = masked.clone(), _row_dot(masked, masked, image)
    # |direction|^2 by its own recurrence: the new gradient is orthogonal to the old direction.
    extent = square
    for step in range(steps):
        going = square > problem.enough
        if not bool(going.any()):
            return step
        torch.mm(direction, problem.a, out=image)
        bend = _row_dot(direction, image, masked)
        # A direction that the inputs never span has no curvature; moving along it is noise.
        length = torch.where(going & (bend > eps * extent), square / bend, 0.0)
        v.addcmul_(direction, length)
        gradient.addcmul_(image, length)
        torch.mul(gradient, uphill, out=masked)
        following = _row_dot(masked, masked, image)
        ratio = torch.where(square > 0, following / square, 0.0)
        torch.addcmul(masked, direction, ratio, out=direction)
        extent = following + ratio.square() * extent
        square = following
    return steps


def _row_dot(x: Tensor, y: Tensor, scratch: Tensor) -> Tensor:
    # A fresh buffer of this size costs more in page faults than the product itself.
    return torch.mul(x, y, out=scratch).sum(1, keepdim=True)


def _exact(v: Tensor, gradient: Tensor, problem: _Problem, steps: int) -> int:
    """Every row by the Cholesky factor of its own A[M, M] in float64, rows of a batch filled up to equal size."""
    count = problem.free.sum(1).long()
    size = int(count.max()) if len(count) else 0
    if size == 0:
        return 0
    a = problem.a.double()
    order = problem.free.argsort(dim=1, descending=True, stable=True)[:, :size]
    used = torch.arange(size, device=v.device) < count[:, None]
    batch = max(1, _EXACT_NUMEL // size**2)
    for first in range(0, len(v), batch):
        piece = slice(first, first + batch)
        index, real = order[piece], used[piece]
        both = real[:, :, None] & real[:, None, :]
        system = torch.where(both, a[index[:, :, None], index[:, None, :]], 0.0)
        system.diagonal(dim1=1, dim2=2).add_(torch.where(real, 0.0, 1.0))
        right = torch.where(real, gradient[piece].double().gather(1, index), 0.0)
        correction = torch.where(real, _solve(system, right), 0.0)
        move = torch.zeros_like(v[piece]).scatter_add_(1, index, -correction.to(v.dtype))
        v[piece] += move
        gradient[piece] += move @ problem.a
    return 1


def _solve(system: Tensor, right: Tensor) -> Tensor:
    """Solution of a stack of PSD systems with unit diagonals, each with the least damping under which it factorises."""
    factor, failed = torch.linalg.cholesky_ex(system)
    damping = 1e-12
    while bool(failed.any()) and damping <= 1.0:
        bad = failed != 0
        shifted = system[bad]
        shifted.diagonal(dim1=1, dim2=2).add_(damping)
        factor[bad], failed[bad] = torch.linalg.cholesky_ex(shifted)
        damping *= 10
    return torch.cholesky_solve(right[:, :, None], factor).squeeze(2)
