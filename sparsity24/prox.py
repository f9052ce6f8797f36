"""The 2:4 regulariser r and its exact proximal operator (reference 3.1 and 3.2).

The minimum over a group of four is the best of three candidates: two, three or four non-zero entries. The first is known;
the others are the larger root of one convex scalar function each, `psi` and `phi`, which Newton's method reaches
monotonically from the right. Everything works on *planes*: four tensors that hold the first, second, third and fourth
member of every group.
"""

# Legend: z input, a = |z|, t = lam * |z| sorted in decreasing order (the zeta of the reference), u solution for lam = 1.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from core.errors import InvalidInput, TenfoldError

# Above the first, or with t3 <= second * t1 * t2, two entries are the global minimum (reference 3.2, early-out).
MAX_DENSE = 0.5 + math.sqrt(0.5)
MIN_THIRD = 2 * math.sqrt(2) - 2

# 32 k groups of float32 planes stay in a core's cache; a GPU wants few large kernels.
_CPU_CHUNK = 1 << 15
_GPU_CHUNK = 1 << 22
# Gathering the unfinished groups costs about as much as solving this share of finished ones.
_COMPACT_BELOW = 0.6
# After a Newton step this small (relative to its scale) the next error is below rounding: convergence is quadratic.
_SMALL_STEP = {torch.float32: 1e-4, torch.float64: 1e-8}
_NUM_NEWTON = {torch.float32: 6, torch.float64: 8}
# Below this the squares of the solver underflow, and prox(z) = z to the last bit but for entries below t1^2.
_NEGLIGIBLE = {torch.float32: 1e-18, torch.float64: 1e-150}

Planes = Sequence[Tensor]


class WrongDtype(TenfoldError, TypeError):
    """A tensor of integers or complex numbers where real weights are needed."""


@dataclass(frozen=True)
class Candidates:
    """The local minima of every group by size of support: index 0 has two, 1 three and 2 four non-zero entries.

    Where no minimum of a support exists, its objective is infinite and its weights are NaN.
    """

    weights: Float[Tensor, "3 *batch width"]
    objectives: Float[Tensor, "3 *batch groups"]


def r24(w: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch"]:
    """The regulariser R, summed over the groups of four in the last dimension (reference 3.1).

    r(w) = |w1 w2 w3| + |w2 w3 w4| + |w3 w4 w1| + |w4 w1 w2|, zero exactly where at most two of the four are non-zero.
    """
    a, b, c, d = _groups(_widened(w).abs()).unbind(-1)
    return (a * b * (c + d) + c * d * (a + b)).sum(-1).to(w.dtype)


def prox24(z: Float[Tensor, "*batch width"], lam: float | Tensor) -> Float[Tensor, "*batch width"]:
    """Global minimiser of 1/2 ||w - z||^2 + lam * r(w) in every group of four of the last dimension (reference 3.2).

    `lam` has the units of 1 / |z| and is a number, or a tensor that broadcasts to `z[..., :1]` or to one value a group.
    Entries that survive in a group of two keep their value bit for bit; ties go to the sparser solution, and among
    equal magnitudes to the lower index. Half precision is computed in float32. Raises `InvalidInput` (a `ValueError`)
    on a width that is not a multiple of 4, on NaN or infinite `z`, and on a negative or non-finite `lam`; `TypeError` on
    integers and complex numbers.
    """
    x = _widened(z)
    _require_finite(x, "z")
    num_groups = _groups(x).shape[-2]
    strength = _per_group(lam, z, num_groups, x.dtype)
    if x.numel() == 0 or (isinstance(strength, float) and strength == 0):
        return z.clone()
    planes = _groups(x).reshape(-1, 4).t().contiguous()
    prox_planes(planes, strength, out=planes)
    return planes.t().reshape(x.shape).to(z.dtype)


def prox24_candidates(z: Float[Tensor, "*batch width"], lam: float | Tensor) -> Candidates:
    """All local minima that compete to be `prox24(z, lam)`, for inspection (reference 3.2, step 3)."""
    x = _widened(z)
    _require_finite(x, "z")
    strength = _per_group(lam, z, _groups(x).shape[-2], x.dtype)
    planes = _groups(x).reshape(-1, 4).unbind(-1)
    lam_g = torch.as_tensor(strength, dtype=x.dtype, device=x.device).expand(planes[0].shape)
    sorted_a, swaps = _sort([plane.abs() for plane in planes])
    t = [lam_g * plane for plane in sorted_a]
    zero = torch.zeros_like(t[0])
    three, has_three = _three(t)
    dense, has_dense = _dense(t)
    solutions = (
        ([t[0], t[1], zero, zero], torch.ones_like(t[0], dtype=torch.bool)),
        ([*three, zero], has_three),
        (dense, has_dense),
    )
    weights, objectives = [], []
    for u, exists in solutions:
        w = [torch.where(lam_g > 0, plane / lam_g, a) for plane, a in zip(u, sorted_a, strict=True)]
        w = [torch.copysign(plane, sign) for plane, sign in zip(_unsort(w, swaps), planes, strict=True)]
        w_g = torch.stack(w, -1)
        value = 0.5 * (w_g - torch.stack(planes, -1)).square().sum(-1) + lam_g * r24(w_g)
        weights.append(torch.where(exists[:, None], w_g, torch.nan).reshape(x.shape))
        objectives.append(torch.where(exists, value, torch.inf).reshape(_groups(x).shape[:-1]))
    return Candidates(torch.stack(weights), torch.stack(objectives))


def top2_mask(score: Float[Tensor, "*batch width"]) -> Bool[Tensor, "*batch width"]:
    """True at the two largest scores of every group of four; equal scores go to the lower index."""
    p = _groups(score).unbind(-1)
    ahead = {(i, j): p[i] >= p[j] for i in range(4) for j in range(i + 1, 4)}
    kept = []
    for i in range(4):
        x, y, z = (ahead[i, j] if i < j else ~ahead[j, i] for j in range(4) if j != i)
        # At most one member is ahead of a kept one, so at least two of the three comparisons are won.
        kept.append((x & y) | (z & (x | y)))
    return torch.stack(kept, -1).reshape(score.shape)


def project24(w: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    """The nearest 2:4-sparse tensor: the two largest magnitudes of every group, the others zero."""
    _widened(w)
    return torch.where(top2_mask(w.abs()), w, torch.zeros((), dtype=w.dtype, device=w.device))


def group_support(w: Float[Tensor, "*batch width"]) -> Int[Tensor, "*batch groups"]:
    """The number of non-zero entries (0 to 4) of every group of four."""
    return (_groups(w) != 0).sum(-1)


def is_24(w: Float[Tensor, ...], dim: int = -1) -> bool:
    """Whether every group of four along `dim` has at most two non-zero entries."""
    return bool((group_support(w.movedim(dim, -1)) <= 2).all())


def prox_planes(z: Float[Tensor, "4 groups"], lam: float | Float[Tensor, groups], out: Tensor) -> int:
    """Write prox_lam of every column of `z` into `out` (may be `z`); the number of columns left with over two non-zeros.

    The work-horse behind `prox24`, without its checks: contiguous planes, float32 or float64, finite, `lam` > 0.
    """
    chunk = _CPU_CHUNK if z.device.type == "cpu" else _GPU_CHUNK
    return sum(
        _prox_chunk(
            z[:, start : start + chunk],
            lam if isinstance(lam, float) else lam[start : start + chunk],
            out[:, start : start + chunk],
        )
        for start in range(0, z.shape[1], chunk)
    )


def _prox_chunk(z: Tensor, lam: float | Tensor, out: Tensor) -> int:
    a = z.abs()
    low01, high01 = torch.minimum(a[0], a[1]), torch.maximum(a[0], a[1])
    low23, high23 = torch.minimum(a[2], a[3]), torch.maximum(a[2], a[3])
    first = torch.maximum(high01, high23)
    inner_a, inner_b = torch.minimum(high01, high23), torch.maximum(low01, low23)
    second, third = torch.maximum(inner_a, inner_b), torch.minimum(inner_a, inner_b)
    # Comparing a with third / lam instead of t keeps this right where lam * |z| overflows.
    active = (third > (first * second).mul_(lam * MIN_THIRD)) & (first < MAX_DENSE / lam)
    num_active = int(active.count_nonzero())
    num_groups = a.shape[1]
    if num_active == num_groups:
        return _solve(z, a, lam, out)
    tied = (second == third) & (third > 0)
    kept = a > third
    if bool(tied.any()):
        index = tied.nonzero().squeeze(1)
        kept[:, index] = top2_mask(a[:, index].t()).t()
    two = torch.where(kept, z, 0.0)
    if num_active == 0:
        out.copy_(two)
        return 0
    if num_active >= _COMPACT_BELOW * num_groups:
        solved = torch.empty_like(z)
        _solve(z, a, lam, solved)
        torch.where(active, solved, two, out=out)
        return int(((out != 0).sum(0) > 2).count_nonzero())
    index = active.nonzero().squeeze(1)
    solved = torch.empty((4, num_active), dtype=z.dtype, device=z.device)
    lam_active = lam if isinstance(lam, float) else lam[index]
    num_over = _solve(z.index_select(1, index), a.index_select(1, index), lam_active, solved)
    out.copy_(two)
    out.index_copy_(1, index, solved)
    return num_over


def _solve(z: Tensor, a: Tensor, lam: float | Tensor, out: Tensor) -> int:
    """Prox of groups that the early-out could not finish; the number that keeps more than two entries."""
    sorted_a, swaps = _sort(a.unbind(0))
    t = [lam * plane for plane in sorted_a]
    three, has_three = _three(t)
    # f3 < f2 in closed form; on a tie the sparser solution stays.
    three_wins = has_three.logical_and_(torch.addcmul(three[0] * three[0], three[1], three[1]) < 1)
    two = [sorted_a[0], sorted_a[1], None, None]
    candidates = three_wins & (t[3] > 0)
    if bool(candidates.any()):
        dense, has_dense = _dense(t)
        dense_wins = has_dense.logical_and_(candidates).logical_and_(_dense_minus_three(t, dense, three) < 0)
    else:
        dense, dense_wins = [*three, torch.zeros_like(t[0])], candidates
    u = [torch.where(dense_wins, dense[i], three[i]).div_(lam) for i in range(3)]
    u.append(torch.where(dense_wins, dense[3], 0.0).div_(lam))
    negligible = t[0] < _NEGLIGIBLE[a.dtype]
    w = [
        torch.where(three_wins, u[i], 0.0 if two[i] is None else two[i])  # type: ignore[arg-type]
        for i in range(4)
    ]
    if bool(negligible.any()):
        w = [torch.where(negligible, plane, solution) for plane, solution in zip(sorted_a, w, strict=True)]
    num_over = int((w[2] > 0).count_nonzero())
    for i, plane in enumerate(_unsort(w, swaps)):
        # Adding zero turns the -0.0 that copysign gives a dropped negative entry into 0.0.
        torch.copysign(plane, z[i], out=plane)
        torch.add(plane, 0.0, out=out[i])
    return num_over


# Comparators of neighbours only, swapping on strict order: a stable sort, so equal magnitudes keep the lower index first.
_NETWORK = (0, 2, 1, 0, 2, 1)


def _sort(planes: Planes) -> tuple[list[Tensor], list[Tensor]]:
    p, swaps = list(planes), []
    for i in _NETWORK:
        swaps.append(p[i] < p[i + 1])
        p[i], p[i + 1] = torch.maximum(p[i], p[i + 1]), torch.minimum(p[i], p[i + 1])
    return p, swaps


def _unsort(planes: Planes, swaps: Planes) -> list[Tensor]:
    p = list(planes)
    for i, swapped in zip(reversed(_NETWORK), reversed(swaps), strict=True):
        p[i], p[i + 1] = torch.where(swapped, p[i + 1], p[i]), torch.where(swapped, p[i], p[i + 1])
    return p


def _three(t: Planes) -> tuple[list[Tensor], Tensor]:
    """The minimum with three non-zero entries for lam = 1, and where it exists: the larger root of psi.

    psi(r) = 1/2 (t1 + S1)(t2 + S2) + r - t3 with S_i = sqrt(r^2 + t_i^2 - t3^2), u3 = (t3 + r) / 2, u_i = (t_i + S_i) / 2.
    """
    t1, t2, t3 = t[:3]
    tiny = torch.finfo(t1.dtype).tiny
    small = _SMALL_STEP[t1.dtype] * t3
    excess1, excess2 = (t1 - t3).mul_(t1 + t3), (t2 - t3).mul_(t2 + t3)
    # The first Newton step, from r = t3, needs no square root: psi = 2 t1 t2 and psi' = 1 + t3 (t1/t2 + t2/t1).
    product = t1 * t2
    slope = torch.addcmul(t1 * t1, t2, t2).mul_(t3).add_(product).clamp_min_(tiny)
    r = torch.addcmul(t3, product, product / slope, value=-2)
    exists = torch.ones_like(r, dtype=torch.bool)
    for step_number in range(_NUM_NEWTON[t1.dtype]):
        s1, s2 = torch.addcmul(excess1, r, r).sqrt_(), torch.addcmul(excess2, r, r).sqrt_()
        sum1, sum2 = s1 + t1, s2 + t2
        psi = torch.addcmul(r - t3, sum1, sum2, value=0.5)
        # psi' times S1 S2, so that one division serves; it has the sign of the Hessian's determinant.
        product = s1 * s2
        curvature = torch.addcmul(sum1.mul_(s1), sum2, s2)
        slope = torch.addcmul(product, r, curvature, value=0.5)
        exists.logical_and_(slope > 0)
        step = psi.mul_(product).div_(slope.clamp_min_(tiny))
        r = r.sub_(step)
        if step_number + 1 < _NUM_NEWTON[t1.dtype] and not bool((step > small).any()):
            break
    u1 = torch.addcmul(excess1, r, r).sqrt_().add_(t1).mul_(0.5)
    u2 = torch.addcmul(excess2, r, r).sqrt_().add_(t2).mul_(0.5)
    u3 = (r + t3).mul_(0.5)
    exists.logical_and_(u3 > 0)
    # One Gauss-Seidel sweep never raises the objective; it restores small entries whose squares underflow above.
    u2 = torch.addcmul(t2, u1, u3, value=-1).clamp_min_(0)
    u1 = torch.addcmul(t1, u2, u3, value=-1).clamp_min_(0)
    u3 = torch.addcmul(t3, u1, u2, value=-1).clamp_min_(0)
    return [u1, u2, u3], exists.logical_and_(u3 > 0)


def _dense(t: Planes) -> tuple[list[Tensor], Tensor]:
    """The minimum with four non-zero entries for lam = 1, and where it exists: the larger root of phi.

    phi(v) = slope0 v - 2 + w0 sqrt(v^2 + p0) + 1/2 sum_i sqrt(v^2 + p_i), with v the smallest entry's d where c <= 0, the
    sum of the entries where c > 0 (cases A and B of reference 3.2).
    """
    t1, t2, t3, t4 = t
    tiny = torch.finfo(t1.dtype).tiny
    total = (t1 + t2).add_(t3).add_(t4)
    c = torch.add(t4 * 4, total, alpha=-2).add_(1)
    case_b = c > 0
    p0, base = c.abs(), c.clamp_min(0)
    p = [torch.add(base, plane - t4, alpha=4) for plane in (t1, t2, t3)]
    slope0 = torch.where(case_b, 1.0, 0.5).to(t1.dtype)
    w0 = 1.5 - slope0
    v = torch.where(case_b, total.clamp_max(2 / 3), 2 / 3)
    exists = torch.ones_like(case_b)
    small = _SMALL_STEP[t1.dtype]
    for step_number in range(_NUM_NEWTON[t1.dtype]):
        square = v * v
        r0, r1, r2, r3 = (torch.add(square, q).sqrt_() for q in (p0, *p))
        outer = w0 * r0
        phi = torch.addcmul(outer - 2, slope0, v)
        phi = phi.add_(r1, alpha=0.5).add_(r2, alpha=0.5).add_(r3, alpha=0.5)
        # phi' times the four radicals: one division for four reciprocals.
        pair, pair_sum = r1 * r2, r1 + r2
        triple = pair * r3
        reciprocals = torch.addcmul(pair, r3, pair_sum).mul_(r0).mul_(0.5)
        reciprocals = torch.addcmul(reciprocals, w0, triple)
        product = triple.mul_(r0)
        slope = torch.addcmul(slope0 * product, v, reciprocals)
        exists.logical_and_(slope > 0)
        step = phi.mul_(product).div_(slope.clamp_min_(tiny))
        v = v.sub_(step)
        if step_number + 1 < _NUM_NEWTON[t1.dtype] and not bool((step > small).any()):
            break
    square = v * v
    r0 = torch.add(square, p0).sqrt_()
    total_u, d4 = torch.where(case_b, v, r0), torch.where(case_b, r0, v)
    half = total_u.sub_(1).mul_(0.5)
    u = [torch.add(half, torch.add(square, q).sqrt_(), alpha=0.5) for q in p]
    u.append(torch.add(half, d4, alpha=0.5))
    # s - 1 + d cancels for tiny t; 0 <= u <= t and two sweeps from the smallest entry on restore every digit.
    u = [torch.minimum(x.clamp_min_(0), bound) for x, bound in zip(u, t, strict=True)]
    for _ in range(2):
        pair, pair_sum = u[0] * u[1], u[0] + u[1]
        u[3] = torch.addcmul(t4 - pair, pair_sum, u[2], value=-1).clamp_min_(0)
        u[2] = torch.addcmul(t3 - pair, pair_sum, u[3], value=-1).clamp_min_(0)
        pair, pair_sum = u[2] * u[3], u[2] + u[3]
        u[1] = torch.addcmul(t2 - pair, pair_sum, u[0], value=-1).clamp_min_(0)
        u[0] = torch.addcmul(t1 - pair, pair_sum, u[1], value=-1).clamp_min_(0)
    return u, exists.logical_and_(u[3] > 0)


def _dense_minus_three(t: Planes, dense: Planes, three: Planes) -> Tensor:
    """f4 - f3 with the common terms dropped."""
    d, u = dense, three
    # (d - t)^2 - (u - t)^2 = (d - u)(d + u - 2t): no cancellation between two close squares.
    squares = torch.addcmul(d[3] * d[3], d[3], t[3], value=-2)
    for i in range(3):
        squares = torch.addcmul(squares, d[i] - u[i], (d[i] + u[i]).sub_(t[i], alpha=2))
    pair_low, pair_high = d[0] * d[1], d[2] * d[3]
    cubic = torch.addcmul(pair_low * (d[2] + d[3]), pair_high, d[0] + d[1])
    return torch.addcmul(cubic, u[0] * u[1], u[2], value=-1).add_(squares, alpha=0.5)


def _groups(w: Tensor) -> Tensor:
    if w.ndim == 0 or w.shape[-1] % 4:
        raise InvalidInput(
            "2:4 groups run along the last dimension, which must be a multiple of 4; this tensor has shape "
            f"{tuple(w.shape)}. Leave such a weight dense."
        )
    return w.unflatten(-1, (w.shape[-1] // 4, 4))


def _widened(w: Tensor) -> Tensor:
    if not w.is_floating_point():
        raise WrongDtype(f"Weights must be real floating-point numbers, not {w.dtype}. Convert them first.")
    return w.float() if w.dtype in (torch.float16, torch.bfloat16) else w


def _require_finite(x: Tensor, name: str) -> None:
    if x.numel() and not bool(torch.isfinite(x.abs().amax())):
        raise InvalidInput(f"`{name}` holds NaN or infinite values; the proximal operator needs finite ones.")


def _per_group(lam: float | Tensor, z: Tensor, num_groups: int, dtype: torch.dtype) -> float | Tensor:
    """`lam` as a number, or as one positive value for each group of `z` in row-major order."""
    if not isinstance(lam, Tensor) or lam.numel() == 1:
        value = float(lam)
        if not (math.isfinite(value) and value >= 0):
            raise InvalidInput(f"`lam` must be a finite number >= 0 and is {value}.")
        return value
    if not bool((torch.isfinite(lam) & (lam >= 0)).all()):
        raise InvalidInput("`lam` must be finite and >= 0 everywhere; the tensor given is not.")
    shape = (*z.shape[:-1], num_groups)
    try:
        return lam.to(device=z.device, dtype=dtype).expand(shape).reshape(-1).contiguous()
    except RuntimeError as error:
        raise InvalidInput(
            f"`lam` has shape {tuple(lam.shape)}; it must broadcast to one value a row {(*z.shape[:-1], 1)} or a group {shape}."
        ) from error
