"""LoRA adapters merged into pruned models: peft's own merge loses the pattern, ours keeps it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from core.errors import InvalidInput
from sparsity24.lora import merge_lora
from sparsity24.pattern import TWO_FOUR, Pattern
from sparsity24.weights import WeightRef

SPARSE = ("self_attn.q_proj", "mlp.down_proj")
DENSE = ("self_attn.v_proj",)


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_attention_heads=2, num_key_value_heads=1, **shape))


def _project(weight: Tensor, pattern: Pattern = TWO_FOUR) -> None:
    weight.data.copy_(torch.where(pattern.mask(weight.data.abs()), weight.data, 0))


def _adapted(**options: Any) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """A model with two of three adapted layers a block 2:4, and by name their weights and what the adapter adds."""
    model = _llama()
    for name, module in model.named_modules():
        if name.endswith(SPARSE):
            _project(module.weight)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    targets = [name.rpartition(".")[2] for name in SPARSE + DENSE]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, **options))
    _randomise(adapted)
    deltas = {
        f"{name.removeprefix('base_model.model.')}.weight": module.get_delta_weight("default")
        for name, module in adapted.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    return adapted, before, deltas


def _randomise(adapted: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


def _sparse_names(model: nn.Module) -> list[str]:
    return [f"{name}.weight" for name, _ in model.named_modules() if name.endswith(SPARSE)]


def test_the_plain_merge_of_peft_loses_the_pattern() -> None:
    adapted, _, _ = _adapted()
    merged = adapted.merge_and_unload()
    weights = dict(merged.named_parameters())
    assert all(TWO_FOUR.share(weights[name]) < 0.1 for name in _sparse_names(merged))


def test_the_masked_merge_is_the_sum_on_the_old_mask_and_plain_where_weights_were_dense() -> None:
    adapted, before, deltas = _adapted()
    merged = merge_lora(adapted)
    assert isinstance(merged, LlamaForCausalLM)
    assert {name for name, _ in merged.named_parameters()} == set(before)
    sparse = _sparse_names(merged)
    assert len(deltas) == 6
    for name, weight in merged.named_parameters():
        expected = before[name] + deltas.get(name, 0)
        if name in sparse:
            expected = torch.where(before[name] != 0, expected, 0)
            assert torch.equal(weight != 0, before[name] != 0)
            assert not weight[weight == 0].signbit().any()
        assert torch.allclose(weight, expected, atol=1e-6), name


def test_reprojection_keeps_the_largest_of_the_merged_weight() -> None:
    adapted, before, deltas = _adapted()
    merged = merge_lora(adapted, how="reproject")
    weights = dict(merged.named_parameters())
    moved = 0
    for name in _sparse_names(merged):
        total = before[name] + deltas[name]
        assert torch.allclose(weights[name], torch.where(TWO_FOUR.mask(total.abs()), total, 0), atol=1e-6)
        moved += int(((weights[name] != 0) != (before[name] != 0)).sum())
    assert moved > 0
    dense = next(name for name in before if name.endswith("v_proj.weight"))
    assert torch.allclose(weights[dense], before[dense] + deltas[dense], atol=1e-6)


def test_weight_decomposed_adapters_merge_as_peft_says_and_keep_the_mask() -> None:
    adapted, before, _ = _adapted(use_dora=True)
    plain = dict(copy.deepcopy(adapted).merge_and_unload().named_parameters())
    merged = dict(merge_lora(adapted).named_parameters())
    sparse = [name for name in merged if name.removesuffix(".weight").endswith(SPARSE)]
    for name in sparse:
        assert torch.allclose(merged[name], torch.where(before[name] != 0, plain[name], 0), atol=1e-6)


def test_conv1d_keeps_its_pattern_along_its_inputs() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    layers = [module for module in model.modules() if isinstance(module, Conv1D)]
    for layer in layers:
        _project(layer.weight.t())
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))
    _randomise(adapted)
    before = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    merged = merge_lora(adapted)
    weight = merged.transformer.h[0].attn.c_attn.weight
    assert torch.equal(weight != 0, before != 0)
    assert not torch.equal(weight, before)


def test_fused_experts_need_their_places_and_then_keep_their_masks() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_local_experts": 3}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=40, num_attention_heads=2, num_key_value_heads=1, **shape))
    name = "model.layers.0.mlp.experts.down_proj"
    parameter = dict(model.named_parameters())[name]
    for expert in parameter:
        _project(expert)
    before = parameter.detach().clone()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"]))
    _randomise(adapted)
    with pytest.raises(InvalidInput, match=r"down_proj` is a stack of experts: give weights="):
        merge_lora(adapted)
    merged = merge_lora(adapted, weights=[WeightRef(f"{name}[{e}]", name, e) for e in range(3)])
    after = dict(merged.named_parameters())[name]
    assert torch.equal(after != 0, before != 0)
    assert not torch.equal(after, before)


def test_other_patterns_are_kept() -> None:
    model = _llama()
    pattern = Pattern(1, 4)
    for name, module in model.named_modules():
        if name.endswith("up_proj"):
            _project(module.weight, pattern)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"]))
    _randomise(adapted)
    merged = merge_lora(adapted, pattern=pattern)
    assert all(pattern.holds(module.weight) for name, module in merged.named_modules() if name.endswith("up_proj"))


def test_one_of_several_adapters_is_merged_by_its_name() -> None:
    adapted, before, deltas = _adapted()
    adapted.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and ".other." in name:
            parameter.data.fill_(0.5)
    merged = dict(merge_lora(adapted, "other").named_parameters())
    dense = next(name for name in before if name.endswith("v_proj.weight"))
    added = merged[dense] - before[dense]
    assert not torch.allclose(added, deltas[dense], atol=1e-2)
    assert torch.allclose(added, added[0, 0].expand_as(added), atol=1e-6)
    assert added[0, 0] > 0.1
    assert torch.equal(merged["model.layers.0.mlp.down_proj.weight"], before["model.layers.0.mlp.down_proj.weight"])


def test_wrong_input_is_refused_before_anything_changes() -> None:
    adapted, before, _ = _adapted()
    with pytest.raises(InvalidInput, match=r"takes a peft\.PeftModel; got LlamaForCausalLM"):
        merge_lora(_llama())
    with pytest.raises(InvalidInput, match=r"No adapter is called 'x'; there are default"):
        merge_lora(adapted, "x")
    with pytest.raises(InvalidInput, match=r"no parameter `y\.weight`"):
        merge_lora(adapted, weights=[WeightRef("y", "y.weight")])
    broken = next(p for name, p in reversed(list(adapted.named_parameters())) if "lora_B" in name)
    broken.data[0, 0] = torch.nan
    with pytest.raises(InvalidInput, match=r"lora_B\.default\.weight` has NaN"):
        merge_lora(adapted)
    broken.data[0, 0] = 0
    for name, parameter in adapted.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert "lora_" in name or torch.equal(parameter, before[plain])
    adapted.merge_adapter()
    with pytest.raises(InvalidInput, match=r"is merged into .* already"):
        merge_lora(adapted)
