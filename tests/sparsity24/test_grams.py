"""What a block's weights see, and the target between the pruned and the dense model's outputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparsity24.grams import LayerInputs, shifted_target
from sparsity24.layer import prune_layer
from sparsity24.methods import SparseGPT, Wanda
from sparsity24.model import prune_model


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(40, (4, 30), generator=generator) for _ in range(3)]


def _inputs_of(model: Any, name: str) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in _batches():
            model(batch, use_cache=False)
    handle.remove()
    return torch.cat(seen).double()


@pytest.mark.parametrize("mix", [0.25, 0.5, 1.0])
def test_the_target_is_the_least_squares_fit_to_outputs_between_the_two_models(mix: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator).double()
    x_dense = x + 0.3 * torch.randn(200, 8, generator=generator).double()
    w0 = torch.randn(5, 8, generator=generator).double()
    gram, shift = x.T @ x / 200, (x_dense - x).T @ x / 200
    inputs = LayerInputs(gram.float(), x.mean(0).float(), 200, shift.float())
    found = shifted_target(w0.float(), inputs, mix)
    # Ridge regression of the change of the outputs on x, by augmented least squares.
    ridge = 0.01 * gram.diagonal().mean()
    rows = torch.cat([x, (200 * ridge).sqrt() * torch.eye(8).double()])
    change = torch.cat([mix * (x_dense - x) @ w0.T, torch.zeros(8, 5).double()])
    expected = w0 + torch.linalg.lstsq(rows, change).solution.T
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_a_layer_without_inputs_keeps_its_dense_target() -> None:
    w0, nothing = torch.randn(5, 8), torch.zeros(8, 8)
    assert shifted_target(w0, LayerInputs(nothing, torch.zeros(8), 9, nothing), 0.5) is w0


def test_without_a_shift_the_target_is_the_dense_weight() -> None:
    w0 = torch.randn(5, 8)
    assert shifted_target(w0, LayerInputs(torch.eye(8), torch.zeros(8), 9), 0.5) is w0


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=lambda method: method.name)
def test_half_way_pruning_equals_full_passes_of_both_models(method: Any) -> None:
    model, literal, dense = _llama(), _llama(), _llama()
    prune_model(model, _batches(), method, refine="none", target_mix=0.5)
    groups = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
    for index in range(3):
        before = copy.deepcopy(literal)
        for group in groups:
            names = [f"model.layers.{index}.{name}" for name in group]
            x, x_dense = _inputs_of(before, names[0]), _inputs_of(dense, names[0])
            gram, shift = (x.T @ x / len(x)).float(), ((x_dense - x).T @ x / len(x)).float()
            inputs = LayerInputs(gram, x.mean(0).float(), len(x), shift)
            layers = [literal.get_submodule(name) for name in names]
            target = shifted_target(torch.cat([layer.weight.detach() for layer in layers]), inputs, 0.5)
            weight = prune_layer(target, gram, method, "none").weight
            for layer, part in zip(layers, weight.split([len(layer.weight) for layer in layers]), strict=True):
                layer.weight.data.copy_(part)
    for (name, one), other in zip(model.named_parameters(), literal.parameters(), strict=True):
        assert torch.equal(one == 0, other == 0), name
        assert torch.allclose(one, other, atol=2e-3), name


@pytest.mark.parametrize("mix", [-0.1, 1.5])
def test_a_mix_outside_zero_to_one_is_refused(mix: float) -> None:
    with pytest.raises(ValueError, match="target_mix"):
        prune_model(_llama(), _batches(), target_mix=mix)
