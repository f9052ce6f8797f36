"""The methods against literal implementations, exact solutions and the rows of the robustness section."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from sparsity24.layer import local_loss, prune_layer, relative_loss
from sparsity24.methods import METHODS, Magnitude, ProxPruner, Random, SparseGPT, Wanda, as_method
from sparsity24.pattern import Pattern
from sparsity24.problem import LayerContext, definite, largest_eigenvalue
from sparsity24.prox import group_support, is_24, prox24, top2_mask
from sparsity24.refinement import refine
from sparsity24.synthetic import LAYER_KINDS, correlated_group, synthetic_layer


def _layer(seed: int = 0, rows: int = 12, width: int = 24, kind: str = "low-rank") -> tuple[Tensor, Tensor]:
    layer = synthetic_layer(kind, rows=rows, width=width, seed=seed)
    return layer.weight, layer.hessian


def _inputs(hessian: Tensor) -> LayerContext:
    """A mean input that goes with any Hessian: |mean_j| below sqrt(H_jj)."""
    signs = torch.randn(len(hessian), generator=torch.Generator().manual_seed(9)).tanh()
    return LayerContext(mean=0.5 * signs.to(hessian.dtype) * hessian.diagonal().sqrt().nan_to_num())


def test_local_loss_is_the_squared_output_error_a_token() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 50, generator=generator, dtype=torch.float64)
    dense, weight = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    error = ((weight - dense) @ x).square().sum() / 50
    assert local_loss(weight, dense, x @ x.T / 50) == pytest.approx(float(error), rel=1e-12)
    assert relative_loss(weight, dense, x @ x.T / 50) == pytest.approx(
        float(error / ((dense @ x).square().sum() / 50)), rel=1e-12
    )
    assert relative_loss(torch.zeros_like(dense), dense, x @ x.T) == pytest.approx(1.0)
    assert relative_loss(weight, torch.zeros_like(dense), torch.zeros(8, 8, dtype=torch.float64)) == 0.0


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_every_method_gives_a_two_of_four_weight_on_its_mask(name: str, kind: str) -> None:
    weight, hessian = _layer(kind=kind)
    result = prune_layer(weight, hessian, name, refine="none", context=_inputs(hessian))
    assert is_24(result.weight)
    assert bool((group_support(result.mask.float()) == 2).all())
    assert bool((result.weight[~result.mask] == 0).all())
    assert result.rel_loss == pytest.approx(relative_loss(result.weight, weight, hessian), rel=1e-5)


def _literal_sparsegpt(weight: Tensor, hessian: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Frantar and Alistarh's algorithm entry by entry, in double loops."""
    w, h = weight.double().clone(), hessian.double().clone()
    rows, width = w.shape
    # Ours: a dead feature gets the mean of the others, not 1, so that the damping does not depend on the inputs' scale.
    mean = h.diagonal()[h.diagonal() > 0].mean()
    for j in range(width):
        if h[j, j] == 0:
            h[j, j] = mean
            w[:, j] = 0
    h += 0.01 * mean * torch.eye(width, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(h)).mT.conj()
    mask = torch.zeros(rows, width, dtype=torch.bool)
    for start in range(0, width, block):
        stop = min(start + block, width)
        errors = torch.zeros(rows, width, dtype=torch.float64)
        for i in range(start, stop):
            for row in range(rows):
                if i % 4 == 0:
                    score = [float(w[row, j] ** 2 / upper[j, j] ** 2) for j in range(i, i + 4)]
                    for j in sorted(range(4), key=lambda j: (-score[j], j))[:2]:
                        mask[row, i + j] = True
                kept = w[row, i] if mask[row, i] else 0.0
                error = (w[row, i] - kept) / upper[i, i]
                for j in range(i + 1, stop):
                    w[row, j] -= error * upper[i, j]
                w[row, i] = kept
                errors[row, i] = error
        for j in range(stop, width):
            for row in range(rows):
                w[row, j] -= (errors[row, start:stop] * upper[start:stop, j]).sum()
    return w, mask


@pytest.mark.parametrize(("seed", "block"), [(0, 8), (1, 16), (2, 128)])
def test_sparsegpt_equals_a_literal_implementation(seed: int, block: int) -> None:
    weight, hessian = _layer(seed, rows=5, width=20)
    hessian[3, :] = hessian[:, 3] = 0
    expected, mask = _literal_sparsegpt(weight, hessian, block)
    found = SparseGPT(block_size=block).prune(weight.double(), hessian.double())
    assert torch.equal(found.mask, mask)
    assert torch.allclose(found.weight, expected, atol=1e-10)


def test_sparsegpt_on_one_group_equals_exact_optimal_brain_surgeon() -> None:
    # After the mask is fixed, eliminating columns in order with U is the exact least squares on what is left to move.
    for seed in range(10):
        group = correlated_group(0.9, rows=6, seed=seed)
        weight, hessian = group.weight.double(), group.hessian.double()
        found = SparseGPT(damping=0.0).prune(weight, hessian)
        for row in range(len(weight)):
            w, kept = weight[row].clone(), found.mask[row]
            for j in range(4):
                if not kept[j]:
                    # Columns before j are frozen; those behind it may compensate.
                    later = torch.arange(j + 1, 4)
                    shift = -torch.linalg.solve(hessian[later][:, later], hessian[later, j]) * (0 - w[j])
                    w[later] += shift
                    w[j] = 0
            assert torch.allclose(found.weight[row], w, atol=1e-9)


def test_wanda_and_magnitude_keep_the_largest_scores_and_their_weights() -> None:
    weight, hessian = _layer(kind="power-law")
    norms = hessian.diagonal().sqrt()
    for method, score in ((Wanda(), weight.abs() * norms), (Magnitude(), weight.abs())):
        found = method.prune(weight, hessian)
        for row, group in itertools.product(range(len(weight)), range(weight.shape[1] // 4)):
            part = slice(4 * group, 4 * group + 4)
            expected = score[row, part].topk(2).indices.sort().values
            assert torch.equal(found.mask[row, part].nonzero().squeeze(1), expected)
        assert torch.equal(found.weight, weight * found.mask)


def test_random_masks_depend_on_the_seed_only() -> None:
    weight, hessian = _layer()
    assert torch.equal(Random(seed=3).prune(weight, hessian).mask, Random(seed=3).prune(2 * weight, hessian).mask)
    assert not torch.equal(Random(seed=3).prune(weight, hessian).mask, Random(seed=4).prune(weight, hessian).mask)


def _literal_algorithm_2(weight: Tensor, hessian: Tensor, lam0: float, beta: float, steps: int) -> Tensor:
    """Reference 3.3 as it stands, un-preconditioned, eta = 1/L."""
    eta = 1 / (2 * largest_eigenvalue(hessian))
    w = weight.clone()
    for k in range(steps):
        w = prox24(w - eta * 2 * (w - weight) @ hessian, eta * lam0 * beta**k)
    return w


def test_paper_variant_is_algorithm_2_as_it_stands() -> None:
    layer = synthetic_layer("block-correlated", rows=16, width=32, seed=1)
    weight, hessian = layer.weight.double(), layer.hessian.double()
    paper = ProxPruner.variant("paper")
    found = paper.prune(weight, hessian)
    # lam0 is given in units of 1 / (eta * rms(W0)), which only names the number.
    lam0 = paper.lam0 / float(weight.square().mean().sqrt()) * 2 * largest_eigenvalue(hessian)
    literal = _literal_algorithm_2(weight, hessian, lam0, paper.beta, found.iterations)
    assert is_24(literal)
    assert torch.allclose(found.history.final_iterate, literal, atol=1e-6)
    assert torch.equal(found.mask, top2_mask(literal.abs()))


def _literal_scale_free(weight: Tensor, hessian: Tensor, method: ProxPruner, steps: int) -> Tensor:
    """Reference 3.3, scale-free form with momentum, without planes and folded products."""
    h = hessian + method.damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    d = h.diagonal().sqrt()
    a = h / d / d[:, None]
    a = a / largest_eigenvalue(a)
    v0 = weight * d
    sigma = v0.square().mean(1, keepdim=True).sqrt()
    v, before = v0, v0
    for k in range(steps):
        y = v + method.momentum * (v - before)
        before, v = v, sigma * prox24((y - (y - v0) @ a) / sigma, method.lam0 * method.beta**k)
    return v / d


@pytest.mark.parametrize("variant", ["default", "fast"])
def test_scale_free_form_equals_a_literal_implementation(variant: str) -> None:
    layer = synthetic_layer("power-law", rows=8, width=32, seed=2)
    weight, hessian = layer.weight.double(), layer.hessian.double()
    method = ProxPruner.variant(variant)
    found = method.prune(weight, hessian)
    literal = _literal_scale_free(weight, hessian, method, found.iterations)
    assert torch.equal(found.mask, top2_mask((literal * hessian.diagonal().sqrt()).abs()))
    assert torch.allclose(found.history.final_iterate, literal, atol=1e-5)


def test_prox_ends_two_of_four_within_the_steps_that_the_threshold_promises() -> None:
    weight, hessian = _layer(rows=32, width=64)
    for beta in (1.2, 1.05):
        found = ProxPruner(beta=beta, stop=1.0).prune(weight, hessian)
        assert is_24(found.history.final_iterate)
        assert found.history.share_24[-1] == 1.0
        assert found.iterations <= found.history.steps_promised
    still = ProxPruner(beta=1.0, stop=1.0, max_iter=200).prune(weight, hessian)
    assert not is_24(still.history.final_iterate)
    assert still.history.steps_promised is None
    assert is_24(still.weight)


def test_scale_free_form_does_not_see_the_scale_of_weights_rows_or_features() -> None:
    weight, hessian = _layer(rows=16, width=32)
    weight, hessian = weight.double(), hessian.double()
    expected = ProxPruner().prune(weight, hessian).mask
    rows = torch.linspace(0.1, 10, 16, dtype=torch.float64)[:, None]
    assert torch.equal(ProxPruner().prune(rows * weight, 1e-6 * hessian).mask, expected)
    features = 2.0 ** torch.randint(-3, 4, (32,), generator=torch.Generator().manual_seed(0)).double()
    # Damping breaks the invariance, by its own size.
    undamped = ProxPruner(damping=0.0)
    scaled = undamped.prune(weight / features, features[:, None] * hessian * features)
    assert torch.equal(scaled.mask, undamped.prune(weight, hessian).mask)


def test_exact_refit_of_its_own_mask_is_never_worse_than_what_the_prox_returns() -> None:
    for kind in LAYER_KINDS:
        weight, hessian = _layer(kind=kind, rows=32, width=64)
        for variant in ("paper", "default", "fast"):
            found = ProxPruner.variant(variant).prune(weight, hessian)
            refit, _ = refine(found.weight, found.mask, weight, hessian, "exact")
            assert relative_loss(refit, weight, hessian) <= found.rel_loss * (1 + 1e-6)


def test_prox_finds_better_masks_than_wanda_and_sparsegpt_on_correlated_inputs() -> None:
    for kind in ("block-correlated", "low-rank", "power-law"):
        weight, hessian = _layer(kind=kind, rows=32, width=128)
        loss = {name: prune_layer(weight, hessian, name, "cg", context=_inputs(hessian)).rel_loss for name in METHODS}
        assert loss["prox-fast"] < min(loss["wanda"], loss["sparsegpt"])
        assert loss["prox-quality"] < min(loss["wanda"], loss["sparsegpt"])
        assert loss["random"] == max(loss.values())


@pytest.mark.parametrize("name", METHODS)
def test_nan_in_weights_or_hessian_names_the_layer(name: str) -> None:
    weight, hessian = _layer()
    for where in ("weight", "hessian"):
        w, h = weight.clone(), hessian.clone()
        (w if where == "weight" else h)[0, 1] = float("nan")
        with pytest.raises(ValueError, match=r"block\.7\.down hold NaN"):
            prune_layer(w, h, name, name="block.7.down", context=_inputs(hessian))


@pytest.mark.parametrize("name", METHODS)
def test_width_that_is_no_multiple_of_four_is_refused_with_its_shape(name: str) -> None:
    with pytest.raises(ValueError, match=r"\(3, 10\)"):
        prune_layer(torch.ones(3, 10), torch.eye(10), name)


def test_integer_weights_are_a_type_error() -> None:
    with pytest.raises(TypeError):
        prune_layer(torch.ones(3, 8).long(), torch.eye(8))


@pytest.mark.parametrize("name", METHODS)
def test_singular_hessian_and_dead_features_are_survived(name: str) -> None:
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
    x[[2, 7, 8, 9, 10, 11]] = 0
    weight, hessian = torch.randn(6, 16, generator=torch.Generator().manual_seed(2)), x @ x.T / 5
    found = prune_layer(weight, hessian, name, "none", context=_inputs(hessian))
    for how in ("gd", "nesterov", "cg", "exact"):
        refined, _ = refine(found.weight, found.mask, weight, hessian, how)
        for sparse in (found.weight, refined):
            assert is_24(sparse)
            assert bool(torch.isfinite(sparse).all())
    if name.startswith("prox") or name in ("sparsegpt", "admm", "alps"):
        assert bool((found.weight[:, [2, 7, 8, 9, 10, 11]] == 0).all())


@pytest.mark.parametrize("name", METHODS)
def test_a_zero_hessian_a_zero_weight_and_equal_weights_give_two_places_a_group(name: str) -> None:
    for weight, hessian in (
        (torch.randn(3, 8), torch.zeros(8, 8)),
        (torch.zeros(3, 8), torch.eye(8)),
        (torch.ones(3, 8), torch.eye(8)),
    ):
        found = prune_layer(weight, hessian, name, context=_inputs(hessian))
        assert bool((group_support(found.mask.float()) == 2).all())
        assert bool(torch.isfinite(found.weight).all())
    # DSnoT swaps by the mean input where scores tie.
    if name not in ("random", "dsnot"):
        assert found.mask[0].tolist() == [True, True, False, False] * 2


@pytest.mark.parametrize("name", METHODS)
def test_a_weight_that_is_two_of_four_already_is_left_alone(name: str) -> None:
    weight, hessian = _layer()
    weight = weight * top2_mask(weight.abs())
    found = prune_layer(weight, hessian, name)
    assert torch.equal(found.weight, weight)
    assert found.rel_loss == 0


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_weight_is_kept_and_the_loss_is_of_what_it_holds(name: str, dtype: torch.dtype) -> None:
    weight, hessian = _layer()
    weight = weight.to(dtype)
    found = prune_layer(weight, hessian, name, context=_inputs(hessian))
    assert found.weight.dtype == dtype
    assert is_24(found.weight)
    assert found.rel_loss == pytest.approx(relative_loss(found.weight, weight, hessian), rel=1e-12)


def test_weights_that_overflow_in_half_precision_are_refused_with_the_name_of_the_layer() -> None:
    # Two equal inputs: the kept weight takes over the other's work, 9e4 in all.
    hessian = torch.eye(4)
    hessian[0, 1] = hessian[1, 0] = 0.999
    weight = torch.tensor([[60000.0, 30000, 55000, 50000]], dtype=torch.float16)
    with pytest.raises(ValueError, match=r"block\.0.*float16"):
        prune_layer(weight, torch.where(hessian == 0, 0.99, hessian), "magnitude", "exact", name="block.0")


@pytest.mark.parametrize("name", METHODS)
def test_pruning_twice_gives_identical_masks(name: str) -> None:
    weight, hessian = _layer()
    first, second = (prune_layer(weight, hessian, name, context=_inputs(hessian)) for _ in range(2))
    assert torch.equal(first.mask, second.mask)
    assert torch.equal(first.weight, second.weight)


def test_unknown_names_and_settings_are_refused_with_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="wanda"):
        as_method("wandaa")
    with pytest.raises(ValueError, match="quality"):
        ProxPruner.variant("qualty")
    for setting in ({"lam0": 0.0}, {"beta": 0.9}, {"momentum": 1.0}, {"stop": 0.0}, {"max_iter": 0}, {"damping": -1.0}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            ProxPruner(**setting)  # type: ignore[arg-type]
    for block_size in (6, 0):
        with pytest.raises(ValueError, match="block_size"):
            SparseGPT(block_size=block_size)
    with pytest.raises(ValueError, match=r"multiple of 8.*4:8"):
        SparseGPT(block_size=12, pattern=Pattern(4, 8))
    with pytest.raises(ValueError, match="damping"):
        SparseGPT(damping=-1.0)
    with pytest.raises(ValueError, match="cg"):
        prune_layer(*_layer(), "prox", "cgg")


PATTERNS = (Pattern(1, 2), Pattern(2, 4), Pattern(4, 8), Pattern(1, 3))


@pytest.mark.parametrize("name", ["magnitude", "wanda", "random", "sparsegpt", "admm", "alps", "dsnot"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_score_based_methods_keep_exactly_n_of_m(name: str, pattern: Pattern) -> None:
    weight, hessian = _layer()
    method = SparseGPT(block_size=12, pattern=pattern) if pattern.m == 3 and name == "sparsegpt" else None
    found = prune_layer(
        weight, hessian, method or as_method(name, pattern=pattern), "exact", context=_inputs(hessian), name="x"
    )
    assert bool((found.mask.unflatten(1, (-1, pattern.m)).sum(2) == pattern.n).all())
    assert bool((found.weight[~found.mask] == 0).all())


def test_other_patterns_than_two_of_four_are_refused_for_the_prox() -> None:
    with pytest.raises(ValueError, match=r"makes 2:4 masks only.*sparsegpt"):
        as_method("prox-fast", pattern=Pattern(1, 2))
    with pytest.raises(ValueError, match="groups of four"):
        as_method(ProxPruner(), pattern=Pattern(4, 8))
    assert as_method("prox", pattern=Pattern(2, 4)) is METHODS["prox"]
    assert as_method(Wanda(), pattern=Pattern(1, 2)) == Wanda(pattern=Pattern(1, 2))
    assert as_method("random", seed=7, pattern=Pattern(1, 2)) == Random(seed=7, pattern=Pattern(1, 2))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_width_that_does_not_fit_the_pattern_is_refused_by_its_name(pattern: Pattern) -> None:
    width = 25
    width += width % pattern.m == 0
    with pytest.raises(ValueError, match=f"{pattern} groups.*multiple of {pattern.m}"):
        prune_layer(torch.ones(2, width), torch.eye(width), Magnitude(pattern=pattern))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if getattr(method, "splits_rows", False)])
def test_two_halves_of_the_rows_give_what_the_stack_gives(name: str) -> None:
    weight, hessian = _layer(rows=24, width=32)
    weight, hessian = weight.double(), hessian.double()
    # Halves of unequal scale and difficulty, one of them with rows that are sparse already.
    weight[:8] *= 20 * top2_mask(weight[:8])
    mean = _inputs(hessian).mean
    stack = prune_layer(weight, hessian, name, "exact", context=LayerContext(mean=mean))
    # A cut at 0 leaves a process without rows.
    for cut in (0, 8, 15):
        parts = _on_threads(
            [
                lambda total, part=part: prune_layer(part, hessian, name, "exact", context=LayerContext(mean, total))
                for part in (weight[:cut], weight[cut:])
            ]
        )
        assert torch.equal(torch.cat([part.mask for part in parts]), stack.mask)
        assert torch.allclose(torch.cat([part.weight for part in parts]), stack.weight, atol=1e-9)
        if stack.history is not None:
            assert parts[0].iterations == parts[1].iterations == stack.iterations
            assert parts[0].history.share_24 == pytest.approx(stack.history.share_24)


def _on_threads(jobs: list) -> list:
    """Every job on its own thread, with a `total` that waits for all of them and sums."""
    barrier, given = threading.Barrier(len(jobs)), [torch.zeros(()) for _ in jobs]

    def run(index: int) -> object:
        def total(value: Tensor) -> Tensor:
            given[index] = value
            barrier.wait(timeout=60)
            result = torch.stack(given).sum(0)
            barrier.wait(timeout=60)
            return result

        try:
            return jobs[index](total)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, range(len(jobs))))


def test_methods_that_look_at_the_whole_layer_do_not_claim_to_split_rows() -> None:
    assert {name for name, method in METHODS.items() if not getattr(method, "splits_rows", False)} == {
        "random",
        "admm",
        "alps",
    }


def test_alone_nothing_is_summed() -> None:
    assert LayerContext().sum(3, torch.device("cpu")) == 3
    assert LayerContext(total=lambda value: 2 * value).sum(3, torch.device("cpu")) == 6


@pytest.mark.parametrize("name", METHODS)
def test_exact_refit_of_a_mask_is_never_worse_than_any_other_refinement(name: str) -> None:
    for kind in ("block-correlated", "power-law"):
        weight, hessian = _layer(kind=kind, rows=6, width=16)
        hessian[3, :] = hessian[:, 3] = 0
        weight, hessian = weight.double(), hessian.double()
        exact = prune_layer(weight, hessian, name, "exact", context=_inputs(hessian))
        raw = prune_layer(weight, hessian, name, "none", context=_inputs(hessian))
        assert torch.equal(raw.mask, exact.mask)
        assert exact.rel_loss <= raw.rel_loss * (1 + 1e-9)
        for how in ("gd", "nesterov", "cg"):
            other, _ = refine(raw.weight, raw.mask, weight, hessian, how, steps=50)
            assert exact.rel_loss <= relative_loss(other, weight, hessian) * (1 + 1e-9)


@pytest.mark.parametrize("name", ["prox", "sparsegpt", "admm", "alps", "wanda"])
def test_the_scale_of_the_inputs_does_not_matter_even_beside_a_dead_feature(name: str) -> None:
    layer = synthetic_layer("block-correlated", rows=24, width=64)
    hessian = layer.hessian.double().clone()
    hessian[5], hessian[:, 5] = 0, 0
    one = prune_layer(layer.weight.double(), hessian, name, refine="none")
    for scale in (1e-6, 1e6):
        other = prune_layer(layer.weight.double(), hessian * scale, name, refine="none")
        assert torch.equal(one.mask, other.mask), scale
        assert other.rel_loss == pytest.approx(one.rel_loss, rel=1e-6)


def test_a_relative_loss_is_never_negative_and_keeps_seven_digits_of_the_loss_of_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1e-20, 1.0, 1e15):
        w0 = size * torch.randn(16, 32, generator=generator)
        x = torch.randn(1, 32, generator=generator)
        hessian = x.T @ x
        nearby = w0 + 1e-3 * size * torch.randn(16, 32, generator=generator)
        exact = relative_loss(nearby.double(), w0.double(), hessian.double())
        assert relative_loss(w0, w0, hessian) == 0
        assert 0 <= relative_loss(nearby, w0, hessian) == pytest.approx(exact, abs=1e-7)


def test_a_hessian_that_rounding_left_indefinite_is_damped_with_a_warning_and_never_dropped() -> None:
    weight, hessian = _layer(kind="low-rank", rows=8, width=32)
    eigenvalues, vectors = torch.linalg.eigh(hessian.double())
    eigenvalues[:2] = -0.02 * hessian.diagonal().mean()
    dented = (vectors * eigenvalues) @ vectors.T
    for name in ("sparsegpt", "alps", "prox"):
        with pytest.warns(UserWarning, match="not positive definite with damping"):
            found = prune_layer(weight.double(), dented, name, "none")
        assert is_24(found.weight)
        # As good as on the clean Hessian, which the identity in its place would not be.
        clean = relative_loss(found.weight, weight.double(), hessian.double())
        identity = prune_layer(weight.double(), torch.eye(32, dtype=torch.float64), name, "none")
        assert clean < 0.8 * relative_loss(identity.weight, weight.double(), hessian.double())


def test_a_matrix_that_is_no_hessian_is_refused() -> None:
    hessian = 1e9 * (torch.ones(8, 8) - torch.eye(8))
    with pytest.raises(ValueError, match="positive semi-definite"):
        definite(hessian + 1e-9 * torch.eye(8), 1e-4)
    hessian.fill_diagonal_(-1.0)
    for name in METHODS:
        with pytest.raises(ValueError, match="negative diagonal"):
            prune_layer(torch.randn(2, 8), hessian, name, context=LayerContext(mean=torch.ones(8)))


@pytest.mark.parametrize(("correlation", "needed"), [(1.005, 0.01), (1.05, 0.1)])
def test_damping_climbs_ten_by_ten_and_stops_at_the_first_that_factorises(correlation: float, needed: float) -> None:
    hessian = torch.eye(4, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = correlation
    with pytest.warns(UserWarning, match=f"with damping 0.001; {needed} is"):
        metric, factor = definite(hessian, 0.001)
    assert float(metric[0, 0]) == pytest.approx(1 + needed)
    assert torch.allclose(factor @ factor.T, metric)
