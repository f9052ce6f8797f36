"""Layers of a model in this process on NVIDIA's sparse tensor cores, where that is faster (reference 11).

torch's semi-structured tensors cannot be saved: save a model dense or packed, and convert it after loading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from core.errors import InvalidInput, NeedsHardware
from core.progress import track
from sparsity24.pattern import TWO_FOUR, Pattern
from sparsity24.weights import WeightRef

Backend = Literal["cusparselt", "cutlass"]

# By backend and dtype: what rows and columns must be multiples of, and the pattern that the hardware takes.
SHAPE_RULES: dict[Backend, dict[torch.dtype, tuple[int, int, Pattern]]] = {
    "cutlass": {
        torch.float16: (32, 64, TWO_FOUR),
        torch.bfloat16: (32, 64, TWO_FOUR),
        torch.float32: (32, 32, Pattern(1, 2)),
    },
    "cusparselt": {torch.float16: (16, 16, TWO_FOUR), torch.bfloat16: (16, 16, TWO_FOUR)},
}

# Median seconds of `F.linear` with this weight on so many tokens.
Timer = Callable[[Tensor, int], float]
Converter = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Decision:
    """What became of one weight, and why; seconds by number of tokens where it was timed."""

    name: str
    shape: tuple[int, ...]
    converted: bool
    reason: str
    dense_seconds: dict[int, float]
    sparse_seconds: dict[int, float]


@dataclass(frozen=True)
class SemiStructuredReport:
    """What `to_semi_structured` did."""

    backend: Backend
    decisions: tuple[Decision, ...]

    @property
    def converted(self) -> tuple[str, ...]:
        """The names of the weights that are semi-structured tensors now."""
        return tuple(decision.name for decision in self.decisions if decision.converted)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def misfit(weight: Tensor, backend: Backend) -> str:
    """Why the hardware cannot take this weight, in words; empty when it can."""
    if weight.ndim != 2 or not weight.is_contiguous():
        return "only contiguous matrices can be converted"
    rule = SHAPE_RULES[backend].get(weight.dtype)
    if rule is None:
        return f"{backend} does not take {weight.dtype}"
    rows, columns, pattern = rule
    if not weight.numel() or weight.shape[0] % rows or weight.shape[1] % columns:
        return f"{backend} needs multiples of {rows} rows and {columns} columns"
    return "" if pattern.holds(weight) else f"it is not {pattern} throughout"


@torch.no_grad()
def to_semi_structured(
    model: nn.Module,
    weights: Sequence[WeightRef] | None = None,
    *,
    token_counts: Sequence[int] = (512, 4096),
    keep: Literal["faster", "all"] = "faster",
    timer: Timer | None = None,
    converter: Converter | None = None,
) -> SemiStructuredReport:
    """Replace weights of nn.Linear layers, in place, by semi-structured tensors; returns what was converted and why.

    Each weight that fits is timed dense and sparse with every one of `token_counts`, and converted when it is faster with all
    of them; `keep="all"` converts without timing. Give the least number of tokens that the model will see at once: generation
    with one row at a time is slower. `weights` defaults to every nn.Linear; those that do not fit stay dense, with the reason.
    Parameters used in several places stay dense too. `timer` and `converter` replace the measurement and torch's conversion.

    Raises `NeedsHardware` without a CUDA device of compute capability 8.0, and `InvalidInput` on weights that are not on it.
    """
    if not token_counts or min(token_counts) < 1:
        raise InvalidInput(f"token_counts are numbers of tokens of at least 1; got {tuple(token_counts)}.")
    if keep not in ("faster", "all"):
        raise InvalidInput(f'keep is "faster" or "all"; got {keep!r}.')
    if converter is None:
        check_hardware()
    backend = torch_backend()
    convert = converter or torch.sparse.to_sparse_semi_structured
    decisions = []
    for name, module in track(list(_layers(model, weights)), "Timing layers"):
        weight = module.weight
        if converter is None and not weight.is_cuda:
            raise InvalidInput(f"`{name}` is on {weight.device}. Move the model to a CUDA device first.")
        reason = misfit(weight.detach(), backend)
        if not reason and _num_users(model, weight) > 1:
            reason = "several modules share it"
        if reason:
            decisions.append(Decision(name, tuple(weight.shape), False, reason, {}, {}))
            continue
        sparse = convert(weight.detach())
        decision = _decide(name, weight.detach(), sparse, token_counts, keep, timer or time_linear)
        if decision.converted:
            module.weight = nn.Parameter(sparse, requires_grad=False)
        decisions.append(decision)
    return SemiStructuredReport(backend, tuple(decisions))


def _decide(
    name: str, dense: Tensor, sparse: Tensor, token_counts: Iterable[int], keep: Literal["faster", "all"], timer: Timer
) -> Decision:
    shape = tuple(dense.shape)
    if keep == "all":
        return Decision(name, shape, True, "all were asked for", {}, {})
    before = {count: timer(dense, count) for count in token_counts}
    after = {count: timer(sparse, count) for count in token_counts}
    slower = [count for count in before if after[count] >= before[count]]
    listed = ", ".join(str(count) for count in slower)
    reason = f"not faster with {listed} tokens" if slower else "faster"
    return Decision(name, shape, not slower, reason, before, after)


def check_hardware() -> None:
    """Raise `NeedsHardware` unless there is a CUDA device whose tensor cores multiply sparse matrices."""
    if not torch.cuda.is_available():
        raise NeedsHardware(
            "Semi-structured tensors run on NVIDIA GPUs of compute capability 8.0 or more; this machine has no CUDA device. "
            "The dense model gives the same results here."
        )
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        raise NeedsHardware(
            f"Semi-structured tensors need compute capability 8.0 or more (A100, RTX 30 or newer); "
            f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}. The dense model gives the same results."
        )


def torch_backend() -> Backend:
    """The library that torch's conversion uses here."""
    return "cutlass" if torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS else "cusparselt"


def time_linear(weight: Float[Tensor, "rows width"], num_tokens: int) -> float:
    """Median seconds of `F.linear` with this weight on so many tokens, on the device of the weight."""
    from torch.utils.benchmark import Timer as TorchTimer

    x = torch.randn(num_tokens, weight.shape[1], device=weight.device, dtype=weight.dtype)
    statement = TorchTimer("linear(x, weight)", globals={"linear": nn.functional.linear, "x": x, "weight": weight})
    return float(statement.blocked_autorange(min_run_time=0.1).median)


def _layers(model: nn.Module, weights: Sequence[WeightRef] | None) -> Iterator[tuple[str, nn.Linear]]:
    modules = dict(model.named_modules())
    if weights is None:
        yield from ((name, module) for name, module in modules.items() if isinstance(module, nn.Linear))
        return
    for ref in weights:
        module = modules.get(ref.parameter.removesuffix(".weight"))
        if module is None and ref.expert is None:
            raise InvalidInput(f"The model has no layer `{ref.parameter}`, which the weights name.")
        # Stacks of experts and Conv1D have no kernel; they stay as they are.
        if isinstance(module, nn.Linear):
            yield ref.name, module


def _num_users(model: nn.Module, weight: Tensor) -> int:
    users = (p for module in model.modules() for p in module.parameters(recurse=False))
    return sum(parameter is weight for parameter in users)
