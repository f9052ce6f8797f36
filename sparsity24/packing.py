"""The codec of packed weights: the kept values, and one bit a weight that says where they lie (reference 11).

For 2:4 in 16 bits that is 2 values and 4 bits for every group of 4: 9/16 of the dense size. Bits run along the input axis,
the first weight in the lowest bit, every row padded to whole bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from core.errors import InvalidInput
from sparsity24.pattern import TWO_FOUR, Pattern

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Packed:
    """The kept values of N:M weights in their order along the input axis, and the bits that mark their places."""

    values: Float[Tensor, "..."]
    positions: UInt8[Tensor, "..."]


def mask_digest(weight: Float[Tensor, "rows width"]) -> str:
    """The first 16 hex digits of the SHA-256 of the places of the non-zeros, the same on every device and for every dtype.

    Minus zero counts as zero. The places are the bits of `pack_bits`, row after row.
    """
    return hashlib.sha256(pack_bits(weight != 0).numpy().tobytes()).hexdigest()[:16]


def pack(weight: Float[Tensor, "*batch width"], pattern: Pattern = TWO_FOUR, *, name: str = "The weight") -> Packed:
    """Exactly `n` values of every group of `m` along the last axis, and their places; on the CPU.

    A group with fewer non-zeros fills up with its zeros: minus zeros first, so that they keep their sign, then from the left.
    A minus zero that finds no place reads back as plus zero; all other bits are kept. Raises `InvalidInput`, with `name`,
    on a weight that does not follow the pattern, and on dtypes other than floats of 16, 32 or 64 bits.
    """
    weight = weight.detach().cpu()
    if weight.dtype not in DTYPES:
        raise InvalidInput(f"{name} is {weight.dtype}; only floats of 16, 32 or 64 bits can be packed.")
    share = pattern.share(weight)
    if share < 1:
        raise InvalidInput(
            f"{name} is not {pattern}: {1 - share:.1%} of its groups hold more than {pattern.n} non-zeros. Only pruned "
            "weights can be packed."
        )
    zero = weight == 0
    kept = pattern.mask((~zero).half() * 2 + (zero & weight.signbit()).half())
    shape = *weight.shape[:-1], weight.shape[-1] // pattern.m * pattern.n
    return Packed(weight[kept].view(shape), pack_bits(kept))


def unpack(packed: Packed, pattern: Pattern = TWO_FOUR, *, name: str = "The weight") -> Float[Tensor, "*batch width"]:
    """The dense weight, with plus zeros in the free places.

    Raises `InvalidInput`, with `name`, when the places do not fit the pattern or the values: the data is damaged.
    """
    values, positions = packed.values, packed.positions
    width = values.shape[-1] // pattern.n * pattern.m
    if (*values.shape[:-1], -(-width // 8)) != tuple(positions.shape) or values.shape[-1] % pattern.n:
        raise InvalidInput(
            f"{name} is damaged: values of shape {tuple(values.shape)} and places of shape {tuple(positions.shape)} do not "
            f"belong together in {pattern}. Save it again."
        )
    kept = unpack_bits(positions, width)
    if (kept.view(*kept.shape[:-1], -1, pattern.m).sum(-1) != pattern.n).any():
        raise InvalidInput(
            f"{name} is damaged: not every group of {pattern.m} marks exactly {pattern.n} places. Save it again."
        )
    dense = torch.zeros(kept.shape, dtype=values.dtype)
    dense[kept] = values.flatten()
    return dense


def pack_bits(mask: Bool[Tensor, "*batch width"]) -> UInt8[Tensor, "*batch bytes"]:
    """Eight entries a byte along the last axis, the first in the lowest bit, the last byte filled with zeros; on the CPU."""
    # Transposed weights give transposed bytes, whose order in memory is not that of their rows.
    return torch.from_numpy(np.ascontiguousarray(np.packbits(mask.cpu().numpy(), axis=-1, bitorder="little")))


def unpack_bits(bits: UInt8[Tensor, "*batch bytes"], width: int) -> Bool[Tensor, "*batch width"]:
    """The mask that `pack_bits` packed."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=width, bitorder="little").view(np.bool_))
