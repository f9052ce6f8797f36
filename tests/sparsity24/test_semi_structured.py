"""Semi-structured tensors: shape rules and decisions with a stand-in for the GPU, and CUTLASS's own layout on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from core.errors import InvalidInput, NeedsHardware
from sparsity24 import semi_structured
from sparsity24.packing import pack
from sparsity24.pattern import TWO_FOUR, Pattern
from sparsity24.semi_structured import SHAPE_RULES, misfit, to_semi_structured
from sparsity24.weights import WeightRef


def _sparse(rows: int, width: int, dtype: torch.dtype = torch.float16, pattern: Pattern = TWO_FOUR) -> Tensor:
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.where(pattern.mask(weight.abs()), weight, 0)


def _model() -> nn.Sequential:
    """Two layers that fit cuSPARSELt, one of an odd shape, one dense."""
    model = nn.Sequential(*(nn.Linear(32, rows, bias=False) for rows in (32, 48, 20, 32))).half()
    for module, weight in zip(
        model, (_sparse(32, 32), _sparse(48, 32), _sparse(20, 32), torch.ones(32, 32)), strict=True
    ):
        module.weight = nn.Parameter(weight.half())
    return model


class _Marked(Tensor):
    """What the stand-in converter gives."""


def _mark(weight: Tensor) -> Tensor:
    return weight.clone().as_subclass(_Marked)


def _times(sparse_at: dict[int, float]) -> Callable[[Tensor, int], float]:
    """A timer by which a dense weight takes one second and a sparse one as given, whatever its shape."""
    return lambda weight, tokens: sparse_at[tokens] if isinstance(weight, _Marked) else 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("thinned", [False, True], ids=["two a group", "fewer"])
def test_the_cutlass_layout_of_our_weights_gives_every_value_back(dtype: torch.dtype, thinned: bool) -> None:
    weight = _sparse(64, 128, dtype)
    if thinned:
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.4] = 0
    values, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    assert values.shape == (64, 64)
    assert metadata.nbytes * 8 == 64 * 128 // 4 * 4
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, metadata), weight)
    if not thinned:
        assert torch.equal(values, pack(weight).values)


def test_the_cutlass_layout_of_a_dense_weight_would_lose_values() -> None:
    weight = torch.ones(32, 64, dtype=torch.float16)
    back = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(weight))
    assert int((back != weight).sum()) == weight.numel() // 2
    assert misfit(weight, "cutlass") == "it is not 2:4 throughout"


def test_single_precision_is_one_of_two_in_cutlass() -> None:
    # Torch's way back copies halves of 16 bits and changes those that look like a NaN; here the lower ones are zero.
    weight = _sparse(32, 32, torch.bfloat16, Pattern(1, 2)).float()
    back = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(weight))
    assert torch.equal(back, weight)
    assert misfit(weight, "cutlass") == ""
    assert misfit(_sparse(32, 32, torch.float32), "cutlass") == "it is not 1:2 throughout"
    assert "float32" in misfit(weight, "cusparselt")


def test_the_shape_rules_are_those_of_this_torch() -> None:
    theirs = {"cutlass": SparseSemiStructuredTensorCUTLASS, "cusparselt": SparseSemiStructuredTensorCUSPARSELT}
    assert set(SHAPE_RULES) == set(theirs)
    for backend, rules in SHAPE_RULES.items():
        known: dict[torch.dtype, Any] = theirs[backend]._DTYPE_SHAPE_CONSTRAINTS
        assert set(rules) == {dtype for dtype in known if dtype not in (torch.int8, torch.float8_e4m3fn)}
        for dtype, (rows, columns, _) in rules.items():
            assert (rows, columns) == (known[dtype].sparse_min_rows, known[dtype].sparse_min_cols)


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (_sparse(16, 32), ""),
        (_sparse(24, 32), "multiples of 16 rows and 16 columns"),
        (_sparse(16, 24), "multiples of 16 rows and 16 columns"),
        (_sparse(32, 16).t(), "contiguous"),
        (_sparse(32, 32).view(2, 16, 32), "contiguous matrices"),
        (_sparse(16, 32).double(), "float64"),
        (torch.zeros(0, 32).half(), "multiples of"),
    ],
)
def test_what_the_hardware_cannot_take_is_said(weight: Tensor, said: str) -> None:
    assert said in misfit(weight, "cusparselt")
    assert bool(said) == bool(misfit(weight, "cusparselt"))


def test_only_what_is_faster_with_every_number_of_tokens_is_converted() -> None:
    model = _model()
    report = to_semi_structured(model, token_counts=(64, 512), timer=_times({64: 0.9, 512: 0.5}), converter=_mark)
    assert report.converted == ("0", "1")
    assert [isinstance(module.weight, _Marked) or isinstance(module.weight.data, _Marked) for module in model] == [
        *(True, True, False, False)
    ]
    assert report.decisions[0].sparse_seconds == {64: 0.9, 512: 0.5}
    assert [decision.reason for decision in report.decisions][2:] == [
        "cusparselt needs multiples of 16 rows and 16 columns",
        "it is not 2:4 throughout",
    ]
    before = _model()
    slow = to_semi_structured(before, token_counts=(64, 512), timer=_times({64: 1.1, 512: 0.5}), converter=_mark)
    assert slow.converted == ()
    assert slow.decisions[0].reason == "not faster with 64 tokens"
    assert not any(isinstance(module.weight.data, _Marked) for module in before)
    assert to_semi_structured(before, timer=_times({512: 1.0, 4096: 1.0}), converter=_mark).converted == ()


def test_all_that_fit_are_converted_on_request_without_timing() -> None:
    def never(weight: Tensor, tokens: int) -> float:
        raise AssertionError("timed")

    assert to_semi_structured(_model(), keep="all", timer=never, converter=_mark).converted == ("0", "1")


def test_only_the_named_weights_are_looked_at_and_an_unknown_name_is_refused() -> None:
    fast = _times({512: 0.5, 4096: 0.5})
    report = to_semi_structured(_model(), [WeightRef("1", "1.weight")], timer=fast, converter=_mark)
    assert [decision.name for decision in report.decisions] == ["1"]
    with pytest.raises(InvalidInput, match=r"no layer `9\.weight`"):
        to_semi_structured(_model(), [WeightRef("9", "9.weight")], timer=fast, converter=_mark)


def test_a_shared_parameter_stays_dense() -> None:
    model = _model()
    model[3].weight = model[0].weight
    report = to_semi_structured(model, timer=_times({512: 0.5, 4096: 0.5}), converter=_mark)
    assert report.converted == ("1",)
    assert report.decisions[0].reason == "several modules share it"
    assert model[3].weight is model[0].weight


def test_a_machine_without_cuda_and_an_old_gpu_say_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NeedsHardware, match="no CUDA device"):
        to_semi_structured(_model())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(NeedsHardware, match=r"Tesla T4 has 7\.5"):
        to_semi_structured(_model())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(InvalidInput, match="is on cpu"):
        to_semi_structured(_model())


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InvalidInput, match="at least 1"):
        to_semi_structured(_model(), token_counts=())
    with pytest.raises(InvalidInput, match="at least 1"):
        to_semi_structured(_model(), token_counts=(0,))


def test_the_timer_runs_the_linear_function_on_so_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[int, ...]] = set()

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        seen.add(tuple(x.shape))
        return x @ weight.t()

    monkeypatch.setattr(nn.functional, "linear", linear)
    assert 0 < semi_structured.time_linear(torch.randn(16, 32), 7) < 1
    assert seen == {(7, 32)}
