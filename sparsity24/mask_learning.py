"""Masks learned end to end: the regulariser of reference 3.1 inside training (ProxSparse, arXiv 2502.00258; reference 4).

    learned = learn_masks(model, sequences, num_steps=400)          # the model is as before
    report = prune_model(model, sequences, learned, refine="cg")    # original weights on the masks, then polished

A copy of the model is trained on the language-model loss; after every optimiser step the proximal operator pulls each
group of four towards two non-zeros. The masks are the two largest of what was learned; the learned weights are dropped.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import InitVar, asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from core.errors import InvalidInput, unknown_name
from core.training.loop import Batches, Step, TrainingDiverged, fit
from core.training.sharding import local, whole
from core.training.torch import TorchStep
from sparsity24.blocks import InMemory, calm, survey
from sparsity24.calibration import Batch, as_inputs
from sparsity24.pattern import TWO_FOUR
from sparsity24.problem import ALONE, LayerContext, LayerResult, check_at_least, check_setting, prepared, result_of
from sparsity24.prox import all_finite, prox_planes, top2_mask
from sparsity24.resume import digest
from sparsity24.weights import WeightRef, check_plain, check_real, select

# Groups that go through the proximal operator at once: small weights together, so that calls do not dominate, and large
# ones in parts, so that the working memory stays small.
_BUCKET = 1 << 20


@dataclass(frozen=True)
class MaskLearning:
    """How masks are learned.

    With `scale_free` (ours), `learning_rate` is in units of the rms of each parameter, and the proximal operator works in
    units of the rms of each row (reference 3.3) with the step `lam * learning_rate` of that moment, as proximal gradient
    demands: a step of AdamW moves a weight by about the learning rate, and at `lam` = 1 the pull on the third entry of a
    typical group is about as long. One setting then serves all models. Without it both are absolute, and the operator has
    the same `lam` after every step whatever the learning rate, which is what ProxSparse publishes; such a `lam` is tied to
    the model's scale, the learning rate and the number of steps.

    `train` says which parameters learn: those to prune, or all. The rate rises for the share `warmup` of the steps, then
    falls linearly to zero, as published.
    """

    lam: float = 1.0
    learning_rate: float = 0.02
    scale_free: bool = True
    train: Literal["pruned", "all"] = "pruned"
    warmup: float = 0.1
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        """Refuse settings that no training could use."""
        check_at_least(0, lam=self.lam)
        for field in ("learning_rate", "max_grad_norm"):
            value = getattr(self, field)
            check_setting(math.isfinite(value) and value > 0, field, value, "a finite number above 0")
        check_setting(0 <= self.warmup <= 1, "warmup", self.warmup, "a share of the steps, from 0 to 1")
        check_setting(self.train in ("pruned", "all"), "train", self.train, "`pruned` or `all`")

    @classmethod
    def variant(cls, name: str) -> MaskLearning:
        """`default` (ours) or `paper` (ProxSparse as published, with its values for Llama-2-7B; see `PUBLISHED`)."""
        variants = {"default": cls(), "paper": _published(0.25)}
        if name not in variants:
            raise unknown_name("variant of mask learning", name, variants)
        return variants[name]


def _published(lam: float, learning_rate: float = 1e-4) -> MaskLearning:
    return MaskLearning(lam, learning_rate, scale_free=False, train="all")


# Reference 4; learning rates from the scripts of the authors' repository. Each is for 400 steps of one sequence of 4096
# tokens (OpenLLaMA: 2048).
PUBLISHED: Mapping[str, MaskLearning] = {
    "meta-llama/Llama-2-7b-hf": _published(0.25),
    "meta-llama/Llama-2-13b-hf": _published(0.5),
    "meta-llama/Llama-3.1-8B": _published(0.85, 5e-5),
    "openlm-research/open_llama_7b_v2": _published(1.0),
    "Qwen/Qwen2.5-14B": _published(0.2),
    "mistralai/Mistral-7B-v0.1": _published(20.0, 5e-5),
    "mistralai/Mistral-7B-v0.3": _published(25.0, 5e-5),
}


@dataclass(frozen=True)
class LearnedMasks:
    """Masks, how they were learned, and a pruning method: `prune_model` gives each weight of the same model its mask.

    `losses` are means over ten steps each. `share_24` is the share of groups that training left with at most two
    non-zeros, `changed` the share of kept places that the largest original magnitudes would not have kept.

    As a method it is handed rows without a name, stacked or split over processes, and knows them by their bits.
    """

    splits_rows: ClassVar[bool] = True

    settings: MaskLearning
    num_steps: int
    batch_size: int
    seed: int
    num_tokens: int
    losses: tuple[float, ...]
    share_24: float
    changed: float
    seconds: float
    skipped: tuple[str, ...]
    learned: InitVar[Mapping[str, tuple[Tensor, Tensor]]]

    def __post_init__(self, learned: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Stack the rows of every width and sort their keys."""
        tables: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        masks: dict[str, Tensor] = {}
        for width in sorted({mask.shape[1] for _, mask in learned.values()}):
            own = {name: part for name, part in learned.items() if part[1].shape[1] == width}
            stacked = torch.cat([mask for _, mask in own.values()])
            masks.update(zip(own, torch.split(stacked, [len(mask) for _, mask in own.values()]), strict=True))
            tables[width] = (*torch.cat([keys for keys, _ in own.values()]).sort(stable=True), stacked)
        # Not fields: a report writes down the fields of its method.
        object.__setattr__(self, "_tables", tables)
        object.__setattr__(self, "_masks", {name: masks[name] for name in learned})

    @property
    def name(self) -> str:
        """`end-to-end prox`."""
        return "end-to-end prox"

    @property
    def masks(self) -> Mapping[str, Bool[Tensor, "_ _"]]:
        """The masks by the name of the weight."""
        masks: Mapping[str, Tensor] = self.__dict__["_masks"]
        return masks

    def prune(
        self,
        dense: Float[Tensor, "rows width"],
        hessian: Float[Tensor, "width width"],
        context: LayerContext = ALONE,
    ) -> LayerResult:
        """The dense weights on their masks. Raises `InvalidInput` on rows that are not of the model that was learned on."""
        w0, h = prepared(dense, hessian)
        mask = self._mask_of(dense).to(dense.device)
        return result_of(w0 * mask, mask, dense, w0, h)

    def _mask_of(self, dense: Tensor) -> Tensor:
        tables: Mapping[int, tuple[Tensor, Tensor, Tensor]] = self.__dict__["_tables"]
        wanted = row_keys(dense).cpu()
        if dense.shape[1] in tables:
            keys, order, masks = tables[dense.shape[1]]
            at = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
            if torch.equal(keys[at], wanted):
                return masks[order[at]]
        raise InvalidInput(
            "These weights are not those that the masks were learned for. Prune the very model that learn_masks was given, "
            "with the same skip=[...], and with no other target than its own weights."
        )


def learn_masks(
    model: nn.Module,
    batches: Sequence[Batch],
    settings: MaskLearning | str = "default",
    *,
    num_steps: int = 400,
    batch_size: int = 1,
    skip: Sequence[str] = (),
    strict: bool = False,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
    gradient_accumulation_steps: int = 1,
    mixed_precision: Literal["no", "bf16"] = "no",
    parallel: Literal["auto", "ddp", "fsdp"] = "auto",
    device: str | torch.device | None = None,
) -> LearnedMasks:
    """The masks that `num_steps` of training on the sequences of `batches` find for the weights in the model's blocks.

    `model` is a transformers causal language model and stays bit for bit as it is: a copy learns, on `device` (None: an
    accelerator when there is one) and in float32, because a step is smaller than the rounding of half precision; give
    `mixed_precision="bf16"` to compute in it. That takes 16 bytes for each weight that learns and 4 for each other.
    `settings` is `default`, `paper`, one of `PUBLISHED` or your own. `skip` and `strict` are those of `prune_model`.

    Sequences come in a new order every pass; AdamW has no weight decay. With a `checkpoint_dir` an interrupted run goes on
    where its last checkpoint was, to the same masks. Under torchrun the processes share each batch; `parallel="fsdp"`
    also shards the copy, which needs weights stored (rows, width).

    Raises `InvalidInput` before any training on settings and data that do not fit and on models as `prune_model` does,
    `TrainingDiverged` when the loss or a weight is no longer finite.
    """
    started = time.perf_counter()
    chosen = MaskLearning.variant(settings) if isinstance(settings, str) else settings
    check_setting(num_steps >= 1, "num_steps", num_steps, "at least 1")
    sequences = _sequences(model, batches)
    refs, skipped = _refs(model, max(sequences, key=len), skip, strict)
    if parallel == "fsdp" and any(ref.expert is not None or ref.transposed for ref in refs):
        raise InvalidInput(
            "parallel='fsdp' cuts parameters along their first axis, which keeps groups whole only in weights stored "
            f"(rows, width); {type(model).__name__} has others. Use parallel='ddp', or skip them."
        )
    data = Batches(len(sequences), batch_size, seed)
    inner = _torch_step(
        _trainable_copy(model, refs, chosen),
        chosen,
        num_steps=num_steps,
        gradient_accumulation_steps=gradient_accumulation_steps,
        mixed_precision=mixed_precision,
        parallel=parallel,
        device=device,
        seed=seed,
    )
    keys = {ref.name: row_keys(ref.of(_parameter(model, ref))).cpu() for ref in refs}
    history = fit(
        ProxStep(inner, refs, chosen),
        lambda indices: _stacked([sequences[index] for index in indices.tolist()]),
        data,
        num_steps=num_steps,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every,
        # Data and weights decide the masks; a checkpoint of others must not be continued.
        identity=None
        if checkpoint_dir is None
        else {
            "sequences": digest(dict(zip(map(str, range(len(sequences))), sequences, strict=True))),
            "weights": digest(keys),
        },
        description=f"Learning the masks of {len(refs)} weights",
    )
    learned, kept, changed, sparse = {}, 0, 0, 0
    for ref in refs:
        weight = ref.of(whole(_parameter(inner.model, ref).detach())).cpu()
        if not all_finite(weight):
            raise TrainingDiverged(
                f"`{ref.name}` has NaN or infinite entries after the last step. Lower learning_rate."
            )
        mask = top2_mask(weight.abs())
        original = ref.of(_parameter(model, ref).detach()).cpu()
        kept += int(mask.sum())
        changed += int((mask & ~top2_mask(original.abs())).sum())
        sparse += int((torch.unflatten(weight, -1, (-1, 4)).count_nonzero(-1) <= 2).sum())
        learned[ref.name] = keys[ref.name], mask
    return LearnedMasks(
        settings=chosen,
        num_steps=num_steps,
        batch_size=batch_size,
        seed=seed,
        num_tokens=sum(map(len, sequences)),
        losses=tuple(row["loss"] for row in history.train),
        share_24=2 * sparse / kept,
        changed=changed / kept,
        seconds=time.perf_counter() - started,
        skipped=skipped,
        learned=learned,
    )


class ProxStep(Step):
    """A step of `inner`, and then the proximal operator on the weights `refs` of its model.

    The operator changes weights behind AdamW's back. That is what proximal AdamW is: the moments are averages of
    gradients, which know nothing of weights, and the parameters are the only copy of the weights that there is.
    """

    def __init__(self, inner: TorchStep, refs: Sequence[WeightRef], settings: MaskLearning) -> None:
        self._inner, self._settings = inner, settings
        self.rank, self.world_size = inner.rank, inner.world_size
        self.identity = {**inner.identity, **asdict(settings), "pruned": [ref.name for ref in refs]}
        self._full_rate = inner.optimizer.param_groups[0]["initial_lr"]
        self._buckets = list(_buckets([ref.of(local(_parameter(inner.model, ref)).detach()) for ref in refs]))

    def step(self, batch: Any) -> Mapping[str, Tensor | float]:
        """The metrics of `inner`."""
        metrics = self._inner.step(batch)
        settings = self._settings
        if settings.scale_free:
            pull = settings.lam * settings.learning_rate * float(metrics["learning_rate"]) / self._full_rate
        else:
            pull = settings.lam
        if pull > 0:
            for bucket in self._buckets:
                _shrink(bucket, pull, by_row=settings.scale_free)
        return metrics

    def state(self) -> Mapping[str, Any]:
        """That of `inner`: the operator remembers nothing."""
        return self._inner.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state()` returned."""
        self._inner.load_state(state)

    def agree(self, number: int) -> int:
        """The first process's `number`."""
        return self._inner.agree(number)


# Rows of a weight, (rows, width), as a view of it, and the rms that each had at the start, (rows, 1).
Piece = tuple[Tensor, Tensor]


def _buckets(weights: Sequence[Tensor]) -> Iterator[list[Piece]]:
    """All rows of all weights, in order, in lists of about `_BUCKET` groups."""
    bucket: list[Piece] = []
    room = _BUCKET
    for weight in weights:
        rows = max(1, _BUCKET // max(1, weight.shape[1] // 4))
        for part in torch.split(weight, rows):
            if bucket and part.numel() // 4 > room:
                yield bucket
                bucket, room = [], _BUCKET
            room -= part.numel() // 4
            bucket.append((part, _rms(part, dim=1)))
    if bucket:
        yield bucket


def _rms(weight: Tensor, dim: int | None = None) -> Tensor:
    """The root of the mean square, 1 where all is zero and there is nothing to scale."""
    found = weight.detach().double().square().mean(dim=dim, keepdim=dim is not None).sqrt()
    return torch.where(found > 0, found, 1.0).to(weight.dtype)


def _shrink(bucket: Sequence[Piece], pull: float, *, by_row: bool) -> None:
    """Replace the weights w of a bucket by prox(w) with `pull`, in units of the rms of each row or as it is."""
    first = bucket[0][0]
    sizes = [part.numel() // 4 for part, _ in bucket]
    planes = torch.empty((4, sum(sizes)), dtype=first.dtype, device=first.device)
    lam = torch.empty(planes.shape[1], dtype=first.dtype, device=first.device) if by_row else None
    spans = list(zip(bucket, torch.split(planes, sizes, dim=1), strict=True))
    start = 0
    for (part, scale), own in spans:
        members = torch.unflatten(part, 1, (-1, 4))
        shape = members.shape[:2]
        for index in range(4):
            own[index].view(shape).copy_(members[..., index])
        if lam is not None:
            torch.div(pull, scale.expand(shape), out=lam[start : start + own.shape[1]].view(shape))
        start += own.shape[1]
    prox_planes(planes, pull if lam is None else lam, out=planes)
    for (part, _), own in spans:
        members = torch.unflatten(part, 1, (-1, 4))
        for index in range(4):
            members[..., index].copy_(own[index].view(members.shape[:2]))


def row_keys(weight: Float[Tensor, "rows width"]) -> Int[Tensor, " rows"]:
    """A number for each row that depends on all its bits in float32, the same on every device."""
    generator = torch.Generator().manual_seed(weight.shape[1])
    # Odd, so that none loses a bit: int64 arithmetic is modulo 2^64.
    factors = torch.randint(-(1 << 62), 1 << 62, (weight.shape[1],), generator=generator).mul_(2).add_(1)
    factors = factors.to(weight.device)
    keys = [torch.zeros(0, dtype=torch.int64, device=weight.device)]
    for part in torch.split(weight.detach(), max(1, (1 << 24) // max(1, weight.shape[1]))):
        bits = part.float().contiguous().view(torch.int32)
        # Weights that were half precision have no low bits; all the entropy would meet in the high ones of the product.
        keys.append(((bits ^ (bits >> 16)).long() * factors).sum(1))
    return torch.cat(keys)


def _parameter(model: nn.Module, ref: WeightRef) -> nn.Parameter:
    return model.get_parameter(ref.parameter)


def _sequences(model: nn.Module, batches: Sequence[Batch]) -> list[Int[Tensor, " _"]]:
    """The sequences one by one, without padding."""
    found = []
    for inputs in as_inputs(model, batches):
        if set(inputs) != {"input_ids"}:
            raise InvalidInput(
                f"Masks are learned on the next-token loss of a causal language model, which needs `input_ids`; this "
                f"calibration has {sorted(inputs)}."
            )
        found += [ids.cpu().long() for ids in inputs["input_ids"]]
    if any(len(ids) < 2 for ids in found):
        raise InvalidInput("A sequence of one token has nothing to predict; leave it out of the calibration data.")
    return found


@torch.no_grad()
def _refs(
    model: nn.Module, sequence: Tensor, skip: Sequence[str], strict: bool
) -> tuple[list[WeightRef], tuple[str, ...]]:
    check_plain(model)
    with calm(model):
        seen = survey(model, InMemory(), {"input_ids": sequence[None]})
    selection = select(model, seen.blocks, seen.groups, pattern=TWO_FOUR, skip=skip, strict=strict)
    refs = [ref for groups in selection.groups.values() for group in groups for ref in group]
    check_real({ref.parameter: _parameter(model, ref) for ref in refs})
    return refs, selection.skipped


def _trainable_copy(model: nn.Module, refs: Sequence[WeightRef], settings: MaskLearning) -> nn.Module:
    learner = copy.deepcopy(model)
    pruned = {id(_parameter(learner, ref)) for ref in refs}
    for parameter in learner.parameters():
        if parameter.is_floating_point():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
            parameter.requires_grad_(settings.train == "all" or id(parameter) in pruned)
    for buffer in learner.buffers():
        if buffer.dtype in (torch.float16, torch.bfloat16):
            buffer.data = buffer.data.float()
    return learner


def _torch_step(model: nn.Module, settings: MaskLearning, *, num_steps: int, **options: Any) -> TorchStep:
    rates = [
        settings.learning_rate * (float(_rms(parameter)) if settings.scale_free else 1.0)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]

    def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        (group,) = groups
        # One rate each, in the order of the model's parameters.
        return torch.optim.AdamW(
            [
                {"params": [parameter], "lr": rate, "weight_decay": 0.0}
                for parameter, rate in zip(group["params"], rates, strict=True)
            ]
        )

    return TorchStep(
        model,
        next_token_loss,
        learning_rate=settings.learning_rate,
        num_steps=num_steps,
        optimizer=adamw,
        weight_decay_on="all",
        schedule="linear",
        warmup_steps=round(settings.warmup * num_steps),
        max_grad_norm=settings.max_grad_norm,
        **options,
    )


def _stacked(sequences: Sequence[Tensor]) -> dict[str, Tensor]:
    """Sequences as one batch, padded at the end to the longest; `attention_mask` only where there is padding."""
    lengths = [len(ids) for ids in sequences]
    ids = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    if len(set(lengths)) == 1:
        return {"input_ids": ids}
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def next_token_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean over predicted tokens of the negative log-likelihood, in nats."""
    logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
    targets = batch["input_ids"][:, 1:]
    if "attention_mask" in batch:
        targets = targets.masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(wide, targets.flatten())
