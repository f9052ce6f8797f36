"""Prune one model by several methods under torchrun, and leave the weights of every rank and run in a folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from sparsity24.model import prune_model
from sparsity24.streaming import prune_checkpoint

METHODS = ("wanda", "magnitude", "sparsegpt", "prox-fast", "prox-paper", "random", "admm")


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(40, (2, 30), generator=generator) for _ in range(5)]


def main(folder: Path) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    for method in METHODS:
        pruned = model()
        report = prune_model(pruned, batches(), method, target_mix=0.5 if method == "sparsegpt" else 0.0)
        assert report.num_tokens == 300
        save_file(
            {key: value.clone() for key, value in pruned.state_dict().items()}, folder / f"{method}-{rank}.safetensors"
        )
    prune_checkpoint(folder / "dense", folder / "streamed", batches(), "sparsegpt")
    if "RANK" in os.environ:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
