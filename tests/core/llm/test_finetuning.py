"""Fine-tuning: the loss is the mean over targets however the batch is cut, packed or shared, and runs resume exactly."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from torch import nn

from core.errors import InvalidInput
from core.llm import finetuning
from core.llm.causal import CausalLM
from core.llm.examples import EncodedPair, collate, encode_pairs, supervised_row
from core.llm.finetuning import Finetuning, add_lora, completion_loss, finetune
from core.training import Batches, Event, Moment, TrainingDiverged

from .conftest import VOCABULARY, make_model, make_tokenizer
from .scripts import finetune as script

PACKED = ("llama", "gpt2", "qwen3", "gemma3")


def _rows(num: int, seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)

    def ids(least: int, most: int) -> tuple[int, ...]:
        size = int(torch.randint(least, most + 1, (1,), generator=generator))
        return tuple(torch.randint(2, VOCABULARY, (size,), generator=generator).tolist())

    return [supervised_row(EncodedPair(ids(1, 6), (*ids(0, 12), 0))) for _ in range(num)]


def _model(name: str = "llama", dtype: torch.dtype = torch.float64) -> nn.Module:
    model = make_model(name).to(dtype)
    # Weights small enough that no softmax saturates.
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    return model.eval()


def _gradients(model: nn.Module, batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = completion_loss(model, batch)
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def _close(left, right, tolerance: float = 1e-10) -> bool:
    return all(torch.allclose(left[name], right[name], rtol=0, atol=tolerance) for name in left)


def _sgd(**settings) -> Finetuning:
    return Finetuning(
        learning_rate=0.5, max_grad_norm=None, optimizer=lambda groups: torch.optim.SGD(groups), **settings
    )


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_the_loss_is_the_mean_over_targets_of_one_forward_each(name):
    model, rows = _model(name), _rows(5)
    terms = []
    with torch.no_grad():
        for row in rows:
            for t, label in enumerate(row["labels"]):
                if label != -100:
                    logits = model(input_ids=torch.tensor([row["input_ids"][:t]])).logits[0, -1]
                    terms.append(-logits.log_softmax(0)[label].item())
        assert completion_loss(model, collate(rows)).item() == pytest.approx(sum(terms) / len(terms), abs=1e-8)
        stock = model(**{key: torch.tensor([rows[0][key]]) for key in ("input_ids", "labels")}).loss
        assert completion_loss(model, collate(rows[:1])).item() == pytest.approx(stock.item(), abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_only_the_places_that_predict_an_answer_token_have_a_gradient(name):
    model, seen = _model(name), []

    def keep(module, inputs, output):
        output[0].retain_grad()
        seen.append(output[0])

    prompt, target = (5, 6, 7), (8, 9, 10, 0)
    rows = [supervised_row(EncodedPair(prompt, target)), *_rows(1)]
    with torch.enable_grad():
        handle = model.base_model.register_forward_hook(keep)
        completion_loss(model, collate(rows)).backward()
        handle.remove()
    places = seen[0].grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert places == list(range(len(prompt) - 1, len(prompt) + len(target) - 1))


def test_a_model_that_cannot_leave_logits_out_has_the_same_loss(monkeypatch):
    model, batch = _model(), collate(_rows(4))
    expected = completion_loss(model, batch).item()
    monkeypatch.setattr(finetuning, "accepts", lambda model, argument: False)
    assert completion_loss(model, batch).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_and_padded_rows_have_the_same_loss_and_gradients(name, attention):
    model, rows = _model(name), _rows(9)
    model.set_attn_implementation(attention)
    packed = collate(rows, packing=True)
    assert len(packed["input_ids"]) < len(rows)
    loss, gradients = _gradients(model, collate(rows))
    packed_loss, packed_gradients = _gradients(model, packed)
    assert packed_loss == pytest.approx(loss, abs=1e-10)
    # Gemma normalises in float32, whatever its weights are.
    assert _close(packed_gradients, gradients, 1e-6 if name == "gemma3" else 1e-10)


@pytest.mark.parametrize("name", PACKED)
def test_no_gradient_crosses_from_one_row_of_a_line_to_another(name):
    model = _model(name)
    long, first, second = ({"input_ids": [*range(2, n)], "labels": [*range(2, n)]} for n in (12, 8, 6))
    batch = collate([long, first, second], packing=True)
    assert batch["input_ids"][1].tolist() == [*first["input_ids"], *second["input_ids"]]
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, position_ids=batch["position_ids"], use_cache=False).logits
    logits[1, len(first["input_ids"]) :].square().sum().backward()
    touched = embedded.grad.abs().sum(-1)
    assert not touched[0].any()
    assert not touched[1, : len(first["input_ids"])].any()
    assert touched[1, len(first["input_ids"]) :].all()


def test_lines_put_behind_each_other_for_flash_attention_have_the_same_loss(monkeypatch):
    model, batch = _model(), collate(_rows(9), packing=True)
    expected = completion_loss(model, batch).item()
    widths = []
    monkeypatch.setattr(finetuning, "_attention", lambda model: "flash_attention_2")
    model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    assert completion_loss(model, batch).item() == pytest.approx(expected, abs=1e-10)
    assert widths == [(1, batch["input_ids"].numel())]


@pytest.mark.parametrize("name", ["bloom", "opt"])
def test_packing_is_refused_where_rows_of_a_line_see_each_other(name):
    with pytest.raises(InvalidInput, match="does not keep the rows of a packed line apart"):
        finetune(_model(name), _rows(4), Finetuning(num_steps=1, packing=True))


@pytest.mark.parametrize("packing", [False, True])
def test_micro_batches_with_unequal_numbers_of_targets_give_the_gradient_of_the_whole_batch(packing):
    rows = _rows(7)
    model = _model()
    before = _weights(model)
    _, gradients = _gradients(model, collate(rows))
    targets = [sum(label != -100 for label in row["labels"]) for row in rows]
    assert len({sum(targets[part::3]) for part in range(3)}) == 3
    history = finetune(model, rows, _sgd(num_steps=1, gradient_accumulation_steps=3, packing=packing))
    expected = {name: before[name] - 0.5 * gradients[name] for name in before}
    # The number of targets is a float32.
    assert _close(_weights(model), expected, 1e-6)
    model.load_state_dict(before, strict=False)
    assert history.train[0]["loss"] == pytest.approx(completion_loss(model, collate(rows)).item(), abs=1e-6)


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script.__file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [*command, str(tmp_path / "weights.pt")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = torch.load(tmp_path / "weights.pt")
    assert found["processes"] == 2
    for packing in (False, True):
        assert _close(found[str(packing)], script.train(1, packing=packing), 1e-6)


def test_a_loss_that_is_not_a_number_names_the_rows_of_its_batch():
    rows = _rows(12)
    rows[5]["input_ids"][0] = 1

    def loss(model, batch):
        bad = (batch["input_ids"] == 1).any()
        return completion_loss(model, batch) * torch.where(bad, torch.nan, 1.0)

    with pytest.raises(TrainingDiverged) as error:
        finetune(_model(), rows, Finetuning(num_steps=3, batch_size=4), seed=3, loss=loss)
    step = next(n for n in range(3) if 5 in Batches(12, 4, seed=3).indices(n))
    named = ", ".join(map(str, sorted(Batches(12, 4, seed=3).indices(step).tolist())))
    assert error.value.step == step + 1
    assert str(error.value).endswith(f"It holds the rows {named}.")


class _Killed(Exception):
    pass


def test_a_run_that_was_killed_goes_on_to_the_same_weights(tmp_path):
    def run(model: nn.Module, folder: Path | None, die_at: int | None = None):
        def hook(event: Event) -> None:
            if event.moment is Moment.STEP and event.step == die_at:
                raise _Killed

        settings = Finetuning(num_steps=6, batch_size=4, learning_rate=1e-2, warmup_steps=2)
        every = None if folder is None else 2
        return finetune(model, _rows(10), settings, checkpoint_dir=folder, checkpoint_every=every, hooks=[hook])

    # GPT-2 has dropout, so the random numbers must go on as well.
    whole, killed, resumed = (_model("gpt2", torch.float32) for _ in range(3))
    history = run(whole, None)
    with pytest.raises(_Killed):
        run(killed, tmp_path, die_at=5)
    assert run(resumed, tmp_path).train == history.train
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_dataset_and_a_list_of_the_same_rows_train_alike():
    rows, models = _rows(10), [_model() for _ in range(2)]
    for model, given in zip(models, (rows, datasets.Dataset.from_list(rows)), strict=True):
        finetune(model, given, _sgd(num_steps=3, batch_size=4), seed=2)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_the_seed_decides_the_order_of_the_rows():
    def first_batch(seed: int) -> list[list[int]]:
        seen: list[list[int]] = []

        def loss(model, batch):
            seen.extend(batch["input_ids"].tolist())
            return completion_loss(model, batch)

        finetune(_model(), _rows(10), _sgd(num_steps=1, batch_size=4), seed=seed, loss=loss)
        return seen

    assert first_batch(0) == first_batch(0) != first_batch(1)


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_is_afterwards_in_the_mode_it_was_in(fails):
    model = _model("gpt2")
    model.transformer.h[1].train()
    before = [module.training for module in model.modules()]

    def loss(model, batch):
        assert all(module.training for module in model.modules())
        if fails:
            raise _Killed
        return completion_loss(model, batch)

    try:
        finetune(model, _rows(4), Finetuning(num_steps=1), loss=loss)
    except _Killed:
        assert fails
    assert [module.training for module in model.modules()] == before


def test_lora_trains_the_adapters_and_nothing_else():
    plain = _model(dtype=torch.float32)
    model = add_lora(copy.deepcopy(plain), rank=4, alpha=8)
    start = _weights(model)
    finetune(model, _rows(8), Finetuning(num_steps=2, batch_size=4, learning_rate=1e-2, packing=True))
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, start[name])}
    assert changed == {name for name in start if "lora_" in name}
    base = {name.replace("base_layer.", ""): weight for name, weight in model.get_base_model().named_parameters()}
    assert all(torch.equal(weight, base[name]) for name, weight in plain.named_parameters())


def test_adapters_begin_as_the_plain_model_and_depend_on_the_seed_alone():
    batch = collate(_rows(4))
    state = torch.random.get_rng_state()
    one, same, other = (_weights(add_lora(_model(dtype=torch.float32), seed=seed)) for seed in (1, 1, 2))
    torch.random.set_rng_state(state)
    model = add_lora(_model(dtype=torch.float32), seed=1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert completion_loss(model, batch).item() == completion_loss(_model(dtype=torch.float32), batch).item()


def test_drawing_adapters_leaves_the_callers_random_numbers_alone():
    model = _model(dtype=torch.float32)
    state = torch.random.get_rng_state()
    add_lora(model)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_fine_tuned_model_says_its_answers_and_stops():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    pairs = [
        {"prompt": "the value of", "completion": " the array"},
        {"prompt": "return", "completion": " the order of the other values"},
        {"prompt": "in the", "completion": " order"},
    ]
    model = _model(dtype=torch.float32)
    rows = [supervised_row(pair) for pair in encode_pairs(tokenizer, pairs)]
    finetune(model, rows, Finetuning(num_steps=40, learning_rate=3e-2))
    lm = CausalLM(model, tokenizer, provenance="fine-tuned")
    for pair, (answer,) in zip(pairs, lm.generate([pair["prompt"] for pair in pairs], max_new_tokens=40), strict=True):
        assert answer.text == pair["completion"]
        assert answer.token_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("settings", "num_rows", "steps"),
    [
        (Finetuning(batch_size=4), 10, 2),
        (Finetuning(batch_size=4, num_epochs=2.5), 10, 5),
        (Finetuning(batch_size=32), 10, 1),
        (Finetuning(batch_size=4, num_epochs=0.1), 10, 1),
        (Finetuning(num_steps=7, num_epochs=3), 10, 7),
    ],
)
def test_a_run_makes_its_steps_or_its_passes(settings, num_rows, steps):
    assert settings.steps(num_rows) == steps
    assert finetune(_model(), _rows(num_rows), settings).num_steps == steps


def test_runs_without_updates_are_refused():
    for wrong in ({"batch_size": 0}, {"num_steps": 0}, {"num_epochs": 0}):
        with pytest.raises(InvalidInput, match="batch_size and num_steps are at least 1"):
            Finetuning(**wrong)
    with pytest.raises(InvalidInput, match="no rows to train on"):
        finetune(_model(), [], Finetuning())
    with pytest.raises(InvalidInput, match="Batches of 2 rows cannot be shared"):
        finetune(_model(), _rows(2), Finetuning(gradient_accumulation_steps=3))
