"""Whole models: block by block, every block calibrated on what the pruned blocks before it give (reference 3.5)."""

from __future__ import annotations

import fnmatch
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from core.errors import InvalidInput
from core.progress import progress, track
from sparsity24.capture import GramCapture
from sparsity24.layer import prune_layer
from sparsity24.methods import Method, as_method
from sparsity24.problem import relative_loss
from sparsity24.prox import is_24
from sparsity24.refinement import check_settings

# Token ids, or what a tokenizer returns: `input_ids` and, where there is padding, `attention_mask`.
Batch = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class LayerReport:
    """One pruned weight: where it lies, its losses relative to Tr(W0 H W0^T), and the iterations of its method.

    `mask_rel_loss` is that of the method's own weights, `rel_loss` that after refinement. `mask_digest` is the start of the
    SHA-256 of the places of the non-zeros.
    """

    weight: WeightRef
    shape: tuple[int, int]
    mask_rel_loss: float
    rel_loss: float
    iterations: int
    mask_digest: str

    @property
    def name(self) -> str:
        """The name of the weight."""
        return self.weight.name


@dataclass(frozen=True)
class PruneReport:
    """What `prune_model` did."""

    method: str
    method_params: dict[str, Any]
    refine: str
    steps: int
    layers: tuple[LayerReport, ...]
    skipped: tuple[str, ...]
    num_tokens: int
    seconds: float
    solve_seconds: float

    @property
    def mean_rel_loss(self) -> float:
        """The mean over layers of the relative loss."""
        return sum(layer.rel_loss for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "mean_rel_loss": self.mean_rel_loss}


@dataclass(frozen=True)
class LayerGram:
    """A weight and the Gram of its inputs."""

    name: str
    weight: Float[Tensor, "rows width"]
    hessian: Float[Tensor, "width width"]


@torch.no_grad()
def prune_model(
    model: nn.Module,
    batches: Sequence[Batch],
    method: Method | str = "prox",
    *,
    refine: str = "cg",
    steps: int = 20,
    skip: Sequence[str] = (),
    strict: bool = False,
) -> PruneReport:
    """Prune the linear layers in the blocks of a transformers decoder to 2:4, in place.

    Block by block: the Grams of a block are collected on what the already pruned blocks give, its layers are pruned,
    and the block is run again with its new weights to make the next one's inputs. Embeddings, norms and the head stay
    dense, and so does what matches a pattern of `skip`. A layer whose width is not a multiple of 4 is left dense with a
    warning, or refused before anything is modified with `strict`. On any error the model is as it was before, for which the
    original weights are kept until the end.

    Raises `InvalidInput` on empty calibration, on NaN or infinite weights or activations (naming the layer), on
    quantised or meta weights, and on a model whose blocks are not found.
    """
    solver = as_method(method)
    check_settings(refine, steps, tol=0.0)
    started, solving = time.perf_counter(), 0.0
    blocks = find_blocks(model)
    wanted, skipped = _choose(model, blocks, skip, strict)
    layers: list[LayerReport] = []
    originals: dict[str, Tensor] = {}
    with _calm(model), _restored_on_error(wanted, originals):
        stack = _Stack.record(model, blocks, batches)
        last = max(index for index, name in enumerate(blocks) if _within(wanted, name))
        with progress(f"Pruning {len(wanted)} layers by {solver.name}", total=len(wanted)) as bar:
            for index, name in enumerate(blocks):
                if index > last:
                    break
                weights = _within(wanted, name)
                if not weights:
                    stack.advance(index)
                    continue
                for group, hessian in stack.grams(index, weights):
                    since = time.perf_counter()
                    for report, weight in _prune_group(solver, group, hessian, wanted, refine, steps):
                        originals[report.name] = wanted[report.name].detach().clone()
                        wanted[report.name].copy_(weight)
                        layers.append(report)
                        bar.advance(note=f"{report.name} relative loss {report.rel_loss:.4f}")
                    solving += time.perf_counter() - since
                if index < last:
                    stack.advance(index)
    return PruneReport(
        method=solver.name,
        method_params=_settings(solver),
        refine=refine,
        steps=steps,
        layers=tuple(layers),
        skipped=tuple(skipped),
        num_tokens=stack.num_tokens,
        seconds=time.perf_counter() - started,
        solve_seconds=solving,
    )


@torch.no_grad()
def dense_grams(model: nn.Module, batches: Sequence[Batch], *, num_blocks: int | None = None) -> list[LayerGram]:
    """Weight and Gram of every prunable layer of the first blocks, from the inputs of the dense model."""
    blocks = find_blocks(model)
    wanted, _ = _choose(model, blocks, block_skips(model, num_blocks), strict=False)
    found = []
    with _calm(model):
        stack = _Stack.record(model, blocks, batches)
        for index, name in track(list(enumerate(blocks))[:num_blocks], "Collecting Grams"):
            for group, hessian in stack.grams(index, _within(wanted, name)):
                found += [LayerGram(member, wanted[member].detach().float(), hessian) for member in group]
            stack.advance(index)
    return found


def _settings(method: Method) -> dict[str, Any]:
    # A user's own method need not be a dataclass; ours are.
    return asdict(method) if is_dataclass(method) and not isinstance(method, type) else {}


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a transformers decoder, by name, first to last (reference 10).

    The longest list of modules that transformers itself calls unsplittable, or that check-point as one layer; failing
    that, the longest list of modules.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    # transformers 5 gives a set on some models, a list on others, and None where nothing is declared.
    unsplittable = set(getattr(model, "_no_split_modules", None) or ())
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }

    def is_block(module: nn.Module) -> bool:
        return type(module).__name__ in unsplittable or isinstance(module, GradientCheckpointingLayer)

    candidates = {name: module for name, module in lists.items() if all(is_block(child) for child in module)} or lists
    if not candidates:
        raise InvalidInput(
            f"{type(model).__name__} has no list of blocks; prune its layers one by one with prune_layer."
        )
    name, blocks = max(candidates.items(), key=lambda item: len(item[1]))
    return {f"{name}.{index}": block for index, block in enumerate(blocks)}


def block_skips(model: nn.Module, num_blocks: int | None) -> list[str]:
    """Patterns for `skip` that leave all but the first blocks dense."""
    names = list(find_blocks(model))
    return [] if num_blocks is None else [f"{name}.*" for name in names[num_blocks:]]


def _choose(
    model: nn.Module, blocks: Mapping[str, nn.Module], skip: Sequence[str], strict: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights to prune, by name, all checked; and the names of the linear layers that are left dense."""
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    wanted: dict[str, Tensor] = {}
    chosen: set[int] = set()
    skipped, misfits = [], []
    for block_name, block in blocks.items():
        for inner, module in block.named_modules():
            name = f"{block_name}.{inner}"
            if not isinstance(module, nn.Linear):
                continue
            if any(fnmatch.fnmatch(name, pattern) for pattern in skip):
                skipped.append(name)
            elif module.weight.shape[1] % 4:
                misfits.append(f"{name} has {module.weight.shape[1]} inputs")
                skipped.append(name)
            else:
                if id(module.weight) in shared:
                    raise InvalidInput(
                        f"`{name}` is tied to an embedding, which stays dense. Leave it out with skip=['{name}']."
                    )
                # Layers that share one parameter are pruned once, on the inputs of all of them.
                if id(module.weight) not in chosen:
                    chosen.add(id(module.weight))
                    wanted[name] = module.weight
    unused = [pattern for pattern in skip if not any(fnmatch.fnmatch(name, pattern) for name in skipped)]
    if unused:
        raise InvalidInput(
            f"skip={unused} matches no linear layer of a block. Names look like {next(iter(wanted), skipped[:1])}."
        )
    if misfits:
        text = "2:4 groups run along the input axis, which must be a multiple of 4: " + "; ".join(misfits)
        if strict:
            raise InvalidInput(f"{text}. Leave them dense with skip=[...].")
        warnings.warn(f"{text}. They stay dense.", stacklevel=3)
    for name, weight in wanted.items():
        if weight.is_meta or not weight.is_floating_point():
            raise InvalidInput(
                f"`{name}` holds {weight.dtype} on {weight.device}: load the model with real floating-point weights."
            )
        if not torch.isfinite(weight).all():
            raise InvalidInput(f"The weight of `{name}` has NaN or infinite entries.")
    if not wanted:
        raise InvalidInput("Every linear layer is skipped: there is nothing to prune.")
    return wanted, skipped


def _within(wanted: Mapping[str, Tensor], block: str) -> dict[str, Tensor]:
    return {name: weight for name, weight in wanted.items() if name.startswith(f"{block}.")}


def _prune_group(
    solver: Method, group: Sequence[str], hessian: Tensor, wanted: Mapping[str, Tensor], refine: str, steps: int
) -> Iterator[tuple[LayerReport, Tensor]]:
    """Weights that share a Gram are stacked: rows are independent given H, and what depends on H is done once."""
    parts = [wanted[name].detach().float() for name in group]
    stacked = torch.cat(parts)
    if is_24(stacked):
        results, iterations = parts, 0
    else:
        pruned = prune_layer(stacked, hessian, solver, refine=refine, steps=steps, name=", ".join(group))
        results, iterations = list(torch.split(pruned.weight, [len(part) for part in parts])), pruned.iterations
    for name, before, after in zip(group, parts, results, strict=True):
        rounded = after.to(wanted[name].dtype)
        if not torch.isfinite(rounded).all() or not is_24(rounded):
            raise InvalidInput(
                f"Pruning `{name}` gave NaN, infinite or dense weights in {rounded.dtype}: its weights or inputs are too large "
                "to be squared. Leave it dense with skip=[...], or rescale the model."
            )
        shape = (before.shape[0], before.shape[1])
        yield LayerReport(name, shape, relative_loss(rounded.float(), before, hessian), iterations), rounded


@dataclass
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        if "hidden_states" in self.kwargs:
            output = block(*self.args, **{**self.kwargs, "hidden_states": hidden})
        else:
            output = block(hidden, *self.args[1:], **self.kwargs)
        return output[0] if isinstance(output, tuple) else output

    @property
    def hidden(self) -> Tensor:
        return self.kwargs["hidden_states"] if "hidden_states" in self.kwargs else self.args[0]


@dataclass
class _Stack:
    """The blocks, what each is called with, and the hidden states that enter the next one, a batch each."""

    blocks: list[nn.Module]
    names: list[str]
    calls: list[list[_Call]]
    hidden: list[Tensor]
    keep: list[Tensor | None] = field(default_factory=list)
    num_tokens: int = 0

    @classmethod
    def record(cls, model: nn.Module, blocks: Mapping[str, nn.Module], batches: Sequence[Batch]) -> _Stack:
        """Learn the arguments of every block for every batch.

        The first sequence runs through the dense model and must be reproduced by replaying the blocks one by one. Then
        the batches run through a model whose blocks return what they get: masks and rotary embeddings do not depend on it.
        """
        inputs = [_as_inputs(batch) for batch in batches]
        if not inputs or not sum(batch["input_ids"].numel() for batch in inputs):
            raise InvalidInput("Calibration is empty: give at least one batch with tokens.")
        stack = cls(list(blocks.values()), list(blocks), [], [])
        device = next(model.parameters()).device
        stand_in = stack._learn_from(model, {key: value.to(device) for key, value in _longest(inputs[0]).items()})
        for batch in inputs:
            on_device = {key: value.to(device) for key, value in batch.items()}
            calls, _ = _run_recording(model, stack.blocks, on_device, stand_in)
            stack.calls.append(calls)
            stack.hidden.append(calls[0].hidden)
            mask = batch.get("attention_mask")
            stack.keep.append(None if mask is None or bool(mask.all()) else mask.bool())
            stack.num_tokens += int(batch["input_ids"].numel() if mask is None else mask.sum())
        if stack.num_tokens == 0:
            raise InvalidInput("Calibration is all padding: give at least one batch with tokens.")
        return stack

    def grams(self, index: int, weights: Mapping[str, Tensor]) -> list[tuple[tuple[str, ...], Tensor]]:
        """The Gram of every group of weights of block `index` that share an input."""
        capture = GramCapture(weights)
        for call, hidden, keep in zip(self.calls, self.hidden, self.keep, strict=True):
            capture.batch(partial(call[index].run, self.blocks[index], hidden), keep)
        unused = set(weights) - {name for group in capture.groups for name in group}
        if unused:
            raise InvalidInput(f"No token went through {', '.join(sorted(unused))}. Leave them dense with skip=[...].")
        found = []
        for group in capture.groups:
            hessian = capture.grams[group[0]].mean()
            if not torch.isfinite(hessian).all():
                raise InvalidInput(f"The inputs of `{group[0]}` have NaN or infinite entries.")
            found.append((group, hessian))
        return found

    def advance(self, index: int) -> None:
        """Replace the hidden states by what block `index` makes of them."""
        for number, call in enumerate(self.calls):
            self.hidden[number] = call[index].run(self.blocks[index], self.hidden[number])

    def _learn_from(self, model: nn.Module, sequence: Mapping[str, Tensor]) -> Callable[..., Any]:
        """Check on one sequence that replay reproduces the dense model, and say what may stand in for a block."""
        calls, output = _run_recording(model, self.blocks, sequence, None)
        in_tuple = isinstance(output, tuple)
        expected = output[0] if in_tuple else output
        hidden = calls[0].hidden
        for block, call in zip(self.blocks, calls, strict=True):
            hidden = call.run(block, hidden)
        if not torch.isfinite(hidden).all():
            raise InvalidInput("The dense model gives NaN or infinite activations on the first calibration sequence.")
        if float((hidden - expected).abs().max() / expected.abs().max().clamp_min(1e-30)) > 1e-3:
            raise InvalidInput(
                f"Running the blocks of {self.names[0].rsplit('.', 1)[0]} one by one does not reproduce the model: it does "
                "something between blocks that replay cannot see."
            )
        return _return_hidden_in_tuple if in_tuple else _return_hidden


def _longest(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sequence of a batch with the least padding, as a batch of one."""
    mask = batch.get("attention_mask")
    row = 0 if mask is None else int(mask.sum(1).argmax())
    return {key: value[row : row + 1] for key, value in batch.items()}


def _as_inputs(batch: Batch) -> dict[str, Tensor]:
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        given = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"keys {sorted(inputs)}"
        raise InvalidInput(
            f"A calibration batch is a (batch, sequence) tensor of token ids, alone or as `input_ids`; got {given}."
        )
    return {key: inputs[key] for key in ("input_ids", "attention_mask") if inputs.get(key) is not None}


def _run_recording(
    model: nn.Module, blocks: Sequence[nn.Module], inputs: Mapping[str, Tensor], stand_in: Callable[..., Any] | None
) -> tuple[list[_Call], Any]:
    """The calls of all blocks in one forward pass, and what the last one returned; `stand_in` runs in their place."""
    calls: list[_Call] = []
    outputs: list[Any] = []

    def note_call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(_Call(args, dict(kwargs)))

    def note_output(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output)

    handles = [block.register_forward_pre_hook(note_call, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(note_output))
    # An instance may carry a forward of its own (accelerate's hooks put one there); most do not.
    own = [vars(block).get("forward") for block in blocks]
    # The head is not needed, and at a large vocabulary it is the dearest layer.
    body = getattr(model, "base_model", model)
    try:
        if stand_in is not None:
            for block in blocks:
                block.forward = stand_in
        body(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for block, forward in zip(blocks, own, strict=True):
            if forward is not None:
                block.forward = forward
            elif stand_in is not None:
                del block.forward
    if len(calls) != len(blocks):
        raise InvalidInput(
            f"The model called its {len(blocks)} blocks {len(calls)} times in one pass; replay needs once each."
        )
    return calls, outputs[0]


def _return_hidden(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _return_hidden_in_tuple(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
    return (hidden_states,)


@contextmanager
def _calm(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards every module's own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _restored_on_error(wanted: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for name, weight in originals.items():
            wanted[name].copy_(weight)
        raise
