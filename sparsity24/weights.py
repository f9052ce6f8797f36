"""Which matrices of a model are pruned, and where each lies: a parameter, one expert of it, perhaps stored transposed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from core.errors import InvalidInput
from sparsity24.pattern import Pattern
from sparsity24.prox import all_finite


@dataclass(frozen=True)
class WeightRef:
    """One (rows, width) weight inside a parameter of a model.

    `name` is the module's name for a layer of its own, and `parameter[expert]` for an expert of a fused parameter.
    `parameter` is the key in the state dict. `transposed` weights are stored (width, rows), as GPT-2's Conv1D does.
    """

    name: str
    parameter: str
    expert: int | None = None
    transposed: bool = False

    def of(self, parameter: Float[Tensor, "..."]) -> Float[Tensor, "rows width"]:
        """The weight as a (rows, width) view of the parameter: writing to it writes to the parameter."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        return matrix.t() if self.transposed else matrix


@dataclass(frozen=True)
class Selection:
    """The weights to prune, block by block, those that share an input together; and the names of what stays dense."""

    groups: dict[str, list[tuple[WeightRef, ...]]]
    skipped: tuple[str, ...]

    @property
    def num_weights(self) -> int:
        """How many weights will be pruned."""
        return sum(len(group) for groups in self.groups.values() for group in groups)


def matrices(model: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[str, dict[str, nn.Parameter]]:
    """By block, the parameters of two or three dimensions that a product could take: no embedding, no router."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    num_experts = _num_experts(model)
    for name, block in blocks.items():
        own = found.setdefault(name, {})
        for inner, module in block.named_modules():
            if isinstance(module, nn.Embedding):
                continue
            for leaf, parameter in module.named_parameters(recurse=False):
                key = ".".join(part for part in (name, inner, leaf) if part)
                # A parameter that several layers share goes by the first one's name.
                if any(parameter is other for other in own.values()):
                    continue
                if parameter.ndim in (2, 3) and not _routes(inner, module, parameter, num_experts):
                    own[key] = parameter
    return found


def _num_experts(model: nn.Module) -> set[int]:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return {count for name in names if isinstance(count := getattr(text, name, None), int)}


def _routes(name: str, module: nn.Module, parameter: Tensor, num_experts: set[int]) -> bool:
    """Whether a parameter chooses experts: its name or class says so and its output is a score for each, or one."""
    last = name.rpartition(".")[2]
    named = re.search(r"(^|_)(router|gate)$", last) is not None or "Router" in type(module).__name__
    return named and parameter.ndim == 2 and bool({1, *num_experts} & set(parameter.shape))


def check_plain(model: nn.Module) -> None:
    """Refuse a model that carries adapters: their matrices are no weights to prune, and cover those that are."""
    adapters = [name for name, module in model.named_modules() if type(module).__module__.startswith("peft.")]
    if adapters:
        raise InvalidInput(
            f"The model carries adapters (`{adapters[-1]}`). Merge them first, with sparsity24.merge_lora or merge_and_unload."
        )


def check_real(parameters: Mapping[str, Tensor]) -> None:
    """Refuse weights that cannot be pruned as they are: quantised, on the meta device, sharded over devices."""
    from torch.distributed.tensor import DTensor

    for name, weight in parameters.items():
        if isinstance(weight, DTensor):
            raise InvalidInput(
                f"`{name}` is sharded over devices (DTensor). Prune the whole model before sharding it; several processes "
                "may share the work under torchrun."
            )
        if weight.is_meta or not weight.is_floating_point():
            raise InvalidInput(
                f"`{name}` holds {weight.dtype} on {weight.device}: load the model with real floating-point weights, or "
                "stream it from its files with prune_checkpoint."
            )


def check_finite(parameters: Mapping[str, Tensor]) -> None:
    """Refuse weights with NaN or infinite entries."""
    for name, weight in parameters.items():
        if not all_finite(weight):
            raise InvalidInput(f"The weight `{name}` has NaN or infinite entries.")


def select(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    found: Mapping[str, Sequence[tuple[WeightRef, ...]]],
    *,
    pattern: Pattern,
    skip: Sequence[str],
    strict: bool,
) -> Selection:
    """What is pruned of what a pass `found`, after `skip`, widths that do not fit, and weights that are one parameter.

    `found` gives each block's weights in groups that share an input. Raises `InvalidInput` on a pattern of `skip` that
    matches nothing, on a weight tied to an embedding, when nothing is left, and with `strict` on widths that do not fit.
    """
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen: set[int] = set()
    skipped, misfits = [], []

    def wanted(ref: WeightRef) -> bool:
        parameter = parameters[ref.parameter]
        width = parameter.shape[-2] if ref.transposed else parameter.shape[-1]
        if any(fnmatch(ref.name, given) for given in skip):
            skipped.append(ref.name)
        elif width % pattern.m:
            misfits.append(f"{ref.name} has {width} inputs")
            skipped.append(ref.name)
        elif id(parameter) in tied:
            raise InvalidInput(
                f"`{ref.name}` is tied to an embedding, which stays dense. Leave it out with skip=['{ref.name}']."
            )
        else:
            return True
        return False

    groups: dict[str, list[tuple[WeightRef, ...]]] = {}
    for name in blocks:
        kept = [tuple(filter(wanted, group)) for group in found.get(name, ())]
        # Blocks that share one parameter: it is pruned where it comes first.
        own = [tuple(ref for ref in group if id(parameters[ref.parameter]) not in chosen) for group in kept]
        chosen |= {id(parameters[ref.parameter]) for group in own for ref in group}
        groups[name] = [group for group in own if group]
    names = [ref.name for block in found.values() for group in block for ref in group]
    unused = [given for given in skip if not any(fnmatch(name, given) for name in names)]
    if unused:
        raise InvalidInput(f"skip={unused} matches no weight of a block. Names look like {names[:1]}.")
    if misfits:
        text = f"{pattern} groups run along the input axis, which must be a multiple of {pattern.m}: " + "; ".join(
            misfits
        )
        if strict:
            raise InvalidInput(f"{text}. Leave them dense with skip=[...].")
        warnings.warn(f"{text}. They stay dense.", stacklevel=4)
    selection = Selection(groups, tuple(skipped))
    if not selection.num_weights:
        raise InvalidInput("Every weight is skipped: there is nothing to prune.")
    return selection


def expanded(name: str, parameter: Tensor, transposed: bool) -> Iterator[WeightRef]:
    """The weights inside a parameter: itself, or one for each expert."""
    if parameter.ndim == 2:
        yield WeightRef(name.removesuffix(".weight"), name, None, transposed)
    else:
        for expert in range(len(parameter)):
            yield WeightRef(f"{name}[{expert}]", name, expert, transposed)
