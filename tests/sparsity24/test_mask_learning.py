"""End-to-end mask learning against a literal training loop, its resume, what it must leave alone, and what it gains."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from core.data import catalog
from core.errors import CheckpointError, InvalidInput
from core.llm.causal import CausalLM
from core.testbed import tiny_llama
from core.training import TrainingDiverged
from sparsity24 import mask_learning
from sparsity24.calibration import random_sequences
from sparsity24.mask_learning import PUBLISHED, MaskLearning, learn_masks, row_keys
from sparsity24.model import prune_model
from sparsity24.prox import group_support, is_24, prox24, top2_mask

VOCAB = 40
ABSOLUTE = MaskLearning(lam=0.3, learning_rate=0.02, scale_free=False, train="all", warmup=0.25)
RELATIVE = MaskLearning(lam=2.0, learning_rate=0.05, warmup=0.25)


def _llama(seed: int = 0, *, hidden: int = 16, ffn: int = 24, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).to(dtype)
    return model.eval()


def _batches(num: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (4, 20), generator=generator) for _ in range(num)]


def _pruned_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]


def _learned_weights(folder: Path) -> dict[str, Tensor]:
    """The weights that training ended with, from its last checkpoint."""
    (saved,) = folder.glob("step-*/arrays.safetensors")
    return {name.removeprefix("model."): value for name, value in load_file(saved).items() if name.startswith("model.")}


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def _literal(model: LlamaForCausalLM, ids: Tensor, settings: MaskLearning, num_steps: int) -> dict[str, Tensor]:
    """The same training in a plain loop, one weight at a time; the whole of `ids` is one batch."""
    model = copy.deepcopy(model).train()
    pruned = {f"{name}.weight" for name in _pruned_names(model)}
    trained = {n: p for n, p in model.named_parameters() if settings.train == "all" or n in pruned}
    sizes = {
        n: p.detach().double().square().mean().sqrt().item() if settings.scale_free else 1.0 for n, p in trained.items()
    }
    scales = {n: trained[n].detach().double().square().mean(1, keepdim=True).sqrt() for n in pruned}
    optimizer = torch.optim.AdamW([{"params": [p], "name": n} for n, p in trained.items()], weight_decay=0.0)
    warm = round(settings.warmup * num_steps)
    for step in range(num_steps):
        factor = step / warm if step < warm else (num_steps - step) / (num_steps - warm)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * sizes[group["name"]] * factor
        logits = model(input_ids=ids).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1))
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(list(trained.values()), settings.max_grad_norm)
        optimizer.step()
        for name in pruned:
            weight = trained[name].detach()
            pull = (
                settings.lam * settings.learning_rate * factor / scales[name] if settings.scale_free else settings.lam
            )
            weight.copy_(prox24(weight, pull))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("settings", [ABSOLUTE, RELATIVE], ids=["absolute", "scale-free"])
def test_training_is_adamw_followed_by_the_proximal_operator_at_every_step(
    settings: MaskLearning, tmp_path: Path
) -> None:
    # Double precision, since AdamW's first steps turn the sign of a rounding error into a whole step.
    model, ids = _llama(dtype=torch.float64), torch.cat(_batches())
    learned = learn_masks(model, [ids], settings, num_steps=8, batch_size=len(ids), checkpoint_dir=tmp_path)
    expected = _literal(model, ids, settings, num_steps=8)
    found = _learned_weights(tmp_path)
    originals = dict(model.named_parameters())
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-9), name
        assert torch.equal(found[name], originals[name]) is (
            settings.train == "pruned" and name[:-7] not in learned.masks
        )
    for name, mask in learned.masks.items():
        assert torch.equal(mask, top2_mask(found[f"{name}.weight"].abs()))
    share = torch.cat([(group_support(found[f"{name}.weight"]) <= 2).flatten() for name in learned.masks])
    assert learned.share_24 == pytest.approx(share.double().mean().item())
    assert 0 < learned.share_24 < 1


def test_without_a_regulariser_the_masks_are_the_largest_of_plain_fine_tuning(tmp_path: Path) -> None:
    model, ids = _llama(dtype=torch.float64), torch.cat(_batches())
    settings = replace(RELATIVE, lam=0.0)
    learned = learn_masks(model, [ids], settings, num_steps=8, batch_size=len(ids), checkpoint_dir=tmp_path)
    assert learned.share_24 == 0.0
    tuned = _literal(model, ids, settings, num_steps=8)
    found = _learned_weights(tmp_path)
    for name, mask in learned.masks.items():
        assert torch.equal(mask, top2_mask(found[f"{name}.weight"].abs()))
        assert torch.equal(mask, top2_mask(tuned[f"{name}.weight"].abs()))
    assert learned.changed > 0


@pytest.mark.parametrize("settings", [replace(ABSOLUTE, warmup=0.0), replace(RELATIVE, warmup=0.0)])
def test_a_large_lambda_makes_every_group_sparse_in_one_step(settings: MaskLearning) -> None:
    assert learn_masks(_llama(), _batches(), replace(settings, lam=1e6), num_steps=1).share_24 == 1.0


@pytest.mark.parametrize("groups", [1, 7, 100])
def test_small_weights_together_and_large_ones_in_parts_give_the_same_masks(
    groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In double precision: how many Newton steps the operator takes depends on what it works on at once."""
    model = _llama(dtype=torch.float64)
    whole = learn_masks(model, _batches(), RELATIVE, num_steps=4, checkpoint_dir=tmp_path / "whole")
    monkeypatch.setattr(mask_learning, "_BUCKET", groups)
    parts = learn_masks(model, _batches(), RELATIVE, num_steps=4, checkpoint_dir=tmp_path / "parts")
    assert _same(dict(parts.masks), dict(whole.masks))
    found, expected = _learned_weights(tmp_path / "parts"), _learned_weights(tmp_path / "whole")
    assert all(torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-9) for name in expected)


def test_scale_free_masks_do_not_depend_on_the_scale_of_the_weights_and_absolute_ones_do() -> None:
    """Queries and keys divided and multiplied by 8 (a power of two: no rounding) give the same model."""
    model, scaled, batches = _llama(), _llama(), _batches()
    with torch.no_grad():
        for name, parameter in scaled.named_parameters():
            parameter.mul_({"q": 8.0, "k": 1 / 8}.get(name.split(".")[-2][0], 1.0) if "self_attn" in name else 1.0)
    ours = replace(RELATIVE, max_grad_norm=1e9)
    one, other = (learn_masks(each, batches, ours, num_steps=12, batch_size=4) for each in (model, scaled))
    agreement = [(one.masks[name] == other.masks[name]).double().mean().item() for name in one.masks]
    assert min(agreement) > 0.97
    assert one.changed > 0.03
    assert other.share_24 == pytest.approx(one.share_24, abs=0.01)
    theirs = replace(ABSOLUTE, train="pruned", max_grad_norm=1e9)
    queries = "model.layers.0.self_attn.q_proj"
    first, second = (
        learn_masks(each, batches, theirs, num_steps=12, batch_size=4).masks[queries] for each in (model, scaled)
    )
    assert (first == second).double().mean() < 0.97


def test_the_model_is_left_bit_for_bit_and_pruning_keeps_original_weights_on_the_masks() -> None:
    model, batches = _llama(), _batches()
    before = _state(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    generator = torch.random.get_rng_state()
    learned = learn_masks(model, batches, RELATIVE, num_steps=4)
    assert _same(_state(model), before)
    assert not model.training
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), generator)
    report = prune_model(model, batches, learned, refine="none")
    assert sorted(layer.name for layer in report.layers) == sorted(learned.masks) == sorted(_pruned_names(model))
    after = _state(model)
    for name, value in before.items():
        mask = learned.masks.get(name.removesuffix(".weight"))
        assert torch.equal(after[name], value if mask is None else torch.where(mask, value, 0.0)), name
    assert report.method == "end-to-end prox"
    assert report.method_params["settings"] == asdict(RELATIVE)
    assert not {"masks", "learned"} & report.method_params.keys()


def test_refinement_polishes_the_learned_masks_without_changing_them() -> None:
    model, batches = _llama(), _batches()
    learned = learn_masks(model, batches, RELATIVE, num_steps=4)
    rough = prune_model(copy.deepcopy(model), batches, learned, refine="none")
    report = prune_model(model, batches, learned, refine="cg")
    assert report.mean_rel_loss < rough.mean_rel_loss
    for name, mask in learned.masks.items():
        assert bool((model.get_submodule(name).weight[~mask] == 0).all())


def test_learned_masks_know_rows_in_any_order_and_refuse_those_of_another_model() -> None:
    model = _llama()
    learned = learn_masks(model, _batches(), RELATIVE, num_steps=4)
    names = ("model.layers.1.mlp.gate_proj", "model.layers.0.mlp.gate_proj")
    weight = torch.cat([model.get_submodule(name).weight.detach() for name in names])
    mask = torch.cat([learned.masks[name] for name in names])
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))[:20]
    found = learned.prune(weight[order], torch.eye(16))
    assert torch.equal(found.mask, mask[order])
    assert torch.equal(found.weight, weight[order] * mask[order] + 0.0)
    for stranger in (weight.nextafter(torch.tensor(9.0)), torch.randn(3, 20)):
        with pytest.raises(InvalidInput, match="not those that the masks were learned for"):
            learned.prune(stranger, torch.eye(stranger.shape[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_of_rows_differ_where_one_bit_does(dtype: torch.dtype) -> None:
    row = torch.randn(32, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = row.repeat(33, 1)
    for column in range(32):
        rows[column + 1, column] = rows[column + 1, column].nextafter(torch.tensor(9.0, dtype=dtype))
    assert len(row_keys(rows.float()).unique()) == 33
    assert torch.equal(row_keys(rows.float())[[0, 7]], row_keys(rows.float()[[0, 7]]))


def test_half_precision_weights_learn_in_float32_and_stay_half_in_the_model() -> None:
    """Steps of 1e-4 of the weights vanish in bfloat16, whose spacing is 4e-3: nothing would be learned."""
    small = MaskLearning(lam=0.0, learning_rate=2e-4, warmup=0.0)
    model = _llama(dtype=torch.bfloat16)
    learned = learn_masks(model, _batches(), small, num_steps=30, batch_size=8)
    assert learned.changed > 0
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    prune_model(model, _batches(), learned, refine="none")
    assert all(is_24(model.get_submodule(name).weight) for name in learned.masks)


def test_padding_is_no_token() -> None:
    model, ids = _llama(), _batches(1)[0]
    padded = {
        "input_ids": nn.functional.pad(ids, (0, 5), value=3),
        "attention_mask": torch.ones(4, 25, dtype=torch.long),
    }
    padded["attention_mask"][:, 20:] = 0
    plain, cut = (learn_masks(model, [batch], RELATIVE, num_steps=3) for batch in (ids, padded))
    assert plain.losses == cut.losses
    mixed = learn_masks(model, [ids, ids[:, :9]], RELATIVE, num_steps=1, batch_size=8)
    losses = [
        nn.functional.cross_entropy(model(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="sum").item()
        for x in (ids, ids[:, :9])
    ]
    assert mixed.losses[0] == pytest.approx(sum(losses) / (4 * 19 + 4 * 8), rel=1e-5)


@pytest.mark.parametrize("kind", ["conv1d", "experts"])
def test_groups_run_along_the_input_axis_of_every_kind_of_weight(kind: str) -> None:
    torch.manual_seed(0)
    model: Any
    if kind == "conv1d":
        config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3)
        model = GPT2LMHeadModel(config).eval()
    else:
        model = MixtralForCausalLM(
            MixtralConfig(
                vocab_size=VOCAB,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_local_experts=3,
                num_experts_per_tok=2,
                initializer_range=0.3,
            )
        ).eval()
    before = _state(model)
    learned = learn_masks(model, _batches(), RELATIVE, num_steps=6, batch_size=8)
    assert all(bool((group_support(mask.float()) == 2).all()) for mask in learned.masks.values())
    assert 0 < learned.share_24 < 1
    prune_model(model, _batches(), learned, refine="none")
    if kind == "conv1d":
        name = "transformer.h.0.mlp.c_fc"
        expected = before[f"{name}.weight"] * learned.masks[name].t()
        assert torch.equal(model.state_dict()[f"{name}.weight"], expected + 0.0)
    else:
        name = "model.layers.0.mlp.experts.down_proj"
        expected = torch.stack([before[name][index] * learned.masks[f"{name}[{index}]"] for index in range(3)])
        assert torch.equal(model.state_dict()[name], expected + 0.0)


class _Blockless(nn.Module):
    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


class _Killed(BaseException):
    pass


def test_a_run_that_was_killed_resumes_to_the_same_masks_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = _llama(), _batches()
    options: dict[str, Any] = {"num_steps": 9, "batch_size": 3, "checkpoint_every": 2}
    whole = learn_masks(model, batches, RELATIVE, **options, checkpoint_dir=tmp_path / "whole")
    true_loss, calls = mask_learning.next_token_loss, 0

    def dies_in_the_sixth_step(learner: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise _Killed
        return true_loss(learner, batch)

    before = _state(model)
    monkeypatch.setattr(mask_learning, "next_token_loss", dies_in_the_sixth_step)
    with pytest.raises(_Killed):
        learn_masks(model, batches, RELATIVE, **options, checkpoint_dir=tmp_path / "killed")
    monkeypatch.undo()
    assert _same(_state(model), before)
    assert [path.name for path in (tmp_path / "killed").glob("step-*")] == ["step-00000004"]
    resumed = learn_masks(model, batches, RELATIVE, **options, checkpoint_dir=tmp_path / "killed")
    assert _same(_learned_weights(tmp_path / "whole"), _learned_weights(tmp_path / "killed"))
    assert _same(dict(whole.masks), dict(resumed.masks))
    assert resumed.losses == whole.losses
    unsaved = learn_masks(model, batches, RELATIVE, num_steps=9, batch_size=3)
    assert _same(dict(unsaved.masks), dict(whole.masks))


def test_a_checkpoint_of_other_data_weights_or_settings_is_not_continued(tmp_path: Path) -> None:
    model, batches = _llama(), _batches()
    learn_masks(model, batches, RELATIVE, num_steps=2, checkpoint_dir=tmp_path)
    for other in (
        (model, _batches(seed=1), RELATIVE),
        (_llama(1), batches, RELATIVE),
        (model, batches, replace(RELATIVE, lam=1.0)),
    ):
        with pytest.raises(CheckpointError, match="belongs to a different run"):
            learn_masks(*other, num_steps=2, checkpoint_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lam": -1.0}, "lam"),
        ({"lam": float("nan")}, "lam"),
        ({"lam": float("inf")}, "lam"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"warmup": 1.5}, "warmup"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
    ],
)
def test_settings_that_no_training_could_use_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        MaskLearning(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"batches": []}, "empty"),
        ({"batches": [torch.zeros(0, 8, dtype=torch.long)]}, "empty"),
        ({"batches": [torch.zeros(2, 1, dtype=torch.long)]}, "nothing to predict"),
        ({"batches": [torch.zeros(2, 8)]}, "token ids"),
        ({"batches": [{"inputs_embeds": torch.zeros(2, 8, 16)}]}, "input_ids"),
        ({"batch_size": 9}, "do not fill one batch"),
        ({"settings": "papr"}, "paper"),
        ({"skip": ["*"]}, "nothing to prune"),
        ({"skip": ["*.wrong"]}, "matches no weight"),
    ],
)
def test_data_and_options_that_do_not_fit_are_refused_before_training(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask_learning, "fit", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(InvalidInput, match=message):
        learn_masks(**{"model": _llama(), "batches": _batches(), **change})


def test_a_model_without_blocks_or_with_bad_weights_is_refused() -> None:
    model = _llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(InvalidInput, match="NaN or infinite"):
        learn_masks(model, _batches(), num_steps=1)
    with pytest.raises(InvalidInput, match="no list of blocks"):
        learn_masks(_Blockless(), _batches(), num_steps=1)


def test_a_width_that_is_no_multiple_of_four_stays_dense_with_the_warning_of_prune_model() -> None:
    model, batches = _llama(ffn=26), _batches()
    with pytest.warns(UserWarning, match="multiple of 4") as caught:
        learned = learn_masks(model, batches, RELATIVE, num_steps=2)
    names = [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    assert list(learned.skipped) == names
    assert not set(names) & learned.masks.keys()
    with pytest.warns(UserWarning, match="multiple of 4") as wanted:
        prune_model(model, batches, learned, refine="none")
    texts = [{str(w.message) for w in found if "multiple" in str(w.message)} for found in (caught, wanted)]
    assert texts[0] == texts[1]
    with pytest.raises(InvalidInput, match="multiple of 4"):
        learn_masks(_llama(ffn=26), batches, RELATIVE, num_steps=2, strict=True)


def test_skipped_weights_get_no_mask() -> None:
    model = _llama()
    learned = learn_masks(model, _batches(), RELATIVE, num_steps=2, skip=["*.down_proj"])
    assert sorted(learned.skipped) == [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    assert sorted(learned.masks) == sorted(set(_pruned_names(model)) - set(learned.skipped))


def test_a_diverging_run_raises_and_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _llama()
    before = _state(model)
    with pytest.raises(TrainingDiverged):
        learn_masks(model, _batches(), replace(ABSOLUTE, learning_rate=1e30, warmup=0.0), num_steps=3)
    true_loss = mask_learning.next_token_loss

    def with_a_gradient_of_nan(learner: Any, batch: Any) -> Tensor:
        return true_loss(learner, batch) + (0 * learner.model.layers[0].mlp.up_proj.weight).sum().sqrt()

    monkeypatch.setattr(mask_learning, "next_token_loss", with_a_gradient_of_nan)
    with pytest.raises(TrainingDiverged, match="after the last step"):
        learn_masks(model, _batches(), replace(ABSOLUTE, warmup=0.0), num_steps=1)
    assert _same(_state(model), before)


def test_published_settings_are_absolute_and_those_of_the_reference() -> None:
    lams = {name.split("/")[1]: settings.lam for name, settings in PUBLISHED.items()}
    assert lams == {
        "Llama-2-7b-hf": 0.25,
        "Llama-2-13b-hf": 0.5,
        "Llama-3.1-8B": 0.85,
        "open_llama_7b_v2": 1.0,
        "Qwen2.5-14B": 0.2,
        "Mistral-7B-v0.1": 20.0,
        "Mistral-7B-v0.3": 25.0,
    }
    assert MaskLearning.variant("paper") == PUBLISHED["meta-llama/Llama-2-7b-hf"]
    assert all(not s.scale_free and s.train == "all" and s.learning_rate in (1e-4, 5e-5) for s in PUBLISHED.values())


_DISTRIBUTED = """
import sys
sys.path[:0] = {paths!r}
import torch
from test_mask_learning import RELATIVE, _batches, _llama
from sparsity24.mask_learning import learn_masks

for parallel in ("ddp", "fsdp"):
    model = _llama(dtype=torch.float64)
    learned = learn_masks(
        model, _batches(), RELATIVE, num_steps=4, batch_size=4, parallel=parallel, device="cpu",
        checkpoint_dir="{folder}/" + parallel,
    )
    torch.save(dict(learned.masks), f"{folder}/{{parallel}}-{{torch.distributed.get_rank()}}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_learn_the_masks_of_one_under_ddp_and_fsdp(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    root = Path(__file__).parents[2]
    script.write_text(_DISTRIBUTED.format(paths=[str(root), str(Path(__file__).parent)], folder=tmp_path))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ran = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    alone = learn_masks(
        _llama(dtype=torch.float64), _batches(), RELATIVE, num_steps=4, batch_size=4, checkpoint_dir=tmp_path / "alone"
    )
    expected = _learned_weights(tmp_path / "alone")
    for parallel in ("ddp", "fsdp"):
        found = _learned_weights(tmp_path / parallel)
        assert all(torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-9) for name in expected)
        for rank in range(2):
            masks = torch.load(tmp_path / f"{parallel}-{rank}.pt", weights_only=True)
            assert masks.keys() == alone.masks.keys()
            assert _same(masks, dict(alone.masks))


@cache
def _corpus() -> tuple[Tensor, str]:
    """Token ids to learn on, and held-out text."""
    train = catalog.load("embedded:corpus", "train").text[:400_000]
    return torch.tensor(tiny_llama(0).encode(train)), catalog.load("embedded:corpus", "test").text[:60_000]


def _perplexity(lm: CausalLM, masks: Mapping[str, Tensor]) -> float:
    """On held-out text, with the masks on the original weights, which come back afterwards."""
    weights = {name: lm.model.get_submodule(name).weight.data for name in masks}
    originals = {name: weight.clone() for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.mul_(masks[name])
    found = lm.perplexity(_corpus()[1], window=128, max_windows=60).value
    for name, weight in weights.items():
        weight.copy_(originals[name])
    return found


def test_learned_masks_beat_magnitude_and_random_ones_on_held_out_text_for_every_seed() -> None:
    """Measured after 400 steps on seeds 0 and 1: 13.8 and 13.7, magnitude 17.6 and 16.7; the margin is about half of that."""
    for seed in range(3):
        lm = tiny_llama(seed)
        sequences = random_sequences(_corpus()[0], num_sequences=120, window=128, seed=seed)
        learned = learn_masks(lm.model, sequences, num_steps=120, seed=seed, device="cpu")
        generator = torch.Generator().manual_seed(seed)
        weights = {name: lm.model.get_submodule(name).weight.detach() for name in learned.masks}
        scores = {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}
        random = _perplexity(lm, {name: top2_mask(score) for name, score in scores.items()})
        magnitude = _perplexity(lm, {name: top2_mask(weight.abs()) for name, weight in weights.items()})
        found, dense = _perplexity(lm, learned.masks), _perplexity(lm, {})
        assert dense < found < 0.92 * magnitude < magnitude < random, (seed, dense, found, magnitude, random)
