"""Whole tensors and shards: FSDP2 for a model, and the way of any tensor into a checkpoint and back.

Each function takes plain tensors too, so the torch step reads the same on one process and on many.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, device: torch.device, world_size: int, dtype: torch.dtype | None) -> None:
    """Shard `model` over all processes in place; it computes in `dtype` (None: as it is) and reduces in float32.

    Each item of an outermost `nn.ModuleList` (a transformer's blocks) is gathered on its own, everything else together.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        # Every process may have drawn other initial weights; the first one's count, as in DDP.
        torch.distributed.broadcast(tensor.detach(), 0)
    mesh = init_device_mesh(device.type, (world_size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32)
    for unit in (*_units(model), model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)


def _units(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _units(child)


def local(tensor: Tensor) -> Tensor:
    """This process's part of `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`; a collective when it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """The whole `tensor` on the device of `like`, and cut as it is cut."""
    moved = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return moved
    # Every process has read the whole tensor, so each keeps its own shard without communication.
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def like_shard(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of which `part` is this process's part, cut as `like` is cut."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A copy on the host; bfloat16 and float8, which numpy does not have, as their bits."""
    plain = tensor.detach().cpu()
    if plain.dtype == torch.bfloat16 or (plain.is_floating_point() and plain.element_size() == 1):
        plain = plain.contiguous().view(torch.uint16 if plain.element_size() == 2 else torch.uint8)
    return np.array(plain.numpy())


def to_tensor(array: np.ndarray, dtype: str) -> Tensor:
    """The tensor that `to_numpy` was given; `dtype` is the name of its type (`float32`, `bfloat16`)."""
    tensor = torch.from_numpy(np.array(array))
    wanted: torch.dtype = getattr(torch, dtype)
    return tensor if tensor.dtype == wanted else tensor.view(wanted)
