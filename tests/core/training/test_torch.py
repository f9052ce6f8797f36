from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from core.errors import CheckpointError, InvalidInput, NeedsHardware
from core.training import Batches, Event, Moment, fit
from core.training.torch import TorchStep

_GENERATOR = torch.Generator().manual_seed(0)
_INPUTS = torch.randn(64, 8, generator=_GENERATOR)
_TARGETS = torch.randn(64, 3, generator=_GENERATOR)
_TOKENS = torch.randint(0, 64, (32, 16), generator=_GENERATOR)

Batch = dict[str, Tensor]


def mlp(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3)).to(dtype)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def fetch(indices: np.ndarray) -> Batch:
    return {"inputs": _INPUTS[indices], "targets": _TARGETS[indices]}


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    return ((model(batch["inputs"]) - batch["targets"]) ** 2).mean()


def next_token(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch).loss


def make(model: nn.Module, loss: Callable[[nn.Module, Any], Any] = squared_error, **options: Any) -> TorchStep:
    return TorchStep(model, loss, **{"learning_rate": 0.01, "num_steps": 12, "device": "cpu", **options})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, left), right in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right), name


def by_hand(model: nn.Module, num_steps: int, schedule: str, warmup_steps: int, max_grad_norm: float) -> list[float]:
    """The training loop that anybody would write, on the same batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    scheduler = transformers.get_scheduler(schedule, optimizer, warmup_steps, num_steps)
    batches, losses = Batches(32, 8, seed=2), []
    for position in range(num_steps):
        loss = next_token(model, _TOKENS[batches.indices(position)])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_llama_trains_bit_for_bit_as_in_a_loop_written_by_hand() -> None:
    plain, model = llama(), llama()
    expected = by_hand(plain.train(), 12, "cosine", 3, 0.5)
    losses: list[float] = []
    fit(
        make(model, next_token, warmup_steps=3, max_grad_norm=0.5),
        lambda indices: _TOKENS[indices],
        Batches(32, 8, seed=2),
        num_steps=12,
        hooks=[lambda event: losses.append(float(event.metrics["loss"])) if event.moment is Moment.STEP else None],
    )
    assert losses == expected
    assert_same_weights(model, plain)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_micro_batches_are_one_big_batch(parts: int) -> None:
    whole, accumulated = llama().double(), llama().double()
    for model, count in ((whole, 1), (accumulated, parts)):
        fit(
            make(model, next_token, gradient_accumulation_steps=count),
            lambda indices: _TOKENS[indices],
            Batches(32, 8),
            num_steps=6,
        )
    for left, right in zip(whole.parameters(), accumulated.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-9)


def test_metrics_of_micro_batches_are_averaged() -> None:
    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        value = squared_error(model, batch)
        return value, {"mean_target": batch["targets"].mean()}

    metrics = make(mlp(), loss, gradient_accumulation_steps=4).step(fetch(np.arange(8)))
    assert float(metrics["mean_target"]) == pytest.approx(float(_TARGETS[:8].mean()), rel=1e-6)
    assert float(metrics["loss"]) == pytest.approx(squared_error(mlp(), fetch(np.arange(8))).item(), rel=1e-6)


def test_a_batch_that_does_not_split_evenly_is_refused() -> None:
    with pytest.raises(InvalidInput, match="this one has 6 items"):
        make(mlp(), gradient_accumulation_steps=4).step(fetch(np.arange(6)))


def test_the_average_follows_its_formula() -> None:
    model = mlp()
    step = make(model, ema_decay=0.8)
    expected = weights(model)
    for position in range(5):
        step.step(fetch(np.arange(8) + position))
        expected = {name: 0.8 * expected[name] + 0.2 * value for name, value in weights(model).items()}
    trained = weights(model)
    with step.averaged_weights() as averaged:
        for name, value in weights(averaged).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
            assert not torch.equal(value, trained[name])
    for name, value in weights(model).items():
        assert torch.equal(value, trained[name])


def test_asking_for_an_average_that_is_not_kept_says_how_to_keep_it() -> None:
    with pytest.raises(InvalidInput, match="ema_decay"), make(mlp()).averaged_weights():
        pass


def test_clipping_bounds_the_update_and_reports_the_norm_before_it() -> None:
    model = mlp()
    before = weights(model)
    squared_error(model, fetch(np.arange(8))).backward()
    norm = float(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm())
    model.zero_grad()
    sgd = partial(torch.optim.SGD, lr=1.0)
    step = make(model, max_grad_norm=norm / 4, optimizer=sgd, learning_rate=1.0, schedule="constant")
    assert float(step.step(fetch(np.arange(8)))["grad_norm"]) == pytest.approx(norm, rel=1e-6)
    moved = torch.cat([(before[name] - value).flatten() for name, value in weights(model).items()]).norm()
    assert float(moved) == pytest.approx(norm / 4, rel=1e-4)


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("linear", None),
        ("cosine", None),
        ("constant_with_warmup", None),
        ("inverse_sqrt", None),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("warmup_stable_decay", {"num_decay_steps": 4}),
    ],
)
def test_learning_rates_are_those_of_transformers(schedule: str, options: dict[str, Any] | None) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = transformers.get_scheduler(schedule, optimizer, 3, 12, scheduler_specific_kwargs=options)
    step = make(mlp(), schedule=schedule, warmup_steps=3, schedule_options=options)
    for _ in range(12):
        expected = scheduler.get_last_lr()[0]
        assert step.step(fetch(np.arange(8)))["learning_rate"] == expected
        optimizer.step()
        scheduler.step()


def test_weight_decay_spares_biases_norms_and_embeddings() -> None:
    model = llama()
    groups = make(model, next_token, weight_decay=0.1).optimizer.param_groups
    decayed = {id(parameter) for parameter in groups[0]["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert names == {name for name, _ in model.named_parameters() if name.endswith("_proj.weight")}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    everything = make(llama(), next_token, weight_decay=0.1, weight_decay_on="all").optimizer.param_groups
    assert [group["weight_decay"] for group in everything] == [0.1]


def test_dropout_is_a_function_of_seed_and_step_and_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    results = []
    for noise in (0, 1):
        model = mlp(dropout=0.5)
        step = make(model, seed=4)
        torch.manual_seed(7)
        for _ in range(3):
            step.step(fetch(np.arange(8)))
            if noise:
                torch.rand(noise)
        results.append(model)
    assert_same_weights(*results)
    step = make(mlp(dropout=0.5), seed=4)
    torch.manual_seed(7)
    step.step(fetch(np.arange(8)))
    assert torch.equal(torch.rand(3), expected)
    one, other = mlp(dropout=0.5), mlp(dropout=0.5)
    make(one, seed=4).step(fetch(np.arange(8)))
    make(other, seed=5).step(fetch(np.arange(8)))
    assert not torch.equal(one[0].weight, other[0].weight)


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        partial(torch.optim.SGD, momentum=0.9, nesterov=True),
        torch.optim.Adafactor,
        partial(torch.optim.RMSprop, centered=True),
        torch.optim.ASGD,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_optimizer_resumes_bit_for_bit(
    tmp_path: Path, optimizer: Callable[..., torch.optim.Optimizer] | None, dtype: torch.dtype
) -> None:
    class Stop(Exception):
        pass

    def cut(event: Event) -> None:
        if event.moment is Moment.STEP and event.step == 8:
            raise Stop

    def fetch_in_dtype(indices: np.ndarray) -> Batch:
        return {name: value.to(dtype) for name, value in fetch(indices).items()}

    def run(folder: str, model: nn.Module, *hooks: Callable[[Event], None]) -> nn.Module:
        step = make(model, optimizer=optimizer, ema_decay=0.9, weight_decay=0.01, warmup_steps=2)
        fit(
            step,
            fetch_in_dtype,
            Batches(64, 8),
            num_steps=12,
            checkpoint_dir=tmp_path / folder,
            checkpoint_every=3,
            hooks=hooks,
        )
        return model

    whole = run("whole", mlp(dropout=0.2, dtype=dtype))
    with pytest.raises(Stop):
        run("cut", mlp(dropout=0.2, dtype=dtype), cut)
    assert_same_weights(run("cut", mlp(dropout=0.2, dtype=dtype)), whole)
    for name in ("arrays.safetensors", "scalars.json"):
        saved = [(tmp_path / folder / "step-00000012" / name).read_bytes() for folder in ("whole", "cut")]
        assert saved[0] == saved[1], name


def test_a_state_is_a_copy_that_later_updates_leave_alone() -> None:
    model = mlp()
    step = make(model)
    step.step(fetch(np.arange(8)))
    state, kept = step.state(), weights(model)
    step.step(fetch(np.arange(8)))
    step.load_state(state)
    for name, value in weights(model).items():
        assert torch.equal(value, kept[name])


def test_frozen_weights_do_not_move_and_running_statistics_are_saved() -> None:
    model = nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    before = weights(model)
    step = make(model)
    step.step(fetch(np.arange(8)))
    after = weights(model)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["2.weight"], before["2.weight"])
    assert np.array_equal(step.state()["model.1.running_mean"], model[1].running_mean.numpy())


def test_a_state_of_another_model_is_refused_by_the_name_of_the_weight() -> None:
    state = make(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))).state()
    with pytest.raises(CheckpointError, match=r"\(4, 8\) for model.0.weight.*\(5, 8\)"):
        make(nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3))).load_state(state)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights() -> None:
    seen: list[torch.dtype] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        outputs = model(batch["inputs"])
        seen.append(outputs.dtype)
        return ((outputs.float() - batch["targets"]) ** 2).mean()

    full, mixed = mlp(), mlp()
    make(full).step(fetch(np.arange(8)))
    make(mixed, loss, mixed_precision="bf16").step(fetch(np.arange(8)))
    assert seen == [torch.bfloat16]
    for left, right in zip(full.parameters(), mixed.parameters(), strict=True):
        assert right.dtype == torch.float32
        torch.testing.assert_close(left, right, atol=0.021, rtol=0)


def test_float16_skips_an_update_that_overflows_and_resumes_with_its_loss_scale() -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return ((model(batch["inputs"]).float() - batch["targets"]) ** 2).mean() * batch["scale"]

    def run(step: TorchStep, *scales: float) -> None:
        for scale in scales:
            step.step({**fetch(np.arange(8)), "scale": torch.tensor(scale)})

    def start() -> tuple[nn.Module, TorchStep]:
        model = mlp()
        return model, make(model, loss, mixed_precision="fp16")

    model, step = start()
    run(step, 1.0)
    before = weights(model)
    assert any(not torch.equal(value, weights(mlp())[name]) for name, value in before.items())
    run(step, 1e9)
    for name, value in weights(model).items():
        assert torch.equal(value, before[name]), name
    resumed, other = start()
    other.load_state(step.state())
    assert other.state()["scaler"]["scale"] == 2.0**15
    run(step, 1.0, 1.0)
    run(other, 1.0, 1.0)
    assert_same_weights(resumed, model)


def test_evaluation_mode_ends_with_the_next_step() -> None:
    model = mlp()
    step = make(model)
    model.eval()
    step.step(fetch(np.arange(8)))
    assert model.training


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_parallel_training_in_one_process_says_how_to_start_more(parallel: str) -> None:
    with pytest.raises(NeedsHardware, match="torchrun --nproc-per-node"):
        make(mlp(), parallel=parallel)


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2"},
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},
    ],
)
def test_a_launch_that_silently_gives_one_process_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    make(mlp())
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NeedsHardware, match="this one runs alone"):
        make(mlp())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schedule": "cosin"}, InvalidInput, "Did you mean cosine"),
        ({"schedule": "reduce_lr_on_plateau"}, InvalidInput, "Unknown schedule"),
        ({"learning_rate": 0.0}, InvalidInput, "learning_rate is a finite number above 0; got 0.0"),
        ({"learning_rate": float("nan")}, InvalidInput, "learning_rate"),
        ({"warmup_steps": 13}, InvalidInput, "warmup_steps is from 0 to num_steps=12; got 13"),
        ({"ema_decay": 1.0}, InvalidInput, "ema_decay"),
        ({"max_grad_norm": 0.0}, InvalidInput, "max_grad_norm"),
        ({"gradient_accumulation_steps": 0}, InvalidInput, "gradient_accumulation_steps"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(mlp(), **options)


def test_a_model_without_trainable_weights_is_refused() -> None:
    with pytest.raises(InvalidInput, match="nothing to train"):
        make(mlp().requires_grad_(False))
