"""Where each pruned weight lies in a saved folder, which is not always where it lies in the model.

transformers fuses the experts of a layer into one parameter when it loads a checkpoint, and takes them apart again when it
saves: a weight of the model can be several tensors on disk. The report in the folder, `sparsity24.json`, says which.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from core.errors import InvalidInput
from core.files import write_atomic
from sparsity24.model import PruneReport
from sparsity24.weights import WeightRef

REPORT_NAME = "sparsity24.json"


@dataclass(frozen=True)
class Place:
    """`count` rows of a weight, from its row `row` on, as rows `at`, `at + 1`, ... of a matrix in the tensor `key`.

    `expert` and `transposed` say where the matrix lies in the tensor, as they do in a `WeightRef`.
    """

    key: str
    expert: int | None
    transposed: bool
    at: int
    row: int
    count: int

    def of(self, tensor: Float[Tensor, "..."]) -> Float[Tensor, "rows width"]:
        """The rows, as a view of the tensor. Raises `InvalidInput` when it has no such rows."""
        deep = 2 if self.expert is None else 3
        known = min(self.expert or 0, self.at, self.row, self.count) >= 0
        if not known or tensor.ndim != deep or (self.expert or 0) >= len(tensor):
            raise InvalidInput(f"`{self.key}` of shape {tuple(tensor.shape)} is not what the report says.")
        matrix = WeightRef("", self.key, self.expert, self.transposed).of(tensor)
        if self.at + self.count > len(matrix):
            raise InvalidInput(f"`{self.key}` of shape {tuple(tensor.shape)} lacks rows that the report names.")
        return matrix[self.at : self.at + self.count]


Places = Mapping[str, tuple[Place, ...]]


def as_in_the_model(report: PruneReport) -> Places:
    """The places of a folder whose tensors are named and shaped as the model's parameters."""
    return {
        layer.name: (Place(w.parameter, w.expert, w.transposed, 0, 0, layer.shape[0]),)
        for layer in report.layers
        for w in [layer.weight]
    }


def on_disk(model: nn.Module, report: PruneReport) -> Places:
    """The places of the folder that `model.save_pretrained` writes.

    Found by sending the number of every row, in place of its weights, through the conversion that transformers applies when it
    saves. Raises `InvalidInput` when a row does not come out as a row.
    """
    from transformers.core_model_loading import revert_weight_conversion

    markers: dict[str, Tensor] = {}
    starts: dict[str, int] = {}
    weights: list[tuple[int, str, int]] = []
    total = 0
    shapes = {name: parameter.shape for name, parameter in model.state_dict().items()}
    for layer in report.layers:
        ref, num_rows = layer.weight, layer.shape[0]
        if ref.parameter not in markers:
            experts = 1 if ref.expert is None else shapes[ref.parameter][0]
            marks = torch.arange(total, total + experts * num_rows).view(experts, num_rows, 1)
            marks = marks.mT if ref.transposed else marks
            markers[ref.parameter], starts[ref.parameter] = (marks[0] if ref.expert is None else marks), total
            total += experts * num_rows
        weights.append((starts[ref.parameter] + (ref.expert or 0) * num_rows, layer.name, num_rows))
    try:
        stored = revert_weight_conversion(model, dict(markers))  # type: ignore[arg-type]
    except (RuntimeError, ValueError, AttributeError, KeyError) as error:
        raise InvalidInput(
            f"transformers cannot give the pruned weights their names in a checkpoint: {error}"
        ) from error
    weights.sort()
    places: dict[str, list[Place]] = {name: [] for _, name, _ in weights}
    for key, marks in stored.items():
        for run, mark in _runs(key, marks):
            for start, name, num_rows in weights[max(0, bisect_right(weights, mark, key=itemgetter(0)) - 1) :]:
                first, stop = max(mark, start), min(mark + run.count, start + num_rows)
                if start >= mark + run.count:
                    break
                if first < stop:
                    at = run.at + first - mark
                    places[name].append(Place(key, run.expert, run.transposed, at, first - start, stop - first))
    for _, name, num_rows in weights:
        if sum(place.count for place in places[name]) != num_rows:
            raise InvalidInput(f"Some rows of {name} do not come out as rows of a matrix of the checkpoint.")
    usual = as_in_the_model(report)
    as_before = {key for key, marks in stored.items() if key in markers and marks.shape == markers[key].shape}
    return {
        name: usual[name] if usual[name][0].key in as_before else tuple(sorted(found, key=lambda place: place.row))
        for name, found in places.items()
    }


def _runs(key: str, marks: Tensor) -> Iterable[tuple[Place, int]]:
    """Runs of consecutive marks in a tensor of the checkpoint, with the first mark of each."""
    if marks.ndim not in (2, 3) or 1 not in marks.shape[-2:]:
        raise InvalidInput(f"`{key}` does not hold the weights as rows of matrices.")
    transposed = marks.shape[-1] != 1
    lines = marks.squeeze(-2 if transposed else -1)
    for expert, line in enumerate(lines) if marks.ndim == 3 else [(None, lines)]:
        breaks = [0, *((line.diff() != 1).nonzero().flatten() + 1).tolist(), len(line)]
        for at, stop in pairwise(breaks):
            yield Place(key, expert, transposed, at, 0, stop - at), int(line[at])


def write_report(folder: Path, report: PruneReport, places: Places) -> None:
    """Write `sparsity24.json`: the report, and the places of the weights that lie elsewhere than in the model."""
    usual = as_in_the_model(report)
    moved = {name: [asdict(place) for place in found] for name, found in places.items() if found != usual[name]}
    write_atomic(folder / REPORT_NAME, json.dumps({**report.to_dict(), "stored": moved}, indent=1))


def read_report(folder: Path) -> tuple[PruneReport, Places] | None:
    """The report in a folder with the places of its weights, or None. Raises `InvalidInput` when it is damaged."""
    path = folder / REPORT_NAME
    if not path.exists():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        stored: Mapping[str, Sequence[Mapping[str, Any]]] = values.pop("stored", {})
        report = PruneReport.from_dict(values)
        moved = {name: tuple(Place(**place) for place in found) for name, found in stored.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{path} is not a report of ours ({error}). Remove it to check every matrix.") from error
    return report, {**as_in_the_model(report), **moved}
