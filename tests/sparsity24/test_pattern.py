"""N:M patterns against brute force, ties and what must be refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsity24.pattern import TWO_FOUR, Pattern

PATTERNS = (Pattern(1, 2), Pattern(2, 4), Pattern(4, 8), Pattern(1, 4), Pattern(2, 3))


def _brute_force(score: Tensor, pattern: Pattern) -> Tensor:
    mask = torch.zeros(score.shape, dtype=torch.bool)
    for row in range(len(score)):
        for start in range(0, score.shape[1], pattern.m):
            group = [(-float(score[row, j]), j) for j in range(start, start + pattern.m)]
            for _, j in sorted(group)[: pattern.n]:
                mask[row, j] = True
    return mask


@given(st.sampled_from(PATTERNS), st.integers(0, 10_000), st.booleans())
@settings(max_examples=100, deadline=None)
def test_mask_keeps_the_best_and_among_equals_the_first(pattern: Pattern, seed: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(5, 24, generator=generator)
    if ties:
        score = score.round()
    expected = _brute_force(score, pattern)
    assert torch.equal(pattern.mask(score), expected)
    # Columns of a transposed tensor, as SparseGPT passes them.
    assert torch.equal(pattern.mask(score.t().contiguous().t()), expected)
    assert pattern.holds(score * expected)
    assert pattern.share(score * expected) == 1.0


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_constant_and_zero_groups_keep_the_first_places(pattern: Pattern) -> None:
    for value in (0.0, -0.0, 3.0):
        found = pattern.mask(torch.full((2, 24), value)).unflatten(1, (-1, pattern.m))
        assert bool(found[..., : pattern.n].all())
        assert not bool(found[..., pattern.n :].any())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_masks_of_other_dtypes_and_of_stacks_keep_n_of_m(pattern: Pattern, dtype: torch.dtype) -> None:
    score = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = pattern.mask(score)
    assert bool((found.unflatten(-1, (-1, pattern.m)).sum(-1) == pattern.n).all())
    assert torch.equal(found[1], pattern.mask(score[1]))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_share_counts_groups_and_negative_zero_is_zero(pattern: Pattern) -> None:
    weight = torch.zeros(1, 4 * pattern.m)
    weight[0, : pattern.m] = 1
    weight[0, pattern.m : pattern.m + pattern.n] = 1
    weight[0, 2 * pattern.m :] = -0.0
    assert pattern.share(weight) == 0.75
    assert not pattern.holds(weight)
    assert pattern.holds(weight[:, pattern.m :])


def test_a_weight_without_rows_follows_every_pattern() -> None:
    for pattern in PATTERNS:
        empty = torch.zeros(0, 24)
        assert pattern.mask(empty).shape == (0, 24)
        assert pattern.share(empty) == 1.0
        assert pattern.holds(empty)


def test_patterns_are_written_n_colon_m() -> None:
    assert Pattern.parse("2:4") == TWO_FOUR
    assert str(Pattern.parse("4:8")) == "4:8"
    for text in ("0.5", "unstructured", "2/4", "-1:4", "2:4 ", ""):
        with pytest.raises(ValueError, match="Unstructured sparsity is not offered"):
            Pattern.parse(text)
    for text in ("4:4", "0:4", "5:4"):
        with pytest.raises(ValueError, match=text):
            Pattern.parse(text)


def test_a_width_that_is_no_multiple_of_m_is_refused_with_its_shape() -> None:
    for pattern in PATTERNS:
        with pytest.raises(ValueError, match=rf"multiple of {pattern.m}; got shape \(2, 25\)"):
            pattern.holds(torch.ones(2, 25))
