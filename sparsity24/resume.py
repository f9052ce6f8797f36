"""Blocks that are done, each in one file, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.errors import CheckpointError
from core.files import write_atomic

if TYPE_CHECKING:
    from sparsity24.model import LayerReport

KEY_NAME = "run.json"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of tensors and their names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def unfinished(output_dir: Path) -> Path:
    """Where a run keeps what it has until `output_dir` is complete."""
    return output_dir.with_name(f".{output_dir.name}.unfinished")


class FinishedBlocks:
    """A folder of finished blocks of one run: weights, layer reports, and the digest of the dense weights they came from.

    `key` says everything that determines the result but the weights; a folder with another key is refused. `stored` gives a
    parameter's name and dtype in the files, as they are in memory unless given.
    """

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        stored: Callable[[str, Tensor], tuple[str, torch.dtype]] = lambda name, tensor: (name, tensor.dtype),
    ) -> None:
        self.folder, self._stored = folder, stored
        self._key = json.dumps(key, indent=1, sort_keys=True, default=str)
        known = folder / KEY_NAME
        if not known.exists() and any(folder.glob("*.safetensors")):
            raise CheckpointError(f"{folder} holds blocks of an unknown run. Remove it, or choose another folder.")
        if known.exists() and known.read_text() != self._key:
            before = json.loads(known.read_text())
            now = json.loads(self._key)
            changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
            raise CheckpointError(
                f"{folder} holds an unfinished run with other settings ({', '.join(changed)}). Finish that one, remove the "
                "folder, or choose another."
            )

    def path(self, name: str) -> Path:
        """The file of a block."""
        return self.folder / f"{name}.safetensors"

    def take(self, name: str, dense: str, parameters: Mapping[str, Tensor]) -> list[LayerReport]:
        """Put the finished weights of a block into `parameters`, and return its reports.

        Raises `CheckpointError` when the block's weights before, of which `dense` is the digest, were others.
        """
        from sparsity24.model import LayerReport

        with safe_open(self.path(name), framework="pt") as file:
            header = json.loads(file.metadata()["block"])
            if header["dense"] != dense:
                raise CheckpointError(
                    f"{self.path(name)} came from other weights than this model's. Remove {self.folder} to start anew."
                )
            for key, parameter in parameters.items():
                parameter.copy_(file.get_tensor(self._stored(key, parameter)[0]))
        return [LayerReport.from_dict(report) for report in header["reports"]]

    def put(self, name: str, dense: str, parameters: Mapping[str, Tensor], reports: Sequence[LayerReport]) -> None:
        """Write a finished block; `dense` is the digest of its weights before."""
        header = {"dense": dense, "reports": [asdict(report) for report in reports]}
        tensors = {}
        for key, parameter in parameters.items():
            stored, dtype = self._stored(key, parameter)
            tensors[stored] = parameter.detach().to(device="cpu", dtype=dtype).contiguous()
        # With the first block, so that a run that is refused before it leaves nothing.
        write_atomic(self.folder / KEY_NAME, self._key)
        partial = self.path(name).with_suffix(".partial")
        save_file(tensors, partial, metadata={"format": "pt", "block": json.dumps(header)})
        partial.replace(self.path(name))
