"""The packed codec: bit-exact round trips, the promised size, and the layout that compressed-tensors reads."""

from __future__ import annotations

import hashlib

import pytest
import torch
from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import (
    Sparse24BitMaskTensor,
    sparse24_bitmask_decompress,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from core.errors import InvalidInput
from sparsity24.packing import Packed, mask_digest, pack, unpack
from sparsity24.pattern import TWO_FOUR, Pattern

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PATTERNS = (TWO_FOUR, Pattern(1, 2), Pattern(4, 8), Pattern(1, 4), Pattern(2, 3))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


def _sparse(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, pattern: Pattern = TWO_FOUR
) -> Tensor:
    """Weights of a pattern in which many groups hold fewer than n non-zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight = torch.where(pattern.mask(torch.rand(shape, generator=generator)), weight, 0)
    return torch.where(torch.rand(shape, generator=generator) < 0.3, torch.zeros_like(weight), weight)


@st.composite
def _weights(draw: st.DrawFn) -> tuple[Tensor, Pattern]:
    pattern = draw(st.sampled_from(PATTERNS))
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    batch = draw(st.sampled_from([(), (2,)]))
    shape = (*batch, rows, groups * pattern.m)
    return _sparse(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31)), pattern), pattern


@given(_weights())
def test_packing_and_unpacking_returns_every_bit(case: tuple[Tensor, Pattern]) -> None:
    weight, pattern = case
    packed = pack(weight, pattern)
    assert packed.values.dtype == weight.dtype
    assert torch.equal(_bits(unpack(packed, pattern)), _bits(weight))


@given(st.lists(st.sampled_from([0.0, -0.0, 1.5, -2.0, float("inf")]), min_size=4, max_size=4))
def test_a_group_of_at_most_two_bit_patterns_other_than_plus_zero_returns_every_bit(group: list[float]) -> None:
    weight = torch.tensor([group])
    if not TWO_FOUR.holds(weight):
        with pytest.raises(InvalidInput, match="not 2:4"):
            pack(weight)
        return
    back = unpack(pack(weight))
    assert torch.equal(back, weight)
    if int((_bits(weight) != 0).sum()) <= 2:
        assert torch.equal(_bits(back), _bits(weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_weight_is_two_values_and_four_bits_a_group(dtype: torch.dtype) -> None:
    weight = _sparse((6, 64), dtype)
    packed = pack(weight)
    assert packed.values.nbytes == weight.nbytes // 2
    assert packed.positions.nbytes == weight.numel() // 8
    if dtype != torch.float32:
        assert packed.values.nbytes + packed.positions.nbytes == weight.nbytes * 9 // 16


def test_a_dense_weight_is_refused_with_its_name_and_how_far_off_it_is() -> None:
    weight = torch.ones(1, 16)
    weight[0, :12] = _sparse((1, 12))
    with pytest.raises(InvalidInput, match=r"layers\.0\.up_proj is not 2:4: 25\.0%"):
        pack(weight, name="layers.0.up_proj")


def test_a_width_that_does_not_fit_and_integers_of_eight_bits_are_refused() -> None:
    with pytest.raises(InvalidInput, match="multiple of 4"):
        pack(torch.zeros(2, 6))
    with pytest.raises(InvalidInput, match="float8"):
        pack(torch.zeros(2, 8).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("width", [4, 8, 12, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compressed_tensors_reads_our_bits_and_values(width: int, dtype: torch.dtype) -> None:
    weight = _sparse((5, width), dtype)
    packed = pack(weight)
    assert packed.values.shape == (5, width // 2)
    assert packed.positions.shape == (5, -(-width // 8))
    assert torch.equal(sparse24_bitmask_decompress(packed.values, packed.positions, weight.shape), weight)


@pytest.mark.parametrize("width", [4, 8, 12, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_the_bits_and_values_of_compressed_tensors(width: int, dtype: torch.dtype) -> None:
    weight = _sparse((5, width), dtype)
    theirs = Sparse24BitMaskTensor.from_dense(weight)
    assert torch.equal(unpack(Packed(theirs.compressed, theirs.bitmask)), weight)


def test_damaged_places_and_shapes_are_found() -> None:
    packed = pack(_sparse((4, 16)))
    flipped = packed.positions.clone()
    flipped[2, 1] ^= 4
    with pytest.raises(InvalidInput, match="up is damaged"):
        unpack(Packed(packed.values, flipped), name="up")
    with pytest.raises(InvalidInput, match="do not belong together"):
        unpack(Packed(packed.values[:, :-2], packed.positions[:, :1].repeat(1, 3)))
    with pytest.raises(InvalidInput, match="do not belong together"):
        unpack(Packed(packed.values[:3], packed.positions))


def test_the_digest_is_that_of_the_places_written_out_by_hand() -> None:
    weight = torch.tensor([[0.0, 3.0, -0.0, 1.0, 0.0, 0.0, 5.0, 0.0, 2.0, 0.0, 0.0, 0.0], [1.0] + [0.0] * 11])
    places = bytes([0b01001010, 0b00000001, 0b00000001, 0b00000000])
    assert mask_digest(weight) == hashlib.sha256(places).hexdigest()[:16]


@given(_weights())
def test_the_digest_follows_the_places_and_not_the_values(case: tuple[Tensor, Pattern]) -> None:
    weight = case[0].flatten(0, -2)
    assert (
        mask_digest(weight) == mask_digest((weight * -3).to(torch.float32)) == mask_digest(weight.t().contiguous().t())
    )
    changed = weight.clone()
    changed[-1, -1] = 1 if changed[-1, -1] == 0 else 0
    assert mask_digest(weight) != mask_digest(changed)
