"""Fine-tuning of a causal language model on rows of `input_ids` and `labels`, whole or with LoRA adapters.

rows = [supervised_row(pair) for pair in encode_pairs(tokenizer, pairs)]
finetune(model, rows, Finetuning(num_epochs=1, batch_size=32, learning_rate=2e-5))
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from core.errors import InvalidInput, require
from core.llm import examples
from core.llm.examples import IGNORED
from core.llm.modes import in_mode
from core.llm.scoring import accepts
from core.training.loop import Batches, History, Hook, TrainingDiverged, fit
from core.training.torch import TorchStep

# A list of dictionaries, or a `datasets.Dataset`, which is no `Sequence` to a type checker.
Rows = Any
Collate = Callable[[Rows], Any]


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """The settings of one training run; what they mean is in `core.training.torch.TorchStep`.

    `num_steps` None makes `num_epochs` passes over the rows. A batch counts rows over all processes and micro-batches,
    and is all rows where there are fewer; an epoch's shorter last batch is left out. `packing` puts several rows into one
    line (`core.llm.examples.collate`): the same loss, less filling.
    """

    num_steps: int | None = None
    num_epochs: float = 1.0
    batch_size: int = 32
    learning_rate: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    schedule: str = "cosine"
    schedule_options: Mapping[str, Any] | None = None
    warmup_steps: int = 0
    max_grad_norm: float | None = 1.0
    gradient_accumulation_steps: int = 1
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    packing: bool = False
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None

    def __post_init__(self) -> None:
        """Refuse a run without updates."""
        if self.batch_size < 1 or (self.num_steps is not None and self.num_steps < 1) or not self.num_epochs > 0:
            raise InvalidInput(
                "batch_size and num_steps are at least 1 and num_epochs is above 0; got "
                f"batch_size={self.batch_size}, num_steps={self.num_steps}, num_epochs={self.num_epochs}."
            )

    def steps(self, num_rows: int) -> int:
        """How many updates the run makes on so many rows."""
        if self.num_steps is not None:
            return self.num_steps
        return max(1, round(self.num_epochs * (num_rows // min(self.batch_size, num_rows))))


def completion_loss(model: Any, batch: Mapping[str, Any]) -> Float[Tensor, ""]:
    """The negative log-likelihood (natural logarithm) of the batch's target tokens, as a mean.

    `num_targets` of the batch, where it is there, is what the sum is divided by: micro-batches and processes with few
    targets then weigh less, and their average is the mean over all targets.
    """
    nll, _ = target_nll(model, batch)
    return nll.sum() / (batch["num_targets"] if "num_targets" in batch else len(nll))


def target_nll(model: Any, batch: Mapping[str, Any]) -> tuple[Float[Tensor, " targets"], Bool[Tensor, " places"]]:
    """The negative log-likelihood of every target token, and which places of the batch, line by line, predict them.

    A batch is as `collate` makes it; `inputs_embeds` (lines, width, size) may stand for its `input_ids`.
    """
    names = ("inputs_embeds" if "inputs_embeds" in batch else "input_ids", "labels", "position_ids")
    tensors = {name: batch[name] for name in names if name in batch}
    if "position_ids" in tensors and _attention(model).startswith("flash"):
        # Flash attention takes positions that begin again for a border only where there is a single line.
        tensors = {name: tensor.reshape(1, -1, *tensor.shape[2:]) for name, tensor in tensors.items()}
    targets = functional.pad(tensors.pop("labels")[:, 1:], (0, 1), value=IGNORED)
    wanted = targets != IGNORED
    # Prompts are most of many data sets: a large vocabulary's logits are computed for answers only, where a model can.
    keep = {"logits_to_keep": wanted} if accepts(_inner(model), "logits_to_keep") else {}
    logits = model(**tensors, **keep, use_cache=False).logits
    logits = logits if keep else logits[wanted]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(wide, targets[wanted], reduction="none"), wanted.flatten()


def finetune(
    model: Any,
    rows: Rows,
    settings: Finetuning,
    *,
    seed: int = 0,
    loss: Callable[[Any, Any], Tensor] = completion_loss,
    collate: Collate | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
    identity: Mapping[str, Any] | None = None,
    hooks: Sequence[Hook] = (),
    device: str | torch.device | None = None,
    description: str = "Fine-tuning",
) -> History:
    """Train `model` in place on rows (a list, or a `datasets.Dataset`) and return what happened.

    `seed` decides the order of the rows and dropout. The model is in training mode meanwhile, and afterwards every
    module is in the mode it was in. `collate` makes a batch of rows (None: `core.llm.examples.collate`, packed if the
    settings say so). A batch that is a dictionary with `labels` is told what a loss has to divide sums by: `num_targets`
    (see `completion_loss`) and `num_rows`. A run with a `checkpoint_dir` resumes exactly; `identity` is what else a
    checkpoint must agree with, such as a digest of the rows. `device` None is where the model is, or, for several
    processes, what `TorchStep` finds.

    Raises `InvalidInput` on no rows, batches that cannot be cut into micro-batches and, for `packing`, a model in which
    rows of one line see each other; `TrainingDiverged`, naming the rows, when the loss is not finite.
    """
    if not len(rows):
        raise InvalidInput("There are no rows to train on.")
    num_steps, parts = settings.steps(len(rows)), settings.gradient_accumulation_steps
    step = TorchStep(
        model,
        loss,
        learning_rate=settings.learning_rate,
        num_steps=num_steps,
        optimizer=settings.optimizer,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        schedule=settings.schedule,
        schedule_options=settings.schedule_options,
        warmup_steps=settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm,
        gradient_accumulation_steps=parts,
        mixed_precision=settings.mixed_precision,
        split=lambda batch, _: batch,
        device=device if device is not None else _own_device(model),
        seed=seed,
    )
    batches = Batches(len(rows), min(settings.batch_size, len(rows)), seed=seed)
    if batches.batch_size < parts * step.world_size:
        raise InvalidInput(
            f"Batches of {batches.batch_size} rows cannot be shared by {step.world_size} processes with "
            f"gradient_accumulation_steps={parts}. Use a larger batch_size, or fewer parts."
        )
    make = collate or (lambda chosen: examples.collate(chosen, packing=settings.packing))

    def fetch(indices: Int[np.ndarray, " part"]) -> Any:
        chosen = _at(rows, indices)
        made = [make(chosen[part::parts]) for part in range(parts)]
        _weigh(made, len(chosen), step)
        return made[0] if parts == 1 else made

    if settings.packing:
        _check_packing(model, step.device)
    # Gradients that the caller left behind are no part of the first update.
    model.zero_grad(set_to_none=True)
    with in_mode(model, training=True):
        try:
            return fit(
                step,
                fetch,
                batches,
                num_steps=num_steps,
                hooks=hooks,
                checkpoint_dir=checkpoint_dir,
                checkpoint_every=checkpoint_every,
                identity={"packing": settings.packing, **(identity or {})},
                description=description,
            )
        except TrainingDiverged as error:
            named = sorted(int(row) for row in batches.indices(error.step - 1))
            raise TrainingDiverged(f"{error} It holds the rows {', '.join(map(str, named))}.", error.step) from error


def add_lora(
    model: Any,
    *,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    seed: int = 0,
) -> Any:
    """`model` with LoRA adapters (peft), which are then all that trains; `seed` decides their first values.

    `target_modules` names linear layers, or is `all-linear`, which leaves out the output layer. Raises `MissingExtra`
    without peft.
    """
    peft = require("peft", "sched_sampling")
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        # Adapters are drawn on the CPU; `torch.manual_seed` would reseed every accelerator besides.
        torch.default_generator.manual_seed(seed)
        return peft.get_peft_model(model, config)


def _inner(model: Any) -> Any:
    """The transformers model inside DDP and peft."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _attention(model: Any) -> str:
    return str(getattr(getattr(_inner(model), "config", None), "_attn_implementation", None))


@torch.no_grad()
def _check_packing(model: Any, device: torch.device) -> None:
    """Refuse a model in which a row of a packed line can see the row before it, by trying."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)
    try:
        with in_mode(model, training=False):
            first, second = (
                model(
                    input_ids=torch.tensor([[token] * 3 + [0] * 3], device=device),
                    position_ids=positions,
                    use_cache=False,
                ).logits[0]
                for token in (0, 1)
            )
        change = (first - second).abs()
        # Experts are chosen for the whole batch, so rounding may differ; what attention lets through is far more.
        separate = bool(change[3:].max() <= 1e-3 * change[:3].max())
    except TypeError:
        separate = False
    if not separate:
        raise InvalidInput(
            f"{type(_inner(model)).__name__} does not keep the rows of a packed line apart (its attention does not look at "
            "position_ids). Use packing=False."
        )


def _own_device(model: Any) -> torch.device | None:
    return None if int(os.environ.get("WORLD_SIZE", "1")) > 1 else next(model.parameters()).device


def _at(rows: Any, indices: Int[np.ndarray, " part"]) -> list[Mapping[str, Any]]:
    if not hasattr(rows, "column_names"):
        return [rows[int(i)] for i in indices]
    # One reading of many rows is several times as fast as many of one.
    columns = rows[[int(i) for i in indices]]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _weigh(batches: Sequence[Any], num_rows: int, step: TorchStep) -> None:
    """Give every micro-batch what its loss is divided by: the mean number of targets of one, over all processes."""
    if not all(isinstance(batch, dict) and "labels" in batch for batch in batches):
        return
    total = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
    count = torch.tensor(total / len(batches), device=step.device)
    if step.world_size > 1:
        count = reduce(count, "mean")
    for batch in batches:
        batch["num_targets"], batch["num_rows"] = count, num_rows / len(batches)
