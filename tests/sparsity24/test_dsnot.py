"""DSnoT against a literal implementation, a case by hand, and what its swaps must keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsity24.baselines import DSnoT, SparseGPT, Wanda
from sparsity24.layer import prune_layer
from sparsity24.pattern import Pattern
from sparsity24.problem import LayerContext

PATTERNS = (Pattern(2, 4), Pattern(4, 8), Pattern(1, 2))


def _inputs(seed: int = 0, rows: int = 8, width: int = 96, tokens: int = 300) -> tuple[Tensor, Tensor]:
    """A weight, and inputs with means, unequal scales and a dead feature."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(width, generator=generator, dtype=torch.float64).exp()
    shift = torch.randn(width, generator=generator, dtype=torch.float64)
    x = scale * (torch.randn(tokens, width, generator=generator, dtype=torch.float64) + 0.5 * shift)
    x[:, 5] = 0
    return torch.randn(rows, width, generator=generator, dtype=torch.float64), x


def _statistics(x: Tensor) -> tuple[Tensor, LayerContext]:
    return x.T @ x / len(x), LayerContext(mean=x.mean(0))


def _missing(weight: Tensor, mask: Tensor, mean: Tensor, row: int) -> float:
    return sum(float(weight[row, j] * mean[j]) for j in range(len(mean)) if not bool(mask[row, j]))


def _literal(weight: Tensor, x: Tensor, mask: Tensor, method: DSnoT) -> tuple[Tensor, int]:
    """The swaps row by row; the error is computed anew from its definition each time."""
    mask, pattern, mean = mask.clone(), method.pattern, x.mean(0)
    norms = [float((x[:, j] ** 2).mean()) ** 0.5 for j in range(x.shape[1])]
    variance = [max(float(((x[:, j] - mean[j]) ** 2).mean()), 1e-16 * norms[j] ** 2) for j in range(x.shape[1])]
    most = 0
    for row in range(len(weight)):
        moved: set[int] = set()
        sign = 1.0 if _missing(weight, mask, mean, row) > 0 else -1.0
        for cycle in range(method.max_cycles):
            error = sign * _missing(weight, mask, mean, row)
            if error <= method.threshold:
                break
            share = [sign * float(weight[row, j] * mean[j]) for j in range(x.shape[1])]
            pairs = []
            for i in range(x.shape[1]):
                start = i - i % pattern.m
                partners = [
                    j for j in range(start, start + pattern.m) if bool(mask[row, j]) and share[j] < 0 and j not in moved
                ]
                if not bool(mask[row, i]) and share[i] > 0 and i not in moved and partners:
                    pruned = min(partners, key=lambda j: (abs(float(weight[row, j])) * norms[j], j))
                    pairs.append((-share[i] / variance[i], i, pruned))
            if not pairs:
                break
            _, revived, pruned = min(pairs)
            if error - share[revived] + share[pruned] < 0:
                break
            mask[row, revived], mask[row, pruned] = True, False
            moved |= {revived, pruned}
            most = max(most, cycle + 1)
    return mask, most


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("initial", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("seed", range(3))
def test_dsnot_equals_a_literal_implementation(seed: int, initial: str, pattern: Pattern) -> None:
    weight, x = _inputs(seed)
    hessian, context = _statistics(x)
    start = (Wanda if initial == "wanda" else SparseGPT)(pattern=pattern).prune(weight, hessian).mask
    method = DSnoT(initial=initial, pattern=pattern)
    found = method.prune(weight, hessian, context)
    mask, swaps = _literal(weight, x, start, method)
    assert swaps > 0
    assert torch.equal(found.mask, mask)
    assert found.iterations == swaps
    assert torch.equal(found.weight, weight * mask)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_swaps_keep_the_pattern_and_never_raise_the_error_of_the_mean_output(pattern: Pattern) -> None:
    for seed in range(5):
        weight, x = _inputs(seed)
        hessian, context = _statistics(x)
        before = Wanda(pattern=pattern).prune(weight, hessian).mask
        after = DSnoT(pattern=pattern).prune(weight, hessian, context).mask
        assert not torch.equal(before, after)
        assert bool((after.unflatten(1, (-1, pattern.m)).sum(2) == pattern.n).all())
        errors = [(weight * ~mask @ context.mean) for mask in (before, after)]
        assert bool((errors[1].abs() <= errors[0].abs() + 1e-12).all())
        assert bool((errors[1] * errors[0] >= -1e-12).all())
        assert float(errors[1].abs().mean()) < 0.9 * float(errors[0].abs().mean())


def test_one_swap_by_hand() -> None:
    # Wanda keeps inputs 0 and 1. Missing: 0.6 + 0.3 = 0.9. Input 2 gives most back for its variance (0.6 / 0.64 against
    # 0.3 / 0.91), and of the kept only input 1 pulls the other way (-0.2): 0.9 - 0.6 - 0.2 = 0.1. Then nothing pairs.
    weight = torch.tensor([[2.0, -1.5, 1.0, 1.0]], dtype=torch.float64)
    mean = torch.tensor([0.5, 0.2 / 1.5, 0.6, 0.3], dtype=torch.float64)
    context = LayerContext(mean=mean)
    found = DSnoT().prune(weight, torch.eye(4, dtype=torch.float64), context)
    assert found.mask.tolist() == [[True, False, True, False]]
    assert found.iterations == 1
    # Turned around, the same; a threshold above the error, or a swap that would turn its sign, leaves Wanda's mask.
    assert torch.equal(DSnoT().prune(-weight, torch.eye(4, dtype=torch.float64), context).mask, found.mask)
    assert DSnoT(threshold=0.91).prune(weight, torch.eye(4, dtype=torch.float64), context).iterations == 0
    turned = LayerContext(mean=mean * torch.tensor([1.0, 2.5, 1.0, 1.0], dtype=torch.float64))
    assert DSnoT().prune(weight, torch.eye(4, dtype=torch.float64), turned).iterations == 0


def test_a_row_ends_at_the_threshold_though_another_pair_would_lower_the_error() -> None:
    # Two groups alike: 1.8 is missing, and a swap in either takes 0.8 from it.
    weight = torch.tensor([[2.0, -1.5, 1.0, 1.0] * 2], dtype=torch.float64)
    mean = torch.tensor([0.5, 0.2 / 1.5, 0.6, 0.3] * 2, dtype=torch.float64)
    for threshold, swaps in ((1.9, 0), (1.5, 1), (0.9, 2), (0.1, 2)):
        method = DSnoT(threshold=threshold)
        found = method.prune(weight, torch.eye(8, dtype=torch.float64), LayerContext(mean=mean))
        assert int(found.mask[0, 2::4].sum()) == swaps


def test_inputs_of_mean_zero_and_no_cycles_leave_the_start() -> None:
    weight, x = _inputs()
    hessian, context = _statistics(x)
    start = Wanda().prune(weight, hessian).mask
    assert torch.equal(DSnoT().prune(weight, hessian, LayerContext(mean=torch.zeros(96))).mask, start)
    assert torch.equal(DSnoT(max_cycles=0).prune(weight, hessian, context).mask, start)


def test_the_number_of_swaps_of_a_row_is_bounded_by_max_cycles() -> None:
    weight, x = _inputs()
    hessian, context = _statistics(x)
    start = Wanda().prune(weight, hessian).mask
    for cycles in (1, 2):
        found = DSnoT(max_cycles=cycles).prune(weight, hessian, context)
        assert int((found.mask & ~start).sum(1).max()) == cycles == found.iterations


def test_a_dead_feature_is_never_revived() -> None:
    for seed in range(5):
        weight, x = _inputs(seed)
        hessian, context = _statistics(x)
        start = Wanda().prune(weight, hessian).mask
        found = DSnoT().prune(weight, hessian, context).mask
        assert not bool((found & ~start)[:, 5].any())


def test_the_weight_of_a_constant_input_is_revived_first() -> None:
    # Missing 1 + 0.2 + 0.1; input 3 is constant (mean^2 = second moment), input 2 gives more back but has a variance.
    weight = torch.tensor([[3.0, -2.0, 1.0, 1.0, 5.0, 5.0, 1.0, 0.0]], dtype=torch.float64)
    mean = torch.tensor([0.0, 0.1, 0.2, 0.1, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    hessian = torch.eye(8, dtype=torch.float64)
    for constant, revived in ((3, 3), (2, 2)):
        hessian.fill_diagonal_(1.0)
        hessian[constant, constant] = mean[constant] ** 2
        found = DSnoT(max_cycles=1).prune(weight, hessian, LayerContext(mean=mean)).mask
        assert found[0, :4].tolist() == [True, False, revived == 2, revived == 3]


def test_it_needs_a_mean_input_of_the_right_size() -> None:
    weight, x = _inputs()
    hessian, _ = _statistics(x)
    with pytest.raises(ValueError, match=r"LayerContext\(mean="):
        prune_layer(weight, hessian, "dsnot")
    for mean in (torch.zeros(95), torch.full((96,), torch.nan)):
        with pytest.raises(ValueError, match="96 finite numbers"):
            DSnoT().prune(weight, hessian, LayerContext(mean=mean))


def test_unknown_starts_and_negative_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="wanda"):
        DSnoT(initial="wandaa")
    for wrong in ({"max_cycles": -1}, {"threshold": -0.1}, {"threshold": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DSnoT(**wrong)
    with pytest.raises(ValueError, match="block_size"):
        DSnoT(initial="sparsegpt", pattern=Pattern(1, 3))
