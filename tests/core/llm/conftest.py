"""Tiny random models of several architectures, with tokenizers that have different habits."""

from __future__ import annotations

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from core.llm.causal import CausalLM

VOCABULARY = 300
CONTEXT = 96
ARCHITECTURES = ("llama", "gpt2", "qwen3", "gemma3", "opt", "bloom")


def make_tokenizer(*, start: bool = False, close: bool = False):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>", "<start>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["return the value of the array in the order of the other values"], trainer)
    if start or close:
        template = ("<start> " if start else "") + "$A" + (" <end>" if close else "")
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<end>", 0), ("<start>", 1)]
        )
    # No pad token on purpose: nothing here may need one.
    special = {"eos_token": "<end>", **({"bos_token": "<start>"} if start else {})}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def make_model(name: str):
    shared = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": None}
    usual = {
        **shared,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
    }
    configs = {
        "llama": lambda: transformers.LlamaConfig(**usual),
        "gpt2": lambda: transformers.GPT2Config(**shared, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT),
        "qwen3": lambda: transformers.Qwen3Config(**usual),
        # A window of six tokens, so that a cache that slides wrongly over the filling shows.
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **usual, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
        ),
        "opt": lambda: transformers.OPTConfig(
            **{**shared, "pad_token_id": 2},
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
        ),
        "bloom": lambda: transformers.BloomConfig(**shared, hidden_size=32, n_layer=2, n_head=4),
    }
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configs[name]())
    for parameter in model.parameters():
        # Large weights: a wrong position or mask must move the results by more than rounding does.
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="session", params=ARCHITECTURES)
def lm(request):
    return CausalLM(make_model(request.param), make_tokenizer(), provenance=f"random {request.param}")


@pytest.fixture(scope="session")
def llama():
    return CausalLM(make_model("llama"), make_tokenizer(), provenance="random llama")


@pytest.fixture(scope="session")
def with_start_token():
    return CausalLM(make_model("llama"), make_tokenizer(start=True, close=True), provenance="random llama")


@pytest.fixture(scope="session")
def gpt2():
    return CausalLM(make_model("gpt2"), make_tokenizer(), provenance="random gpt2")
