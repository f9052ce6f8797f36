"""The torch step: one optimizer update on one or many processes, for `core.training.loop.fit`.

accelerate finds the device and the processes (start many with `torchrun`), moves batches and averages metrics; precision,
DDP and FSDP2 are torch's own, because `accelerate.Accelerator` fixes one precision for the whole process, patches the
model's `forward`, and on a CPU silently replaces FSDP by DDP.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast, find_batch_size, reduce, send_to_device, slice_tensors
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import SchedulerType, get_scheduler

from core.errors import CheckpointError, InvalidInput, NeedsHardware, unknown_name
from core.training.loop import Step
from core.training.sharding import like_shard, local, placed, shard, to_numpy, to_tensor, whole

Loss = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Mapping[str, Any]]]

_PRECISIONS = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class TorchStep(Step):
    """One update of `model` by the gradient of `loss(model, batch)`, which returns the loss, or it and more metrics.

    The loss is a mean over the batch it is given. Gradients are averaged over `gradient_accumulation_steps` micro-batches
    and over the processes with equal weight: a loss that divides by a varying number of tokens has to bring its own
    weights. `fit`'s batches are global, so the result does not depend on how many processes or micro-batches share one.

    `optimizer` makes any torch optimizer from parameter groups (each with `lr` and `weight_decay`); None is AdamW with
    `betas`. `weight_decay_on="matrices"` spares biases, norms and embeddings. `schedule` is a name that
    `transformers.get_scheduler` knows, with `schedule_options` as its own settings. `ema_decay` keeps an exponential
    moving average of the weights (`averaged_weights`). `split(batch, parts)` cuts a batch into micro-batches; the
    default slices every tensor in nested lists, tuples and dictionaries.

    Random numbers that `loss` draws from torch's global generator (dropout, noise) are a function of (seed, step,
    process), and the caller's generator is left as it was.

    `parallel` is "ddp" or "fsdp" (each item of an outermost `nn.ModuleList` is one shard unit, then the rest), or "auto":
    DDP when there are several processes. `model` is changed in place; use it, or `step.model`, for evaluation.

    Raises `InvalidInput` on settings that do not fit, and `NeedsHardware` when several processes were asked for and there
    is one.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        learning_rate: float,
        num_steps: int,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        weight_decay_on: Literal["matrices", "all"] = "matrices",
        schedule: str = "cosine",
        warmup_steps: int = 0,
        schedule_options: Mapping[str, Any] | None = None,
        max_grad_norm: float | None = 1.0,
        gradient_accumulation_steps: int = 1,
        mixed_precision: Literal["no", "fp16", "bf16"] = "no",
        ema_decay: float | None = None,
        parallel: Literal["auto", "ddp", "fsdp"] = "auto",
        split: Callable[[Any, int], Sequence[Any]] | None = None,
        device: str | torch.device | None = None,
        seed: int = 0,
    ) -> None:
        if schedule not in {kind.value for kind in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}:
            raise unknown_name(
                "schedule", schedule, {kind.value for kind in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}
            )
        _check_settings(learning_rate, num_steps, warmup_steps, max_grad_norm, gradient_accumulation_steps, ema_decay)
        if mixed_precision not in _PRECISIONS:
            raise unknown_name("mixed_precision", mixed_precision, _PRECISIONS)
        if parallel not in ("auto", "ddp", "fsdp"):
            raise unknown_name("parallel", parallel, ("auto", "ddp", "fsdp"))
        state = PartialState(cpu=device is not None and torch.device(device).type == "cpu")
        _refuse_silent_single_process(state)
        self.rank, self.world_size = state.process_index, state.num_processes
        self.device: torch.device = state.device if device is None else torch.device(device)
        if parallel != "auto" and self.world_size == 1:
            raise NeedsHardware(
                f"parallel={parallel!r} needs several processes and this is one. Start it with "
                "`torchrun --nproc-per-node N script.py`, or use parallel='auto'."
            )
        self._dtype = _PRECISIONS[mixed_precision]
        if mixed_precision == "fp16" and parallel == "fsdp":
            raise InvalidInput(
                "The loss scaling of fp16 does not work on FSDP shards. Use mixed_precision='bf16' or 'no'."
            )

        self.model = model.to(self.device)
        self._callable: nn.Module = self.model
        self._fsdp = parallel == "fsdp"
        if self._fsdp:
            shard(self.model, self.device, self.world_size, self._dtype)
        elif self.world_size > 1:
            self._callable = DistributedDataParallel(
                self.model, device_ids=None if self.device.type == "cpu" else [self.device]
            )
        self._loss, self._split = loss, split or split_tensors
        self._accumulation, self._max_grad_norm, self._seed = gradient_accumulation_steps, max_grad_norm, seed
        self._names = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        groups = _parameter_groups(self.model, self._names, learning_rate, weight_decay, weight_decay_on)
        self.optimizer: Optimizer = (
            torch.optim.AdamW(groups, lr=learning_rate, betas=betas) if optimizer is None else optimizer(groups)
        )
        self._scheduler = get_scheduler(
            schedule,
            self.optimizer,
            num_warmup_steps=warmup_steps,
            num_training_steps=num_steps,
            scheduler_specific_kwargs=None if schedule_options is None else dict(schedule_options),
        )
        self._scaler = torch.amp.GradScaler(self.device.type) if mixed_precision == "fp16" else None
        self._position = 0
        self._average: dict[str, Tensor] = {}
        if ema_decay is not None:
            self._average = {name: local(parameter).detach().clone() for name, parameter in self._names.items()}
            self._update_average = get_ema_multi_avg_fn(ema_decay)  # type: ignore[no-untyped-call]
        self.identity = {
            "optimizer": type(self.optimizer).__name__,
            "learning_rate": learning_rate,
            "betas": list(betas),
            "weight_decay": weight_decay,
            "weight_decay_on": weight_decay_on,
            "schedule": schedule,
            "schedule_options": dict(schedule_options or {}),
            "warmup_steps": warmup_steps,
            "num_steps": num_steps,
            "max_grad_norm": max_grad_norm,
            "mixed_precision": mixed_precision,
            "ema_decay": ema_decay,
            "seed": seed,
            "num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "num_trainable_parameters": sum(parameter.numel() for parameter in self._names.values()),
        }

    def step(self, batch: Any) -> Mapping[str, Tensor | float]:
        """Update once; `loss`, the caller's metrics, `grad_norm` when clipping, and the `learning_rate` that was used."""
        if not self.model.training:
            self.model.train()
        parts = [batch] if self._accumulation == 1 else self._split(batch, self._accumulation)
        collected: list[Mapping[str, Tensor]] = []
        with self._randomness():
            for number, part in enumerate(parts, start=1):
                with self._gradient_sync(last=number == len(parts)):
                    with self._autocast():
                        result = self._loss(self._callable, send_to_device(part, self.device, non_blocking=True))
                    loss, metrics = result if isinstance(result, tuple) else (result, {})
                    scaled = loss / len(parts)
                    torch.autograd.backward(scaled if self._scaler is None else self._scaler.scale(scaled))
                collected.append({"loss": loss.detach(), **metrics})
        shown: dict[str, Tensor | float] = {**self._averaged(collected)}
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        if self._max_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(list(self._names.values()), self._max_grad_norm)
            shown["grad_norm"] = whole(norm)
        shown["learning_rate"] = float(self._scheduler.get_last_lr()[0])
        if self._scaler is None:
            self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._scheduler.step()
        self._position += 1
        if self._average:
            current = [local(parameter).detach() for parameter in self._names.values()]
            self._update_average(list(self._average.values()), current, self._position)
        return shown

    @contextmanager
    def averaged_weights(self) -> Iterator[nn.Module]:
        """The model with the moving average in place of its weights, for the `with` block (buffers stay as they are)."""
        if not self._average:
            raise InvalidInput("No average is kept; construct TorchStep with ema_decay=0.999 or so.")
        weights = {name: local(parameter).detach() for name, parameter in self._names.items()}
        kept = {name: weight.clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.copy_(self._average[name])
        try:
            yield self.model
        finally:
            for name, weight in weights.items():
                weight.copy_(kept[name])

    def state(self) -> Mapping[str, Any]:
        """Weights, buffers, optimizer, schedule, loss scale and average; complete on the first process, {} on the others.

        Weights have the names `model.<name>`. A collective: every process has to call it.
        """
        found: dict[str, Any] = {
            "position": self._position,
            "schedule": {**self._scheduler.state_dict()},
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
            "groups": [
                {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
            ],
        }
        dtypes: dict[str, str] = {}
        for name, tensor in self._tensors():
            gathered = whole(tensor)
            if self.rank == 0:
                found[name], dtypes[name] = to_numpy(gathered), str(gathered.dtype).removeprefix("torch.")
        for name, parameter in self._names.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor):
                    found[f"optimizer.{name}.{key}"] = value
        return {**found, "dtypes": dict(sorted(dtypes.items()))} if self.rank == 0 else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`, also one that was saved with another number of processes."""
        dtypes = state["dtypes"]
        saved = {name: to_tensor(state[name], dtype) for name, dtype in dtypes.items()}
        self._position = int(state["position"])
        with torch.no_grad():
            for name, target in self._model_tensors():
                if name not in saved or saved[name].shape != target.shape:
                    raise CheckpointError(
                        f"The checkpoint holds {tuple(saved[name].shape) if name in saved else 'nothing'} for {name}, and "
                        f"the model needs {tuple(target.shape)}. It was saved with another model."
                    )
                target.copy_(placed(saved[name], target))
            for name, average in self._average.items():
                average.copy_(local(placed(saved[f"average.{name}"], self._names[name])))
        # Not `Optimizer.load_state_dict`: it casts every entry to the dtype of its parameter, which is not exact.
        for saved_group, group in zip(state["groups"], self.optimizer.param_groups, strict=True):
            group.update({key: _like_type(value, group.get(key)) for key, value in saved_group.items()})
        on_device = {
            id(parameter)
            for group in self.optimizer.param_groups
            if group.get("capturable") or group.get("fused")
            for parameter in group["params"]
        }
        self.optimizer.state.clear()
        for key, value in {**state, **saved}.items():
            if key.startswith("optimizer."):
                name, _, entry = key.removeprefix("optimizer.").rpartition(".")
                parameter = self._names[name]
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value = placed(value, parameter)
                elif isinstance(value, Tensor) and (entry != "step" or id(parameter) in on_device):
                    value = value.to(self.device)
                self.optimizer.state[parameter][entry] = value
        self._scheduler.load_state_dict(state["schedule"])
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])

    def agree(self, number: int) -> int:
        """The first process's `number`, on every process, after all of them have come this far."""
        return number if self.world_size == 1 else int(broadcast(torch.tensor([number], device=self.device)).item())

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._model_tensors()
        for name, parameter in self._names.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield f"optimizer.{name}.{key}", value
        for name, average in self._average.items():
            yield f"average.{name}", like_shard(average, self._names[name])

    def _model_tensors(self) -> Iterator[tuple[str, Tensor]]:
        # Buffers that are not persistent too: what changes during training decides the next update.
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            yield f"model.{name}", tensor.detach()

    def _autocast(self) -> AbstractContextManager[object]:
        # Under FSDP the policy of `shard` casts instead.
        if self._dtype is None or self._fsdp:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)

    @contextmanager
    def _gradient_sync(self, *, last: bool) -> Iterator[None]:
        if isinstance(self._callable, FSDPModule):
            self._callable.set_requires_gradient_sync(last)
        if isinstance(self._callable, DistributedDataParallel) and not last:
            with self._callable.no_sync():
                yield
        else:
            yield

    @contextmanager
    def _randomness(self) -> Iterator[None]:
        devices = [] if self.device.type == "cpu" else [self.device]
        with torch.random.fork_rng(devices=devices, device_type=self.device.type if devices else "cuda"):
            words = np.random.SeedSequence([self._seed, self._position, self.rank]).generate_state(1, np.uint64)
            # `torch.manual_seed` would take 250 us: it seeds every kind of device and records who asked.
            torch.default_generator.manual_seed(int(words[0]))
            if devices:
                torch.get_device_module(self.device).manual_seed(int(words[0]))
            yield

    def _averaged(self, collected: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        if len(collected) == 1 and self.world_size == 1:
            return collected[0]
        names = list(collected[0])
        values = torch.stack(
            [
                torch.stack([torch.as_tensor(row[name], device=self.device).float() for name in names])
                for row in collected
            ]
        ).mean(dim=0)
        return dict(zip(names, reduce(values, "mean") if self.world_size > 1 else values, strict=True))


def split_tensors(batch: Any, parts: int) -> Sequence[Any]:
    """`parts` equal slices along the first axis of every tensor in nested lists, tuples and dictionaries.

    Raises `InvalidInput` when the batch is not a multiple of `parts`.
    """
    size = find_batch_size(batch)
    if size is None or size % parts:
        raise InvalidInput(
            f"gradient_accumulation_steps={parts} cuts each process's batch into equal parts, and this one has {size} items. "
            f"Use a batch size that is a multiple of {parts} times the number of processes."
        )
    width = size // parts
    return [slice_tensors(batch, slice(start, start + width)) for start in range(0, size, width)]


def _parameter_groups(
    model: nn.Module, trainable: Mapping[str, nn.Parameter], learning_rate: float, weight_decay: float, on: str
) -> list[dict[str, Any]]:
    if on not in ("matrices", "all"):
        raise unknown_name("weight_decay_on", on, ("matrices", "all"))
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        for parameter in module.parameters(recurse=False)
    }
    decayed = {
        name
        for name, parameter in trainable.items()
        if on == "all" or (parameter.ndim > 1 and id(parameter) not in embeddings)
    }
    groups = [
        {
            "params": [p for n, p in trainable.items() if n in decayed],
            "lr": learning_rate,
            "weight_decay": weight_decay,
        },
        {"params": [p for n, p in trainable.items() if n not in decayed], "lr": learning_rate, "weight_decay": 0.0},
    ]
    if not trainable:
        raise InvalidInput("No parameter of the model has requires_grad=True; there is nothing to train.")
    return [group for group in groups if group["params"]]


def _like_type(value: Any, current: Any) -> Any:
    # JSON has lists where optimizers have tuples (betas).
    return tuple(value) if isinstance(current, tuple) else value


def _refuse_silent_single_process(state: PartialState) -> None:
    if state.num_processes > 1:
        return
    asked = {
        name: os.environ[name]
        for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
        if os.environ.get(name, "1").isdigit() and int(os.environ.get(name, "1")) > 1
    }
    # `accelerate launch --cpu --num_processes 2` starts one process and leaves exactly this trace.
    if not asked and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and "RANK" not in os.environ:
        asked = {"MASTER_ADDR": os.environ["MASTER_ADDR"]}
    if asked:
        settings = ", ".join(f"{name}={value}" for name, value in asked.items())
        raise NeedsHardware(
            f"Several processes were asked for ({settings}) but this one runs alone. Start them with "
            "`torchrun --nproc-per-node N script.py`; `accelerate launch --cpu` starts only one."
        )


def _check_settings(
    learning_rate: float,
    num_steps: int,
    warmup_steps: int,
    max_grad_norm: float | None,
    gradient_accumulation_steps: int,
    ema_decay: float | None,
) -> None:
    wrong = {
        "learning_rate": (learning_rate, "a finite number above 0", 0 < learning_rate < float("inf")),
        "num_steps": (num_steps, "at least 1", num_steps >= 1),
        "warmup_steps": (warmup_steps, f"from 0 to num_steps={num_steps}", 0 <= warmup_steps <= num_steps),
        "max_grad_norm": (max_grad_norm, "above 0, or None", max_grad_norm is None or max_grad_norm > 0),
        "gradient_accumulation_steps": (gradient_accumulation_steps, "at least 1", gradient_accumulation_steps >= 1),
        "ema_decay": (ema_decay, "from 0 to below 1, or None", ema_decay is None or 0 <= ema_decay < 1),
    }
    for name, (value, allowed, right) in wrong.items():
        if not right:
            raise InvalidInput(f"{name} is {allowed}; got {value}.")
