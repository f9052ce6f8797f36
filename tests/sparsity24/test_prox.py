"""The regulariser and its proximal operator against brute force, known thresholds and invariants."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsity24.prox import (
    MAX_DENSE,
    group_support,
    is_24,
    project24,
    prox24,
    prox24_candidates,
    r24,
    top2_mask,
)
from sparsity24.reference_solvers import prox24_alternating, prox24_brute_force, prox_objective
from sparsity24.synthetic import PROX_INPUTS, prox_inputs

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
SIGNS = torch.tensor(list(itertools.product((1.0, -1.0), repeat=4)), dtype=torch.float64)


def _gap(z: Tensor, lam: float | Tensor, best: Tensor, dtype: torch.dtype) -> float:
    per_row = lam if isinstance(lam, float) else lam[:, None]
    w = prox24(z.to(dtype), lam if isinstance(lam, float) else per_row.to(dtype)).double()
    return float((prox_objective(w, z, per_row).squeeze(-1) - best).max())


@pytest.mark.parametrize("decade", range(-3, 3))
def test_prox_matches_brute_force_on_ten_thousand_groups_of_every_decade_of_lambda(decade: int) -> None:
    generator = torch.Generator().manual_seed(decade + 10)
    per_family = math.ceil(10_000 / len(PROX_INPUTS))
    z = torch.cat([prox_inputs(family, per_family, seed=decade + 10) for family in PROX_INPUTS])
    lam = 10.0 ** (decade + torch.rand(len(z), generator=generator, dtype=torch.float64))
    # Half the groups keep lam |z| where the hard cases are, the other half the size of an ordinary weight.
    z[::2] /= lam[::2, None]
    best = prox24_brute_force(z, lam, seed=decade + 10)
    scale = z.square().sum(1).clamp_min(1)
    for dtype, tolerance in TOLERANCE.items():
        w = prox24(z.to(dtype), lam[:, None].to(dtype)).double()
        gap = (prox_objective(w, z, lam[:, None]).squeeze(-1) - best) / scale
        assert float(gap.max()) <= tolerance, dtype


def test_prox_matches_brute_force_on_every_sign_pattern() -> None:
    magnitudes = torch.cat([prox_inputs(family, 20, seed=3).abs() for family in PROX_INPUTS])
    z = (magnitudes[:, None, :] * SIGNS).flatten(0, 1)
    best = prox24_brute_force(magnitudes, 1.0).repeat_interleave(len(SIGNS))
    for dtype, tolerance in TOLERANCE.items():
        assert _gap(z, 1.0, best, dtype) <= tolerance
    assert bool((prox24(z, 1.0) * z >= 0).all())


@pytest.mark.parametrize("ties", [(0, 0, 1, 2), (0, 0, 0, 1), (1, 0, 0, 0), (0, 1, 1, 0), (0, 0, 0, 0), (0, 0, 1, 1)])
def test_prox_matches_brute_force_on_ties(ties: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(sum(ties))
    values = 1.5 * torch.rand(400, 3, generator=generator, dtype=torch.float64)
    z = values[:, list(ties)]
    best = prox24_brute_force(z, 1.0)
    for dtype, tolerance in TOLERANCE.items():
        assert _gap(z, 1.0, best, dtype) <= tolerance


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9, 1e-12, 1e-15])
def test_prox_of_tiny_inputs_is_relatively_exact(size: float) -> None:
    z = size * prox_inputs("uniform", 300, seed=1)
    best = prox24_brute_force(z, 1.0)
    for dtype, tolerance in TOLERANCE.items():
        assert _gap(z, 1.0, best, dtype) <= tolerance * size**2


@given(
    st.lists(st.floats(-3, 3, width=32, allow_subnormal=False), min_size=4, max_size=4),
    st.floats(0.0009765625, 8.0, width=32),
    st.permutations(range(4)),
    st.lists(st.sampled_from((1.0, -1.0)), min_size=4, max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_signs_and_order_pass_through(values: list[float], lam: float, order: list[int], signs: list[float]) -> None:
    z, flips = torch.tensor([values], dtype=torch.float64), torch.tensor([signs], dtype=torch.float64)
    w = prox24(z, lam)
    assert torch.equal((prox24(z * flips, lam) * flips).abs(), w.abs())
    permuted = prox24(z[:, order], lam)
    # Equal magnitudes are told apart by place, so only the values can be compared. Two solutions may tie to rounding.
    ours, theirs = prox_objective(w, z, lam), prox_objective(permuted, z[:, order], lam)
    assert float((ours - theirs).abs()) <= 1e-13 * (1 + float(z.square().sum()))
    assert bool((w.abs() <= z.abs() * (1 + 1e-15)).all())
    assert bool((w * z >= 0).all())


@given(
    st.lists(st.floats(-3, 3, width=32, allow_subnormal=False), min_size=2, max_size=2),
    st.permutations(range(4)),
    st.floats(0.0, 1e30),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=200, deadline=None)
def test_two_of_four_vectors_are_fixed_points(
    values: list[float], order: list[int], lam: float, dtype: torch.dtype
) -> None:
    z = torch.tensor([[*values, 0.0, -0.0]], dtype=dtype)[:, order]
    assert torch.equal(prox24(z, lam), z)


@given(st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4), st.floats(1.0, 1e6))
@settings(max_examples=200, deadline=None)
def test_output_is_the_projection_bit_for_bit_above_the_threshold(values: list[float], factor: float) -> None:
    z = torch.tensor([values])
    largest = float(z.abs().max())
    if largest < 1e-30:
        return
    w = prox24(z, factor * 1.0000002 * MAX_DENSE / largest)
    assert is_24(w)
    assert torch.equal(w, project24(z))


@pytest.mark.parametrize("lam", [1e-3, 0.3, 2.0, 50.0])
def test_scaling_identity(lam: float) -> None:
    z = prox_inputs("uniform", 2000, seed=5) / lam
    assert torch.allclose(prox24(z, lam), prox24(lam * z, 1.0) / lam, rtol=1e-12, atol=1e-12 / lam)


@pytest.mark.parametrize(
    ("group", "to", "expected"),
    [((1.0, 1.0, 1.0, 0.0), 2, 1.2071068), ((1.0, 1.0, 1.0, 1.0), 3, 0.87533366), ((1.0, 1.0, 1.0, 1.0), 2, 1.2071068)],
)
def test_support_jumps_at_the_known_lambda(group: tuple[float, ...], to: int, expected: float) -> None:
    z = torch.tensor([group], dtype=torch.float64)
    # 1/2 + 1/sqrt(2); the second solves f(u + 3u^2 = z) = f(u + u^2 = z), where the reference prints 0.8754.
    low, high = 0.1, 3.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if int(group_support(prox24(z, middle))) <= to else (middle, high)
    assert high == pytest.approx(expected, abs=1e-7)


def test_support_never_grows_with_lambda() -> None:
    z = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    last = torch.full((5000, 1), 4)
    for lam in torch.linspace(0.01, 3, 60).tolist():
        support = group_support(prox24(z, lam))
        assert bool((support <= last).all())
        last = support


def test_candidates_hold_the_prox_and_its_objective() -> None:
    z = torch.cat([prox_inputs(family, 200, seed=7) for family in PROX_INPUTS])
    z = z[z.abs().amin(1) > 1e-3]
    found = prox24_candidates(z, 1.0)
    value, best = found.objectives.min(0)
    assert torch.allclose(value, prox_objective(prox24(z, 1.0), z, 1.0), rtol=0, atol=1e-12)
    assert set(best.unique().tolist()) == {0, 1, 2}
    for index, size in enumerate((2, 3, 4)):
        exists = found.objectives[index, :, 0].isfinite()
        assert bool((group_support(found.weights[index][exists]) == size).all())
        assert bool(found.weights[index][~exists].isnan().all())


def test_a_dense_minimum_is_global_only_where_the_three_sparse_one_beats_two() -> None:
    # The pruning of cases of reference 3.2, which saves most dense solves.
    z = torch.cat([prox_inputs(family, 1500, seed=8) for family in PROX_INPUTS])
    two, three, dense = prox24_candidates(z, 1.0).objectives.squeeze(-1)
    assert not bool(((dense < two - 1e-12) & ~(three < two + 1e-12)).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_result_rounded(dtype: torch.dtype) -> None:
    z = torch.randn(500, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    w = prox24(z, 0.4)
    assert w.dtype == dtype
    assert torch.equal(w, prox24(z.float(), 0.4).to(dtype))
    assert is_24(prox24(z, 1e4))


def test_lambda_may_differ_by_row_and_by_group() -> None:
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(6, 3, 8, generator=generator)
    by_row, by_group = torch.rand(6, 3, 1, generator=generator), torch.rand(6, 3, 2, generator=generator)
    for lam in (by_row.expand(6, 3, 2), by_group):
        w = prox24(z, by_row if lam.stride(-1) == 0 else lam)
        for index in itertools.product(range(6), range(3), range(2)):
            part = slice(4 * index[2], 4 * index[2] + 4)
            expected = prox24(z[index[:2]][part], float(lam[index]))
            assert torch.allclose(w[index[:2]][part], expected, atol=1e-6)


def test_chunks_and_compaction_do_not_change_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(3000, 4, generator=torch.Generator().manual_seed(3))
    whole = {lam: prox24(z, lam) for lam in (0.05, 0.5, 1.0, 2.0)}
    monkeypatch.setattr("sparsity24.prox._CPU_CHUNK", 17)
    for lam, expected in whole.items():
        assert torch.allclose(prox24(z, lam), expected, atol=1e-6)


def test_non_contiguous_input_gives_the_same() -> None:
    z = torch.randn(8, 5, generator=torch.Generator().manual_seed(4)).T
    assert torch.equal(prox24(z, 0.5), prox24(z.contiguous(), 0.5))


def test_lambda_zero_and_negligible_products_return_the_input() -> None:
    z = torch.randn(10, 8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(prox24(z, 0.0), z)
    assert torch.equal(prox24(z, 1e-30), z)
    assert torch.equal(prox24(1e-25 * z, 1.0), 1e-25 * z)
    per_row = torch.ones(10, 1)
    per_row[3:] = 0
    assert torch.equal(prox24(z, per_row)[3:], z[3:])


def test_overflow_of_lambda_times_z_is_two_sparse_by_size() -> None:
    z = torch.tensor([[3e30, -2e30, 1e30, 4e30], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, -1.0, 1.0]])
    for lam in (1e30, 3e38, 1e300):
        w = prox24(z, lam)
        assert torch.equal(w, project24(z))


@pytest.mark.parametrize("lam", [-1.0, float("nan"), float("inf")])
def test_lambda_must_be_finite_and_not_negative(lam: float) -> None:
    with pytest.raises(ValueError, match="lam"):
        prox24(torch.ones(1, 4), lam)
    with pytest.raises(ValueError, match="lam"):
        prox24(torch.ones(2, 4), torch.tensor([[1.0], [lam]]))


def test_lambda_of_a_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        prox24(torch.ones(2, 8), torch.ones(3, 1))


@pytest.mark.parametrize("function", [lambda z: prox24(z, 1.0), r24, project24, top2_mask, group_support, is_24])
def test_width_must_be_a_multiple_of_four(function: object) -> None:
    with pytest.raises(ValueError, match=r"multiple of 4.*\(3, 6\)"):
        function(torch.ones(3, 6))  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
@pytest.mark.parametrize("function", [lambda z: prox24(z, 1.0), r24, project24])
def test_integers_and_complex_numbers_are_type_errors(function: object, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError):
        function(torch.ones(1, 4).to(dtype))  # type: ignore[operator]


def test_integers_are_refused_by_name_where_annotations_are_not_checked() -> None:
    from sparsity24.prox import WrongDtype, _widened

    with pytest.raises(WrongDtype, match="int64"):
        _widened(torch.ones(1, 4).long())


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        prox24(torch.tensor([[1.0, float("nan"), 0.0, 0.0]]), 1.0)


def test_r_is_the_third_symmetric_polynomial_and_vanishes_exactly_on_two_of_four() -> None:
    generator = torch.Generator().manual_seed(6)
    for size in range(5):
        w = torch.randn(300, 4, generator=generator, dtype=torch.float64)
        w = w.scatter(1, torch.rand(300, 4, generator=generator).argsort(1)[:, size:], 0.0)
        literal = sum(w[:, list(three)].prod(1).abs() for three in itertools.combinations(range(4), 3))
        assert torch.allclose(r24(w), literal, rtol=1e-14)
        assert bool(((r24(w) == 0) == (size <= 2)).all())
    assert r24(torch.ones(2, 12)).tolist() == [12.0, 12.0]


def test_top2_keeps_exactly_two_with_the_lower_index_first() -> None:
    for values in itertools.product((0.0, 1.0, 2.0), repeat=4):
        score = torch.tensor([values])
        expected = sorted(range(4), key=lambda i: (-values[i], i))[:2]
        assert top2_mask(score).nonzero()[:, 1].tolist() == sorted(expected)
    assert top2_mask(torch.tensor([[-0.0, 0.0, -0.0, 0.0]])).tolist() == [[True, True, False, False]]


def test_projection_is_the_nearest_two_of_four() -> None:
    w = torch.randn(200, 4, generator=torch.Generator().manual_seed(7))
    best = torch.stack(
        [w[:, [i for i in range(4) if i not in kept]].square().sum(1) for kept in itertools.combinations(range(4), 2)]
    ).amin(0)
    assert torch.allclose((project24(w) - w).square().sum(1), best)


def test_is_24_looks_along_the_given_dimension() -> None:
    w = torch.zeros(4, 8)
    w[:3] = 1
    assert not is_24(w, dim=0)
    assert not is_24(w)
    w[2] = -0.0
    assert is_24(w, dim=0)


def test_alternating_solver_from_zero_is_sometimes_only_local() -> None:
    z = prox_inputs("nearly equal", 500, seed=9)
    best = prox24_brute_force(z, 1.0)
    gap = prox_objective(prox24_alternating(z, 1.0, sweeps=400), z, 1.0).squeeze(-1) - best
    assert float(gap.min()) >= -1e-12
    assert 0.01 < float((gap > 1e-9).double().mean()) < 0.5
