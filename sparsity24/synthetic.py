"""Constructed inputs with known structure (reference 7, "Set-ups used above"): for the prox, and groups and layers to prune."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from core.errors import unknown_name


@dataclass(frozen=True)
class SyntheticLayer:
    """A dense weight and the mean of x x^T over its inputs."""

    weight: Float[Tensor, "rows width"]
    hessian: Float[Tensor, "width width"]


def synthetic_layer(
    kind: str, *, rows: int = 128, width: int = 256, samples_per_feature: int = 8, seed: int = 0
) -> SyntheticLayer:
    """A layer with standard normal weights whose inputs are `iid`, `block-correlated`, `low-rank` or `power-law`.

    block-correlated: within a group of four x_j = 0.3 e_j + 0.95 s_j b with one common b and random signs s_j; low-rank:
    rank width/8 and noise of 0.5; power-law: singular values k^(-1/2) in a random basis, features scaled by exp(N(0, 1)).
    """
    if kind not in LAYER_KINDS:
        raise unknown_name("kind of synthetic layer", kind, LAYER_KINDS)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    x = LAYER_KINDS[kind](width, samples_per_feature * width, generator)
    return SyntheticLayer(weight, x @ x.T / x.shape[1])


def _block_correlated(width: int, samples: int, generator: torch.Generator) -> Tensor:
    own = torch.randn(width // 4, 4, samples, generator=generator)
    common = torch.randn(width // 4, 1, samples, generator=generator)
    signs = torch.randint(2, (width // 4, 4, 1), generator=generator) * 2.0 - 1
    return (0.3 * own + 0.95 * signs * common).flatten(0, 1)


def _low_rank(width: int, samples: int, generator: torch.Generator) -> Tensor:
    rank = width // 8
    factor = torch.randn(width, rank, generator=generator)
    noise = torch.randn(width, samples, generator=generator)
    return factor @ torch.randn(rank, samples, generator=generator) / rank**0.5 + 0.5 * noise


def _power_law(width: int, samples: int, generator: torch.Generator) -> Tensor:
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    spectrum = torch.arange(1, width + 1).float().rsqrt()
    scale = torch.randn(width, 1, generator=generator).exp()
    return scale * (basis @ (spectrum[:, None] * torch.randn(width, samples, generator=generator)))


LAYER_KINDS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "iid": lambda width, samples, generator: torch.randn(width, samples, generator=generator),
    "block-correlated": _block_correlated,
    "low-rank": _low_rank,
    "power-law": _power_law,
}


def correlated_group(rho: float, *, rows: int = 64, seed: int = 0) -> SyntheticLayer:
    """One group of four inputs in two correlated pairs, with Gaussian rows of weights (reference claims 6 and 14).

    The pairing is random; the first pair has correlation `rho`, the second `rho` times a uniform number. Unit diagonal.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(4, generator=generator).tolist()
    hessian = torch.eye(4)
    for (i, j), correlation in (
        (order[:2], rho),
        (order[2:], rho * float(torch.rand(1, generator=generator))),
    ):
        hessian[i, j] = hessian[j, i] = correlation
    return SyntheticLayer(torch.randn(rows, 4, generator=generator), hessian)


def prox_inputs(family: str, num_groups: int, *, seed: int = 0) -> Float[Tensor, "groups 4"]:
    """Groups (float64, random signs, magnitudes for lam = 1 in [0, 2.2]) of one family of `PROX_INPUTS` (reference claim 2)."""
    if family not in PROX_INPUTS:
        raise unknown_name("family of prox inputs", family, PROX_INPUTS)
    generator = torch.Generator().manual_seed(seed)

    def uniform(columns: int, high: float = 2.2) -> Tensor:
        return high * torch.rand(num_groups, columns, generator=generator, dtype=torch.float64)

    z = PROX_INPUTS[family](uniform)
    z = z.gather(1, torch.rand(z.shape, generator=generator).argsort(1))
    signs = torch.randint(2, z.shape, generator=generator) * 2.0 - 1
    return z * signs


Uniform = Callable[..., Tensor]


def _near_boundary(uniform: Uniform) -> Tensor:
    # The third within 20 % of t1 t2 (around the early-out's 0.83 t1 t2), the fourth anywhere below it.
    first, second = uniform(1, 1.3), uniform(1, 1.0)
    second = first * second
    third = torch.minimum(second, first * second * (0.8 + uniform(1, 0.4)))
    return torch.cat([first, second, third, third * uniform(1, 1.0)], 1)


def _from_solution(uniform: Uniform) -> Tensor:
    u = uniform(4, 0.5)
    total = u.sum(1, keepdim=True)
    others = 0.5 * (total.square() - u.square().sum(1, keepdim=True)) - u * (total - u)
    return u + others


PROX_INPUTS: dict[str, Callable[[Uniform], Tensor]] = {
    "uniform": lambda uniform: uniform(4),
    "nearly equal": lambda uniform: uniform(1) * (1 + uniform(4, 0.02)) / 1.02,
    "equal": lambda uniform: uniform(1).expand(-1, 4).clone(),
    "three nearly equal": lambda uniform: torch.cat([uniform(1) * (1 + uniform(3, 0.02)) / 1.02, uniform(1)], 1),
    "one large": lambda uniform: torch.cat([uniform(1), uniform(3, 0.2)], 1),
    "near the boundary": _near_boundary,
    "from a dense solution": _from_solution,
    "tiny": lambda uniform: uniform(4, 1.0) * 10 ** -(uniform(1, 4.0)),
}
