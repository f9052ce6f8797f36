"""Slow, independent solvers of the proximal problem: what the exact one is measured and checked against.

Both rest on one fact only: given the other three entries, r is a weighted absolute value of the fourth, so one coordinate
is minimised by soft-thresholding.
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from sparsity24.prox import r24


def prox_objective(
    w: Float[Tensor, "*batch width"], z: Float[Tensor, "*batch width"], lam: float | Tensor
) -> Float[Tensor, "*batch groups"]:
    """1/2 ||w - z||^2 + lam * r(w) of every group of four; `lam` is a number or has one value a group."""
    w_g, z_g = _groups(w), _groups(z)
    return 0.5 * (w_g - z_g).square().sum(-1) + lam * r24(w_g)


def prox24_alternating(
    z: Float[Tensor, "*batch width"],
    lam: float | Tensor,
    sweeps: int = 100,
    start: Float[Tensor, "*batch width"] | None = None,
) -> Float[Tensor, "*batch width"]:
    """A local minimiser of the proximal problem by exact minimisation of one coordinate after the other.

    Sorts every group and sweeps from the largest entry to the smallest, from `start` or from zero, written as the sibling
    method ProxSparse does it: columns of one (groups, 4) tensor. (Held as four contiguous planes the same sweeps run
    about twice as fast.) `lam` is a number or has one value a group.
    """
    groups = _groups(z)
    a, order = groups.abs().sort(dim=-1, descending=True, stable=True)
    u = torch.zeros_like(a) if start is None else _groups(start).abs().gather(-1, order)
    for _ in range(sweeps):
        for i in range(4):
            x, y, v = (u[..., j] for j in range(4) if j != i)
            u[..., i] = (a[..., i] - lam * (x * y + v * (x + y))).clamp_min(0)
    solution = torch.empty_like(a).scatter_(-1, order, u)
    return torch.copysign(solution, groups).reshape(z.shape)


def prox24_brute_force(
    z: Float[Tensor, "groups 4"],
    lam: float | Float[Tensor, "groups"],
    *,
    starts_per_axis: int = 3,
    random_starts: int = 8,
    sweeps: int = 400,
    seed: int = 0,
) -> Float[Tensor, "groups"]:
    """The global minimum of the objective of every group, by multi-start coordinate minimisation in float64.

    Starts from every corner of a grid over the box [0, |z|] (which holds every minimiser), from random points, and from
    the best two-, three- and four-entry points; each is followed by `sweeps` sweeps over the coordinates. Works on a
    batch: memory is groups x starts x 4 doubles.
    """
    a = z.double().abs().sort(-1, descending=True).values
    lam_g = torch.as_tensor(lam, dtype=torch.float64).expand(a.shape[0])
    axis = torch.linspace(0, 1, starts_per_axis, dtype=torch.float64)
    grid = torch.tensor(list(itertools.product(axis.tolist(), repeat=4)), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    fractions = torch.cat([grid, torch.rand(random_starts, 4, generator=generator, dtype=torch.float64)])
    u = (a[:, None, :] * fractions).flatten(0, 1)
    repeated, strength = a.repeat_interleave(len(fractions), 0), lam_g.repeat_interleave(len(fractions))
    u = _descend(u, repeated, strength, sweeps=25)
    # Only the three best of each group's points are worth following to the end.
    value = prox_objective(u, repeated, strength[:, None]).reshape(len(a), -1)
    best = value.topk(min(3, value.shape[1]), dim=1, largest=False).indices
    u = u.reshape(len(a), -1, 4).gather(1, best[:, :, None].expand(-1, -1, 4)).flatten(0, 1)
    repeated, strength = a.repeat_interleave(best.shape[1], 0), lam_g.repeat_interleave(best.shape[1])
    u = _descend(u, repeated, strength, sweeps=sweeps)
    value = prox_objective(u, repeated, strength[:, None]).reshape(len(a), -1).amin(1)
    two = torch.cat([a[:, :2], torch.zeros_like(a[:, 2:])], 1)
    return torch.minimum(value, prox_objective(two, a, 0.0).squeeze(1))


def _descend(u: Tensor, a: Tensor, lam: Tensor, sweeps: int) -> Tensor:
    planes, bounds = [plane.contiguous() for plane in u.unbind(1)], [plane.contiguous() for plane in a.unbind(1)]
    for _ in range(sweeps):
        for i in (3, 2, 1, 0):
            x, y, v = (planes[j] for j in range(4) if j != i)
            planes[i] = torch.addcmul(bounds[i], lam, torch.addcmul(x * y, v, x + y), value=-1).clamp_min_(0)
    return torch.stack(planes, 1)


def _groups(w: Tensor) -> Tensor:
    return w.reshape(*w.shape[:-1], w.shape[-1] // 4, 4)
