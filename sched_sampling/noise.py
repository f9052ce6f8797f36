"""Random numbers that are a function of where they are used: a counter-based generator in plain integer arithmetic.

The coin and the Gumbel noise of a position depend on (seed, row, position) and, for the noise, the token. So they are the same
in every batch, on every device and in every pass of the parallel sampler, and none of them is ever stored.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood 2014), whose constants these are, as signed numbers: torch multiplies int64 modulo 2^64.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLY_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLY_2 = 0x94D049BB133111EB - (1 << 64)
_COIN, _GUMBEL, _TOKEN = 1, 2, 3


def coins(
    seed: int, rows: Int64[Tensor, " positions"], positions: Int64[Tensor, " positions"]
) -> Float64[Tensor, " positions"]:
    """A uniform number in (0, 1) for every (row, position)."""
    return _uniform(_key(seed, _COIN, rows, positions))


def token_draws(
    seed: int, rows: Int64[Tensor, " positions"], positions: Int64[Tensor, " positions"]
) -> Float64[Tensor, " positions"]:
    """Another uniform number in (0, 1) for every (row, position), independent of its coin."""
    return _uniform(_key(seed, _TOKEN, rows, positions))


def gumbel(
    seed: int,
    rows: Int64[Tensor, " positions"],
    positions: Int64[Tensor, " positions"],
    tokens: Int64[Tensor, "#positions tokens"],
) -> Float64[Tensor, "positions tokens"]:
    """A standard Gumbel number for every (row, position, token)."""
    keys = _key(seed, _GUMBEL, rows, positions)
    return _uniform(_mixed(keys[:, None] + tokens * _GAMMA)).log_().neg_().log_().neg_()


def _key(seed: int, purpose: int, rows: Tensor, positions: Tensor) -> Tensor:
    start = _mixed(torch.tensor((seed * 8 + purpose) % (1 << 63), device=rows.device))
    return _mixed(_mixed(start + (rows + 1) * _GAMMA) + (positions + 1) * _GAMMA)


def _mixed(words: Tensor) -> Tensor:
    words = (words ^ _shifted(words, 30)) * _MULTIPLY_1
    words = (words ^ _shifted(words, 27)) * _MULTIPLY_2
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, places: int) -> Tensor:
    # torch shifts in the sign bit; the generator wants zeros.
    return (words >> places) & ((1 << (64 - places)) - 1)


def _uniform(words: Tensor) -> Tensor:
    # The middle of one of 2^52 equal cells: never 0 or 1, so that both logarithms are finite.
    return (_shifted(words, 12).double() + 0.5) * 2.0**-52
