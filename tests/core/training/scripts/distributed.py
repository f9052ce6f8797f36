"""Two processes under torchrun: DDP and FSDP2 against a single-process loop written by hand; FSDP resumed from itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from core.training import Batches, Event, Moment, fit
from core.training.torch import TorchStep

NUM_STEPS, BATCH_SIZE, DECAY = 10, 8, 0.9
TOKENS = torch.randint(0, 64, (40, 16), generator=torch.Generator().manual_seed(0))


def llama(seed: int = 0, *, tied: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch).loss


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def by_hand(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    scheduler = transformers.get_scheduler("cosine", optimizer, 2, NUM_STEPS)
    batches, losses = Batches(len(TOKENS), BATCH_SIZE, seed=1), []
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for position in range(NUM_STEPS):
        value = loss(model.train(), TOKENS[batches.indices(position)])
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(value.item())
        for name, parameter in model.named_parameters():
            average[name] = DECAY * average[name] + (1 - DECAY) * parameter.detach()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, average, losses


class Cut(Exception):
    pass


def cut(event: Event) -> None:
    if event.moment is Moment.STEP and event.step == 6:
        raise Cut


def train(model: nn.Module, folder: Path, **options: Any) -> tuple[TorchStep, list[float]]:
    hooks = options.pop("hooks", ())
    step = TorchStep(
        model,
        loss,
        learning_rate=0.01,
        num_steps=NUM_STEPS,
        warmup_steps=2,
        max_grad_norm=0.5,
        ema_decay=DECAY,
        device="cpu",
        **options,
    )
    history = fit(
        step,
        lambda indices: TOKENS[indices],
        Batches(len(TOKENS), BATCH_SIZE, seed=1),
        num_steps=NUM_STEPS,
        checkpoint_dir=folder,
        checkpoint_every=4,
        log_every=1,
        hooks=hooks,
    )
    return step, [row["loss"] for row in history.train]


def largest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def main(folder: Path) -> None:
    report: dict[str, Any] = {}
    trained: dict[str, dict[str, Tensor]] = {}
    for name, tied, options in (
        ("ddp", True, {"parallel": "auto"}),
        ("ddp_accumulated", True, {"parallel": "ddp", "gradient_accumulation_steps": 2}),
        ("fsdp", True, {"parallel": "fsdp"}),
        ("fsdp_untied", False, {"parallel": "fsdp"}),
        ("fsdp_accumulated", True, {"parallel": "fsdp", "gradient_accumulation_steps": 2}),
        ("fsdp_bf16", True, {"parallel": "fsdp", "mixed_precision": "bf16"}),
    ):
        expected, expected_average, expected_losses = by_hand(llama(tied=tied))
        # Another initial model on the second process: the first one's must win.
        model = llama(seed=int(torch.distributed.get_rank()) if torch.distributed.is_initialized() else 0, tied=tied)
        step, losses = train(model, folder / name, **options)
        trained[name] = {key: whole(parameter) for key, parameter in step.model.named_parameters()}
        with step.averaged_weights() as averaged:
            average = {key: whole(parameter) for key, parameter in averaged.named_parameters()}
        report[name] = {
            "weights": largest(expected, trained[name]),
            "average": largest(expected_average, average),
            "losses": float(np.abs(np.array(losses) - np.array(expected_losses)).max()),
            "sharded": sum(isinstance(parameter, DTensor) for parameter in step.model.parameters()),
            "parameters": len(trained[name]),
        }
        report["world_size"] = step.world_size
    for name in ("ddp", "fsdp"):
        try:
            train(llama(), folder / f"{name}_cut", parallel=name, hooks=[cut])
        except Cut:
            pass
        else:
            raise AssertionError("the run was to be cut")
        step, _ = train(llama(seed=5), folder / f"{name}_cut", parallel=name)
        resumed = {key: whole(parameter) for key, parameter in step.model.named_parameters()}
        report[f"{name}_resumed_identical"] = all(torch.equal(resumed[key], trained[name][key]) for key in resumed)
    # Left for the test to finish in one process.
    for name in ("ddp", "fsdp"):
        try:
            train(llama(), folder / f"{name}_unfinished", parallel=name, hooks=[cut])
        except Cut:
            pass
    if step.rank == 0:
        (folder / "report.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
