"""Fine-tune a tiny Llama and save its weights; under torchrun, on several processes."""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from core.llm.finetuning import Finetuning, finetune

# The parts that two processes take of a batch have different numbers of targets.
ROWS = [{"input_ids": [n % 7 + 1] * (n + 3), "labels": [-100] + [n % 7 + 1] * (n + 2)} for n in range(16)]


def train(accumulation: int, *, packing: bool) -> dict[str, torch.Tensor]:
    """The weights after three steps, by name."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).double()
    settings = Finetuning(
        num_steps=3,
        batch_size=8,
        learning_rate=0.1,
        max_grad_norm=None,
        gradient_accumulation_steps=accumulation,
        packing=packing,
        optimizer=lambda groups: torch.optim.SGD(groups),
    )
    finetune(model, ROWS, settings, seed=1, device="cpu")
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


if __name__ == "__main__":
    weights = {str(packing): train(2, packing=packing) for packing in (False, True)}
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save({"processes": torch.distributed.get_world_size(), **weights}, sys.argv[1])
