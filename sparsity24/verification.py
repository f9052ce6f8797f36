"""What any checkpoint or model really holds: the share of groups that follow the pattern, and whether masks changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from core.errors import InvalidInput
from core.progress import track
from sparsity24.blocks import find_blocks
from sparsity24.folders import Folder
from sparsity24.model import PruneReport
from sparsity24.packing import DTYPES, mask_digest
from sparsity24.pattern import TWO_FOUR, Pattern
from sparsity24.places import Place, Places, as_in_the_model, read_report
from sparsity24.weights import matrices


@dataclass(frozen=True)
class Verification:
    """For every weight that was looked at, the share of its groups that follow the pattern.

    `changed` are those whose non-zeros lie elsewhere than the report says (a merged LoRA, further training); empty without a
    report. `either_axis` are stacks of matrices of which a file does not say along which axis their inputs run: their share is
    the larger of the two.
    """

    shares: dict[str, float]
    pattern: Pattern = TWO_FOUR
    changed: tuple[str, ...] = ()
    either_axis: tuple[str, ...] = field(default=())

    @property
    def sparse(self) -> tuple[str, ...]:
        """The weights that follow the pattern throughout."""
        return tuple(name for name, share in self.shares.items() if share == 1)

    @property
    def dense(self) -> tuple[str, ...]:
        """The weights that do not."""
        return tuple(name for name, share in self.shares.items() if share < 1)


def verify(
    source: Path | str | nn.Module, pattern: Pattern | str | None = None, *, report: PruneReport | None = None
) -> Verification:
    """How much of each weight follows the pattern: of a model's blocks, or of a folder in any of our formats, ours or anyone's.

    With a report (of the folder, or given) its weights are checked, with its pattern unless another is given, and their masks
    are compared with its digests. Without one it is every matrix whose width fits, along its last axis (Conv1D of a model:
    its first), and every stack of matrices along the better of its two axes; the pattern is 2:4 unless another is given.
    Raises `InvalidInput` when there is nothing to check, or when weights of the report or files of the index are missing.
    """
    given = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
    if isinstance(source, nn.Module):
        tensors: Folder | _InMemory = _InMemory(source)
        found = None if report is None else (report, as_in_the_model(report))
    else:
        tensors = Folder(Path(source))
        found = read_report(tensors.path)
        if report is not None:
            found = report, found[1] if found is not None else as_in_the_model(report)
    if found is not None:
        return _against_report(tensors, *found, given)
    return _all_matrices(tensors, given or TWO_FOUR, str(source) if not isinstance(source, nn.Module) else "The model")


@dataclass(frozen=True)
class _InMemory:
    """The tensors of a model, looked at as those of a folder are."""

    model: nn.Module

    @property
    def entries(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict())

    def tensor(self, name: str) -> Tensor:
        return self.entries[name]


def _against_report(
    tensors: Folder | _InMemory, report: PruneReport, places: Places, pattern: Pattern | None
) -> Verification:
    pattern = pattern or Pattern.parse(report.pattern)
    missing = [layer.name for layer in report.layers if any(p.key not in tensors.entries for p in places[layer.name])]
    if missing:
        raise InvalidInput(f"Weights that the report names are missing: {', '.join(missing[:3])}.")
    shares, changed = {}, []
    read = _LastRead(tensors)
    for layer in track(report.layers, "Checking weights"):
        weight = read.weight(places[layer.name])
        if tuple(weight.shape) != layer.shape:
            raise InvalidInput(
                f"{layer.name} is {tuple(weight.shape)} and the report says {layer.shape}: it is of another model."
            )
        shares[layer.name] = pattern.share(weight)
        if mask_digest(weight) != layer.mask_digest:
            changed.append(layer.name)
    return Verification(shares, pattern, tuple(changed))


class _LastRead:
    """Weights put together from their places; the experts of one tensor read it once."""

    def __init__(self, tensors: Folder | _InMemory) -> None:
        self._tensors, self._key = tensors, ""
        self._tensor = torch.empty(0)

    def weight(self, places: tuple[Place, ...]) -> Float[Tensor, "rows width"]:
        parts = []
        for place in places:
            if place.key != self._key:
                self._key, self._tensor = place.key, self._tensors.tensor(place.key).detach()
            parts.append(place.of(self._tensor))
        if len({part.shape[1] for part in parts}) != 1:
            raise InvalidInput(f"The rows of `{places[0].key}` differ in width: it is not what the report says.")
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _all_matrices(tensors: Folder | _InMemory, pattern: Pattern, where: str) -> Verification:
    shares: dict[str, float] = {}
    either = []
    candidates = _of_folder(tensors, pattern) if isinstance(tensors, Folder) else _of_model(tensors.model)
    for key, weight, transposed in candidates:
        name = key.removesuffix(".weight")
        views = [weight, weight.mT] if weight.ndim == 3 else [weight.mT if transposed else weight]
        fitting = [view for view in views if view.shape[-1] % pattern.m == 0 and weight.numel()]
        if weight.dtype in DTYPES and fitting:
            shares[name] = max(pattern.share(view) for view in fitting)
            if weight.ndim == 3:
                either.append(name)
    if not shares:
        raise InvalidInput(f"{where} holds no matrix of floats whose width is a multiple of {pattern.m}.")
    return Verification(shares, pattern, either_axis=tuple(either))


def _of_folder(folder: Folder, pattern: Pattern) -> Iterator[tuple[str, Tensor, bool]]:
    for key in track(list(folder.entries), "Checking weights"):
        shape = folder.shape(key)
        if len(shape) in (2, 3) and any(size % pattern.m == 0 for size in shape[-2:]):
            yield key, folder.tensor(key), folder.transposed(key)


def _of_model(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    from transformers.pytorch_utils import Conv1D

    for parameters in matrices(model, find_blocks(model)).values():
        for key, parameter in parameters.items():
            module = model.get_submodule(key.rpartition(".")[0])
            yield key, parameter.detach(), isinstance(module, Conv1D)
