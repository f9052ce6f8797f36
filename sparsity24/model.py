"""Whole models: block by block, every block calibrated on what the pruned blocks before it give (reference 3.5)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from core.data import cache
from core.errors import InvalidInput
from core.progress import Bar, progress, track
from sparsity24 import refinement
from sparsity24.blocks import (
    Home,
    InMemory,
    OnDevice,
    Stack,
    Survey,
    block_skips,
    calm,
    find_blocks,
    record,
    survey,
)
from sparsity24.calibration import Batch, as_inputs
from sparsity24.grams import Group, LayerInputs, collect, shifted_target
from sparsity24.layer import prune_layer
from sparsity24.methods import Method, as_method, pattern_of
from sparsity24.packing import mask_digest
from sparsity24.pattern import TWO_FOUR
from sparsity24.problem import LayerContext, relative_losses
from sparsity24.prox import all_finite
from sparsity24.ranks import Ranks
from sparsity24.resume import FinishedBlocks, digest
from sparsity24.weights import Selection, WeightRef, check_plain, check_real, matrices, select


@dataclass(frozen=True)
class LayerReport:
    """One pruned weight: where it lies, its losses relative to Tr(W0 H W0^T), and the iterations of its method.

    `mask_rel_loss` is that of the method's own weights, `rel_loss` that after refinement. `mask_digest` is the start of the
    SHA-256 of the places of the non-zeros; `num_tokens` is how many tokens of calibration reached the weight,
    `relative_residual` how far its refinement got (that of the weights which share its input; None without one).
    """

    weight: WeightRef
    shape: tuple[int, int]
    mask_rel_loss: float
    rel_loss: float
    iterations: int
    mask_digest: str
    num_tokens: int = 0
    relative_residual: float | None = None

    @property
    def name(self) -> str:
        """The name of the weight."""
        return self.weight.name

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerReport:
        """The report that `asdict` gave, from its JSON."""
        return cls(**{**values, "weight": WeightRef(**values["weight"]), "shape": tuple(values["shape"])})


@dataclass(frozen=True)
class PruneReport:
    """What `prune_model` did. `calibration` says in words where the tokens came from, where the caller knows."""

    method: str
    method_params: dict[str, Any]
    pattern: str
    refine: str
    steps: int
    layers: tuple[LayerReport, ...]
    skipped: tuple[str, ...]
    num_tokens: int
    seconds: float
    solve_seconds: float
    target_mix: float = 0.0
    tol: float = 1e-4
    calibration: str = ""

    @property
    def mean_rel_loss(self) -> float:
        """The mean over layers of the relative loss."""
        return sum(layer.rel_loss for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "mean_rel_loss": self.mean_rel_loss}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruneReport:
        """The report that `to_dict` gave, from its JSON."""
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        layers = tuple(LayerReport.from_dict(layer) for layer in values["layers"])
        return cls(**{**known, "layers": layers, "skipped": tuple(values["skipped"])})


@dataclass(frozen=True)
class LayerGram:
    """A weight and the Gram of its inputs."""

    name: str
    weight: Float[Tensor, "rows width"]
    hessian: Float[Tensor, "width width"]


@dataclass(frozen=True)
class Job:
    """How every weight is pruned."""

    method: Method
    refine: str = "cg"
    steps: int = 20
    tol: float = 1e-4
    target_mix: float = 0.0

    def __post_init__(self) -> None:
        """Refuse settings under which hours of work would be lost."""
        refinement.check_settings(self.refine, self.steps, self.tol)
        if not 0 <= self.target_mix <= 1:
            raise InvalidInput(f"`target_mix` must be in [0, 1], 0.5 being half-way; got {self.target_mix}.")

    def key(self, inputs: Sequence[Mapping[str, Tensor]], skip: Sequence[str]) -> dict[str, Any]:
        """All that determines the result but the weights."""
        calibration = cache.digest(digest(batch) for batch in inputs)
        return {**self.settings(), "skip": sorted(skip), "calibration": calibration}

    def settings(self) -> dict[str, Any]:
        """The fields that a report shows."""
        # A user's own method need not be a dataclass; ours are.
        method = self.method
        params: dict[str, Any] = asdict(method) if is_dataclass(method) and not isinstance(method, type) else {}
        return {
            "method": method.name,
            "method_params": {name: value for name, value in params.items() if name != "pattern"},
            "pattern": str(pattern_of(method)),
            "refine": self.refine,
            "steps": self.steps,
            "tol": self.tol,
            "target_mix": self.target_mix,
        }


@torch.no_grad()
def prune_model(
    model: nn.Module,
    batches: Sequence[Batch],
    method: Method | str = "prox",
    *,
    refine: str = "cg",
    steps: int = 20,
    tol: float = 1e-4,
    skip: Sequence[str] = (),
    strict: bool = False,
    target_mix: float = 0.0,
    resume_dir: Path | None = None,
    device: torch.device | str | None = None,
) -> PruneReport:
    """Prune the weights in the blocks of a transformers model to the method's pattern, 2:4 unless it has another, in place.

    Block by block: the Grams of a block are collected on what the already pruned blocks give, its weights are pruned,
    and the block is run again with them to make the next one's inputs. Embeddings, norms, routers and the head stay
    dense, and so does what matches a pattern of `skip`. A weight whose width does not fit is left dense with a warning, or
    refused before anything is modified with `strict`.

    `refine`, `steps` and `tol` are those of `prune_layer`. `target_mix` aims at a target that lies so far from W0's output
    on the pruned stack's inputs towards the dense model's (0.5: half-way, reference 3.5). With `resume_dir` every finished
    block is kept in a file there, and a run with the same settings, calibration and weights goes on after them. `device` is
    where a block is computed when the model itself lies in host memory. Under `torchrun` the processes share the batches and
    the rows. On any error the model is as it was before, for which the original weights are kept until the end; a model too
    large for that is streamed by `sparsity24.streaming.prune_checkpoint`.

    Raises `InvalidInput` on empty calibration, on NaN or infinite weights or activations (naming the layer), on
    quantised or meta weights, and on a model whose blocks are not found.
    """
    job = Job(as_method(method), refine, steps, tol, target_mix)
    started = time.perf_counter()
    blocks = find_blocks(model)
    check_plain(model)
    found = matrices(model, blocks)
    check_real(
        {
            name: weight
            for own in found.values()
            for name, weight in own.items()
            if not any(fnmatch(name.removesuffix(".weight"), given) for given in skip)
        }
    )
    inputs = as_inputs(model, batches)
    home: Home = InMemory() if device is None else OnDevice(blocks, torch.device(device))
    originals: dict[str, tuple[Tensor, Tensor]] = {}
    with calm(model), _restored_on_error(originals):
        seen = survey(model, home, one_sequence(inputs))
        selection = select(model, blocks, seen.groups, pattern=pattern_of(job.method), skip=skip, strict=strict)
        for name in (ref.parameter for groups in selection.groups.values() for group in groups for ref in group):
            parameter = model.get_parameter(name)
            originals.setdefault(name, (parameter, parameter.detach().clone()))
        finished = FinishedBlocks(resume_dir, job.key(inputs, skip)) if resume_dir is not None else None
        run = prune_blocks(model, home, seen, selection, inputs, job, finished=finished)
        return run.report(job, selection, time.perf_counter() - started)


@dataclass(frozen=True)
class Pruned:
    """What pruning all blocks gave."""

    layers: tuple[LayerReport, ...]
    num_tokens: int
    solve_seconds: float

    def report(self, job: Job, selection: Selection, seconds: float) -> PruneReport:
        """The report, with a warning where Grams are singular."""
        poor = [layer for layer in self.layers if layer.num_tokens < layer.shape[1]]
        if poor:
            warnings.warn(
                f"{len(poor)} of {len(self.layers)} weights saw fewer tokens than they have inputs, {poor[0].name} "
                f"{poor[0].num_tokens} for {poor[0].shape[1]}: their Grams are singular and the solution fits the draw. "
                "Use more calibration.",
                stacklevel=3,
            )
        return PruneReport(
            **job.settings(),
            layers=self.layers,
            skipped=selection.skipped,
            num_tokens=self.num_tokens,
            seconds=seconds,
            solve_seconds=self.solve_seconds,
        )


def prune_blocks(
    model: nn.Module,
    home: Home,
    seen: Survey,
    selection: Selection,
    inputs: list[dict[str, Tensor]],
    job: Job,
    *,
    finished: FinishedBlocks | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Pruned:
    """Prune every block that the selection names, stack by stack; `finished` blocks are taken as they are.

    `dtypes` says which parameters are kept in another dtype than they are computed in; their weights are rounded to it.
    """
    ranks = Ranks.current()
    own = ranks.share(inputs)
    layers: list[LayerReport] = []
    num_tokens, solving = 0, 0.0
    if job.target_mix and len(seen.stacks) > 1:
        raise InvalidInput(
            "The half-way target needs one stack of blocks: a decoder would see the pruned encoder's states."
        )
    remaining = {name for name, groups in selection.groups.items() if groups}
    with progress(f"Pruning {selection.num_weights} matrices by {job.method.name}", total=selection.num_weights) as bar:
        for number, blocks in enumerate(seen.stacks):
            if not remaining & set(blocks):
                continue
            stack = record(model, home, seen, number, own)
            num_tokens += stack.num_tokens
            dense = replace(stack, hidden=list(stack.hidden)) if job.target_mix else None
            for index, (name, block) in enumerate(blocks.items()):
                with home.resident(name, dense=True):
                    parameters = {f"{name}.{key}": value for key, value in block.named_parameters()}
                    reports, seconds = _one_block(
                        stack,
                        dense,
                        index,
                        selection.groups.get(name, []),
                        parameters,
                        job,
                        finished,
                        dtypes or {},
                        bar,
                    )
                    layers += reports
                    solving += seconds
                    remaining.discard(name)
                    if not remaining & set(blocks):
                        break
                    stack.advance(index)
    return Pruned(tuple(layers), int(ranks.total(torch.tensor(num_tokens))), solving)


def _one_block(
    stack: Stack,
    dense: Stack | None,
    index: int,
    groups: Sequence[Group],
    parameters: Mapping[str, nn.Parameter],
    job: Job,
    finished: FinishedBlocks | None,
    dtypes: Mapping[str, torch.dtype],
    bar: Bar,
) -> tuple[list[LayerReport], float]:
    """Prune one resident block, or take it as it was finished: its reports, and the seconds that the solves took."""
    if not groups:
        if dense is not None:
            dense.advance(index)
        return [], 0.0
    name = list(stack.blocks)[index]
    before = digest(parameters) if finished is not None else ""
    if finished is not None and finished.path(name).exists():
        if dense is not None:
            dense.advance(index)
        done = finished.take(name, before, parameters)
        bar.advance(len(done), note=f"{name} was done before")
        return done, 0.0
    ranks = Ranks.current()
    reports: list[LayerReport] = []
    seen = collect(stack, index, groups, ranks=ranks, dense=dense)
    since = time.perf_counter()
    for group in groups:
        reports += _prune_group(job, group, seen.pop(group), parameters, dtypes, ranks)
        bar.advance(len(group), note=f"{_short(group[-1].name)} loss {reports[-1].rel_loss:.3f}")
    seconds = time.perf_counter() - since
    if finished is not None and ranks.rank == 0:
        finished.put(name, before, parameters, reports)
    return reports, seconds


def _short(name: str) -> str:
    """The name from the number of its block on: what fits beside a progress bar."""
    parts = name.split(".")
    return ".".join(parts[next((i for i, part in enumerate(parts) if part.isdigit()), 0) :])


def _prune_group(
    job: Job,
    group: Group,
    inputs: LayerInputs,
    parameters: Mapping[str, nn.Parameter],
    dtypes: Mapping[str, torch.dtype],
    ranks: Ranks,
) -> Iterator[LayerReport]:
    """Prune weights that share a Gram, stacked: rows are independent given it, and what depends on it is done once."""
    views = [ref.of(parameters[ref.parameter]) for ref in group]
    kept_in = [dtypes.get(ref.parameter, view.dtype) for ref, view in zip(group, views, strict=True)]
    parts = [view.detach().float() for view in views]
    names = ", ".join(ref.name for ref in group)
    pattern = pattern_of(job.method)
    # Rows that follow the pattern already stay bit for bit, whatever else is in their stack.
    sparse = [pattern.holds(part) for part in parts]
    target = shifted_target(torch.cat(parts), inputs, job.target_mix)
    sizes = [len(part) for part in parts]
    if all(sparse):
        results, raw_parts, iterations, residual = parts, parts, 0, None
    else:
        split = ranks.size > 1 and getattr(job.method, "splits_rows", False)
        mine = ranks.rows(len(target)) if split else slice(None)
        context = LayerContext(inputs.mean, ranks.total) if split else LayerContext(inputs.mean)
        pruned = prune_layer(target[mine], inputs.gram, job.method, "none", context=context, name=names)
        raw, weight, iterations, residual = pruned.weight, pruned.weight, pruned.iterations, None
        if job.refine != "none":
            weight, info = refinement.refine(
                raw, pruned.mask, target[mine], inputs.gram, job.refine, steps=job.steps, tol=job.tol
            )
            residual = info.relative_residual
        if split:
            raw, weight = ranks.gather(raw, len(target)), ranks.gather(weight, len(target))
        results, raw_parts = list(torch.split(weight, sizes)), list(torch.split(raw, sizes))
    for ref, view, keep, before, after, goal, dtype in zip(
        group, views, sparse, raw_parts, results, torch.split(target, sizes), kept_in, strict=True
    ):
        rounded = view.detach().to(dtype) if keep else after.to(dtype)
        if not all_finite(rounded) or not pattern.holds(rounded):
            raise InvalidInput(
                f"Pruning `{ref.name}` gave NaN, infinite or dense weights in {dtype}: its weights or inputs are too large "
                "to be squared. Leave it dense with skip=[...], or rescale the model."
            )
        raw_loss, loss = relative_losses([before, rounded.float()], goal, inputs.gram)
        view.copy_(rounded)
        shape = (view.shape[0], view.shape[1])
        yield LayerReport(ref, shape, raw_loss, loss, iterations, mask_digest(rounded), inputs.num_tokens, residual)


@torch.no_grad()
def dense_grams(model: nn.Module, batches: Sequence[Batch], *, num_blocks: int | None = None) -> list[LayerGram]:
    """Weight and Gram of every prunable weight of the first blocks, from the inputs of the dense model."""
    inputs = as_inputs(model, batches)
    home = InMemory()
    found = []
    with calm(model):
        seen = survey(model, home, one_sequence(inputs))
        skip = block_skips(model, num_blocks)
        selection = select(model, seen.blocks, seen.groups, pattern=TWO_FOUR, skip=skip, strict=False)
        for number in range(len(seen.stacks)):
            stack = record(model, home, seen, number, inputs)
            for index, name in enumerate(track(list(stack.blocks)[:num_blocks], "Collecting Grams")):
                block = stack.blocks[name]
                for group, layer in collect(stack, index, selection.groups.get(name, []), ranks=Ranks()).items():
                    for ref in group:
                        weight = ref.of(block.get_parameter(ref.parameter.removeprefix(f"{name}.")))
                        found.append(LayerGram(ref.name, weight.detach().float(), layer.gram))
                stack.advance(index)
    return found


def one_sequence(inputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The first sequence of the first batch, as a batch of one."""
    return {key: value[:1] for key, value in inputs[0].items()}


@contextmanager
def _restored_on_error(originals: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for parameter, before in originals.values():
            parameter.copy_(before)
        raise
