"""Every family of transformers that the reference lists, at a tiny random size: found, captured, pruned, replayed.

The Gram of every weight is compared with that of the inputs which a forward hook sees, or, for fused experts, with the
products that a pass of the whole model makes.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from sparsity24.blocks import InMemory, calm, find_stacks, record, survey
from sparsity24.calibration import as_inputs
from sparsity24.capture import Use, WeightWatch
from sparsity24.grams import collect
from sparsity24.methods import Magnitude
from sparsity24.model import one_sequence, prune_model
from sparsity24.pattern import TWO_FOUR
from sparsity24.ranks import Ranks
from sparsity24.weights import matrices

VOCAB = 48
DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
SLIDING: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 8}
OTHER: dict[str, Any] = {key: DECODER[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
PLAIN: dict[str, Any] = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}

# Name: class, configuration, weights pruned a block (T5: 6 in the encoder's and 10 in the decoder's).
FAMILIES: dict[str, tuple[Any, Any, int]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**DECODER), 7),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**DECODER, head_dim=8), 7),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**DECODER, **SLIDING), 7),
    "phi3": (Phi3ForCausalLM, Phi3Config(**DECODER), 4),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**OTHER, n_embd=16, n_layer=2, n_head=2), 4),
    "opt": (
        OPTForCausalLM,
        OPTConfig(**OTHER, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2),
        6,
    ),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**PLAIN), 4),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**DECODER, **EXPERTS), 12),
    "gpt-oss": (GptOssForCausalLM, GptOssConfig(**DECODER, **EXPERTS, **SLIDING), 12),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig(**DECODER, num_experts=4, num_experts_per_tok=2), 12),
    "bert": (BertForMaskedLM, BertConfig(**PLAIN), 6),
    "t5": (T5ForConditionalGeneration, T5Config(**OTHER, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8), 8),
    "vit": (
        ViTForImageClassification,
        ViTConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        ),
        6,
    ),
}


def _model(name: str) -> Any:
    torch.manual_seed(0)
    cls, config, _ = FAMILIES[name]
    model = cls(copy.deepcopy(config))
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _batches(name: str) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> Tensor:
        return torch.randint(3, VOCAB, (2, length), generator=generator)

    if name == "vit":
        return [{"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)} for _ in range(3)]
    if name == "t5":
        return [{"input_ids": ids(20), "decoder_input_ids": ids(11)} for _ in range(3)]
    return [{"input_ids": ids(20)} for _ in range(3)]


def _literal_grams(model: Any, batches: list[dict[str, Tensor]]) -> dict[tuple[str, int | None], Tensor]:
    """Grams from whole passes of the dense model, every product of every parameter watched."""
    blocks = {name: block for stack in find_stacks(model) for name, block in stack.items()}
    parameters = {key: value for own in matrices(model, blocks).values() for key, value in own.items()}
    uses: list[Use] = []
    with torch.no_grad(), calm(model), WeightWatch(parameters, uses.append):
        for batch in batches:
            model(**batch)
    seen: dict[tuple[str, int | None], list[Tensor]] = {}
    for use in uses:
        seen.setdefault((use.parameter, use.expert), []).append(use.x.reshape(-1, use.x.shape[-1]).double())
    return {key: torch.cat(x).T @ torch.cat(x) / len(torch.cat(x)) for key, x in seen.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_block_by_block_the_dense_model_gives_the_grams_of_whole_passes(name: str) -> None:
    model = _model(name)
    batches = _batches(name)
    expected = _literal_grams(model, batches)
    found = {}
    with torch.no_grad(), calm(model):
        inputs = as_inputs(model, batches)
        seen = survey(model, InMemory(), one_sequence(inputs))
        for number in range(len(seen.stacks)):
            stack = record(model, InMemory(), seen, number, inputs)
            for index, block in enumerate(stack.blocks):
                groups = seen.groups[block]
                for group, layer in collect(stack, index, groups, ranks=Ranks()).items():
                    found |= {(ref.parameter, ref.expert): layer for ref in group}
                stack.advance(index)
    assert {key for key in found if key[1] is None} == {key for key in expected if key[1] is None}
    for key, gram in expected.items():
        # Experts with fewer tokens than inputs are filled up from their neighbours.
        if found[key].num_tokens >= len(gram):
            assert torch.allclose(found[key].gram.double(), gram, rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_pruned_along_its_inputs_and_nothing_else_changes(name: str) -> None:
    model = _model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = prune_model(model, _batches(name), "sparsegpt")
    blocks = sum(len(stack) for stack in find_stacks(model))
    assert len(report.layers) == FAMILIES[name][2] * blocks
    parameters = dict(model.named_parameters())
    for layer in report.layers:
        weight = layer.weight.of(parameters[layer.weight.parameter].detach())
        assert TWO_FOUR.holds(weight), layer.name
        assert weight.shape == layer.shape
        assert 0 < layer.rel_loss < 1, layer.name
    pruned = {layer.weight.parameter for layer in report.layers}
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (key not in pruned), key
    assert not any("router" in key or "embed" in key or "lm_head" in key or "gate.weight" in key for key in pruned)


@pytest.mark.parametrize("name", ["gpt2", "gpt-oss"])
def test_transposed_weights_are_not_sparse_along_their_outputs(name: str) -> None:
    model = _model(name)
    report = prune_model(model, _batches(name), Magnitude(), refine="none")
    parameters = dict(model.named_parameters())
    turned = [layer for layer in report.layers if layer.weight.transposed]
    assert turned
    for layer in turned:
        stored = parameters[layer.weight.parameter].detach()
        matrix = stored if layer.weight.expert is None else stored[layer.weight.expert]
        assert TWO_FOUR.share(matrix) < 1


def test_an_expert_that_few_tokens_reach_is_filled_up_with_the_inputs_of_all() -> None:
    model = _model("mixtral")
    batches = [{"input_ids": torch.tensor([[5, 9, 30]])}]
    blocks = {name: block for stack in find_stacks(model) for name, block in stack.items()}
    first = next(iter(blocks))
    uses: list[Use] = []
    with torch.no_grad(), calm(model), WeightWatch(matrices(model, blocks)[first], uses.append):
        model(**batches[0])
    key = f"{first}.mlp.experts.gate_up_proj"
    routed = {e: [use.x for use in uses if (use.parameter, use.expert) == (key, e)] for e in range(4)}
    everything = torch.cat([x for xs in routed.values() for x in xs])
    with torch.no_grad(), calm(model):
        seen = survey(model, InMemory(), batches[0])
        stack = record(model, InMemory(), seen, 0, batches)
        found = collect(stack, 0, seen.groups[first], ranks=Ranks())
    experts = {group[0].expert: layer for group, layer in found.items() if group[0].parameter == key}
    assert sorted(experts) == [0, 1, 2, 3]
    assert sum(layer.num_tokens for layer in experts.values()) == 6
    pool = everything.T @ everything / 6
    for number, layer in experts.items():
        own = torch.cat(routed[number]) if routed[number] else torch.zeros(0, 16)
        expected = (own.T @ own + (16 - len(own)) * pool) / 16
        assert torch.allclose(layer.gram, expected, rtol=1e-4, atol=1e-6)
    with pytest.warns(UserWarning, match="fewer tokens"):
        prune_model(model, batches, "sparsegpt")


def test_the_experts_implementation_and_the_cache_are_as_before() -> None:
    model = _model("mixtral")
    before = model.get_experts_implementation()
    prune_model(model, _batches("mixtral"), Magnitude(), refine="none")
    assert model.get_experts_implementation() == before
    assert model.config.use_cache is True
