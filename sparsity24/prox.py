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

from core.errors import InvalidInput, TenfoldError, unknown_name

# Above the first, or with t3 <= second * t1 * t2, two entries are the global minimum (reference 3.2, early-out).
MAX_DENSE = 0.5 + math.sqrt(0.5)
MIN_THIRD = 2 * math.sqrt(2) - 2
# Below this largest entry the Hessian is diagonally dominant on the box [0, t]: row i of I + (sums of the other two) has
# off-diagonal entries that add up to twice the sum of three entries.
_CONVEX = 1 / 6

# 64 k groups of float32 planes stay in a core's cache (half and double are slower); a GPU wants few large kernels.
_CPU_CHUNK = 1 << 16
_GPU_CHUNK = 1 << 22
# Gathering the unfinished groups costs about as much as solving this share of finished ones.
_COMPACT_BELOW = 0.6
# After a Newton step this small (relative to its scale) the next error is below rounding: convergence is quadratic.
_SMALL_STEP = {torch.float32: 1e-4, torch.float64: 1e-8}
_NUM_NEWTON = {torch.float32: 6, torch.float64: 12}
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


def prox24(
    z: Float[Tensor, "*batch width"], lam: float | Tensor, *, backend: str = "eager"
) -> Float[Tensor, "*batch width"]:
    """Global minimiser of 1/2 ||w - z||^2 + lam * r(w) in every group of four of the last dimension (reference 3.2).

    `lam` has the units of 1 / |z| and is a number, or a tensor that broadcasts to `z[..., :1]` or to one value a group.
    Entries that survive in a group of two keep their value bit for bit; ties go to the sparser solution, and among
    equal magnitudes to the lower index. Half precision is computed in float32. Raises `InvalidInput` (a `ValueError`)
    on a width that is not a multiple of 4, on NaN or infinite `z`, and on a negative or non-finite `lam`; `TypeError` on
    integers and complex numbers.

    `backend` "compiled" takes the same steps in one loop made by `torch.compile`, in float32 (`sparsity24.prox_compiled`):
    two to four times faster where most groups are active, after a minute or two of compiling.
    """
    x = _widened(z)
    _require_finite(x, "z")
    num_groups = _groups(x).shape[-2]
    strength = _per_group(lam, z, num_groups, x.dtype)
    if x.numel() == 0 or (isinstance(strength, float) and strength == 0):
        return z.clone()
    rows = _groups(x).reshape(-1, 4)
    # Four strided copies; a transposing or stacking copy of four columns takes several times as long.
    planes = torch.empty((4, len(rows)), dtype=x.dtype, device=x.device)
    for plane, member in zip(planes, rows.unbind(1), strict=True):
        plane.copy_(member)
    prox_planes(planes, strength, out=planes, backend=backend)
    result = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for plane, member in zip(planes, result.unbind(1), strict=True):
        member.copy_(plane)
    return result.reshape(x.shape).to(z.dtype)


def prox24_candidates(z: Float[Tensor, "*batch width"], lam: float | Tensor) -> Candidates:
    """All local minima that compete to be `prox24(z, lam)`, for inspection (reference 3.2, step 3)."""
    x = _widened(z)
    _require_finite(x, "z")
    groups = _groups(x)
    lam_g = torch.as_tensor(_per_group(lam, z, groups.shape[-2], x.dtype), dtype=x.dtype, device=x.device)
    rows = groups.reshape(-1, 4)
    lam_g = lam_g.expand(len(rows))
    if bool((lam_g == 0).any()):
        raise InvalidInput("With lam = 0 there is nothing to choose: the minimum is z itself. Give lam > 0.")
    order = rows.abs().argsort(dim=-1, descending=True, stable=True)
    t_at = rows.abs().gather(1, order).mul_(lam_g[:, None]).t().contiguous()
    t = t_at.unbind(0)
    zero = torch.zeros_like(t[0])
    two, three, dense = torch.stack([t[0], t[1], zero, zero]), torch.stack([*_three(t)[1], zero]), _dense(t, t_at)
    weights, objectives = [], []
    for u, support in ((two, 2), (three, 3), (dense, 4)):
        exists = torch.ones_like(zero, dtype=torch.bool) if support == 2 else _is_minimum(u, t_at, support)
        w = torch.empty_like(rows).scatter_(1, order, (u / lam_g).t()).copysign(rows)
        value = 0.5 * (w - rows).square().sum(-1) + lam_g * r24(w)
        weights.append(torch.where(exists[:, None], w, torch.nan).reshape(x.shape))
        objectives.append(torch.where(exists, value, torch.inf).reshape(groups.shape[:-1]))
    return Candidates(torch.stack(weights), torch.stack(objectives))


def _is_minimum(u: Tensor, t: Tensor, support: int) -> Tensor:
    """Whether the first `support` planes of `u` are positive, stationary for lam = 1, with a Hessian that is PSD."""
    x, target = u[:support].t(), t[:support].t()
    total = x.sum(-1, keepdim=True)
    pairs = 0.5 * (total.square() - x.square().sum(-1, keepdim=True)) - x * (total - x)
    tolerance = torch.finfo(x.dtype).eps ** 0.6
    stationary = ((x + pairs - target).abs() <= tolerance * (1 + total)).all(-1)
    hessian = total[..., None] - x[:, :, None] - x[:, None, :]
    hessian.diagonal(dim1=1, dim2=2).fill_(1.0)
    return (x > 0).all(-1) & stationary & (torch.linalg.eigvalsh(hessian)[:, 0] >= -tolerance)


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
    _require_finite(_widened(w), "w")
    return torch.where(top2_mask(w.abs()), w, torch.zeros((), dtype=w.dtype, device=w.device))


def group_support(w: Float[Tensor, "*batch width"]) -> Int[Tensor, "*batch groups"]:
    """The number of non-zero entries (0 to 4) of every group of four."""
    return (_groups(w) != 0).sum(-1)


def is_24(w: Float[Tensor, ...], dim: int = -1) -> bool:
    """Whether every group of four along `dim` has at most two non-zero entries."""
    return bool((group_support(w.movedim(dim, -1)) <= 2).all())


def check_backend(backend: str, dtype: torch.dtype = torch.float32) -> None:
    """Refuse an unknown backend, and a dtype that it has no code for."""
    if backend not in ("eager", "compiled"):
        raise unknown_name("backend of the prox", backend, ("eager", "compiled"))
    if backend == "compiled" and dtype != torch.float32:
        raise InvalidInput(f"The compiled prox works in float32; got {dtype}. Use backend='eager'.")


def prox_planes(
    z: Float[Tensor, "4 groups"], lam: float | Float[Tensor, "groups"], out: Tensor, *, backend: str = "eager"
) -> int:
    """Write prox_lam of every column of `z` into `out` (may be `z`); the number of columns left with over two non-zeros.

    The work-horse behind `prox24`, without its checks: contiguous planes, float32 or float64, finite, `lam` > 0.
    """
    check_backend(backend, z.dtype)
    if backend == "compiled":
        from sparsity24.prox_compiled import compiled_prox

        # A tensor, since a number would be compiled in.
        solved, over = compiled_prox()(z, torch.as_tensor(lam, dtype=z.dtype, device=z.device))
        out.copy_(solved)
        return int(over.sum())
    chunk = _CPU_CHUNK if z.device.type == "cpu" else _GPU_CHUNK
    num_over, unfinished = 0, []
    for start in range(0, z.shape[1], chunk):
        piece = slice(start, start + chunk)
        lam_piece = lam if isinstance(lam, float) else lam[piece]
        active, two = _early_out(z[:, piece], lam_piece)
        num_active, num_groups = _count(active), active.shape[0]
        if num_active >= _COMPACT_BELOW * num_groups and num_active > 0:
            solved, over = _solve(z[:, piece], two, lam_piece)
            if num_active < num_groups:
                solved, over = _select(active, solved, two), over.bitwise_and_(active)
            num_over += _count(over)
            out[:, piece] = solved
            continue
        if num_active:
            index = active.nonzero().squeeze(1)
            unfinished.append((index + start, z[:, piece][:, index], two[:, index]))
        out[:, piece] = two
    if unfinished:
        index = torch.cat([part[0] for part in unfinished])
        z_left, two_left = (torch.cat([part[i] for part in unfinished], 1) for i in (1, 2))
        lam_left = lam if isinstance(lam, float) else lam[index]
        for start in range(0, len(index), chunk):
            piece = slice(start, start + chunk)
            lam_piece = lam_left if isinstance(lam_left, float) else lam_left[piece]
            solved, over = _solve(z_left[:, piece], two_left[:, piece], lam_piece)
            num_over += _count(over)
            out[:, index[piece]] = solved
    return num_over


def _early_out(z: Tensor, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """Where more than the two largest entries might survive (all bits set), and the group with only those two."""
    a = z.abs()
    first, second, third, _ = sorted_values(a.unbind(0))
    # From the smaller factor on, so that an overflow never meets a zero.
    active = torch.sub((second * lam).mul_(MIN_THIRD).mul_(first), third)
    active = _negative(active).bitwise_and_(_negative(torch.sub(first, MAX_DENSE / lam)))
    # Comparing |z| instead of lam |z| keeps the order where the product overflows or underflows.
    two = _masked(z, _negative(torch.sub(third, a, out=a)))
    if not bool(torch.sub(second, third).amin() > 0):
        index = ((second == third) & (third > 0)).nonzero().squeeze(1)
        two[:, index] = project24(z[:, index].t()).t()
    return active, two


def _solve(z: Tensor, two: Tensor, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """Solve the groups that the early-out could not finish, whose two largest entries are `two`; and where it keeps more."""
    t_at = z.abs().mul_(lam)
    t = sorted_values(t_at.unbind(0))
    if bool(t[0].amax() < _CONVEX):
        return _solve_convex(z, two, lam, t, t_at)
    return _solve_any(z, two, lam, t, t_at)


def _solve_convex(z: Tensor, two: Tensor, lam: float | Tensor, t: Planes, t_at: Tensor) -> tuple[Tensor, Tensor]:
    """`_solve` where the objective is convex on the whole box: a minimum with four non-zero entries is the global one."""
    dense = _dense(t, t_at)
    rest = (dense.amin(0) <= 0).logical_or_(t[0] < _NEGLIGIBLE[z.dtype])
    solution, over = torch.copysign(dense.div_(lam), z), _bits(torch.zeros_like(t[0])).bitwise_not_()
    if bool(rest.any()):
        index = rest.nonzero().squeeze(1)
        lam_left = lam if isinstance(lam, float) else lam[index]
        left = [plane[index] for plane in t]
        solution[:, index], over[index] = _solve_any(z[:, index], two[:, index], lam_left, left, t_at[:, index])
    return solution, over


def _solve_any(z: Tensor, two: Tensor, lam: float | Tensor, t: Planes, t_at: Tensor) -> tuple[Tensor, Tensor]:
    """`_solve` from the three candidates; `t_at` is lam |z| and `t` its planes in decreasing order."""
    r, u = _three(t)
    # f3 < f2 in closed form, and a third entry; on a tie the sparser solution stays.
    three_wins = _negative(torch.addcmul(u[0] * u[0], u[1], u[1]).sub_(1)).bitwise_and_(_negative(0 - u[2]))
    dense = _dense(t, t_at)
    pair_low, pair_high = dense[0] * dense[1], dense[2] * dense[3]
    f_dense = (dense - t_at).square_().sum(0).mul_(0.5)
    f_dense = f_dense.addcmul_(pair_low, dense[2] + dense[3]).addcmul_(pair_high, dense[0] + dense[1])
    pairs = [u[1] * u[2], u[0] * u[2], u[0] * u[1]]
    f_three = torch.addcmul(t[3] * t[3], pairs[0], pairs[0]).addcmul_(pairs[1], pairs[1])
    f_three = f_three.addcmul_(pairs[2], pairs[2]).mul_(0.5).addcmul_(pairs[2], u[2])
    dense_wins = _negative(f_dense.sub_(f_three))
    # Written at the places of the input: no sort has to be undone. The root of the third entry has the sign of r.
    wrong_sign = (r - r.abs()).mul_(0.5)
    radicand = (t_at - t[2]).mul_(t_at + t[2]).addcmul_(r, r)
    three = radicand.clamp_min_(0).sqrt_().add_(t_at).mul_(0.5)
    # The last member, below the third, is dropped in the next line whatever stands there.
    three.add_(_masked(wrong_sign, _negative(t[2] - t_at).bitwise_not_()))
    three = _masked(three, _all_but_last(t_at, t[3]))
    w = _select(dense_wins, dense, three).div_(lam)
    # Adding zero turns the -0.0 that copysign gives a dropped negative entry into 0.0.
    w = torch.copysign(w, z).add_(0.0)
    solution = _select(three_wins, w, two)
    negligible = t[0] < _NEGLIGIBLE[z.dtype]
    if bool(negligible.any()):
        index = negligible.nonzero().squeeze(1)
        solution[:, index] = z[:, index]
        three_wins[index] = -(group_support(z[:, index].t()).squeeze(1) > 2).to(three_wins.dtype)
    return solution, three_wins


def _all_but_last(t_at: Tensor, smallest: Tensor) -> Tensor:
    """Bit mask of every member but the smallest; of equal ones, the member with the highest index is the last."""
    kept = _negative(smallest - t_at)
    for i in (2, 1, 0):
        # Once a later member is dropped, an equal one before it stays.
        dropped_later = kept[i + 1].bitwise_not()
        for j in range(i + 2, 4):
            dropped_later.bitwise_or_(kept[j].bitwise_not())
        kept[i].bitwise_or_(dropped_later)
    return kept


# `torch.where` costs several times an arithmetic operation on a CPU; these three work on the bits of floats instead and
# are exact, whatever stands in the lanes that are dropped.


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int64)


def _negative(x: Tensor) -> Tensor:
    """All bits set where `x` is below zero, none elsewhere; `x` is overwritten."""
    return _bits(x).bitwise_right_shift_(31 if x.dtype == torch.float32 else 63)


def _count(mask: Tensor) -> int:
    """Lanes with all bits set; each is -1, and a sum in that type is faster than `count_nonzero`."""
    return -int(mask.sum(dtype=mask.dtype))


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    return (_bits(x) & mask).view(x.dtype)


def _select(mask: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (_bits(x) ^ _bits(y)).bitwise_and_(mask).bitwise_xor_(_bits(y)).view(x.dtype)


def sorted_values(p: Planes) -> list[Tensor]:
    """The four members of every group in decreasing order, by a network of comparators."""
    low01, high01 = torch.minimum(p[0], p[1]), torch.maximum(p[0], p[1])
    low23, high23 = torch.minimum(p[2], p[3]), torch.maximum(p[2], p[3])
    inner_a, inner_b = torch.minimum(high01, high23), torch.maximum(low01, low23)
    return [
        torch.maximum(high01, high23),
        torch.maximum(inner_a, inner_b),
        torch.minimum(inner_a, inner_b),
        torch.minimum(low01, low23),
    ]


def _three(t: Planes) -> tuple[Tensor, list[Tensor]]:
    """The minimum with three non-zero entries for lam = 1: the larger root r of psi, and u1, u2, u3.

    psi(r) = 1/2 (t1 + S1)(t2 + S2) + r - t3 with S_i = sqrt(r^2 + t_i^2 - t3^2), u3 = (t3 + r) / 2, u_i = (t_i + S_i) / 2.
    Where there is no minimum r ends at -t3 (u3 = 0) or at a point with u1^2 + u2^2 >= 1: a Hessian that is not positive
    definite there implies it, so the comparison with two entries rejects both.
    """
    t1, t2, t3 = t[:3]
    tiny = torch.finfo(t1.dtype).tiny
    small, floor = _SMALL_STEP[t1.dtype] * t3, -t3
    excess1, excess2 = (t1 - t3).mul_(t1 + t3), (t2 - t3).mul_(t2 + t3)
    # The first Newton step, from r = t3, needs no square root: psi = 2 t1 t2 and psi' = 1 + t3 (t1/t2 + t2/t1).
    product = t1 * t2
    slope = torch.addcmul(t1 * t1, t2, t2).mul_(t3).add_(product).clamp_min_(tiny)
    r = torch.addcmul(t3, product, product / slope, value=-2)
    torch.maximum(r, floor, out=r)
    for step_number in range(_NUM_NEWTON[t1.dtype]):
        s1, s2 = torch.addcmul(excess1, r, r).sqrt_(), torch.addcmul(excess2, r, r).sqrt_()
        sum1, sum2 = s1 + t1, s2 + t2
        psi = torch.addcmul(r - t3, sum1, sum2, value=0.5)
        # psi' times S1 S2, so that one division serves; it has the sign of the Hessian's determinant.
        product = s1 * s2
        curvature = sum1.mul_(s1).addcmul_(sum2, s2)
        slope = torch.addcmul(product, r, curvature, value=0.5).clamp_min_(tiny)
        step = psi.mul_(product).div_(slope)
        r.sub_(step)
        torch.maximum(r, floor, out=r)
        if step_number + 1 < _NUM_NEWTON[t1.dtype] and not bool(step.sub_(small).amax() > 0):
            break
    u1 = torch.addcmul(excess1, r, r).sqrt_().add_(t1).mul_(0.5)
    u2 = torch.addcmul(excess2, r, r).sqrt_().add_(t2).mul_(0.5)
    return r, [u1, u2, (r + t3).mul_(0.5)]


# The smallest entry's d, as the sum of the entries s, cannot leave [-5, 5] where the early-out has not decided.
_LOWEST_V = -5.0


def _dense(t: Planes, t_at: Tensor) -> Tensor:
    """The minimum with four non-zero entries for lam = 1, at the places of `t_at`: from the larger root of phi.

    phi(v) = slope0 v - 2 + w0 sqrt(v^2 + p0) + 1/2 sum_i sqrt(v^2 + p_i), with v the smallest entry's d where c <= 0, the
    sum of the entries where c > 0 (cases A and B of reference 3.2). Where there is no such minimum the result is some
    point of the box [0, t], which the comparison of objectives judges like any other.
    """
    t1, t2, t3, t4 = t
    tiny = torch.finfo(t1.dtype).tiny
    total = (t1 + t2).add_(t3).add_(t4)
    c = torch.add(t4 * 4, total, alpha=-2).add_(1)
    case_a = _negative(c.clone())
    p0, base = c.abs(), c.clamp_min_(0)
    p1, p2, p3 = (torch.add(base, plane - t4, alpha=4) for plane in (t1, t2, t3))
    half = torch.full_like(t1, 0.5)
    slope0 = 1 - _masked(half, case_a)
    w0 = 1.5 - slope0
    v = _select(case_a, torch.full_like(t1, 2 / 3), total.clamp_max_(2 / 3))
    for step_number in range(_NUM_NEWTON[t1.dtype]):
        square = v * v
        r0, r1, r2, r3 = (torch.add(square, q).sqrt_() for q in (p0, p1, p2, p3))
        pair, pair_sum = r1 * r2, r1 + r2
        phi = torch.addcmul(pair_sum + r3, w0, r0, value=2).mul_(0.5).sub_(2).addcmul_(slope0, v)
        # phi' times the four radicals: one division for four reciprocals.
        reciprocals = torch.addcmul(pair, r3, pair_sum).mul_(r0).mul_(0.5)
        triple = pair.mul_(r3)
        reciprocals.addcmul_(w0, triple)
        product = triple.mul_(r0)
        slope = (slope0 * product).addcmul_(v, reciprocals).clamp_min_(tiny)
        step = phi.mul_(product).div_(slope)
        v.sub_(step).clamp_min_(_LOWEST_V)
        if step_number + 1 < _NUM_NEWTON[t1.dtype] and not bool(step.amax() > _SMALL_STEP[t1.dtype]):
            break
    square = v * v
    r0 = torch.add(square, p0).sqrt_()
    u = torch.add(square.add_(base), t_at - t4, alpha=4).sqrt_()
    smallest_d = _select(case_a, v, r0)
    if bool(smallest_d.amin() < 0):
        wrong_sign = smallest_d.sub_(smallest_d.abs())
        u.add_(_masked(wrong_sign, _negative(t4 - t_at).bitwise_not_()))
    u.add_(_select(case_a, r0, v)).sub_(1).mul_(0.5)
    # s - 1 + d cancels for tiny t. With 0 <= u <= t the error is at most t, and one sweep over the coordinates multiplies
    # it by the size of t: every digit is restored.
    torch.minimum(u.clamp_min_(0), t_at, out=u)
    for i in (3, 1):
        pair, pair_sum = u[i - 3] * u[i - 2], u[i - 3] + u[i - 2]
        for j, other in ((i, i - 1), (i - 1, i)):
            torch.sub(t_at[j], pair, out=u[j]).addcmul_(pair_sum, u[other], value=-1).clamp_min_(0)
    return u


def _groups(w: Tensor) -> Tensor:
    if w.ndim == 0 or w.shape[-1] % 4:
        raise InvalidInput(
            "2:4 groups run along the last dimension, which must be a multiple of 4; this tensor has shape "
            f"{tuple(w.shape)}. Leave such a weight dense."
        )
    return w.reshape(*w.shape[:-1], w.shape[-1] // 4, 4)


def _widened(w: Tensor) -> Tensor:
    if not w.is_floating_point():
        raise WrongDtype(f"Weights must be real floating-point numbers, not {w.dtype}. Convert them first.")
    return w.float() if w.dtype in (torch.float16, torch.bfloat16) else w


def all_finite(x: Float[Tensor, "..."]) -> bool:
    """Whether nothing is NaN or infinite: from the extremes, which costs a fifteenth of looking at every entry's kind."""
    return x.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())


def _require_finite(x: Tensor, name: str) -> None:
    if not all_finite(x):
        raise InvalidInput(f"`{name}` holds NaN or infinite values; the proximal operator needs finite ones.")


def _per_group(lam: float | Tensor, z: Tensor, num_groups: int, dtype: torch.dtype) -> float | Tensor:
    """`lam` as a number, or as one positive value for each group of `z` in row-major order."""
    if not isinstance(lam, Tensor) or lam.numel() == 1:
        value = float(lam)
        if not (math.isfinite(value) and value >= 0):
            raise InvalidInput(f"`lam` must be a finite number >= 0 and is {value}.")
        return min(value, torch.finfo(dtype).max)
    if not bool((torch.isfinite(lam) & (lam >= 0)).all()):
        raise InvalidInput("`lam` must be finite and >= 0 everywhere; the tensor given is not.")
    shape = (*z.shape[:-1], num_groups)
    try:
        return lam.to(device=z.device, dtype=dtype).expand(shape).reshape(-1).contiguous()
    except RuntimeError as error:
        raise InvalidInput(
            f"`lam` has shape {tuple(lam.shape)}; it must broadcast to one value a row {(*z.shape[:-1], 1)} or a group {shape}."
        ) from error
