"""Scoring in length buckets against scoring one by one, in the same run."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from core.llm.causal import CausalLM


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    # Only token ids are scored, so a tokenizer that knows no word will do.
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    return CausalLM(transformers.LlamaForCausalLM(config), tokenizer, provenance="random")


def test_length_buckets_score_256_texts_three_times_faster_than_one_by_one(benchmark, lm):
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.uniform(np.log(4), np.log(120), size=256)).astype(int)
    texts = [generator.integers(512, size=n).tolist() for n in lengths]
    contexts, continuations = [text[:1] for text in texts], [text[1:] for text in texts]
    seconds: dict[str, list[float]] = {"together": [], "alone": []}

    def compare():
        start = time.perf_counter()
        together = lm.log_probs(contexts, continuations)
        middle = time.perf_counter()
        alone = [lm.log_probs([c], [k])[0] for c, k in zip(contexts, continuations, strict=True)]
        seconds["together"].append(middle - start)
        seconds["alone"].append(time.perf_counter() - middle)
        return together, alone

    together, alone = benchmark.pedantic(compare, rounds=5, warmup_rounds=1)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    # The best of each: what else runs on the machine only ever adds time.
    ratio = min(seconds["alone"]) / min(seconds["together"])
    benchmark.extra_info["one by one / length buckets"] = ratio
    assert ratio >= 3, f"one by one takes {ratio:.1f} times as long"
