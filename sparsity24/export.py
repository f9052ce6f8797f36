"""Saving a pruned model with its report, and checking what any checkpoint really holds (reference 11)."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from core.errors import InvalidInput
from core.files import write_atomic
from core.progress import track
from sparsity24.model import PruneReport, find_blocks
from sparsity24.prox import group_support

REPORT_NAME = "sparsity24.json"


@dataclass(frozen=True)
class Verification:
    """For every linear weight that was looked at, the share of its groups of four that are 2:4."""

    shares: dict[str, float]

    @property
    def sparse(self) -> tuple[str, ...]:
        """The weights that are 2:4 throughout."""
        return tuple(name for name, share in self.shares.items() if share == 1)

    @property
    def dense(self) -> tuple[str, ...]:
        """The weights that are not."""
        return tuple(name for name, share in self.shares.items() if share < 1)


def save(model: Any, tokenizer: Any, output_dir: Path, report: PruneReport) -> Path:
    """Write a folder that `from_pretrained` loads everywhere: safetensors with explicit zeros, tokenizer, report.

    Complete or absent: it is written under a temporary name and moved. Raises `InvalidInput` when `output_dir` exists.
    """
    if output_dir.exists():
        raise InvalidInput(f"{output_dir} exists. Choose another folder, or remove it first.")
    partial = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_atomic(partial / REPORT_NAME, json.dumps(report.to_dict(), indent=1))
        partial.replace(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output_dir


def verify(source: Path | nn.Module) -> Verification:
    """How much of each linear weight is 2:4: of a model's blocks, or of a folder's safetensors.

    In a folder that holds our report the pruned weights are checked, else every matrix whose width is a multiple of 4.
    Raises `InvalidInput` when there is nothing to check, or a weight of the report is not in the folder.
    """
    shares = dict(_of_model(source) if isinstance(source, nn.Module) else _of_folder(Path(source)))
    if not shares:
        raise InvalidInput(f"{source} holds no matrix whose width is a multiple of 4.")
    return Verification(shares)


def _share(weight: Tensor) -> float:
    return float((group_support(weight) <= 2).double().mean())


def _of_model(model: nn.Module) -> dict[str, float]:
    linears = {
        f"{name}.{inner}": module.weight
        for name, block in find_blocks(model).items()
        for inner, module in block.named_modules()
        if isinstance(module, nn.Linear) and module.weight.shape[1] % 4 == 0
    }
    return {name: _share(weight.detach()) for name, weight in linears.items()}


def _names_in(report: Path) -> set[str]:
    try:
        return {layer["name"] for layer in json.loads(report.read_text())["layers"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{report} is not a report of ours ({error}). Remove it to check every matrix.") from error


def _of_folder(folder: Path) -> dict[str, float]:
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InvalidInput(f"{folder} holds no *.safetensors. Give the folder of a saved model.")
    report = folder / REPORT_NAME
    named = _names_in(report) if report.exists() else None
    shares = {}
    for path in track(files, "Checking weights"):
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                name = key.removesuffix(".weight")
                shape = tensors.get_slice(key).get_shape()
                wanted = name in named if named is not None else len(shape) == 2 and shape[1] % 4 == 0
                if wanted:
                    shares[name] = _share(tensors.get_tensor(key))
    lost = (named or set()) - set(shares)
    if lost:
        raise InvalidInput(f"{folder} lacks weights that its report names: {', '.join(sorted(lost)[:3])}.")
    return shares
