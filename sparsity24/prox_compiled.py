"""The proximal operator as one straight line of arithmetic, for `torch.compile` (reference 12).

Every group goes through every step, so that a compiler makes one loop of it: on a GPU, where the eager operator is bound by
memory, and on a CPU with a C++ compiler. Compiling takes a minute or two, once a process; `prox24(..., backend="compiled")`
and `ProxPruner(backend="compiled")` ask for it.
"""

# Legend: z input, a = |z|, t = lam * |z| sorted in decreasing order, u solution for lam = 1, as in `sparsity24.prox`.

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsity24.prox import MAX_DENSE, MIN_THIRD, sorted_values

# Seven from t3 are the closed-form step and the six of `sparsity24.prox`; six are float32-exact for phi (reference 3.2).
_NUM_NEWTON_THREE, _NUM_NEWTON_DENSE = 7, 6
_NEGLIGIBLE = 1e-18
# Past this every group has long been two-sparse, and squares stay finite.
_LARGEST = 1e15


def prox_straight(
    z: Float[Tensor, "4 groups"], lam: Float[Tensor, ""] | Float[Tensor, " groups"]
) -> tuple[Float[Tensor, "4 groups"], Bool[Tensor, " groups"]]:
    """prox_lam of every column of `z` (float32), and which columns keep more than two non-zeros."""
    a = z.abs()
    rank = _ranks(a)
    t_at = (a * lam).clamp(max=_LARGEST)
    t1, t2, t3, t4 = sorted_values(t_at.unbind(0))
    u1, u2, u3 = _three(t1, t2, t3)
    three_wins = (u1 * u1 + u2 * u2 < 1) & (u3 > 0)
    d = _dense(t1, t2, t3, t4)
    f_three = _objective((t1, t2, t3, t4), (u1, u2, u3, torch.zeros_like(u3)))
    dense_wins = (d[3] > 0) & (_objective((t1, t2, t3, t4), d) < f_three)
    active = (t1 < MAX_DENSE) & (t3 > MIN_THIRD * t1 * t2)
    over = three_wins & active & (t1 >= _NEGLIGIBLE)
    chosen = [torch.where(dense_wins, x, y) for x, y in zip(d, (u1, u2, u3, torch.zeros_like(u3)), strict=True)]
    planes = []
    for i in range(4):
        u = torch.where(
            rank[i] == 0,
            chosen[0],
            torch.where(rank[i] == 1, chosen[1], torch.where(rank[i] == 2, chosen[2], chosen[3])),
        )
        solved = torch.copysign(u / lam, z[i])
        kept = torch.where(rank[i] < 2, z[i], 0.0)
        plane = torch.where(over, torch.where(u > 0, solved, 0.0), kept)
        planes.append(torch.where(t1 < _NEGLIGIBLE, z[i], plane))
    return torch.stack(planes), over


@cache
def compiled_prox() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`prox_straight`, compiled for any number of groups."""
    found: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = torch.compile(prox_straight, dynamic=True)
    return found


def _ranks(a: Tensor) -> list[Tensor]:
    """The place of every member in decreasing order; equal ones keep theirs."""
    rank = []
    for i in range(4):
        ahead = [(a[j] >= a[i]) if j < i else (a[j] > a[i]) for j in range(4) if j != i]
        rank.append(ahead[0].int() + ahead[1].int() + ahead[2].int())
    return rank


def _three(t1: Tensor, t2: Tensor, t3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The minimum with three non-zero entries, by Newton's method on psi from r = t3 (reference 3.2)."""
    tiny = torch.finfo(t1.dtype).tiny
    excess1, excess2 = (t1 - t3) * (t1 + t3), (t2 - t3) * (t2 + t3)
    r = t3
    for _ in range(_NUM_NEWTON_THREE):
        s1, s2 = torch.sqrt(excess1 + r * r), torch.sqrt(excess2 + r * r)
        sum1, sum2 = t1 + s1, t2 + s2
        psi = 0.5 * sum1 * sum2 + r - t3
        product = s1 * s2
        # psi' times S1 S2: where it is not positive there is no minimum, and the step to the floor shows it.
        slope = (product + 0.5 * r * (sum1 * s1 + sum2 * s2)).clamp(min=tiny)
        r = torch.maximum(r - psi * product / slope, -t3)
    s1, s2 = torch.sqrt(excess1 + r * r), torch.sqrt(excess2 + r * r)
    return 0.5 * (t1 + s1), 0.5 * (t2 + s2), 0.5 * (t3 + r)


def _dense(t1: Tensor, t2: Tensor, t3: Tensor, t4: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The minimum with four non-zero entries, by Newton's method on phi from 2/3 (reference 3.2, cases A and B)."""
    tiny = torch.finfo(t1.dtype).tiny
    total = t1 + t2 + t3 + t4
    c = 1 - 2 * total + 4 * t4
    case_a = c <= 0
    base = c.clamp(min=0)
    p0 = c.abs()
    p1, p2, p3 = base + 4 * (t1 - t4), base + 4 * (t2 - t4), base + 4 * (t3 - t4)
    slope0, w0 = torch.where(case_a, 0.5, 1.0), torch.where(case_a, 1.0, 0.5)
    v = torch.where(case_a, 2 / 3, total.clamp(max=2 / 3))
    for _ in range(_NUM_NEWTON_DENSE):
        square = v * v
        r0, r1, r2, r3 = (torch.sqrt(square + p) for p in (p0, p1, p2, p3))
        phi = slope0 * v - 2 + w0 * r0 + 0.5 * (r1 + r2 + r3)
        product = r0 * r1 * r2 * r3
        reciprocals = w0 * r1 * r2 * r3 + 0.5 * r0 * (r2 * r3 + r1 * r3 + r1 * r2)
        slope = (slope0 * product + v * reciprocals).clamp(min=tiny)
        v = (v - phi * product / slope).clamp(min=-5.0)
    square = v * v
    r0 = torch.sqrt(square + p0)
    s, d4 = torch.where(case_a, r0, v), torch.where(case_a, v, r0)
    u = [torch.sqrt(square + p) for p in (p1, p2, p3)] + [d4]
    u = [torch.minimum(((s - 1 + d) * 0.5).clamp(min=0), t) for d, t in zip(u, (t1, t2, t3, t4), strict=True)]
    for i in (3, 2, 1, 0):
        # s - 1 + d cancels for tiny t; a sweep over the coordinates restores the digits.
        x, y, z = (u[j] for j in range(4) if j != i)
        u[i] = ((t1, t2, t3, t4)[i] - (x * y + z * (x + y))).clamp(min=0)
    return u[0], u[1], u[2], u[3]


def _objective(t: tuple[Tensor, ...], u: tuple[Tensor, ...]) -> Tensor:
    distance = sum(0.5 * (x - y) * (x - y) for x, y in zip(u, t, strict=True))
    value: Tensor = distance + u[0] * u[1] * (u[2] + u[3]) + u[2] * u[3] * (u[0] + u[1])
    return value
