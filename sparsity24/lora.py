"""Merging a LoRA adapter into a pruned model without losing the pattern: a plain merge fills every zero (reference 11)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from core.errors import InvalidInput, require
from sparsity24.packing import pack_bits, unpack_bits
from sparsity24.pattern import TWO_FOUR, Pattern
from sparsity24.weights import WeightRef


@dataclass(frozen=True)
class _Kept:
    """The mask of one weight, eight to a byte."""

    ref: WeightRef
    mask: UInt8[Tensor, "rows bytes"]


@torch.no_grad()
def merge_lora(
    model: Any,
    adapter: str | None = None,
    *,
    how: Literal["masked", "reproject"] = "masked",
    weights: Sequence[WeightRef] | None = None,
    pattern: Pattern = TWO_FOUR,
) -> nn.Module:
    """The base model of a `peft.PeftModel` with the adapter merged in; what followed the pattern follows it still.

    "masked" keeps the non-zeros where they were: (W + BA) on the mask of W. "reproject" keeps the largest of every group of the
    merged weight, which may move the mask (`verify` then says so). Weights that were dense are merged plainly. `adapter` is a
    name, by default the active one; `weights` are those of a `PruneReport`, by default every adapted nn.Linear and Conv1D. The
    base model is changed in place.

    Raises `InvalidInput`, before anything is changed, on what is no PeftModel, on an unknown or already merged adapter, on
    non-finite adapter weights, and on adapters of fused experts when `weights` does not say which they are; `MissingExtra`
    without peft.
    """
    peft = require("peft", "sparsity24")
    if how not in ("masked", "reproject"):
        raise InvalidInput(f'how is "masked" or "reproject"; got {how!r}.')
    if not isinstance(model, peft.PeftModel):
        raise InvalidInput(f"merge_lora takes a peft.PeftModel; got {type(model).__name__}.")
    if adapter is not None and adapter not in model.peft_config:
        raise InvalidInput(f"No adapter is called {adapter!r}; there are {', '.join(sorted(model.peft_config))}.")
    base = {_plain(name): parameter for name, parameter in model.named_parameters() if not _is_adapter(model, name)}
    refs = list(_adapted(model)) if weights is None else list(weights)
    _check(model, base, refs)
    masks = [
        _Kept(ref, pack_bits(weight != 0))
        for ref in refs
        if _follows(weight := ref.of(base[ref.parameter].detach()), pattern)
    ]
    merged: nn.Module = model.merge_and_unload(safe_merge=True, adapter_names=None if adapter is None else [adapter])
    after = dict(merged.named_parameters(remove_duplicate=False))
    for kept in masks:
        weight = kept.ref.of(after[kept.ref.parameter].detach())
        before = unpack_bits(kept.mask, weight.shape[1]).to(weight.device)
        mask = before if how == "masked" else pattern.mask(weight.abs())
        # Not a product: that would leave minus zeros.
        weight.copy_(torch.where(mask, weight, 0))
    return merged


def _follows(weight: Tensor, pattern: Pattern) -> bool:
    return weight.shape[1] % pattern.m == 0 and pattern.holds(weight)


def _is_adapter(model: Any, name: str) -> bool:
    return model.base_model.prefix in name


def _plain(name: str) -> str:
    """The name that a parameter has in the base model."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _adapted(model: Any) -> Iterator[WeightRef]:
    """The weights of adapted nn.Linear and Conv1D layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    for name, module in model.base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
            if isinstance(layer, nn.Linear | Conv1D):
                plain = name.replace(".base_layer", "")
                yield WeightRef(plain, f"{plain}.weight", transposed=isinstance(layer, Conv1D))


def _check(model: Any, base: dict[str, nn.Parameter], refs: Sequence[WeightRef]) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    named = {ref.parameter for ref in refs}
    unknown = sorted(named - set(base))
    if unknown:
        raise InvalidInput(f"The model has no parameter `{unknown[0]}`, which the weights name.")
    for name, module in model.base_model.model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if module.merged_adapters:
            raise InvalidInput(f"An adapter is merged into `{name}` already: its mask is lost. Unmerge it first.")
        target = getattr(module, "parameter_name", None)
        if target is not None:
            plain = f"{name.replace('.base_layer', '')}.{target}"
            if base[plain].ndim == 3 and plain not in named:
                raise InvalidInput(f"`{plain}` is a stack of experts: give weights=, which say where its inputs are.")
    for name, parameter in model.named_parameters():
        if _is_adapter(model, name) and not torch.isfinite(parameter).all():
            raise InvalidInput(f"`{name}` has NaN or infinite entries.")
