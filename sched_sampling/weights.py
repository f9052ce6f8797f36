"""What training changed of a model, as safetensors: the parameters with a gradient, and nothing else.

For a LoRA model that is the adapter alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import CheckpointError
from core.files import write_atomic


def trained_state(model: Any) -> dict[str, Tensor]:
    """A copy of every parameter with `requires_grad`, by name, on the CPU."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def restore(model: Any, state: Mapping[str, Tensor]) -> None:
    """Put a state of `trained_state` back. Raises `CheckpointError` when the model has other parameters to train."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if parameters.keys() != state.keys():
        raise CheckpointError(
            f"The saved weights are those of another model: {sorted(parameters.keys() ^ state.keys())[:3]} differ."
        )
    for name, parameter in parameters.items():
        parameter.copy_(state[name])


def save_trained(model: Any, path: Path) -> None:
    """Write `trained_state(model)` atomically."""
    from safetensors.torch import save

    write_atomic(path, save({name: tensor.contiguous() for name, tensor in trained_state(model).items()}))


def load_trained(model: Any, path: Path) -> None:
    """Put back what `save_trained` wrote."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(f"{path} is missing, though its round is finished. Remove the folder and run again.")
    restore(model, load_file(path))
